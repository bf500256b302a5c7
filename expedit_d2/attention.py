"""Attention terms for tokens that stand for several, or sit on a smaller grid."""

from __future__ import annotations

import torch
from torch import Tensor

from .operators import shape_of

__all__ = ["key_bias", "position_bias", "relative_positions"]


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


def position_bias(
    q: Tensor,
    tables: tuple[Tensor, Tensor],
    positions: Tensor,
    size: tuple[int, int],
    margin: int = 0,
) -> Tensor:
    """Decomposed relative-position logits of tokens at any positions.

    A query's term is linear in its offset from each whole row of the map, and a key between two
    rows takes its share of both. So no pair of tokens needs a look-up of its own: the logits are
    one product, of (N, rows + columns) with (rows + columns, N).

    Args:
        q: (B, heads, N, D) queries, not scaled.
        tables: relative-position tables of rows and of columns, (2 S - 1, D) each.
        positions: (B, N, 2) row and column of each token, from 0.
        size: rows and columns of the original attention; see `relative_positions`.
        margin: positions may lie this far outside of it.

    Returns:
        (B, heads, N, N).
    """
    query, key = [], []
    for axis, table in enumerate(tables):
        rows = shape_of(table)[0]
        limit = size[axis] - 1 + margin
        place = positions[..., axis].clamp(-margin, limit)[..., None]  # (B, N, 1)
        whole = torch.arange(-margin, limit + 1, device=q.device)
        offset = place - whole  # (B, N, n)
        row = ((rows - 1) / 2 + offset * (rows / (2 * size[axis] - 1))).clamp(0, rows - 1)
        low = row.floor()
        share = (row - low).to(q.dtype)[:, None]
        low = low.long()[:, None].expand(-1, q.shape[1], -1, -1)
        high = (low + 1).clamp(max=rows - 1)
        terms = q @ table.to(q.dtype).transpose(0, 1)  # (B, heads, N, 2 S - 1)
        query.append(torch.lerp(terms.gather(-1, low), terms.gather(-1, high), share))
        key.append((1 - offset.abs()).clamp_min(0).to(q.dtype)[:, None])
    return torch.cat(query, dim=-1) @ torch.cat(key, dim=-1).transpose(-2, -1)
