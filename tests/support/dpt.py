"""Tiny DPTs and Depth Anything models with random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from detectron2.config import CfgNode
from torch import nn

from expedit_d2.projects import DPT, get_cfg

CONFIGS = Path(DPT.__file__).parent / "configs"
TINY = {
    "DPT": {"patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2, "img_size": 48},
    "hybrid": {"embed_dim": 24, "depth": 3, "num_heads": 2, "img_size": 64},
}
TINY["DepthAnything"] = TINY["DPT"] | {"init_values": 0.5}


def tiny_cfg(kind: str = "DPT", **changes) -> CfgNode:
    """A random model of a kind, for images of 48 x 48 or 64 x 64 pixels."""
    cfg = get_cfg()
    cfg.merge_from_file(str(CONFIGS / "Base-DPT.yaml"))
    node = cfg.MODEL.DPT
    hybrid = kind == "hybrid"
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.TIMM.NAME = "vit_base_r50_s16_384" if hybrid else "vit_small_patch16_224"
    cfg.MODEL.TIMM.KWARGS = CfgNode(TINY[kind], new_allowed=True)
    node.BLOCKS = [1, 2] if hybrid else [0, 1, 2, 3]
    node.CHANNELS = [256, 512, 12, 14] if hybrid else [6, 8, 12, 14]
    node.FEATURES = 10
    node.SIZE = None
    node.SIZE_DIVISIBILITY = 32 if hybrid else 8
    if kind == "DepthAnything":
        node.NORM, node.POSITIONS, node.READOUT = True, "bicubic", "ignore"
        node.INTERPOLATION = "bilinear"
    for key, value in changes.items():
        node[key] = value
    return cfg


def randomized(model: nn.Module) -> nn.Module:
    """With nothing that is zero, so that every parameter matters; the output is not cut off."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "patch_embed.backbone" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.head.predict[2].bias.fill_(3.0)
    return model.eval()


def expedit_cfg(cfg: CfgNode, **settings) -> CfgNode:
    cfg.MODEL.EXPEDIT.ENABLED = True
    for key, value in settings.items():
        cfg.MODEL.EXPEDIT[key.upper()] = value
    return cfg
