"""Points, matching and losses of Mask2Former against loops and brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from expedit_d2.projects.Mask2Former.modeling.criterion import SetCriterion, bce_loss, dice_loss
from expedit_d2.projects.Mask2Former.modeling.matcher import (
    HungarianMatcher,
    pairwise_bce,
    pairwise_dice,
)
from expedit_d2.projects.Mask2Former.modeling.points import sample_at, uncertain_points

WEIGHTS = {"loss_ce": 2.0, "loss_mask": 5.0, "loss_dice": 3.0}
NO_OBJECT = 0.1
CLASSES = 4


# -------------------------------------------------------------------------------------- oracles


def value_at(mask: Tensor, x: float, y: float) -> float:
    height, width = mask.shape
    row, column = y * height - 0.5, x * width - 0.5
    total = 0.0
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < height and 0 <= j < width:
                total += (1 - abs(row - i)) * (1 - abs(column - j)) * float(mask[i, j])
    return total


def slow_bce(logits: list[float], targets: list[float]) -> float:
    total = 0.0
    for x, t in zip(logits, targets, strict=True):
        p = 1 / (1 + math.exp(-x))
        total -= t * math.log(p) + (1 - t) * math.log(1 - p)
    return total / len(logits)


def slow_dice(logits: list[float], targets: list[float]) -> float:
    shared = size = 0.0
    for x, t in zip(logits, targets, strict=True):
        p = 1 / (1 + math.exp(-x))
        shared += p * t
        size += p + t
    return 1 - (2 * shared + 1) / (size + 1)


# --------------------------------------------------------------------------------------- points


def test_shared_points_are_bilinear_samples():
    masks, points = torch.randn(3, 4, 7), torch.rand(20, 2)
    samples = sample_at(masks, points)
    for n in range(3):
        for p, (x, y) in enumerate(points.tolist()):
            assert samples[n, p].item() == pytest.approx(value_at(masks[n], x, y), abs=1e-5)


def test_own_points_are_those_of_each_mask():
    masks, points = torch.randn(3, 4, 7), torch.rand(3, 20, 2)
    expected = torch.stack([sample_at(m[None], p)[0] for m, p in zip(masks, points, strict=True)])
    torch.testing.assert_close(sample_at(masks, points), expected)


@pytest.mark.parametrize("shape", [(9, 2), (0, 9, 2)])
def test_no_masks_have_no_samples(shape):
    assert sample_at(torch.zeros(0, 4, 5), torch.rand(shape)).shape == (0, 9)


def test_uncertain_points_lie_where_the_mask_changes_sign():
    # A ramp from -1 to 1: least certain in the middle column.
    logits = torch.linspace(-1, 1, 65).expand(2, 65, 65)
    points = uncertain_points(logits, count=400, oversample=4.0, importance=0.75)
    assert points.shape == (2, 400, 2)
    distance = (points[..., 0] - 0.5).abs()
    # 300 of 1600 uniform candidates: the nearest 19 %. Samples at the very edge are blurred with
    # zero, so they look less certain than they are.
    inner = (points[:, :300, 1] - 0.5).abs() < 0.49
    assert distance[:, :300][inner].max() < 0.13
    assert distance[:, 300:].max() > 0.4
    assert points.min() >= 0 and points.max() <= 1
    # Uncertainty is taken from the mask alone, so rows are uniform.
    assert points[:, :300, 1].std() == pytest.approx(math.sqrt(1 / 12), abs=0.03)


@pytest.mark.parametrize("importance,oversample", [(0.0, 1.0), (1.0, 3.0), (0.3, 1.5)])
def test_number_of_points_is_as_asked(importance, oversample):
    assert uncertain_points(torch.randn(3, 5, 5), 13, oversample, importance).shape == (3, 13, 2)
    assert uncertain_points(torch.randn(0, 5, 5), 13, oversample, importance).shape == (0, 13, 2)


# --------------------------------------------------------------------------------------- losses


def test_mask_losses_by_explicit_loop():
    logits, targets = torch.randn(3, 11) * 2, (torch.rand(3, 11) < 0.4).float()
    bce = sum(slow_bce(x.tolist(), t.tolist()) for x, t in zip(logits, targets, strict=True))
    dice = sum(slow_dice(x.tolist(), t.tolist()) for x, t in zip(logits, targets, strict=True))
    assert bce_loss(logits, targets, 2.0).item() == pytest.approx(bce / 2, rel=1e-5)
    assert dice_loss(logits, targets, 2.0).item() == pytest.approx(dice / 2, rel=1e-5)


def test_costs_of_all_pairs_are_the_losses_of_each():
    logits, targets = torch.randn(5, 11) * 3, torch.rand(4, 11)
    bce, dice = pairwise_bce(logits, targets), pairwise_dice(logits, targets)
    assert bce.shape == dice.shape == (5, 4)
    for q in range(5):
        for g in range(4):
            pair = (logits[q].tolist(), targets[g].tolist())
            assert bce[q, g].item() == pytest.approx(slow_bce(*pair), rel=1e-4)
            assert dice[q, g].item() == pytest.approx(slow_dice(*pair), rel=1e-4)


def test_costs_stay_finite_for_extreme_masks():
    logits = torch.tensor([[1e4, -1e4, 0.0]])
    assert torch.isfinite(pairwise_bce(logits, torch.ones(2, 3))).all()
    assert torch.isfinite(pairwise_dice(logits, torch.zeros(2, 3))).all()


# ------------------------------------------------------------------------------------- matching


def sample(queries: int = 6, segments: tuple[int, ...] = (3, 4)) -> tuple[dict, list[dict]]:
    outputs = {
        "pred_logits": torch.randn(len(segments), queries, CLASSES + 1),
        "pred_masks": torch.randn(len(segments), queries, 8, 12) * 3,
    }
    targets = [
        {"labels": torch.randint(CLASSES, (g,)), "masks": torch.rand(g, 16, 24) < 0.5}
        for g in segments
    ]
    return outputs, targets


def test_cost_of_a_pair_weighs_class_mask_and_dice():
    outputs, targets = sample()
    matcher = HungarianMatcher(2.0, 5.0, 3.0, num_points=17)
    torch.manual_seed(1)
    costs = matcher.costs(outputs["pred_logits"][0], outputs["pred_masks"][0], targets[0])
    torch.manual_seed(1)
    points = torch.rand(17, 2).tolist()
    for q in range(6):
        for g in range(3):
            x = [value_at(outputs["pred_masks"][0, q], *p) for p in points]
            t = [value_at(targets[0]["masks"][g].float(), *p) for p in points]
            probability = outputs["pred_logits"][0, q].softmax(0)[targets[0]["labels"][g]].item()
            expected = -2 * probability + 5 * slow_bce(x, t) + 3 * slow_dice(x, t)
            assert costs[q, g].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("queries,segments", [(5, 3), (4, 4), (3, 5)])
def test_matching_is_the_cheapest_of_all_assignments(queries, segments):
    outputs, targets = sample(queries, (segments,))
    matcher = HungarianMatcher(2.0, 5.0, 3.0, num_points=40)
    torch.manual_seed(1)
    costs = matcher.costs(outputs["pred_logits"][0], outputs["pred_masks"][0], targets[0])
    torch.manual_seed(1)
    [(rows, columns)] = matcher(outputs, targets)
    count = min(queries, segments)
    assert len(set(rows.tolist())) == len(set(columns.tolist())) == count
    if queries >= segments:
        candidates = itertools.permutations(range(queries), segments)
        best = min(sum(costs[q, g] for g, q in enumerate(p)) for p in candidates)
    else:
        candidates = itertools.permutations(range(segments), queries)
        best = min(sum(costs[q, g] for q, g in enumerate(p)) for p in candidates)
    assert costs[rows, columns].sum().item() == pytest.approx(best.item(), rel=1e-5)


ORDER = [5, 0, 3, 2]


def perfect_sample() -> tuple[dict, list[dict]]:
    """Segment g is what query ORDER[g] predicts."""
    _, targets = sample(6, (len(ORDER),))
    outputs = {
        "pred_logits": torch.zeros(1, 6, CLASSES + 1),
        "pred_masks": torch.full((1, 6, 16, 24), -10.0),
    }
    for g, q in enumerate(ORDER):
        outputs["pred_logits"][0, q, targets[0]["labels"][g]] = 9.0
        outputs["pred_masks"][0, q] += 20.0 * targets[0]["masks"][g]
    return outputs, targets


def test_perfect_queries_are_matched_to_their_segments():
    [(rows, columns)] = HungarianMatcher(2.0, 5.0, 3.0, num_points=60)(*perfect_sample())
    assert dict(zip(columns.tolist(), rows.tolist(), strict=True)) == dict(enumerate(ORDER))


# ------------------------------------------------------------------------------------ criterion


def criterion(**changes) -> SetCriterion:
    settings = {
        "num_points": 50,
        "oversample_ratio": 3.0,
        "importance_sample_ratio": 0.75,
    } | changes
    matcher = HungarianMatcher(2.0, 5.0, 3.0, num_points=50)
    return SetCriterion(CLASSES, matcher, WEIGHTS, NO_OBJECT, **settings)


def losses_and_pairs(loss: SetCriterion, outputs: dict, targets: list) -> tuple[dict, list]:
    """Losses without their weights, and the pairs matched for them, at the same random points."""
    torch.manual_seed(1)
    pairs = loss.matcher(outputs, targets)
    torch.manual_seed(1)
    losses = loss({**outputs, "aux_outputs": []}, targets)
    return {name: value / WEIGHTS[name] for name, value in losses.items()}, pairs


def test_class_loss_is_a_weighted_mean_over_all_queries():
    outputs, targets = sample()
    loss = criterion()
    losses, pairs = losses_and_pairs(loss, outputs, targets)
    total = weight = 0.0
    for b, (rows, columns) in enumerate(pairs):
        wanted = {
            q: targets[b]["labels"][g].item()
            for q, g in zip(rows.tolist(), columns.tolist(), strict=True)
        }
        for q in range(6):
            label = wanted.get(q, CLASSES)
            w = NO_OBJECT if label == CLASSES else 1.0
            total -= w * outputs["pred_logits"][b, q].log_softmax(0)[label].item()
            weight += w
    assert losses["loss_ce"].item() == pytest.approx(total / weight, rel=1e-5)


def test_mask_losses_compare_the_matched_masks():
    """Where the whole image is one segment and masks are flat, every inner point is the same."""
    outputs, targets = sample(3, (2, 1))
    values = torch.tensor([[-1.0, 0.5, 2.0], [1.0, -0.5, 3.0]])
    outputs["pred_masks"] = values[..., None, None].expand(-1, -1, 400, 600)
    for target in targets:
        target["masks"] = torch.ones(len(target["labels"]), 400, 600)
    loss = criterion(num_points=2000, importance_sample_ratio=0.0)
    losses, pairs = losses_and_pairs(loss, outputs, targets)
    flat = [[values[b, q].item()] * 2000 for b, (rows, _) in enumerate(pairs) for q in rows]
    # Points at the very edge are blurred with zero, hence the tolerance.
    ones = [1.0] * 2000
    assert losses["loss_mask"].item() == pytest.approx(
        sum(slow_bce(x, ones) for x in flat) / 3, rel=0.02
    )
    assert losses["loss_dice"].item() == pytest.approx(
        sum(slow_dice(x, ones) for x in flat) / 3, rel=0.02
    )


def test_deep_supervision_adds_the_losses_of_earlier_predictions():
    outputs, targets = perfect_sample()
    worse = {**outputs, "pred_logits": torch.zeros_like(outputs["pred_logits"])}
    everything = {**outputs, "aux_outputs": [worse, outputs]}
    losses = criterion()(everything, targets)
    assert set(losses) == {f"{name}{end}" for name in WEIGHTS for end in ("", "_0", "_1")}
    assert losses["loss_ce_1"] == losses["loss_ce"]
    assert losses["loss_ce_0"].item() == pytest.approx(2 * math.log(CLASSES + 1), rel=1e-5)
    assert set(criterion(deep_supervision=False)(everything, targets)) == set(WEIGHTS)


def test_losses_are_weighted_and_taken_in_fp32_under_autocast():
    outputs, targets = sample()
    outputs = {k: v.bfloat16() for k, v in outputs.items()} | {"aux_outputs": []}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.manual_seed(2)
        losses = criterion()(outputs, targets)
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    plain = criterion()
    plain.weights = dict.fromkeys(WEIGHTS, 1.0)
    torch.manual_seed(2)
    for name, loss in plain(outputs, targets).items():
        assert losses[name].item() == pytest.approx(WEIGHTS[name] * loss.item(), rel=1e-5)


def test_images_without_segments_teach_no_object_alone():
    outputs, targets = sample(6, (0, 0))
    outputs = {k: v.requires_grad_() for k, v in outputs.items()}
    losses = criterion()({**outputs, "aux_outputs": []}, targets)
    assert losses["loss_mask"] == 0 and losses["loss_dice"] == 0
    expected = -outputs["pred_logits"].log_softmax(-1)[..., -1].mean()
    assert losses["loss_ce"].item() == pytest.approx(2 * expected.item(), rel=1e-5)
    sum(losses.values()).backward()
    assert outputs["pred_masks"].grad is not None and outputs["pred_masks"].grad.abs().max() == 0


def test_no_object_weight_is_a_buffer_of_the_official_name():
    state = criterion().state_dict()
    assert list(state) == ["empty_weight"]
    assert state["empty_weight"].tolist() == pytest.approx([1.0] * CLASSES + [NO_OBJECT])


def test_sampling_ratios_are_checked():
    with pytest.raises(ValueError, match="OVERSAMPLE_RATIO"):
        criterion(oversample_ratio=0.5)
    with pytest.raises(ValueError, match="IMPORTANCE_SAMPLE_RATIO"):
        criterion(importance_sample_ratio=1.5)
