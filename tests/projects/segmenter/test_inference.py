"""Segmenter's sliding windows against a naive loop; batches, sizes, data types."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from PIL import Image
from torch import Tensor, nn

from expedit_d2 import expedite
from expedit_d2.projects.Segmenter.data.mapper import fitted_size
from expedit_d2.projects.Segmenter.modeling import sliding_window
from expedit_d2.projects.Segmenter.modeling.inference import enlarged_size
from expedit_d2.projects.Segmenter.trainer import SegmenterTrainer
from support.segmenter import CLASSES, SIDE, tiny_cfg, tiny_model
from support.tensors import error

SIZES = [(32, 32), (32, 33), (70, 32), (45, 90), (33, 64), (64, 64), (95, 41)]


class Scores(nn.Module):
    """Scores that depend on the place in the window, so that every window differs."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.batches.append(tuple(x.shape))
        h, w = x.shape[2:]
        place = torch.arange(h * w).view(h, w) / (h * w)
        return torch.stack([x.sum(1), x[:, 0] * place, place + x[:, 1]], dim=1)


def naive(predict, image: Tensor, window: int, stride: int) -> Tensor:
    """One window after the other, one pixel's average after the other."""
    height, width = image.shape[1:]
    if min(height, width) < window:
        factor = window / min(height, width)
        size = (int(height * factor + 1e-9), int(width * factor + 1e-9))
        image = F.interpolate(image[None], size, mode="bilinear")[0]
        height, width = size
    found: list[list[list[Tensor]]] = [[[] for _ in range(width)] for _ in range(height)]
    tops, lefts = (
        sorted({min(start, n - window) for start in range(0, n, stride)}) for n in (height, width)
    )
    for top in tops:
        for left in lefts:
            scores = predict(image[None, :, top : top + window, left : left + window])[0]
            for i in range(window):
                for j in range(window):
                    found[top + i][left + j].append(scores[:, i, j])
    rows = [torch.stack([torch.stack(f).mean(0) for f in row], dim=1) for row in found]
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("size", [*SIZES, (20, 50), (31, 16)])
@pytest.mark.parametrize(("window", "stride"), [(32, 32), (32, 20), (32, 12)])
def test_windows_are_those_of_a_naive_loop(size, window, stride):
    image = torch.randn(3, *size)
    (actual,) = sliding_window(Scores(), [image], window, stride)
    assert error(actual, naive(Scores(), image, window, stride)) < 1e-5


@pytest.mark.parametrize("window", [480, 512, 768])
def test_every_enlarged_size_is_the_official_one(window):
    """The aspect, times the window, without its fraction; all in floating point."""
    lost = 0
    for short in range(1, window, 7):
        for long in range(short, 1200, 3):
            aspect = np.float64(long) / np.float64(short)
            side = int(np.trunc(aspect * window))
            assert enlarged_size((short, long), window) == (window, side)
            assert enlarged_size((long, short), window) == (side, window)
            lost += side != long * window // short
    assert (lost > 0) == (window == 480)  # whole-number arithmetic is not the same


@pytest.mark.parametrize(("shorter", "aspect"), [(512, 4), (1024, 2), (520, 8)])
def test_every_fitted_size_is_the_official_one(shorter, aspect):
    """One scale, by the side that reaches its limit first; sides rounded half up."""
    for height, width in itertools.product(range(100, 1100, 10), range(100, 2100, 10)):
        long, short = max(height, width), min(height, width)
        scale = min(shorter * aspect / long, shorter / short)
        expected = tuple(math.floor(side * scale + 0.5) for side in (height, width))
        assert fitted_size((height, width), shorter, shorter * aspect) == expected


