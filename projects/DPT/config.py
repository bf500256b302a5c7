"""Config keys of DPT: ``MODEL.DPT``, ``INPUT.DEPTH`` and ``TEST.DEPTH``.

The encoder is that of ``MODEL.TIMM``: NAME, PRETRAINED, CHECKPOINT, DROP_PATH_RATE, KWARGS, FREEZE.
Defaults are DPT-Large.
"""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode as CN

from expedit_d2.backbones import add_timm_config
from expedit_d2.config import add_keys
from expedit_d2.engine import add_solver_config

__all__ = ["add_dpt_config"]

_DPT: dict[str, Any] = {
    # Indices of the blocks that the head reads: four, or two of a hybrid, whose ResNet gives the
    # first two levels.
    "BLOCKS": [5, 11, 17, 23],
    # Put each level through the final norm (DINOv2).
    "NORM": False,
    # Positions at other sizes: "bilinear" (DPT) or "bicubic" (DINOv2).
    "POSITIONS": "bilinear",
    # The class token: "project" joins it to every token, "add", or "ignore".
    "READOUT": "project",
    # Channels of the four reassembled maps, finest first, and of the maps that are fused.
    "CHANNELS": [256, 512, 1024, 1024],
    "FEATURES": 256,
    # Of the head's number y: "relu", or "sigmoid" for (0, 1).
    "ACTIVATION": "relu",
    # The output is SCALE * y + SHIFT, or with INVERT 1 / (SCALE * y + SHIFT).
    "SCALE": 1.0,
    "SHIFT": 0.0,
    "INVERT": False,
    # What the output is: "metric", depth in metres, or "inverse", inverse depth up to a scale and a
    # shift. It also chooses the loss.
    "OUTPUT": "inverse",
    # (height, width) in pixels at which the network sees images in inference, their aspect kept;
    # None: their own, as in training. METHOD says which side has it: "minimal" the one that changes
    # least (DPT), "lower_bound" the other is larger (Depth Anything), "upper_bound" smaller. Both
    # sides become multiples of DIVISIBILITY.
    "SIZE": [384, 384],
    "SIZE_METHOD": "minimal",
    "SIZE_DIVISIBILITY": 32,
    # Of the prediction to the image's size: "bicubic" (DPT), or "bilinear" with aligned corners.
    "INTERPOLATION": "bicubic",
    # Losses: share of the squared mean that is taken off in the logarithmic one ("metric"), weight
    # of the gradients in the affine-invariant one ("inverse").
    "SILOG_VARIANCE": 0.5,
    "GRADIENT_WEIGHT": 0.5,
}

_INPUT: dict[str, Any] = {
    # Keep (height, width) pixels from the bottom, in the middle: (352, 1216) is the crop of the
    # KITTI benchmark. In training and evaluation; None: all.
    "CROP": None,
    # PNG values to the metre, for data sets given by the path of a list.
    "SCALE": 1000.0,
}

_TEST: dict[str, Any] = {
    # Metres; depths outside are not evaluated, predictions are clipped.
    "MIN": 1e-3,
    "MAX": 80.0,
    # Pixels that count: "none" (all), "garg" or "eigen" (KITTI), "nyu" (the border left out).
    "CROP": "none",
    # Fit each prediction to its labels first: "none", "median", "scale" or "scale_shift" (least
    # squares), in inverse depth where that is the output.
    "ALIGN": "none",
}


def add_dpt_config(cfg: CN) -> None:
    """Add the keys of this project, and those of the encoder, that ``cfg`` does not have yet."""
    add_timm_config(cfg)
    add_solver_config(cfg)
    add_keys(cfg, {"MODEL": {"DPT": _DPT}, "INPUT": {"DEPTH": _INPUT}, "TEST": {"DEPTH": _TEST}})
