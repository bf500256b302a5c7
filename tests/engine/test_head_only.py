"""Checkpoints of a head alone: the frozen backbone's weights are those of its own file."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from detectron2.config import CfgNode
from torch import Tensor

from expedit_d2.engine import slim_checkpoint
from expedit_d2.projects import frozen_part, get_cfg, load_model, trainer_of

_VIT = {"embed_dim": 24, "depth": 3, "num_heads": 2, "img_size": 56}


@pytest.fixture
def backbone(tmp_path) -> str:
    """A file with the weights of a small plain ViT."""
    torch.manual_seed(0)
    vit = timm.create_model("vit_small_patch14_dinov2", num_classes=0, **_VIT)
    torch.save(vit.state_dict(), tmp_path / "backbone.pth")
    return str(tmp_path / "backbone.pth")


def segmenter(backbone: str) -> CfgNode:
    cfg = get_cfg()
    cfg.MODEL.DEVICE, cfg.MODEL.META_ARCHITECTURE = "cpu", "Segmenter"
    timm = cfg.MODEL.TIMM
    timm.NAME, timm.FREEZE, timm.CHECKPOINT = "vit_small_patch14_dinov2", True, backbone
    timm.KWARGS.update(_VIT)
    cfg.MODEL.SEGMENTER.WINDOW_SIZE, cfg.MODEL.SEGMENTER.DECODER = 0, "linear"
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 3
    return cfg


def d2vit(backbone: str) -> CfgNode:
    cfg = get_cfg()
    cfg.MODEL.DEVICE, cfg.MODEL.META_ARCHITECTURE = "cpu", "SemanticSegmentor"
    cfg.MODEL.BACKBONE.NAME = "D2ViT"
    vit, head = cfg.MODEL.VIT, cfg.MODEL.SEM_SEG_HEAD
    vit.CHECKPOINT, vit.FREEZE, vit.USE_REL_POS = backbone, True, False
    vit.IMG_SIZE = vit.PRETRAIN_IMG_SIZE = 64
    vit.EMBED_DIM, vit.DEPTH, vit.NUM_HEADS, vit.WINDOW_SIZE = 24, 3, 2, 2
    vit.WINDOW_BLOCK_INDEXES = [0]
    vit.OUT_FEATURES, vit.SCALE_FACTORS, vit.OUT_CHANNELS = ["p4"], [1.0], 32
    head.NAME, head.IN_FEATURES, head.COMMON_STRIDE, head.NORM = "SemSegFPNHead", ["p4"], 16, ""
    head.NUM_CLASSES, head.CONVS_DIM = 3, 32
    return cfg


CONFIGS = [segmenter, d2vit]


def trained(cfg: CfgNode, file: Path) -> dict[str, Tensor]:
    """A whole checkpoint, as training leaves one."""
    torch.manual_seed(1)
    model = trainer_of(cfg).build_model(cfg)
    torch.save({"model": model.state_dict(), "iteration": 7}, file)
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def head_file(cfg: CfgNode, folder: Path, **changes: Tensor) -> dict[str, Tensor]:
    """MODEL.WEIGHTS of the head alone, with changes; returns the weights of the whole model."""
    whole = trained(cfg, folder / "whole.pth")
    slim_checkpoint(str(folder / "whole.pth"), str(folder / "head.pth"), frozen_part(cfg))
    content = torch.load(folder / "head.pth")
    content["model"] |= changes
    torch.save(content, folder / "head.pth")
    cfg.MODEL.WEIGHTS = str(folder / "head.pth")
    return whole


@pytest.mark.parametrize("config", CONFIGS)
def test_a_head_finds_its_backbone(backbone, tmp_path, config):
    cfg = config(backbone)
    whole = head_file(cfg, tmp_path)
    frozen = frozen_part(cfg)
    names = set(torch.load(tmp_path / "head.pth")["model"])
    assert frozen and names == whole.keys() - frozen.keys()
    loaded = load_model(cfg).state_dict()
    assert loaded.keys() == whole.keys()
    for name, weight in whole.items():
        wanted = weight if name in frozen else weight.half().float()
        torch.testing.assert_close(loaded[name], wanted, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("config", CONFIGS)
def test_whole_checkpoints_need_no_other_file(backbone, tmp_path, config):
    cfg = config(backbone)
    whole = trained(cfg, tmp_path / "whole.pth")
    Path(backbone).unlink()
    cfg.MODEL.WEIGHTS = str(tmp_path / "whole.pth")
    loaded = load_model(cfg).state_dict()
    assert all(torch.equal(loaded[name], whole[name]) for name in whole)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("lost", ["CHECKPOINT", "FREEZE"])
def test_a_head_without_a_backbone_is_refused(backbone, tmp_path, config, lost):
    cfg = config(backbone)
    head_file(cfg, tmp_path)
    node = cfg.MODEL.VIT if config is d2vit else cfg.MODEL.TIMM
    node[lost] = type(node[lost])()
    with pytest.raises(ValueError, match=r"head\.pth.*do not fit the model: .* not in the file"):
        load_model(cfg)


def test_another_nodes_checkpoint_is_no_backbone(backbone, tmp_path):
    cfg = d2vit(backbone)
    head_file(cfg, tmp_path)
    cfg.MODEL.TIMM.CHECKPOINT, cfg.MODEL.TIMM.FREEZE = backbone, True
    cfg.MODEL.VIT.CHECKPOINT = ""
    with pytest.raises(ValueError, match="not in the file"):
        load_model(cfg)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("decoder.other", "decoder.other is not in the model"),
        ("encoder.cls_token", "encoder.* is not in the file"),  # one of many
    ],
)
def test_what_is_left_over_is_refused(backbone, tmp_path, name, what):
    cfg = segmenter(backbone)
    head_file(cfg, tmp_path, **{name: torch.zeros(1, 1, 24)})
    with pytest.raises(ValueError, match=what):
        load_model(cfg)


def test_a_missing_part_of_the_head_is_refused(backbone, tmp_path):
    cfg = segmenter(backbone)
    head_file(cfg, tmp_path)
    weights = torch.load(cfg.MODEL.WEIGHTS)["model"]
    del weights["decoder.head.bias"]
    torch.save({"model": weights}, cfg.MODEL.WEIGHTS)
    with pytest.raises(ValueError, match=r"decoder\.head\.bias is not in the file"):
        load_model(cfg)


def test_only_what_is_elsewhere_is_left_out(backbone, tmp_path):
    """A backbone that was trained on cannot be found again in the file that it started from."""
    cfg = segmenter(backbone)
    whole = trained(cfg, tmp_path / "whole.pth")
    whole["encoder.cls_token"] += 1
    torch.save({"model": whole}, tmp_path / "changed.pth")
    with pytest.raises(ValueError, match=r"has another encoder\.cls_token than"):
        slim_checkpoint(str(tmp_path / "changed.pth"), str(tmp_path / "head.pth"), frozen_part(cfg))
    cfg.MODEL.TIMM.FREEZE = False
    with pytest.raises(ValueError, match="must freeze its ViT"):
        frozen_part(cfg)