def test_test_images_are_resized_by_it(tmp_path):
    """150 x 1280: the longer side is the limit, and Detectron2's own rule gives 487 rows."""
    Image.new("RGB", (1280, 150)).save(tmp_path / "wide.png")
    cfg = tiny_cfg()
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 520, 4160
    record = {"file_name": str(tmp_path / "wide.png")}
    assert SegmenterTrainer.build_test_mapper(cfg)(record)["image"].shape == (3, 488, 4160)
    cfg.INPUT.MIN_SIZE_TEST = 0
    assert SegmenterTrainer.build_test_mapper(cfg)(record)["image"].shape == (3, 150, 1280)


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_windows_of_all_images_share_batches(batch):
    images = [torch.randn(3, *size) for size in SIZES]
    predict = Scores()
    together = sliding_window(predict, images, 32, 20, batch)
    for image, actual in zip(images, together, strict=True):
        (alone,) = sliding_window(Scores(), [image], 32, 20)
        assert torch.equal(actual, alone)
    sizes = [shape[0] for shape in predict.batches]
    assert sizes[:-1] == [batch] * (len(sizes) - 1) and sizes[-1] <= batch


def test_without_a_window_images_are_taken_whole():
    images = [torch.randn(3, *size) for size in [(20, 30), (20, 30), (9, 9), (20, 30)]]
    predict = Scores()
    actual = sliding_window(predict, images, 0, 0)
    assert predict.batches == [(2, 3, 20, 30), (1, 3, 9, 9), (1, 3, 20, 30)]
    for image, scores in zip(images, actual, strict=True):
        assert torch.equal(scores, Scores()(image[None])[0])


@pytest.mark.parametrize("window", [SIDE, 0])
@pytest.mark.parametrize("decoder", ["linear", "mask_transformer"])
def test_model_takes_images_of_any_size(window, decoder):
    model = tiny_model(DECODER=decoder, WINDOW_SIZE=window, WINDOW_STRIDE=24)
    sizes = [(32, 40), (17, 61), (50, 33), (32, 32), (7, 9)]
    inputs = [{"image": (torch.rand(3, *size) * 255).to(torch.uint8)} for size in sizes]
    inputs[1] |= {"height": 25, "width": 90}
    with torch.no_grad():
        together = model(inputs)
        for x, size, actual in zip(inputs, sizes, together, strict=True):
            wanted = (25, 90) if "height" in x else size
            scores = actual["sem_seg"]
            assert scores.shape == (CLASSES, *wanted) and scores.dtype == torch.float32
            assert error(scores, model([x])[0]["sem_seg"]) < 1e-5
            image = (x["image"] - model.pixel_mean) / model.pixel_std
            (expected,) = sliding_window(model.predict, [image], window, 24)
            expected = F.interpolate(expected[None], wanted, mode="bilinear")[0]
            assert error(scores, expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("where", [None, "backbone", "head"])
def test_half_precision(dtype, where):
    model = tiny_model()
    inputs = [{"image": torch.rand(3, 40, 50) * 255}]
    if where:
        expedite(model, 2, ratio=0.6, reconstruct_at=where)
    with torch.no_grad():
        expected = model(inputs)[0]["sem_seg"]
        with torch.autocast("cpu", dtype=dtype):
            actual = model(inputs)[0]["sem_seg"]
    assert actual.dtype == torch.float32
    assert (actual - expected).norm() < 0.15 * expected.norm()


@pytest.mark.parametrize("where", ["backbone", "head"])
def test_ratio_follows_whole_images(where):
    model = tiny_model(WINDOW_SIZE=0)
    inputs = [{"image": torch.rand(3, h, w) * 255} for h, w in [(32, 48), (20, 70)]]
    with torch.no_grad():
        plain = model(inputs)
        with expedite(model, 2, ratio=1.0, temperature=1e6, neighbors=1, reconstruct_at=where):
            exact = model(inputs)
        with expedite(model, 2, ratio=0.5, reconstruct_at=where):
            reduced = model(inputs)
    for a, b, c in zip(plain, exact, reduced, strict=True):
        assert error(b["sem_seg"], a["sem_seg"]) < 1e-4
        assert c["sem_seg"].shape == a["sem_seg"].shape


def test_weights_and_buffers_follow_the_device():
    model = build_model(tiny_cfg())
    assert {*model.state_dict()} == {name for name, _ in model.named_parameters()}
    assert model.to("meta").device.type == "meta"
