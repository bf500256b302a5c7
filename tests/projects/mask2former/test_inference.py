"""Panoptic, instance and semantic output of Mask2Former against slow, plain versions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from expedit_d2.projects.Mask2Former.modeling.inference import (
    instance_inference,
    panoptic_inference,
    semantic_inference,
)

CLASSES = 5
THINGS = frozenset((0, 2, 3))


def blobs(queries: int, height: int = 9, width: int = 13) -> tuple[Tensor, Tensor]:
    """Confident classes and overlapping rectangles."""
    logits = torch.randn(queries, CLASSES + 1) * 3
    masks = torch.randn(queries, height, width) - 4
    for mask in masks:
        top, left = torch.randint(height - 2, ()), torch.randint(width - 3, ())
        mask[top : top + 5, left : left + 6] += 8
    return logits, masks


def slow_panoptic(logits, masks, things, object_threshold, overlap_threshold):
    """One pixel, one query at a time, in the words of the paper's appendix on MaskFormer."""
    queries, height, width = masks.shape
    kept = []
    for q in range(queries):
        exponents = [math.exp(v) for v in logits[q].tolist()]
        score = max(exponents) / sum(exponents)
        category = exponents.index(max(exponents))
        if category != CLASSES and score > object_threshold:
            kept.append((q, category, score))
    probability = masks.sigmoid().tolist()
    ids = [[0] * width for _ in range(height)]
    claims: dict[int, list] = {q: [] for q, _, _ in kept}
    for i in range(height):
        for j in range(width):
            if kept:
                best = max(kept, key=lambda k: k[2] * probability[k[0]][i][j])
                claims[best[0]].append((i, j))
    segments, stuff = [], {}
    for q, category, _ in kept:
        size = sum(p >= 0.5 for row in probability[q] for p in row)
        inside = [(i, j) for i, j in claims[q] if probability[q][i][j] >= 0.5]
        if not inside or len(claims[q]) / size < overlap_threshold:
            continue
        if category in stuff:
            number = stuff[category]
        else:
            number = len(segments) + 1
            isthing = category in things
            segments.append({"id": number, "isthing": isthing, "category_id": category})
            if not isthing:
                stuff[category] = number
        for i, j in inside:
            ids[i][j] = number
    return torch.tensor(ids, dtype=torch.int32), segments


@pytest.mark.parametrize("queries", [1, 4, 12, 30])
@pytest.mark.parametrize("thresholds", [(0.0, 0.0), (0.8, 0.8), (0.4, 0.6), (0.999, 0.5)])
def test_panoptic_merge_is_the_slow_one(queries, thresholds):
    for _ in range(5):
        logits, masks = blobs(queries)
        ours = panoptic_inference(logits, masks, THINGS, *thresholds)
        slow = slow_panoptic(logits, masks, THINGS, *thresholds)
        assert torch.equal(ours[0], slow[0])
        assert ours[1] == slow[1]
        assert ours[0].dtype == torch.int32


def test_stuff_of_a_class_is_one_segment_and_things_are_several():
    logits = torch.full((4, CLASSES + 1), -9.0)
    for q, category in enumerate((1, 1, 2, 2)):
        logits[q, category] = 9.0
    masks = torch.full((4, 4, 8), -9.0)
    for q in range(4):
        masks[q, :, 2 * q : 2 * q + 2] = 9.0
    panoptic, segments = panoptic_inference(logits, masks, THINGS, 0.8, 0.8)
    assert panoptic[0].tolist() == [1, 1, 1, 1, 2, 2, 3, 3]
    assert [(s["category_id"], s["isthing"]) for s in segments] == [
        (1, False),
        (2, True),
        (2, True),
    ]


def test_nothing_found_is_an_empty_map():
    logits = torch.zeros(3, CLASSES + 1)
    logits[:, -1] = 9.0
    panoptic, segments = panoptic_inference(logits, torch.randn(3, 4, 5), THINGS, 0.0, 0.0)
    assert panoptic.shape == (4, 5) and not panoptic.any() and segments == []


def test_semantic_scores_by_explicit_loop():
    logits, masks = blobs(4, 3, 5)
    scores = semantic_inference(logits, masks)
    assert scores.shape == (CLASSES, 3, 5)
    probability = logits.softmax(-1)
    for k in range(CLASSES):
        for i in range(3):
            for j in range(5):
                expected = sum(
                    probability[q, k].item() / (1 + math.exp(-masks[q, i, j].item()))
                    for q in range(4)
                )
                assert scores[k, i, j].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("things", [None, THINGS])
def test_instances_are_the_best_pairs_of_query_and_class(things):
    logits, masks = blobs(6)
    limit = 8
    found = instance_inference(logits, masks, things, limit)
    probability = logits.softmax(-1)
    pairs = [(probability[q, k].item(), q, k) for q in range(6) for k in range(CLASSES)]
    pairs = sorted(pairs, reverse=True)[:limit]
    expected = {}
    for score, q, k in pairs:
        if things is None or k in things:
            inside = masks[q] > 0
            expected[q, k] = score * masks[q].sigmoid()[inside].mean().item()
    assert len(found) == len(expected)
    for mask, label, score in zip(
        found.pred_masks, found.pred_classes.tolist(), found.scores.tolist(), strict=True
    ):
        queries = [q for q in range(6) if torch.equal(mask, (masks[q] > 0).float())]
        match = [(q, label) for q in queries if (q, label) in expected]
        assert match and score == pytest.approx(expected[match[0]], rel=1e-4)


def test_boxes_enclose_the_masks_and_empty_masks_have_score_zero():
    logits = torch.zeros(2, CLASSES + 1)
    masks = torch.full((2, 6, 9), -3.0)
    masks[0, 1:4, 2:8] = 3.0
    found = instance_inference(logits, masks, None, 100)
    assert len(found) == 2 * CLASSES and found.image_size == (6, 9)
    for mask, box, score in zip(found.pred_masks, found.pred_boxes, found.scores, strict=True):
        if mask.any():
            assert box.tolist() == [2, 1, 8, 4] and score > 0.1
        else:
            assert score == 0
