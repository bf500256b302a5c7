"""Attention terms for tokens that stand for several, or sit on a smaller grid."""

from __future__ import annotations

import torch
from torch import Tensor

from .operators import shape_of

__all__ = ["key_bias", "relative_positions"]


def key_bias(sizes: Tensor) -> Tensor:
    """log(size), to be added to the attention logits of each key.

    A key that stands for n tokens then has n votes (proportional attention, Bolya et al., ToMe,
    arXiv 2210.09461, section 3.2). A key of size 0 gets no vote.

    Args:
        sizes: (..., N), at least 0.
    """
    return sizes.clamp_min(torch.finfo(torch.float32).tiny).log()


def relative_positions(table: Tensor, cells: int, span: float, size: int) -> Tensor:
    """Rows of a relative-position table for a coarser axis, by linear interpolation.

    Args:
        table: (2 S - 1, D), row S - 1 + t for an offset of t tokens at the size S it was made for.
        cells: clusters along the axis.
        span: tokens that these clusters spread over.
        size: tokens along the axis of the attention that uses the table. Where it is not S, the
            offsets are stretched as Detectron2 resamples the table.

    Returns:
        (cells, cells, D): the position term of query row i for key row j. With
        ``cells == span == size`` these are Detectron2's.
    """
    rows = shape_of(table)[0]
    centre = (rows - 1) / 2
    index = torch.arange(cells, device=table.device)
    offsets = torch.arange(1 - cells, cells, device=table.device) * (span / cells)
    place = (centre + offsets * rows / (2 * size - 1)).clamp(0, rows - 1)
    low = place.floor().long()
    high = (low + 1).clamp(max=rows - 1)
    share = (place - low)[:, None].to(table.dtype)
    resampled = table[low] * (1 - share) + table[high] * share  # (2 cells - 1, D)
    return resampled[index[:, None] - index[None, :] + cells - 1]
