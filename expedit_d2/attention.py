"""Fused attention for tokens that stand for several tokens, or lie on a smaller grid.

Shorthand: B images or windows, N queries, M keys (N of them, or h x w on a grid), D channels of a
head. Everything that is added to the logits is a *term*. Terms are not broadcast in advance but
added up for a part of the queries at a time, so that a mask of all pairs is never in memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .tracing import cached, in_graph, shape_of

__all__ = [
    "MasksAsChannels",
    "Term",
    "attend",
    "attend_without_mask",
    "grid_terms",
    "key_bias",
    "position_term",
    "relative_positions",
]

#: Added to the logits: a tensor that broadcasts to (B, heads, N, M) or (B, heads, N, h, w), or two
#: tensors, (B, heads, N, K) and (B, heads, K, M), whose product is added.
Term = Tensor | tuple[Tensor, Tensor]

# Entries of the mask that are in memory at once. 16 MiB on the CPU: larger blocks are new pages of
# the operating system each time, and leave the cache before they are read. On a GPU a part must be
# large enough to occupy it.
_PART_CPU, _PART_GPU = 2**22, 2**27


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    terms: Sequence[Term] = (),
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Scaled dot-product attention, softmax(scale * q k^T + terms + bias) v.

    Args:
        q, k, v: (B, heads, N or M, D).
        scale: factor of the products.
        terms: added to the logits; all of them have keys M, or all h x w.
        bias: (B, M) or (B, h, w), added to the logits of each key; see `key_bias`.
        dropout: share of the weights that are dropped.

    Returns:
        (B, heads, N, D).
    """
    if bias is not None:
        bias = bias.to(q.dtype)
        if not terms and q.is_cuda:
            return attend_without_mask(q, k, v, bias.flatten(1), scale, dropout)
        terms = (*terms, bias[:, None, None])
    if not terms:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
    # In a traced or compiled graph every part would be a copy of the code.
    if not in_graph():
        shape = torch.broadcast_shapes(*map(_shape, terms))
        count = -(-math.prod(shape) // (_PART_GPU if q.is_cuda else _PART_CPU))
        axis = next((axis for axis in (0, 1) if shape[axis] > 1), 2)
        length = max(1, shape[axis] // count)
        if length < shape[axis]:
            parts = [
                attend(
                    _part(q, axis, start, length),
                    *(x if axis == 2 else _part(x, axis, start, length) for x in (k, v)),
                    scale,
                    [_part(term, axis, start, length) for term in terms],
                    dropout=dropout,
                )
                for start in range(0, shape[axis], length)
            ]
            return torch.cat(parts, dim=axis)
    first, *others = (t if isinstance(t, Tensor) else t[0] @ t[1] for t in terms)
    mask = sum(others, first).to(q.dtype)
    mask = mask if mask.dim() == 4 else mask.flatten(3)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)


def _shape(term: Term) -> tuple[int, ...]:
    if isinstance(term, Tensor):
        return shape_of(term)
    query, key = map(shape_of, term)
    return (*torch.broadcast_shapes(query[:2], key[:2]), query[2], key[3])


def _part(term: Term, axis: int, start: int, length: int) -> Term:
    """A part of the batch, the heads or the queries; broadcast dimensions stay."""
    if not isinstance(term, Tensor):
        query, key = term
        query = _part(query, axis, start, length)
        return query, key if axis == 2 else _part(key, axis, start, length)
    if term.shape[axis] == 1:
        return term
    return term.narrow(axis, start, min(length, term.shape[axis] - start))


def attend_without_mask(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float | None, dropout: float = 0.0
) -> Tensor:
    """Attention with a key bias, for kernels that take no mask, such as flash attention.

    The bias becomes one more channel of the heads: the query has 1 / scale there, the key its bias
    and the value 0. Further zeros keep the number of channels a multiple of 8.

    Args:
        q, k, v: (B, heads, N or M, D).
        bias: (B or 1, M), added to the logits of each key.
        scale: factor of the products; None: D^-1/2.
        dropout: share of the weights that are dropped.

    Returns:
        (B, heads, N, D).
    """
    batch, heads, queries, channels = shape_of(q)
    scale = channels**-0.5 if scale is None else scale
    more = -(-(channels + 1) // 8) * 8 - channels
    keys = shape_of(k)[2]
    # One small tensor for all heads; the zeros added to the values change nothing.
    tail = F.pad(bias[:, None, :, None].to(k.dtype), (0, more - 1))
    first = _more_channels(1 / scale, more, q.dtype, q.device)
    zeros = _more_channels(0.0, more, v.dtype, v.device)
    q = torch.cat([q, first.expand(batch, heads, queries, -1)], dim=-1)
    k = torch.cat([k, tail.expand(batch, heads, keys, -1)], dim=-1)
    v = torch.cat([v, zeros.expand(batch, heads, keys, -1)], dim=-1)
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
    return out[..., :channels]


@cached
def _more_channels(first: float, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``first`` and zeros, (1, 1, 1, count)."""
    return F.pad(torch.full((1, 1, 1, 1), first, dtype=dtype, device=device), (0, count - 1))


class MasksAsChannels(TorchFunctionMode):
    """Inside, attention with a mask of keys alone runs on kernels without a mask.

    For blocks that take an additive mask and hand it to `scaled_dot_product_attention`: a mask
    (B or 1, 1, 1, M) becomes one more channel of the heads; see `attend_without_mask`.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask", "dropout_p")
            values = dict(zip(names, args, strict=False)) | kwargs
            mask = values.get("attn_mask")
            if mask is not None and mask.dim() == 4 and shape_of(mask)[1:3] == (1, 1):
                return attend_without_mask(
                    values["query"],
                    values["key"],
                    values["value"],
                    mask[:, 0, 0],
                    values.get("scale"),
                    values.get("dropout_p", 0.0),
                )
        return func(*args, **kwargs)


def key_bias(sizes: Tensor) -> Tensor:
    """log(size), to be added to the attention logits of each key.

    A key that stands for n tokens then counts n times (proportional attention, Bolya et al., ToMe,
    arXiv 2210.09461, section 3.2). A key of size 0 does not count.

    Args:
        sizes: (..., N), at least 0.
    """
    return sizes.clamp_min(torch.finfo(torch.float32).tiny).log()


def relative_positions(table: Tensor, cells: int, span: float, size: int) -> Tensor:
    """Rows of a relative-position table for a coarser axis, by linear interpolation.

    Args:
        table: (2 S - 1, D), row S - 1 + t for an offset of t tokens at the size S it was made for.
        cells: clusters along the axis.
        span: extent of these clusters in tokens.
        size: tokens along the axis of the attention that uses the table. Where it is not S, the
            offsets are stretched in the way that Detectron2 resamples the table.

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


def grid_terms(q: Tensor, row: Tensor, col: Tensor) -> tuple[Tensor, Tensor]:
    """Decomposed relative-position logits on a grid, rows and columns separately.

    Args:
        q: (B, heads, h * w, D) queries, not scaled.
        row, col: `relative_positions` of the two axes, (h, h, D) and (w, w, D).

    Returns:
        Terms (B, heads, h * w, h, 1) and (B, heads, h * w, 1, w).
    """
    grid = q.unflatten(2, (shape_of(row)[0], shape_of(col)[0]))
    rows = torch.einsum("bnhwd,hkd->bnhwk", grid, row.to(q.dtype))
    cols = torch.einsum("bnhwd,wkd->bnhwk", grid, col.to(q.dtype))
    return rows.flatten(2, 3)[..., None], cols.flatten(2, 3)[..., None, :]


def position_term(
    q: Tensor,
    tables: tuple[Tensor, Tensor],
    positions: Tensor,
    size: tuple[int, int],
    margin: int = 0,
) -> tuple[Tensor, Tensor]:
    """Decomposed relative-position logits of tokens at any positions.

    A query's logit is linear in its offset from each whole row of the map, and a key between two
    rows takes its share of both. So no pair of tokens needs a look-up of its own: the logits are
    one product, of (N, rows + columns) with (rows + columns, N).

    Args:
        q: (B, heads, N, D) queries, not scaled.
        tables: relative-position tables of rows and of columns, (2 S - 1, D) each.
        positions: (B, N, 2) row and column of each token, from 0.
        size: rows and columns of the original attention; see `relative_positions`.
        margin: how far positions may lie outside of it.

    Returns:
        A term: (B, heads, N, rows + columns) and (B, 1, rows + columns, N).
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
        # NaN becomes an arbitrary integer, so clamp it; the share keeps the logits NaN.
        low = low.long().clamp(0, rows - 1)[:, None].expand(-1, q.shape[1], -1, -1)
        high = (low + 1).clamp(max=rows - 1)
        terms = q @ table.to(q.dtype).transpose(0, 1)  # (B, heads, N, 2 S - 1)
        query.append(torch.lerp(terms.gather(-1, low), terms.gather(-1, high), share))
        key.append((1 - offset.abs()).clamp_min(0).to(q.dtype)[:, None])
    return torch.cat(query, dim=-1), torch.cat(key, dim=-1).transpose(-2, -1)
