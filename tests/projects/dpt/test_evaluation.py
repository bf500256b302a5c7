"""Metrics of depth against plain loops, crops, alignment, and depth in colours."""

from __future__ import annotations

import math
import uuid

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from PIL import Image

from expedit_d2.projects.DPT import DepthEvaluator
from expedit_d2.projects.DPT.evaluation import align, depth_metrics
from expedit_d2.visualize import colorize_depth


@pytest.fixture
def dataset():
    """Name of a data set whose depth PNGs are in millimetres."""
    name = f"depth_{uuid.uuid4().hex}"
    MetadataCatalog.get(name).set(depth_scale=1000.0)
    yield name
    MetadataCatalog.remove(name)


def write(path, depth: np.ndarray) -> dict:
    """A 16-bit PNG in millimetres, and the input of an image that has it."""
    Image.fromarray(np.rint(depth * 1000).astype(np.uint16)).save(path)
    return {"depth_file_name": str(path), "file_name": "image.png"}


def result(dataset, items, outputs, **settings) -> dict[str, float]:
    evaluator = DepthEvaluator(dataset, **settings)
    evaluator.process(items, [{"depth": torch.as_tensor(o)} for o in outputs])
    return evaluator.evaluate()["depth"]


def by_loops(prediction, target) -> dict[str, float]:
    """Every metric, pixel by pixel."""
    n = len(target)
    sums = dict.fromkeys(("sq", "log_sq", "log", "rel", "sq_rel", "log10", "d1", "d2", "d3"), 0.0)
    for p, t in zip(prediction.tolist(), target.tolist(), strict=True):
        sums["sq"] += (p - t) ** 2 / n
        sums["log_sq"] += (math.log(p) - math.log(t)) ** 2 / n
        sums["log"] += (math.log(p) - math.log(t)) / n
        sums["rel"] += abs(p - t) / t / n
        sums["sq_rel"] += (p - t) ** 2 / t / n
        sums["log10"] += abs(math.log10(p) - math.log10(t)) / n
        for k in (1, 2, 3):
            sums[f"d{k}"] += 100 * (max(p / t, t / p) < 1.25**k) / n
    return {
        "RMSE": math.sqrt(sums["sq"]),
        "RMSE_log": math.sqrt(sums["log_sq"]),
        "AbsRel": sums["rel"],
        "SqRel": sums["sq_rel"],
        "log10": sums["log10"],
        "SILog": 100 * math.sqrt(sums["log_sq"] - sums["log"] ** 2),
        "d1": sums["d1"],
        "d2": sums["d2"],
        "d3": sums["d3"],
    }


def test_metrics_are_their_loops():
    rng = np.random.default_rng(0)
    target = rng.uniform(0.5, 70, 200)
    prediction = target * np.exp(rng.normal(0, 0.4, 200))
    actual, expected = depth_metrics(prediction, target), by_loops(prediction, target)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name] == pytest.approx(value, rel=1e-9), name


def test_means_are_over_images_and_outside_depths_do_not_count(dataset, tmp_path):
    rng = np.random.default_rng(0)
    targets = [rng.integers(1000, 9000, (6, 8)) / 1000, rng.integers(1000, 9000, (5, 4)) / 1000]
    targets[0][:3] = 0  # unknown
    targets[0][3, 0] = 60.0  # too far
    outputs = [t + rng.normal(0, 1, t.shape).astype(np.float32) for t in targets]
    outputs[1][0, 0] = 1e6  # clipped
    items = [write(tmp_path / f"{i}.png", t) for i, t in enumerate(targets)]
    actual = result(dataset, items, outputs, min_depth=0.1, max_depth=10.0)
    rows = []
    for target, output in zip(targets, outputs, strict=True):
        valid = (target > 0.1) & (target < 10)
        rows.append(by_loops(np.clip(output[valid], 0.1, 10.0), target[valid]))
    for name in rows[0]:
        expected = (rows[0][name] + rows[1][name]) / 2
        assert actual[name] == pytest.approx(expected, rel=1e-5), name


def test_images_without_any_depth_are_left_out(dataset, tmp_path):
    known, unknown = np.full((4, 4), 2.0), np.zeros((4, 4))
    items = [write(tmp_path / "a.png", known), write(tmp_path / "b.png", unknown)]
    assert result(dataset, items, [known, known])["RMSE"] == 0
    with pytest.raises(ValueError, match=r"nothing to evaluate .* TEST.DEPTH.MIN .*'none'"):
        result(dataset, items[1:], [known])


@pytest.mark.parametrize(
    "crop,size,box",
    [
        ("garg", (375, 1242), (153, 371, 44, 1197)),
        ("eigen", (375, 1242), (124, 342, 44, 1197)),
        ("nyu", (480, 640), (45, 471, 41, 601)),
    ],
)
def test_crops(dataset, tmp_path, crop, size, box):
    """Errors outside the crop do not count, and the outermost pixels inside do."""
    target = np.full(size, 4.0)
    output = np.full(size, 8.0, np.float32)
    top, bottom, left, right = box
    output[top:bottom, left:right] = 4.0
    item = write(tmp_path / "depth.png", target)
    assert result(dataset, [item], [output], crop=crop)["RMSE"] == 0
    for row, col in ((top, left), (bottom - 1, right - 1)):
        wrong = output.copy()
        wrong[row, col] = 5.0
        assert result(dataset, [item], [wrong], crop=crop)["RMSE"] > 0


