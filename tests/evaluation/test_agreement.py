"""Agreement with the plain model's output."""

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from expedit_d2.evaluation import Agreement
from expedit_d2.evaluation.finite import all_finite, watch_finite
from expedit_d2.predictions.matching import match


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
    assert set(reference.evaluate()["agreement"].values()) <= {100.0, None}
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


def test_nothing_found_by_either_is_undefined():
    assert agreement(instances([], [], []), instances([], [], [])) is None


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
        "instances": instances(BOXES, [0, 1], [0.9, 0.8]),
        "depth": torch.rand(4, 4),
    }
    same = dict.fromkeys(("instances", "panoptic", "semantic", "depth"), 100.0)
    assert agree(outputs, outputs) == same


# --- what is undefined, and what is not finite ------------------------------------------------


def everything() -> dict:
    """Every kind of output, each with segments that have no pixel."""
    torch.manual_seed(0)
    found = instances([*BOXES, [5, 5, 5, 5], [3, 3, 3, 9]], [0, 1, 1, 2], [0.9, 0.8, 0.7, 0.6])
    labels = torch.randint(0, 3, (20, 20))
    segments = [{"id": i, "category_id": i, "isthing": True} for i in (1, 2, 7, 9)]
    return {
        "instances": found,
        "panoptic_seg": (labels.int(), segments),
        "sem_seg": torch.randn(4, 20, 20),
        "depth": torch.rand(20, 20),
    }


@pytest.mark.parametrize("masks", [True, False])
def test_a_model_agrees_with_itself_in_full(masks):
    """Segments without a pixel overlap nothing, not even themselves: they are none."""
    outputs = everything()
    if not masks:
        outputs["instances"].remove("pred_masks")
    found = agree(outputs, outputs)
    assert found == dict.fromkeys(("instances", "panoptic", "semantic", "depth"), 100.0)


def test_empty_masks_are_no_instances():
    plain = instances(BOXES, [0, 1], [0.9, 0.8])
    other = instances([*BOXES, [5, 5, 5, 5]], [0, 1, 0], [0.9, 0.8, 0.7])
    assert agreement(plain, other) == agreement(other, plain) == 100.0


def test_nothing_found_on_some_images_is_left_out():
    nothing, two = instances([], [], []), instances(BOXES, [0, 1], [0.9, 0.8])
    reference = Agreement()
    for image, output in enumerate((nothing, two)):
        reference.process([{"image_id": image}], [{"instances": output}])
    evaluator = Agreement(reference)
    for image, output in enumerate((nothing, instances(BOXES[:1], [0], [0.9]))):
        evaluator.process([{"image_id": image}], [{"instances": output}])
    assert evaluator.evaluate()["agreement"]["instances"] == pytest.approx(100 / 1.5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("task", ["instances", "panoptic", "semantic", "depth"])
@pytest.mark.parametrize("whose", ["plain", "other", "both"])
def test_outputs_that_are_not_finite_disagree(bad, task, whose):
    key = {"panoptic": "panoptic_seg", "semantic": "sem_seg"}.get(task, task)
    fine, broken = ({key: everything()[key]} for _ in range(2))
    if task == "instances":
        broken[key].scores[0] = bad
    elif task == "panoptic":
        broken[key][1][0]["score"] = bad
    else:
        broken[key][..., 3, 3] = bad
    plain, other = (fine if whose == "other" else broken, fine if whose == "plain" else broken)
    reference = Agreement()
    evaluator = Agreement(reference)
    items = [{"image_id": 1}, {"image_id": 2}]
    reference.process(items, [plain, fine])
    evaluator.process(items, [other, fine])
    results = evaluator.evaluate()
    assert results["agreement"][task] == pytest.approx(50.0, abs=20)  # one image of the two
    assert results["outputs"]["not_finite"] == (whose != "plain")
    worst = results["outputs"]["worst_image"], results["outputs"]["worst_agreement"]
    assert worst == (1, 0.0)
    assert reference.evaluate()["outputs"]["not_finite"] == (whose != "other")


def test_parts_that_are_not_finite_are_seen_where_the_output_hides_it():
    class Hiding(torch.nn.Module):
        """As detectors do: what is not finite is dropped from the output."""

        def __init__(self):
            super().__init__()
            self.backbone = torch.nn.Identity()

        def forward(self, x):
            self.backbone(x)
            return [{"instances": instances([], [], [])}]

    model, evaluator = Hiding(), None
    with watch_finite(model) as watch:
        evaluator = Agreement(watch=watch)
        for image, value in enumerate((1.0, float("nan"), 2.0)):
            evaluator.process([{"image_id": image}], model(torch.full((2,), value)))
    assert evaluator.not_finite == {1}
    assert not model.backbone._forward_hooks and not model._forward_hooks
    assert evaluator.evaluate()["agreement"]["instances"] == 0.0


def test_all_finite_looks_everywhere():
    assert all_finite({"a": [torch.ones(2), (1.0, "nan", None)], "b": torch.tensor([1])})
    assert not all_finite([{"a": (torch.tensor([1.0, float("inf")]),)}])


def test_a_reference_survives_a_file(tmp_path):
    reference = Agreement()
    broken = everything() | {"depth": torch.full((20, 20), float("nan"))}
    reference.process([{"image_id": 3}, {"file_name": "a/b.jpg"}], [everything(), broken])
    np.savez(tmp_path / "r.npz", **reference.to_arrays())
    with np.load(tmp_path / "r.npz", allow_pickle=False) as file:
        again = Agreement.from_arrays(dict(file))
    assert list(again.records) == list(reference.records)
    assert again.not_finite == {"a/b.jpg"}
    for key, record in reference.records.items():
        for name, array in record.items():
            np.testing.assert_array_equal(again.records[key][name], array)
    results = []
    for one in (reference, again):
        evaluator = Agreement(one)
        evaluator.process([{"image_id": 3}], [everything()])
        results.append(evaluator.evaluate())
    assert results[0] == results[1]
    for arrays in ({}, {"index": np.zeros(3, np.uint8)}, {"0.data": np.zeros(3)}):
        with pytest.raises(ValueError, match="not those of an agreement's reference"):
            Agreement.from_arrays(arrays)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_value_that_is_not_finite_is_found(value, dtype):
    tensor = torch.randn(7, 3).to(dtype)
    assert all_finite({"a": [tensor, torch.zeros(0, 3), torch.tensor([1, 2])]})
    tensor[3, 1] = value
    assert not all_finite({"a": [torch.ones(2), tensor]})


def test_images_of_two_data_sets_may_have_the_same_id():
    items = [{"image_id": 1, "file_name": name} for name in ("a/1.png", "b/1.png")]
    outputs = [{"sem_seg": torch.eye(3)[:, None] * sign} for sign in (1, -1)]
    reference = Agreement()
    reference.process(items, outputs)
    same = Agreement(Agreement.from_arrays(reference.to_arrays()))
    same.process(items, outputs)
    assert same.evaluate()["agreement"] == {"semantic": 100.0}
    swapped = Agreement(reference)
    swapped.process(items, outputs[::-1])
    assert swapped.evaluate()["agreement"]["semantic"] < 100
