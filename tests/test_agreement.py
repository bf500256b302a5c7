"""Agreement with the plain model's output."""

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from expedit_d2.evaluation import Agreement
from expedit_d2.evaluation.agreement import match


def instances(boxes, classes, scores, masks=True):
    found = Instances((20, 20))
    found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).view(-1, 4))
    found.pred_classes = torch.tensor(classes, dtype=torch.long)
    found.scores = torch.tensor(scores)
    if masks:
        planes = torch.zeros(len(boxes), 20, 20, dtype=torch.bool)
        for plane, (x0, y0, x1, y1) in zip(planes, boxes, strict=True):
            plane[y0:y1, x0:x1] = True
        found.pred_masks = planes
    return found


def agree(plain: dict, other: dict, item: dict | None = None) -> dict[str, float]:
    """Agreement of one image's outputs."""
    item = item or {"image_id": 1}
    reference = Agreement()
    reference.process([item], [plain])
    assert set(reference.evaluate()["agreement"].values()) == {100.0}
    evaluator = Agreement(reference)
    evaluator.process([item], [other])
    return evaluator.evaluate()["agreement"]


def agreement(plain: Instances, other: Instances) -> float:
    return agree({"instances": plain}, {"instances": other})["instances"]


BOXES = [[0, 0, 10, 10], [10, 10, 20, 20]]


@pytest.mark.parametrize("masks", [True, False])
def test_same_output_is_100_in_any_order(masks):
    plain = instances(BOXES, [0, 1], [0.9, 0.8], masks)
    other = instances(BOXES[::-1], [1, 0], [0.7, 0.6], masks)
    assert agreement(plain, other) == pytest.approx(100.0)


@pytest.mark.parametrize("masks", [True, False])
def test_half_shifted_box_counts_its_overlap(masks):
    plain = instances(BOXES, [0, 1], [0.9, 0.8], masks)
    other = instances([[0, 2, 10, 10], BOXES[1]], [0, 1], [0.9, 0.8], masks)
    assert agreement(plain, other) == pytest.approx(100 * (0.8 + 1.0) / 2)


def test_lost_and_additional_instances_count_half_each():
    plain = instances(BOXES, [0, 1], [0.9, 0.8])
    assert agreement(plain, instances(BOXES[:1], [0], [0.9])) == pytest.approx(100 / 1.5)
    assert agreement(instances(BOXES[:1], [0], [0.9]), plain) == pytest.approx(100 / 1.5)


def test_another_class_is_no_match():
    plain = instances(BOXES[:1], [0], [0.9])
    assert agreement(plain, instances(BOXES[:1], [1], [0.9])) == 0.0


def test_unsure_instances_do_not_count():
    plain = instances(BOXES, [0, 1], [0.9, 0.3])
    assert agreement(plain, instances(BOXES[:1], [0], [0.9])) == pytest.approx(100.0)


def test_nothing_found_by_either_is_agreement():
    assert agreement(instances([], [], []), instances([], [], [])) == 100.0


def test_matching_is_one_to_one():
    iou = np.array([[0.9, 0.6], [0.8, 0.0]])
    # 0.9 is taken first; what is left for the second row is below 0.5.
    assert match(iou) == [(0, 0)]
    assert iou[0, 0] == 0.9  # the argument is left alone
    assert match(np.array([[0.6, 0.0], [0.0, 0.7]])) == [(1, 1), (0, 0)]


# --- semantic and panoptic maps ---------------------------------------------------------------


def logits(labels: torch.Tensor, classes: int = 4) -> torch.Tensor:
    return torch.nn.functional.one_hot(labels, classes).permute(2, 0, 1).float()


def test_semantic_agreement_is_the_share_of_equal_pixels():
    torch.manual_seed(0)
    plain, other = torch.randint(4, (2, 9, 7))
    found = agree({"sem_seg": logits(plain)}, {"sem_seg": logits(other)}, {"file_name": "a.png"})
    assert found == {"semantic": pytest.approx(100 * (plain == other).float().mean().item())}


