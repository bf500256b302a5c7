"""From a model's queries to the three kinds of output, one image at a time.

Shorthand: Q queries, K classes, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from detectron2.structures import BitMasks, Instances
from torch import Tensor

__all__ = ["instance_inference", "panoptic_inference", "semantic_inference"]


def semantic_inference(logits: Tensor, masks: Tensor) -> Tensor:
    """Class scores of every pixel: (Q, K + 1) and (Q, H, W) logits to (K, H, W)."""
    return torch.einsum("qk,qhw->khw", logits.softmax(-1)[:, :-1], masks.sigmoid())


def panoptic_inference(
    logits: Tensor,
    masks: Tensor,
    things: Collection[int],
    object_mask_threshold: float,
    overlap_threshold: float,
) -> tuple[Tensor, list[dict]]:
    """Panoptic map: every pixel is assigned to the query with the highest score for it.

    Args:
        logits: (Q, K + 1) class logits.
        masks: (Q, H, W) mask logits.
        things: classes whose queries are separate segments; the queries of any other class become
            one segment.
        object_mask_threshold: queries need a class score above this.
        overlap_threshold: the pixels that a query wins must be at least this share of its mask.

    Returns:
        Segment ids, int32 (H, W), 0 where there is none, and for each segment ``id``, ``isthing``
        and ``category_id``.
    """
    scores, classes = logits.softmax(-1).max(-1)
    keep = (classes != logits.shape[-1] - 1) & (scores > object_mask_threshold)
    scores, classes, masks = scores[keep], classes[keep], masks[keep].sigmoid()
    panoptic = torch.zeros(masks.shape[-2:], dtype=torch.int32, device=masks.device)
    segments: list[dict] = []
    if not len(masks):
        return panoptic, segments

    owner = (scores[:, None, None] * masks).argmax(0)
    own = masks >= 0.5
    # Pixels assigned to a query, pixels of its mask, and their intersection.
    won = owner.flatten().bincount(minlength=len(masks)).tolist()
    covered = own.flatten(1).sum(1).tolist()
    inside = own.gather(0, owner[None])[0]
    both = owner[inside].bincount(minlength=len(masks)).tolist()
    stuff: dict[int, int] = {}
    for query, category in enumerate(classes.tolist()):
        if not both[query] or won[query] / covered[query] < overlap_threshold:
            continue
        number = stuff.get(category)
        if number is None:
            number = len(segments) + 1
            isthing = category in things
            segments.append({"id": number, "isthing": isthing, "category_id": category})
            if not isthing:
                stuff[category] = number
        panoptic[inside & (owner == query)] = number
    return panoptic, segments


def instance_inference(
    logits: Tensor, masks: Tensor, things: Collection[int] | None, limit: int
) -> Instances:
    """The best pairs of a query and a class, as instances.

    Args:
        logits: (Q, K + 1) class logits.
        masks: (Q, H, W) mask logits.
        things: classes that have instances; None: all.
        limit: number of pairs, before those of classes without instances are dropped.

    Returns:
        Instances with ``pred_masks`` (0 or 1, float), ``pred_boxes`` around them, ``pred_classes``
        and ``scores``: the class score times the mean mask probability inside the mask.
    """
    scores = logits.softmax(-1)[:, :-1]
    classes = scores.shape[1]
    scores, index = scores.flatten().topk(min(limit, scores.numel()), sorted=False)
    labels = index % classes
    queries = index // classes
    if things is not None:
        keep = torch.isin(labels, torch.tensor(sorted(things), device=labels.device))
        scores, labels, queries = scores[keep], labels[keep], queries[keep]
    # A query may be paired with several classes: what depends on its mask is computed once.
    queries, place = queries.unique(return_inverse=True)
    masks = masks[queries]
    inside = masks > 0
    area = inside.flatten(1).sum(1)
    certainty = (masks.sigmoid() * inside).flatten(1).sum(1) / (area + 1e-6)
    return Instances(
        tuple(masks.shape[-2:]),
        pred_masks=inside.float()[place],
        pred_boxes=BitMasks(inside).get_bounding_boxes()[place],
        pred_classes=labels,
        scores=scores * certainty[place],
    )
