"""Features on disk: what a hit gives, what never hits, and what is trained with it."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn

from expedit_d2 import expedite
from expedit_d2.backbones.feature_cache import cache_features
from expedit_d2.projects import get_cfg, load_model


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


class Backbone(nn.Module):
    """Tensors in a structure, and a count of the images that were run."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 2, stride=2).requires_grad_(False)
        self.drop = nn.Dropout(0.5)
        self.scale = scale
        self.images = 0

    def forward(self, images: Tensor) -> dict[str, Any]:
        self.images += len(images)
        x = self.drop(self.conv(images)) * self.scale
        return {"map": x, "pairs": [Pair(x.mean((2, 3)), x.amax((2, 3)))]}


def flat(outputs: dict[str, Any]) -> list[Tensor]:
    return [outputs["map"], *outputs["pairs"][0]]


def cached(folder: Path, scale: float = 1.0) -> Backbone:
    backbone = Backbone(scale)
    cache_features(folder, backbone)
    return backbone


@pytest.fixture
def images() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(3, 3, 6, 10)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_hit_gives_what_a_run_gave_in_fp16(tmp_path, images, bf16):
    backbone, plain = cached(tmp_path).train(), Backbone().eval()
    with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
        wanted = flat(plain(images))
        missed, hit = backbone(images), backbone(images)
    assert backbone.images == 3
    assert backbone.training and isinstance(hit["pairs"][0], Pair)
    for want, miss, found in zip(wanted, flat(missed), flat(hit), strict=True):
        assert miss.dtype == found.dtype == torch.float32
        torch.testing.assert_close(miss, found, rtol=0, atol=0)
        torch.testing.assert_close(found, want.half().float(), rtol=2e-3, atol=1e-5)


def test_images_are_looked_up_one_by_one(tmp_path, images):
    backbone = cached(tmp_path)
    first = backbone(images[:2])
    again = backbone(images.flip(0))
    assert backbone.images == 3
    torch.testing.assert_close(again["map"][1:], first["map"].flip(0), rtol=0, atol=0)
    backbone(images.flip(3))  # mirrored images are others
    assert backbone.images == 6


def test_another_process_finds_them(tmp_path, images):
    wanted = cached(tmp_path)(images)
    later = cached(tmp_path)
    found = later(images)
    assert later.images == 1  # the first one tells how tensors belong together
    for want, value in zip(flat(wanted), flat(found), strict=True):
        torch.testing.assert_close(value, want, rtol=0, atol=0)


def test_an_interrupted_write_leaves_nothing_that_is_read(tmp_path, images, monkeypatch):
    backbone = cached(tmp_path)
    backbone(images[:1])

    def broken(value: object, file: Any) -> None:
        file.write(b"half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", broken)
        backbone(images[1:])
    torch.testing.assert_close(
        backbone(images)["map"], cached(tmp_path / "other")(images)["map"], rtol=0, atol=0
    )


