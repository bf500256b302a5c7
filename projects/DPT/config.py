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
    # Indices of the blocks that the head uses: four, or two for a hybrid, whose ResNet provides the
    # first two levels.
    "BLOCKS": [5, 11, 17, 23],
    # Apply the final norm to each level (DINOv2).
    "NORM": False,
    # Interpolation of position embeddings: "bilinear" (DPT) or "bicubic" (DINOv2).
    "POSITIONS": "bilinear",
    # Use of the class token: "project" (concatenated to every token), "add" or "ignore".
    "READOUT": "project",
    # Channels of the four reassembled maps, finest first, and of the fused maps.
    "CHANNELS": [256, 512, 1024, 1024],
    "FEATURES": 256,
    # Activation that gives the head's output y: "relu", or "sigmoid" for values in (0, 1).
    "ACTIVATION": "relu",
    # The output is SCALE * y + SHIFT, or with INVERT 1 / (SCALE * y + SHIFT).
    "SCALE": 1.0,
    "SHIFT": 0.0,
    "INVERT": False,
    # What the output is: "metric", depth in metres, or "inverse", inverse depth up to a scale and a
    # shift. It also chooses the loss.
    "OUTPUT": "inverse",
    # (height, width) in pixels to resize images to in inference, keeping the aspect ratio; None: no
    # resizing, as in training. SIZE_METHOD is the side that gets its size: "minimal", the one that
    # changes least (DPT); "lower_bound", the one that leaves the other larger (Depth Anything);
    # "upper_bound", smaller. Both sides become multiples of SIZE_DIVISIBILITY.
    "SIZE": [384, 384],
    "SIZE_METHOD": "minimal",
    "SIZE_DIVISIBILITY": 32,
    # Resizing of the prediction to the image: "bicubic" (DPT), or "bilinear" with aligned corners.
    "INTERPOLATION": "bicubic",
    # Losses: share of the squared mean that is subtracted in the logarithmic loss ("metric"), and
    # weight of gradients in the affine-invariant loss ("inverse").
    "SILOG_VARIANCE": 0.5,
    "GRADIENT_WEIGHT": 0.5,
}

_INPUT: dict[str, Any] = {
    # Crop (height, width) pixels at the bottom centre, in training and evaluation: (352, 1216) is
    # the crop of the KITTI benchmark. None: no crop.
    "CROP": None,
    # PNG values per metre, for data sets given by the path of a list.
    "SCALE": 1000.0,
}

_TEST: dict[str, Any] = {
    # Metres; depths outside are ignored, predictions are clipped.
    "MIN": 1e-3,
    "MAX": 80.0,
    # Evaluated pixels: "none" (all), "garg" or "eigen" (KITTI), "nyu" (without the border).
    "CROP": "none",
    # Align each prediction to its labels first: "none", "median", "scale" or "scale_shift" (least
    # squares), in inverse depth if that is the output.
    "ALIGN": "none",
}


def add_dpt_config(cfg: CN) -> None:
    """Add the keys of this project, and those of the encoder, that ``cfg`` does not have yet."""
    add_timm_config(cfg)
    add_solver_config(cfg)
    add_keys(cfg, {"MODEL": {"DPT": _DPT}, "INPUT": {"DEPTH": _INPUT}, "TEST": {"DEPTH": _TEST}})
