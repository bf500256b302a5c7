"""A tiny Segmenter with random weights, and how an official checkpoint of it is written."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn

from expedit_d2.projects import Segmenter, load_cfg
from support.tensors import perturbed

CONFIGS = Path(Segmenter.__file__).parent / "configs"
PATCH, SIDE, CLASSES = 4, 32, 7
VARIANT = {
    "dataset_kwargs": {"dataset": "ade20k", "image_size": 48, "crop_size": SIDE},
    "inference_kwargs": {"im_size": 48, "window_size": SIDE, "window_stride": 24},
    "net_kwargs": {
        "backbone": "test_vit",
        "d_model": 64,
        "decoder": {
            "drop_path_rate": 0.0,
            "dropout": 0.2,
            "n_layers": 2,
            "name": "mask_transformer",
        },
        "distilled": False,
        "drop_path_rate": 0.1,
        "dropout": 0.0,
        "image_size": (SIDE, SIDE),
        "n_cls": CLASSES,
        "n_heads": 2,
        "n_layers": 6,
        "normalization": "deit",
        "patch_size": PATCH,
    },
}


def tiny_cfg(**segmenter) -> CfgNode:
    """The official settings with a ViT of 6 blocks and 8 x 8 tokens."""
    cfg = load_cfg(CONFIGS / "Base-Segmenter.yaml", ["MODEL.DEVICE", "cpu"])
    cfg.MODEL.TIMM.NAME = "test_vit"
    cfg.MODEL.TIMM.KWARGS = CfgNode({"img_size": SIDE, "patch_size": PATCH})
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = CLASSES
    cfg.MODEL.SEGMENTER.WINDOW_SIZE = cfg.MODEL.SEGMENTER.WINDOW_STRIDE = SIDE
    for key, value in segmenter.items():
        cfg.MODEL.SEGMENTER[key] = value
    return cfg


def tiny_model(cfg: CfgNode | None = None, **segmenter) -> nn.Module:
    """A random model in which nothing is zero."""
    return perturbed(build_model(cfg or tiny_cfg(**segmenter)))


def images(height: int = SIDE, width: int = SIDE, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width)


@torch.no_grad()
def predict(model: nn.Module, x: Tensor) -> Tensor:
    return model.predict(x)


def write_official(folder: Path, weights, variant=VARIANT) -> Path:
    folder.mkdir(exist_ok=True)
    # Not safe_dump: tuples get the tag that they have in official files.
    (folder / "variant.yml").write_text(yaml.dump(variant))
    epoch = {"epoch": 3, "n_cls": CLASSES, "optimizer": {"state": {}, "param_groups": []}}
    torch.save({"model": weights, **epoch}, folder / "checkpoint.pth")
    return folder / "checkpoint.pth"