def test_other_weights_settings_and_precisions_never_hit(tmp_path, images):
    backbone = cached(tmp_path)
    before = backbone(images)["map"]
    with torch.no_grad():
        backbone.conv.bias.add_(1)
    torch.testing.assert_close(backbone(images)["map"], before + 1, atol=5e-3, rtol=0)
    assert backbone.images == 6

    scaled = cached(tmp_path, scale=2.0)
    torch.testing.assert_close(scaled(images)["map"], 2 * before, atol=5e-3, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        scaled(images)
    assert scaled.images == 6


def test_what_fp16_cannot_hold_keeps_its_type(tmp_path, images):
    backbone = cached(tmp_path, scale=1e6)
    backbone(images)
    plain = Backbone(scale=1e6).eval()
    torch.testing.assert_close(backbone(images)["map"], plain(images)["map"])


def test_a_trained_backbone_is_refused(tmp_path):
    backbone = Backbone()
    backbone.conv.bias.requires_grad_()
    with pytest.raises(ValueError, match=r"FEATURE_CACHE needs a frozen backbone"):
        cache_features(tmp_path, backbone)


# ------------------------------------------------------------------------------- real models

_TIMM = {"embed_dim": 24, "depth": 4, "num_heads": 2, "img_size": 56}


def tiny_cfg(name: str, folder: Path | str) -> CfgNode:
    """Of a small model with a frozen ViT."""
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.FEATURE_CACHE = str(folder)
    timm = cfg.MODEL.TIMM
    timm.NAME, timm.FREEZE = "vit_small_patch14_dinov2", True
    timm.KWARGS.update(_TIMM)
    cfg.MODEL.META_ARCHITECTURE = name
    if name == "Segmenter":
        cfg.MODEL.SEGMENTER.WINDOW_SIZE, cfg.MODEL.SEGMENTER.DECODER = 0, "linear"
        cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 3
    elif name == "DPT":
        node = cfg.MODEL.DPT
        node.BLOCKS, node.CHANNELS, node.FEATURES = [0, 1, 2, 3], [4, 4, 4, 4], 4
        node.SIZE, node.SIZE_DIVISIBILITY, node.OUTPUT, node.NORM = None, 14, "metric", True
        node.SHIFT = 1.0
    else:
        cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
        cfg.MODEL.BACKBONE.NAME = name
        vit = cfg.MODEL.VIT
        vit.IMG_SIZE = vit.PRETRAIN_IMG_SIZE = 64
        vit.EMBED_DIM, vit.DEPTH, vit.NUM_HEADS, vit.WINDOW_SIZE = 24, 4, 2, 2
        vit.WINDOW_BLOCK_INDEXES, vit.FREEZE = [0, 2], True
        for node in (vit, timm):
            node.OUT_FEATURES, node.SCALE_FACTORS, node.OUT_CHANNELS = ["p4"], [1.0], 32
        head = cfg.MODEL.SEM_SEG_HEAD
        head.NAME, head.IN_FEATURES, head.COMMON_STRIDE, head.NORM = "SemSegFPNHead", ["p4"], 16, ""
        head.NUM_CLASSES, head.CONVS_DIM = 3, 32
    return cfg


def tiny(name: str, folder: Path | str) -> nn.Module:
    torch.manual_seed(0)
    return build_model(tiny_cfg(name, folder))


def samples(name: str) -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    side = 56 if name in ("Segmenter", "DPT") else 64
    return [
        {
            "image": torch.randint(256, (3, side, side), dtype=torch.uint8),
            "sem_seg": torch.randint(3, (side, side)),
            "depth": torch.rand(side, side) + 1,
        }
        for _ in range(2)
    ]


MODELS = ["Segmenter", "DPT", "D2ViT", "build_timm_vit_backbone"]


@pytest.mark.parametrize("name", MODELS)
def test_training_changes_heads_only_and_as_without_a_cache(tmp_path, name):
    models = [tiny(name, ""), tiny(name, tmp_path), tiny(name, tmp_path)]
    before = {key: value.clone() for key, value in models[0].state_dict().items()}
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            sum(model.train()(samples(name)).values()).backward()
            optimizer.step()
    without, missed, hit = (model.state_dict() for model in models)
    assert list(without) == list(hit) == list(before)
    frozen = {key for key, weight in models[2].named_parameters() if not weight.requires_grad}
    assert frozen
    assert {key for key in before if torch.equal(before[key], hit[key])} == frozen
    for key in before:
        torch.testing.assert_close(hit[key], missed[key], rtol=0, atol=0)
        torch.testing.assert_close(hit[key], without[key], rtol=0.02, atol=0.002)


@pytest.mark.parametrize("name", MODELS)
def test_an_expedited_backbone_is_never_cached(tmp_path, name):
    inputs = samples(name)
    cached, plain = tiny(name, tmp_path).eval(), tiny(name, "").eval()
    (key,) = plain(inputs)[0]
    with torch.no_grad():
        full = cached(inputs)[0][key]
        files = sorted(tmp_path.rglob("*.pth"))
        settings = {"alpha": 1, "keep": 0.3, "residual": False}  # more of a change
        with expedite(cached, **settings), expedite(plain, **settings):
            wanted = plain(inputs)[0][key]
            torch.testing.assert_close(cached(inputs)[0][key], wanted, rtol=0, atol=0)
    assert not torch.allclose(full, wanted, rtol=1e-3)
    assert len(files) == 2 and files == sorted(tmp_path.rglob("*.pth"))


def test_evaluation_has_no_cache(tmp_path):
    cfg = tiny_cfg("Segmenter", tmp_path / "features")
    cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    torch.save({"model": tiny("Segmenter", "").state_dict()}, cfg.MODEL.WEIGHTS)
    load_model(cfg)(samples("Segmenter"))
    assert not (tmp_path / "features").exists()