def test_a_cropped_image_is_put_back(dataset, tmp_path):
    target = np.arange(1, 71).reshape(7, 10) / 10
    item = write(tmp_path / "depth.png", target)
    item["crop"] = (2, 3)
    output = target[2:6, 3:8].astype(np.float32)
    assert result(dataset, [item], [output])["RMSE"] == pytest.approx(0, abs=1e-6)
    item["crop"] = (4, 3)
    with pytest.raises(ValueError, match=r"image.png has \(4, 5\) pixels, its depth \(7, 10\)"):
        result(dataset, [item], [output])


# --- alignment ---------------------------------------------------------------------------------


def test_alignment_recovers_scale_and_shift():
    target = np.random.default_rng(0).uniform(1, 9, 100)
    assert align((target - 0.7) / 2.5, target, "scale_shift") == pytest.approx((2.5, 0.7))
    assert align(target / 2.5, target, "scale") == pytest.approx((2.5, 0.0))
    assert align(target / 2.5, target, "median") == pytest.approx((2.5, 0.0))
    assert align(target / 2.5, target, "none") == (1.0, 0.0)


def test_least_squares_is_the_least():
    rng = np.random.default_rng(0)
    target, prediction = rng.uniform(1, 9, 50), rng.uniform(1, 9, 50)

    def residual(scale, shift):
        return ((scale * prediction + shift - target) ** 2).sum()

    for how, free in (("scale", (1, 0)), ("scale_shift", (1, 1))):
        best = align(prediction, target, how)
        for step in rng.normal(0, 0.01, (20, 2)):
            assert residual(best[0] + step[0] * free[0], best[1] + step[1] * free[1]) >= residual(
                *best
            )


@pytest.mark.parametrize("how", ["median", "scale", "scale_shift"])
def test_metric_predictions_up_to_a_scale(dataset, tmp_path, how):
    target = np.random.default_rng(0).integers(1000, 9000, (6, 8)) / 1000
    item = write(tmp_path / "depth.png", target)
    assert result(dataset, [item], [target / 3], alignment=how)["RMSE"] < 1e-5
    assert result(dataset, [item], [target / 3])["RMSE"] > 1


def test_inverse_predictions_are_aligned_as_such(dataset, tmp_path):
    target = np.random.default_rng(0).integers(1000, 9000, (6, 8)) / 1000
    item = write(tmp_path / "depth.png", target)
    output = 40 / target + 7
    settings = {"output": "inverse", "alignment": "scale_shift", "max_depth": 10.0}
    assert result(dataset, [item], [output], **settings)["AbsRel"] < 1e-5
    # What comes out behind infinity is as far as can be.
    output = 1 / target
    output[0, 0] = -100.0
    settings["alignment"] = "median"
    error = result(dataset, [item], [output], **settings)["RMSE"]
    assert error == pytest.approx((10 - target[0, 0]) / math.sqrt(48), rel=1e-3)


# --- several processes, errors -------------------------------------------------------------------


def test_rows_of_all_processes_are_gathered(dataset, tmp_path, monkeypatch):
    target = np.full((4, 4), 2.0)
    item = write(tmp_path / "depth.png", target)
    evaluator = DepthEvaluator(dataset)
    evaluator.process([item], [{"depth": torch.full((4, 4), 3.0)}])
    other = [depth_metrics(np.full(4, 2.0), np.full(4, 2.0))] * 3
    monkeypatch.setattr(comm, "gather", lambda rows: [rows, other])
    assert evaluator.evaluate()["depth"]["RMSE"] == pytest.approx(1 / 4)
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    monkeypatch.setattr(comm, "gather", lambda rows: [])
    assert evaluator.evaluate() == {}


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"crop": "kitti"}, r"TEST.DEPTH.CROP must be one of .*, got 'kitti'"),
        ({"alignment": "affine"}, r"TEST.DEPTH.ALIGN must be one of .*, got 'affine'"),
        ({"output": "inverse"}, 'TEST.DEPTH.ALIGN must not be "none" with .* "inverse"'),
        ({"min_depth": 0.0}, "TEST.DEPTH.MIN must be above 0 and below MAX, got 0.0 and 80.0"),
        ({"min_depth": 90.0}, "got 90.0 and 80.0"),
    ],
)
def test_errors_name_key_and_value(dataset, settings, message):
    with pytest.raises(ValueError, match=message):
        DepthEvaluator(dataset, **settings)


def test_a_data_set_without_depth_is_refused():
    with pytest.raises(ValueError, match="'coco_2017_val' has no depth"):
        DepthEvaluator("coco_2017_val")


# --- colours -----------------------------------------------------------------------------------


def test_colors_follow_the_map():
    depth = torch.linspace(0, 1, 11)[None].repeat(2, 1)
    depth[1, 3] = torch.inf
    image = colorize_depth(depth, limits=(0, 1), colormap="gray")
    assert image.shape == (2, 11, 3) and image.dtype == np.uint8
    assert np.abs(image[0, :, 0] - 255 * depth[0].numpy()).max() <= 1
    assert (image[1, 3] == 0).all()
    near, far = colorize_depth(depth)[0, [0, -1]].astype(int)
    assert far[0] > far[2] and near[2] > near[0]  # blue to red
    assert (colorize_depth(np.full((3, 3), np.nan)) == 0).all()
    assert len(np.unique(colorize_depth(np.ones((3, 3))))) <= 3
    with pytest.raises(ValueError, match=r"\(H, W\), got \(1, 2, 11\)"):
        colorize_depth(depth[None])