def test_depth_agreement_is_the_share_of_pixels_within_five_percent():
    torch.manual_seed(0)
    plain = torch.rand(9, 7) + 0.1
    other = plain * (0.8 + 0.4 * torch.rand(9, 7))
    plain[0, 0], other[0, 0] = 0.0, 0.0  # inverse depth of what is far
    plain[0, 1] = 0.0
    near = [
        max(a, b) <= 1.05 * min(a, b)
        for a, b in zip(plain.flatten().tolist(), other.flatten().tolist(), strict=True)
    ]
    assert 0 < sum(near) < len(near)
    assert agree({"depth": plain}, {"depth": other}) == {
        "depth": pytest.approx(100 * sum(near) / len(near))
    }


def test_images_are_summed_by_their_pixels():
    reference, evaluator = Agreement(), None
    small, large = torch.zeros(2, 2, dtype=torch.long), torch.zeros(4, 4, dtype=torch.long)
    for image, plain in enumerate((small, large)):
        reference.process([{"image_id": image}], [{"sem_seg": logits(plain)}])
    evaluator = Agreement(reference)
    for image, other in enumerate((small + 1, large)):
        evaluator.process([{"image_id": image}], [{"sem_seg": logits(other)}])
    assert evaluator.evaluate()["agreement"]["semantic"] == pytest.approx(100 * 16 / 20)


def panoptic(labels: torch.Tensor, classes: dict[int, int]) -> dict:
    segments = [
        {"id": i, "category_id": c, "isthing": c < 2}
        for i, c in classes.items()
        if (labels == i).any()
    ]
    return {"panoptic_seg": (labels.int(), segments)}


def panopticapi_quality(plain: dict, other: dict, folder) -> float:
    """The same number by panopticapi, all classes taken for one but kept apart by the match."""
    from panopticapi.evaluation import pq_compute_single_core
    from panopticapi.utils import id2rgb
    from PIL import Image

    sets = []
    for kind, output in (("gt", plain), ("pred", other)):
        labels, segments = output["panoptic_seg"]
        labels = labels.numpy().astype(np.uint32)
        (folder / kind).mkdir()
        Image.fromarray(id2rgb(labels)).save(folder / kind / "1.png")
        info = [
            {
                "id": s["id"],
                "category_id": s["category_id"],
                "area": int((labels == s["id"]).sum()),
                "iscrowd": 0,
            }
            for s in segments
        ]
        sets.append({"image_id": 1, "file_name": "1.png", "segments_info": info})
    categories = {c: {"id": c, "isthing": c < 2} for c in range(4)}
    stat = pq_compute_single_core(
        0, [tuple(sets)], str(folder / "gt"), str(folder / "pred"), categories
    )
    parts = [stat[c] for c in categories]
    size = sum(p.tp + (p.fp + p.fn) / 2 for p in parts)
    return 100 * sum(p.iou for p in parts) / size


@pytest.mark.parametrize("seed", range(4))
def test_panoptic_agreement_is_the_quality_by_panopticapi(seed, tmp_path):
    rng = np.random.default_rng(seed)
    # Blocks of segments, with some of the pixels and some of the classes changed.
    plain = torch.as_tensor(rng.integers(1, 7, (4, 5))).repeat_interleave(6, 0)
    plain = plain.repeat_interleave(6, 1)
    other = torch.where(torch.as_tensor(rng.random(plain.shape) < 0.2), plain % 6 + 1, plain)
    classes = {i: int(rng.integers(4)) for i in range(1, 7)}
    changed = classes | {3: (classes[3] + 1) % 4}
    one, two = panoptic(plain, classes), panoptic(other, changed)
    expected = panopticapi_quality(one, two, tmp_path)
    assert 20 < expected < 99
    assert agree(one, two) == {"panoptic": pytest.approx(expected)}


def test_every_output_is_compared():
    labels = torch.ones(4, 4, dtype=torch.long)
    outputs = panoptic(labels, {1: 2}) | {
        "sem_seg": logits(labels),
        "instances": instances([], [], []),
        "depth": torch.rand(4, 4),
    }
    same = dict.fromkeys(("instances", "panoptic", "semantic", "depth"), 100.0)
    assert agree(outputs, outputs) == same
