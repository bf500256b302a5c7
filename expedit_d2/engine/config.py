"""Choice of the device."""

from __future__ import annotations

import logging

import torch
from detectron2.utils.logger import log_first_n

__all__ = ["choose_device"]


def choose_device(device: str, key: str = "MODEL.DEVICE") -> str:
    """The configured device, or the CPU for "cuda" (the default of configs) without a GPU.

    Args:
        device: name of the device in PyTorch.
        key: config key or option, for error messages.

    Raises:
        ValueError: if this machine does not have the device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        log_first_n(logging.WARNING, "no CUDA device: running on the CPU")
        return "cpu"
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    available = ", ".join(["cpu", *(f"cuda:{index}" for index in range(gpus))])
    try:
        parsed = torch.device(device)
        if parsed.type == "cuda" and (parsed.index or 0) >= gpus:
            raise RuntimeError
        if parsed.type not in ("cuda", "cpu"):
            torch.empty(0, device=parsed)
    except (RuntimeError, NotImplementedError, AssertionError, TypeError):
        raise ValueError(
            f"{key} must be a device of this machine ({available}), got {device!r}"
        ) from None
    return device
