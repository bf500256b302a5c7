"""Attention windows: a map cut into rectangles, padded at the bottom and right where needed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .operators import shape_of

__all__ = ["partition", "shifted_mask", "unpartition"]


def partition(x: Tensor, window: tuple[int, int], value: float = 0.0) -> Tensor:
    """(B, H, W, C) to (B * windows, wh, ww, C), windows row by row; padding is ``value``."""
    (wh, ww), (batch, height, width, channels) = window, shape_of(x)
    x = F.pad(x, (0, 0, 0, -width % ww, 0, -height % wh), value=value)
    rows, cols = -(-height // wh), -(-width // ww)
    x = x.view(batch, rows, wh, cols, ww, channels).transpose(2, 3)
    return x.reshape(batch * rows * cols, wh, ww, channels)


def unpartition(windows: Tensor, size: tuple[int, int]) -> Tensor:
    """The opposite: (B * windows, wh, ww, C) to (B, H, W, C), padding cut off."""
    _, wh, ww, channels = shape_of(windows)
    rows, cols = -(-size[0] // wh), -(-size[1] // ww)
    x = windows.view(-1, rows, cols, wh, ww, channels).transpose(2, 3)
    return x.reshape(-1, rows * wh, cols * ww, channels)[:, : size[0], : size[1]]


def shifted_mask(
    size: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
    device: torch.device | None = None,
) -> Tensor:
    """Attention mask for windows of a map rolled by ``-shift``, as Swin has it.

    The last windows hold what was rolled around: tokens of both sides of that seam do not meet.

    Args:
        size: of the map, a multiple of ``window``.

    Returns:
        (windows, wh * ww, wh * ww), 0 or -100, to be added to attention logits.
    """
    seam = [torch.arange(n, device=device) >= n - s for n, s in zip(size, shift, strict=True)]
    side = 2 * seam[0][:, None] + seam[1].long()
    side = partition(side[None, ..., None], window).flatten(1)
    return (side[:, :, None] != side[:, None]) * -100.0
