"""Check values of Detectron2's config keys that would fail late, with obscure errors."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import getitem
from typing import Any

from detectron2.config import CfgNode

__all__ = ["check_ranges"]


def _from(least: int) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value >= least, f"{least} or more"


def _one_of(*valid: str) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value in valid, f"one of {', '.join(valid)}"


def _are_names(value: Any) -> bool:
    return all(isinstance(name, str) and name for name in value)


_NAMES = (_are_names, "a list of names or paths, such as ('collage_val',)")
_SIDES = (lambda value: min(value, default=0) > 0, "positive numbers of pixels, such as (800,)")

#: Key -> check of a value, and description of valid ones.
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "DATASETS.TRAIN": _NAMES,
    "DATASETS.TEST": _NAMES,
    "DATALOADER.NUM_WORKERS": _from(0),
    "INPUT.FORMAT": _one_of("RGB", "BGR", "L", "YUV-BT.601"),
    "INPUT.MIN_SIZE_TRAIN": _SIDES,
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": _one_of("choice", "range"),
    "INPUT.MAX_SIZE_TRAIN": _from(1),
    "INPUT.MIN_SIZE_TEST": _from(0),
    "INPUT.MAX_SIZE_TEST": _from(1),
    "MODEL.PIXEL_STD": (lambda value: all(value), "numbers other than 0"),
    "MODEL.VIT.PATCH_SIZE": _from(1),
    "MODEL.VIT.DEPTH": _from(1),
    "MODEL.VIT.NUM_HEADS": _from(1),
    "MODEL.VIT.WINDOW_SIZE": _from(0),
    "MODEL.VIT.SQUARE_PAD": _from(0),
    "SOLVER.CHECKPOINT_PERIOD": _from(1),
}


def check_ranges(cfg: CfgNode) -> None:
    """
    Raises:
        ValueError: for a value out of its range, naming the key.
    """
    for key, (valid, words) in _RANGES.items():
        value = reduce(getitem, key.split("."), cfg)
        if not valid(value):
            raise ValueError(f"{key} must be {words}, got {value!r}")
    mean, std = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD
    if len(mean) != len(std):
        raise ValueError(
            f"MODEL.PIXEL_MEAN and PIXEL_STD must have a number for each channel, got {mean} and "
            f"{std}"
        )
