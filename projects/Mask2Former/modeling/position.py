"""Sine position embedding of a feature map (Carion et al., arXiv 2005.12872)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["sine_embedding"]

_TEMPERATURE = 10000.0


def _axis(size: int, channels: int, device: torch.device) -> Tensor:
    """Embedding (size, channels) of positions 1 to size, scaled to one turn of 2 pi."""
    position = torch.arange(1, size + 1, device=device, dtype=torch.float32)
    position = position / (size + 1e-6) * (2 * math.pi)
    pair = torch.arange(channels, device=device, dtype=torch.float32) // 2
    angle = position[:, None] / _TEMPERATURE ** (2 * pair / channels)
    return torch.stack((angle[:, 0::2].sin(), angle[:, 1::2].cos()), dim=-1).flatten(1)


def sine_embedding(size: tuple[int, int], channels: int, device: torch.device) -> Tensor:
    """Embedding of every cell of an H x W map; rows in the first half of the channels.

    Args:
        size: (H, W).
        channels: C, a multiple of 4.

    Returns:
        (H * W, C) in fp32.
    """
    height, width = size
    rows = _axis(height, channels // 2, device)[:, None].expand(-1, width, -1)
    columns = _axis(width, channels // 2, device)[None].expand(height, -1, -1)
    return torch.cat((rows, columns), dim=-1).flatten(0, 1)
