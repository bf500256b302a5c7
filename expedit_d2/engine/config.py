"""Defaults that depend on the machine."""

from __future__ import annotations

import logging

import torch

__all__ = ["choose_device"]


def choose_device(device: str, key: str = "MODEL.DEVICE") -> str:
    """The device asked for, or the CPU where it is "cuda", every config's default, without a GPU.

    Args:
        device: in the form of torch.
        key: the config key or option that gave it, for the message.

    Raises:
        ValueError: if there is no such device on this machine.
    """
    if device == "cuda" and not torch.cuda.is_available():
        logging.getLogger(__name__).warning("no CUDA device, running on the CPU")
        return "cpu"
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = ", ".join(["cpu", *(f"cuda:{index}" for index in range(gpus))])
    try:
        wanted = torch.device(device)
        if wanted.type == "cuda" and (wanted.index or 0) >= gpus:
            raise RuntimeError
        if wanted.type not in ("cuda", "cpu"):
            torch.empty(0, device=wanted)
    except (RuntimeError, NotImplementedError, AssertionError, TypeError):
        raise ValueError(
            f"{key} must be a device of this machine ({there}), got {device!r}"
        ) from None
    return device
