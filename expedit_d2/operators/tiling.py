"""Tiles: which tokens are compared with which clusters, and the products of these pairs.

Both operators need only the clusters near a token. Tokens are therefore tiled by home cell: a
tile of cells plus a rim of r holds every cluster that its tokens may join, so the work stays a
batched matrix product of (tile tokens) x (tile and rim) and no N x M x C product is formed.

Shorthand: B images, H x W tokens, a grid of h x w clusters, C channels, N = H*W, M = h*w,
r = window // 2; T tiles of up to R tokens that are compared with P clusters. A token's *home cell*
is the cell of the grid it falls into; the token may join only clusters whose row and column are
both within r of its home cell. Tiles of all images lie one after another, as do their clusters: (B
* T, ...) and (B * M, ...).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, library

from ..tracing import cached, in_graph, is_compiling, shape_of

__all__ = ["MASKED_LOGIT", "Tiles", "sum_into_clusters", "multiply_tiles", "tile"]

# Logit of a pair that is not allowed: finite, so that a row without any candidate stays finite.
MASKED_LOGIT = -3e38
# Cells along a side of a tile; larger tiles copy less of the rim, smaller ones multiply less.
_TILE = 4
# Tiles along an axis whose cells are not known when a graph is made: of 8 cells at 32.
_TILES = 4
# Numbers in the tiles that are multiplied at once on a CPU, so that they stay in its cache.
_IN_CACHE = 2**19


@dataclass(frozen=True)
class Tiles:
    """T tiles of up to R tokens, each with exactly P clusters (tile and rim).

    Attributes:
        tokens: (T * R,) index into the N tokens.
        real: (T, R, 1) fp32, 0 where a tile has fewer than R tokens, else 1.
        cells: (B * T, P) index into the clusters of all images.
        mask: (T, R, P) fp32, 0 where the cluster is within r of the token's home cell, else
            `MASKED_LOGIT`: added to logits.
        place: (N,) index of each token in the flattened (T * R).
    """

    tokens: Tensor
    real: Tensor
    cells: Tensor
    mask: Tensor
    place: Tensor

    def take(self, items: Tensor) -> Tensor:
        """Tokens (B, N, ...) arranged in tiles, (B, T, R, ...)."""
        return items.index_select(1, self.tokens).unflatten(1, shape_of(self.real)[:2])

    def put(self, tiled: Tensor) -> Tensor:
        """The inverse: (B, T, R, ...) to (B, N, ...)."""
        return tiled.flatten(1, 2).index_select(1, self.place)


@dataclass(frozen=True)
class _Axis:
    """The same along one axis, where T, R and P are those of the axis."""

    tokens: Tensor  # (T, R)
    real: Tensor  # (T, R) bool
    cells: Tensor  # (T, P)
    allowed: Tensor  # (T, R, P) bool
    place: Tensor  # (size,)


def _tile_axis(size: int, cells: int, radius: int, device: torch.device) -> _Axis:
    """Tile one axis of ``size`` tokens and ``cells`` cells; T, R, P as in `_Axis`."""
    # An exported graph has the same number of tiles for every size. All numbers that are divided
    # are positive, as ONNX rounds towards zero.
    count = (cells + _TILE - 1) // _TILE if isinstance(cells, int) else _TILES
    tile = (cells + count - 1) // count
    index = torch.arange(size, device=device)
    # The cell that nearest-neighbour upsampling of the grid would show at each token.
    home = index * cells // size

    first_cell = torch.arange(count, device=device) * tile
    first_token = (first_cell * size + cells - 1) // cells
    longest = min(size, (tile * size + cells - 1) // cells)
    tokens = first_token[:, None] + torch.arange(longest, device=device)
    real = (tokens < size) & (home[tokens.clamp(max=size - 1)] < first_cell[:, None] + tile)
    tokens = tokens.clamp(max=size - 1)

    reach = min(cells, tile + 2 * radius)
    first = (first_cell - radius).clamp(0, cells - reach)
    candidates = first[:, None] + torch.arange(reach, device=device)
    allowed = (home[tokens][:, :, None] - candidates[:, None, :]).abs() <= radius

    owner = home // tile
    place = owner * longest + index - first_token[owner]
    return _Axis(tokens, real, candidates, allowed, place)


def _tile(
    size: tuple[int, int], grid: tuple[int, int], radius: int, batch: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `Tiles` has: the product of the tilings of the two axes."""
    rows, cols = (_tile_axis(s, g, radius, device) for s, g in zip(size, grid, strict=True))

    def cross(a: Tensor, b: Tensor, stride: int) -> Tensor:
        """Row-major index of every (a, b) pair, (Ta, X) and (Tb, Y) to (Ta * Tb, X * Y)."""
        pairs = a[:, None, :, None] * stride + b[None, :, None, :]
        return pairs.reshape(a.shape[0] * b.shape[0], -1)

    real = (rows.real[:, None, :, None] & cols.real[None, :, None, :]).flatten(0, 1).flatten(1)
    allowed = rows.allowed[:, None, :, None, :, None] & cols.allowed[None, :, None, :, None, :]
    allowed = allowed.flatten(0, 1).flatten(1, 2).flatten(2, 3)
    (_, per_row), (tile_cols, per_col) = shape_of(rows.tokens), shape_of(cols.tokens)
    # A token's flat place: its tile first, its row and column inside that tile second.
    tile_row, tile_col = rows.place // per_row, cols.place // per_col
    in_row, in_col = rows.place - tile_row * per_row, cols.place - tile_col * per_col
    owner = tile_row[:, None] * tile_cols + tile_col[None, :]
    place = owner * (per_row * per_col) + in_row[:, None] * per_col + in_col[None, :]
    first = torch.arange(batch, device=device)[:, None, None] * (grid[0] * grid[1])
    tokens = cross(rows.tokens, cols.tokens, size[1]).flatten()
    cells = (first + cross(rows.cells, cols.cells, grid[1])).flatten(0, 1)
    mask = torch.zeros(shape_of(allowed), dtype=torch.float32, device=device)
    mask = mask.masked_fill(~allowed, MASKED_LOGIT)
    return tokens, real.float()[..., None], cells, mask, place.flatten()


