"""Config keys of the training loop, and defaults that depend on the machine."""

from __future__ import annotations

import logging

import torch
from detectron2.config import CfgNode

__all__ = ["add_solver_config", "choose_device"]


def add_solver_config(cfg: CfgNode) -> None:
    """Add ``SOLVER.OPTIMIZER``, a key that Mask2Former's configs have too."""
    if "OPTIMIZER" not in cfg.SOLVER:
        cfg.SOLVER.OPTIMIZER = "SGD"  # or "ADAMW"


def choose_device(device: str) -> str:
    """The device asked for, or the CPU where it is "cuda" and there is none."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        logging.getLogger(__name__).warning("no CUDA device, running on the CPU")
        return "cpu"
    return device