# An operator that compilers do not look into: PyTorch's would inline all these integers wherever
# they are used, and not finish simplifying them. Exported graphs must not contain it. torch before
# 2.4 has no such operators.
_opaque_tile = _tile
if hasattr(library, "custom_op"):
    _opaque_tile = library.custom_op(
        "expedit_d2::tile",
        _tile,
        mutates_args=(),
        schema="(SymInt[] size, SymInt[] grid, SymInt radius, SymInt batch, Device device)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    )
    _opaque_tile.register_fake(_tile)


@cached
def tile(
    size: tuple[int, int], grid: tuple[int, int], radius: int, batch: int, device: torch.device
) -> Tiles:
    """Tile the maps of a batch by home cell; in a compiled graph, by one operator."""
    build = _opaque_tile if is_compiling() else _tile
    return Tiles(*build(size, grid, radius, batch, device))


def _groups(tiles: int, each: int, like: Tensor) -> list[slice]:
    """Groups of tiles, of ``each`` numbers, that are processed together."""
    step = tiles if like.is_cuda or in_graph() else max(1, _IN_CACHE // each)
    return [slice(start, start + step) for start in range(0, tiles, step)]


def multiply_tiles(
    x: Tensor, items: Tensor, cells: Tensor, product: Callable[[Tensor, Tensor, slice], Tensor]
) -> Tensor:
    """Products of tiles with their clusters.

    Args:
        x: (B * T, ...) of each tile.
        items: (B * M, C) of each cluster.
        cells: (B * T, P), see `Tiles`.
        product: some of ``x``, their clusters (tiles, P, C) and which tiles these are.

    Returns:
        The products, one after another.
    """
    tiles, places = shape_of(cells)
    out = [
        product(
            x[group],
            items.index_select(0, cells[group].flatten()).unflatten(0, (-1, places)),
            group,
        )
        for group in _groups(tiles, places * shape_of(items)[1], items)
    ]
    return out[0] if len(out) == 1 else torch.cat(out)


def sum_into_clusters(shares: Tensor, x: Tensor, cells: Tensor, start: Tensor) -> Tensor:
    """Weighted sums of tokens for the clusters near them, added to ``start``.

    Args:
        shares: (B * T, R, P) of each token for each cluster.
        x: (B * T, R, C) the tokens.
        cells: (B * T, P), see `Tiles`.
        start: (B * M, C), modified in place.

    Returns:
        ``start``.
    """
    tiles, places = shape_of(cells)
    for group in _groups(tiles, places * shape_of(x)[2], x):
        sums = shares[group].transpose(1, 2) @ x[group]
        start.index_add_(0, cells[group].flatten(), sums.flatten(0, 1))
    return start
