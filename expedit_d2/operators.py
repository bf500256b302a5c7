"""Token clustering and token reconstruction: the two parameter-free layers of Expedit.

Source: Liang et al., "Expediting Large-Scale Vision Transformer for Dense Prediction without
Fine-tuning", NeurIPS 2022, arXiv 2210.01035, section 3.2. Needs torch and nothing else.

Shorthand: B images, H x W tokens, a grid of h x w clusters, C channels, N = H*W, M = h*w,
r = window // 2. A token's *home cell* is the cell of the grid it falls into; the token may join
only clusters whose row and column are both within r of its home cell.

Both layers only ever need a token's near-by clusters. Tokens are therefore tiled by home cell: a
tile of cells plus a rim of r holds every cluster that its tokens may join, so the work stays a
batched matrix product of (tile tokens) x (tile and rim) and no N x M x C product is formed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .tracing import in_graph, is_exporting, shape_of

__all__ = [
    "Clusters",
    "TokenClustering",
    "TokenReconstruction",
    "cluster_tokens",
    "reconstruct_tokens",
]

_R = TypeVar("_R")

AUTO = "auto"
NORMALIZATIONS = ("l1", "l2")

# A temperature of 6 / (median squared distance to the nearest centroid) makes a token of median
# fit lean on its nearest centroid without ignoring the next ones. 3 to 12 work about as well.
AUTO_FACTOR = 6.0
# Squared distances below this share of the tokens' variance are rounding, not structure.
_NOISE = 1e-6
# Below this no fp32 product of temperature and distance can overflow.
_TINY = 1e-30
# Stands for "not allowed" in logits: finite, so that a row without any candidate stays finite too.
_NEVER = -3e38
# Highest temperature: twice as much still fits fp32.
_HOTTEST = 1e38
# Cells along a side of a tile; larger tiles copy less of the rim, smaller ones multiply less.
_TILE = 4
# Tiles along an axis whose cells are not known when a graph is made: of 8 cells at 32.
_TILES = 4
# Numbers in the tiles that are multiplied at a time on a CPU, so that they stay in its cache.
_IN_CACHE = 2**19


class Clusters(NamedTuple):
    """What a clustering returns.

    Attributes:
        features: (B, h, w, C) in the tokens' type.
        sizes: (B, h, w) fp32, each cluster's share of the affinities. Those of an image sum to
            H * W (or to its weights); a cluster of size 0 stands for no token.
        positions: (B, h, w, 2) fp32, the mean row and column of a cluster's tokens, weighted by
            the affinities.
    """

    features: Tensor
    sizes: Tensor
    positions: Tensor


@dataclass(frozen=True)
class _Tiles:
    """Who meets whom: T tiles of up to R tokens and exactly P clusters (tile and rim)."""

    tokens: Tensor  # (T, R) index into the N tokens
    real: Tensor  # (T, R) False where a tile has fewer than R tokens
    cells: Tensor  # (T, P) index into the M clusters
    allowed: Tensor  # (T, R, P) True where the cluster is within r of the token's home cell
    place: Tensor  # (N,) where each token sits in the flattened (T * R)


def _tile_axis(size: int, cells: int, radius: int, device: torch.device) -> _Tiles:
    """Tile one axis of ``size`` tokens and ``cells`` cells; T, R, P as in `_Tiles`."""
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
    return _Tiles(tokens, real, candidates, allowed, place)


def _tile(
    size: tuple[int, int], grid: tuple[int, int], radius: int, device: torch.device
) -> _Tiles:
    """Tile the map by home cell: the product of the tilings of its two axes."""
    rows, cols = (_tile_axis(s, g, radius, device) for s, g in zip(size, grid, strict=True))

    def cross(a: Tensor, b: Tensor, stride: int) -> Tensor:
        """Row-major index of every (a, b) pair, (Ta, X) and (Tb, Y) to (Ta * Tb, X * Y)."""
        pairs = a[:, None, :, None] * stride + b[None, :, None, :]
        return pairs.reshape(a.shape[0] * b.shape[0], -1)

    real = (rows.real[:, None, :, None] & cols.real[None, :, None, :]).flatten(0, 1).flatten(1)
    allowed = rows.allowed[:, None, :, None, :, None] & cols.allowed[None, :, None, :, None, :]
    (_, per_row), (tile_cols, per_col) = shape_of(rows.tokens), shape_of(cols.tokens)
    # A token's flat place: its tile first, its row and column inside that tile second.
    tile_row, tile_col = rows.place // per_row, cols.place // per_col
    in_row, in_col = rows.place - tile_row * per_row, cols.place - tile_col * per_col
    tile = tile_row[:, None] * tile_cols + tile_col[None, :]
    place = tile * (per_row * per_col) + in_row[:, None] * per_col + in_col[None, :]
    return _Tiles(
        tokens=cross(rows.tokens, cols.tokens, size[1]),
        real=real,
        cells=cross(rows.cells, cols.cells, grid[1]),
        allowed=allowed.flatten(0, 1).flatten(1, 2).flatten(2, 3),
        place=place.flatten(),
    )


def _in_fp32(function: Callable[..., _R]) -> Callable[..., _R]:
    """Run a function of tokens outside autocast, which would take its products in half."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> _R:
        tokens = args[0] if args else next(iter(kwargs.values()))
        if tokens.is_meta:  # has no autocast
            return function(*args, **kwargs)
        with torch.autocast(tokens.device.type, enabled=False):
            return function(*args, **kwargs)

    return run


def _take(items: Tensor, index: Tensor) -> Tensor:
    """Rows of ``items`` (B, L, C) at ``index`` (T, K): (B, T, K, C)."""
    return items.index_select(1, index.flatten()).unflatten(1, tuple(index.shape))


def _flat_index(index: Tensor, batch: int, items: int) -> Tensor:
    """Index (T, K) into the items of one image to (B * T, K) into those of all."""
    first = torch.arange(batch, device=index.device)[:, None, None] * items
    return (index + first).flatten(0, 1)


def _groups(tiles: int, each: int, like: Tensor) -> list[slice]:
    """Tiles of ``each`` numbers in groups that are worked on together."""
    step = tiles if like.is_cuda or in_graph() else max(1, _IN_CACHE // each)
    return [slice(start, start + step) for start in range(0, tiles, step)]


def _meet(
    x: Tensor, items: Tensor, index: Tensor, product: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Products of tiles x (B, T, ...) with their items, (B, L, C) at index (T, P), side by side."""
    batch, total, channels = shape_of(items)
    tiles, places = shape_of(index)
    x, items, index = x.flatten(0, 1), items.flatten(0, 1), _flat_index(index, batch, total)
    out = [
        product(x[group], items.index_select(0, index[group].flatten()).unflatten(0, (-1, places)))
        for group in _groups(batch * tiles, places * channels, items)
    ]
    return (out[0] if len(out) == 1 else torch.cat(out)).unflatten(0, (batch, tiles))


def _gather_up(shares: Tensor, x: Tensor, index: Tensor, start: Tensor) -> Tensor:
    """start (B, L, C), plus the products of tiles (B, T, P, R) and (B, T, R, C) at index (T, P)."""
    batch, total, channels = shape_of(start)
    tiles, places = shape_of(index)
    shares, x, index = shares.flatten(0, 1), x.flatten(0, 1), _flat_index(index, batch, total)
    out = start.flatten(0, 1)
    for group in _groups(batch * tiles, places * channels, x):
        out.index_add_(0, index[group].flatten(), (shares[group] @ x[group]).flatten(0, 1))
    return out.unflatten(0, (batch, total))


@torch.no_grad()
def auto_temperature(distances: Tensor, x: Tensor, weights: Tensor | None = None) -> Tensor:
    """Temperature that follows the scale of the features, one for each image.

    ``AUTO_FACTOR / median`` over the tokens' squared distances to their nearest centroid, so
    that scaling the features by s scales the temperature by s**-2 and every affinity stays.
    Tokens that sit on their centroid (flat regions) say nothing about the scale and are left
    out; where all of them do, the temperature is so high that every token joins its nearest
    centroid alone, which is then exact.

    Args:
        distances: (B, N) squared distance of each token to its nearest centroid.
        x: (B, N, C) tokens around their mean.
        weights: (B, N), 0 for padding; None counts all.

    Returns:
        (B,) temperatures, finite and positive.
    """
    norms = torch.linalg.vector_norm(x, dim=-1).square()
    if weights is None:
        variance = norms.mean(1)
    else:
        variance = (norms * weights).sum(1) / weights.sum(1).clamp_min(_TINY)
    floor = (_NOISE * variance).clamp_min(_TINY)
    informative = distances > floor[:, None]
    if weights is not None:
        informative = informative & (weights > 0)
    total = informative.sum(1)
    # The (lower) median of the informative ones: they sort in front of the infinite rest.
    ordered = distances.masked_fill(~informative, torch.inf).sort(dim=1).values
    middle = ((total - 1) // 2).clamp_min(0)
    median = ordered.gather(1, middle[:, None]).squeeze(1)
    return AUTO_FACTOR / torch.where(total > 0, median, floor)


@torch.no_grad()
def _nearest_distance(tokens: Tensor, clusters: Tensor, nearest: Tensor) -> Tensor:
    """Squared distance (B, N) of tokens (B, N, C) to the clusters (B, M, C) named by index (B, N).

    Taken from the difference itself: expanding the square would leave rounding, of either sign,
    where a token equals its cluster.
    """
    batch, total, _ = shape_of(clusters)
    # Whole rows are taken by index_select several times as fast as by gather.
    first = torch.arange(batch, device=nearest.device)[:, None] * total
    chosen = clusters.flatten(0, 1).index_select(0, (nearest + first).flatten())
    return torch.linalg.vector_norm(tokens - chosen.view_as(tokens), dim=-1).square()


def _centered(tokens: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """fp32 tokens (B, N, C) around their mean, and the mean (B, 1, C).

    Distances do not change, but the squared norms that cancel in them become small.
    """
    tokens = tokens.float()
    if weights is None:
        mean = tokens.mean(1, keepdim=True)
    else:
        share = weights / weights.sum(1, keepdim=True).clamp_min(_TINY)
        mean = (tokens * share[..., None]).sum(1, keepdim=True)
    return tokens - mean, mean


def adaptive_pool(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean of each cell of a grid, (B, H, W, D) to (B, h, w, D)."""
    if not is_exporting():
        return F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), grid).permute(0, 2, 3, 1)
    # The same in two products: ONNX has no such pooling, and torch's way around that takes the
    # size of the example for every size.
    height, width, channels = shape_of(x)[1:]
    rows, cols = (_means(n, cells, x) for n, cells in zip((height, width), grid, strict=True))
    x = (rows @ x.flatten(2)).unflatten(2, (width, channels))
    return cols @ x


def _means(size: int, cells: int, like: Tensor) -> Tensor:
    """(cells, size): what each token of an axis weighs in the mean of each cell."""
    cell = torch.arange(cells, device=like.device)[:, None]
    token = torch.arange(size, device=like.device)
    first, last = cell * size // cells, ((cell + 1) * size + cells - 1) // cells
    inside = ((token >= first) & (token < last)).to(like.dtype)
    return inside / inside.sum(1, keepdim=True)


def _pool(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Adaptive average pooling, (B, H, W, C) to (B, h * w, C)."""
    return adaptive_pool(tokens, grid).flatten(1, 2).contiguous()


def _score(x: Tensor, centroids: Tensor, cells: Tensor | None = None) -> Tensor:
    """Half of |x|^2 - |x - centroid|^2: larger is closer.

    Args:
        x: (B, N, C), or tiled (B, T, R, C).
        centroids: (B, M, C).
        cells: (T, P) which of them each tile meets; None, not tiled: all.

    Returns:
        (B, N, M), or (B, T, R, P).
    """
    norms = centroids.square().sum(-1) / 2  # once a centroid, not once a tile
    if cells is None:
        return x @ centroids.transpose(-2, -1) - norms[:, None]
    products = _meet(x, centroids, cells, lambda x, near: x @ near.transpose(-2, -1))
    return products - norms[:, cells][..., None, :]


def grid_positions(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Row and column of every token, (1, H, W, 2) fp32."""
    rows = torch.arange(height, device=device, dtype=torch.float32)
    cols = torch.arange(width, device=device, dtype=torch.float32)
    return torch.stack(
        [rows[:, None].expand(-1, width), cols[None].expand(height, -1)], dim=-1
    ).unsqueeze(0)


def on_device(numbers: tuple[float, ...], like: Tensor) -> Tensor:
    """Numbers as a tensor (n,) of the type of ``like``, filled in on its device.

    A tensor made from a list would be copied there, and the host waits for that.
    """
    return torch.stack([like.new_full((), number) for number in numbers])


def _logits(score: Tensor, temperature: float | Tensor) -> Tensor:
    """Twice temperature * (score - the best of the row): never above 0, so nothing overflows."""
    if not isinstance(temperature, Tensor):
        temperature = min(temperature, _HOTTEST)
    return 2 * temperature * (score - score.detach().amax(-1, keepdim=True))


@_in_fp32
def cluster_tokens(
    tokens: Tensor,
    grid: tuple[int, int],
    iterations: int = 5,
    temperature: float | str = AUTO,
    window: int = 5,
    weights: Tensor | None = None,
    positions: Tensor | None = None,
) -> Clusters:
    """Cluster a token map by a few steps of local soft k-means (section 3.2, token clustering).

    Centroids start as the adaptive average pooling of the map. Each step computes every token's
    affinity to its candidates, softmax(-temperature * squared distance), and moves the centroids
    to the affinity-weighted means. The token's own norm cancels in the softmax.

    Args:
        tokens: (B, H, W, C), any floating type; sums and distances are taken in fp32.
        grid: (h, w), at most (H, W).
        iterations: number of k-means steps, at least 1.
        temperature: multiplies the squared distances; ``"auto"`` follows the features' scale.
        window: odd side, in cells, of the square of clusters a token may join.
        weights: optional (B, H, W), how many tokens each one stands for: 0 for padding, which
            then joins nothing, or the sizes that an earlier clustering returned.
        positions: optional (B, H, W, 2) or (1, H, W, 2), the tokens' rows and columns; default
            their places in the map.

    Returns:
        The clusters, with their sizes and mean positions.

    Raises:
        ValueError: if the grid does not fit the map.
    """
    if tokens.dim() != 4:
        raise ValueError(f"tokens must have shape (B, H, W, C), got {tuple(tokens.shape)}")
    batch, height, width, channels = shape_of(tokens)
    if grid[0] > height or grid[1] > width:
        raise ValueError(
            f"grid must be at most the token map ({height}, {width}), got {tuple(grid)}"
        )
    tiles = _tile((height, width), grid, window // 2, tokens.device)
    flat = None if weights is None else weights.flatten(1).float()
    x, mean = _centered(tokens.flatten(1, 2), flat)
    if positions is None:
        positions = grid_positions(height, width, tokens.device)
    positions = positions.float().expand(batch, -1, -1, -1)

    counts = tiles.real.float().expand(batch, -1, -1)  # (B, T, R) tokens that each one stands for
    allowed = tiles.allowed
    if flat is None:
        centroids = _pool(x.unflatten(1, (height, width)), grid)
    else:
        counts = counts * flat[:, tiles.tokens]
        total = _pool(flat.view(batch, height, width, 1), grid)
        weighted = (x * flat[..., None]).unflatten(1, (height, width))
        centroids = _pool(weighted, grid) / total.clamp_min(_TINY)
        # A cell of padding alone is no candidate for a token (padding itself joins nothing).
        filled = (total[..., 0] > 0)[:, tiles.cells]  # (B, T, P)
        allowed = allowed & (filled[..., None, :] | (counts == 0)[..., None])

    tiled = _take(x, tiles.tokens)  # (B, T, R, C)

    for _ in range(iterations):
        score = _score(tiled, centroids, tiles.cells)  # (B, T, R, P)
        score = score.masked_fill(~allowed, _NEVER)
        if temperature == AUTO:
            best = tiles.cells.expand(batch, -1, -1).gather(2, score.argmax(-1))
            best = best.flatten(1)[:, tiles.place]
            distances = _nearest_distance(x, centroids, best)
            temperature = auto_temperature(distances, x, flat).view(-1, 1, 1, 1)
        affinity = _logits(score, temperature).softmax(-1) * counts[..., None]
        shares = affinity.transpose(-2, -1)  # (B, T, P, R)
        sizes = shares.new_zeros(batch, grid[0] * grid[1])
        sizes = sizes.index_add(1, tiles.cells.flatten(), shares.sum(-1).flatten(1))
        # The tiny vote for its old place keeps a cluster that no token joins where it is.
        total = sizes[..., None] + _TINY
        centroids = _gather_up(shares, tiled, tiles.cells, centroids * _TINY) / total
    places = _take(positions.flatten(1, 2), tiles.tokens)
    places = _gather_up(shares, places, tiles.cells, _pool(positions, grid) * _TINY) / total
    clusters = (centroids + mean).to(tokens.dtype)
    return Clusters(
        clusters.view(batch, *grid, channels),
        sizes.view(batch, *grid),
        places.view(batch, *grid, -1),
    )


def _normalize(similarity: Tensor, normalize: str) -> Tensor:
    """Weights from log similarities over the last axis: they sum to one, or have unit L2 norm.

    In log space, so that similarities too small for the type still give weights.
    """
    if normalize == "l1":
        return similarity.softmax(-1)
    return (similarity - 0.5 * (2 * similarity).logsumexp(-1, keepdim=True)).exp()


@_in_fp32
def reconstruct_tokens(
    refined: Tensor,
    tokens: Tensor,
    clusters: Tensor,
    neighbors: int = 20,
    temperature: float | str = AUTO,
    normalize: str = "l1",
    window: int | None = None,
    valid: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Rebuild a token map from refined clusters (section 3.2, token reconstruction).

    Every token is a weighted sum of the refined versions of the clusters nearest to what it was
    before clustering; weight = exp(-temperature * squared distance).

    Args:
        refined: (B, h, w, D) clusters after the later blocks (D may differ from C).
        tokens: (B, H, W, C) tokens that went into the clustering.
        clusters: (B, h, w, C) clusters as they left the clustering.
        neighbors: how many clusters a token is rebuilt from.
        temperature: multiplies the squared distances; ``"auto"`` follows the features' scale.
        normalize: ``"l1"``, weights sum to one (the paper), or ``"l2"``, weights have unit L2
            norm (the published code).
        window: look for neighbors only within this odd side, in cells, around the token's home
            cell; None looks at all clusters, as published.
        valid: optional (B, h, w) bool, False for clusters that stand for no token.
        weights: optional (B, H, W), 0 for padding; it has no say in the automatic temperature.

    Returns:
        (B, H, W, D) in the type of ``refined``.

    Raises:
        ValueError: if shapes disagree or there are fewer clusters than ``neighbors``.
    """
    agree = (
        clusters.dim() == tokens.dim() == 4
        and refined.shape[:3] == clusters.shape[:3]
        and tokens.shape[::3] == clusters.shape[::3]
    )
    if not agree:
        raise ValueError(
            "refined, tokens and clusters must have shapes (B, h, w, D), (B, H, W, C) and "
            f"(B, h, w, C), got {tuple(refined.shape)}, {tuple(tokens.shape)} and "
            f"{tuple(clusters.shape)}"
        )
    grid = shape_of(clusters)[1:3]
    if not 1 <= neighbors <= grid[0] * grid[1]:
        raise ValueError(f"neighbors must be in [1, {grid[0] * grid[1]}], got {neighbors}")
    size = shape_of(tokens)[1:3]
    weights = None if weights is None else weights.flatten(1).float()
    x, mean = _centered(tokens.flatten(1, 2), weights)
    centroids = clusters.flatten(1, 2).float() - mean
    values = refined.flatten(1, 2).float()
    keep = None if valid is None else valid.flatten(1)

    def weigh(score: Tensor, nearest_distance: Callable[[], Tensor]) -> Tensor:
        """Scores (B, ..., k) to weights; the distance to the nearest cluster is (B, N)."""
        factor = temperature
        if temperature == AUTO:
            factor = auto_temperature(nearest_distance(), x, weights)
            factor = factor.view(-1, *[1] * (score.dim() - 1))
        return _normalize(_logits(score, factor), normalize)

    if window is None:
        out = _rebuild_from_all(values, x, centroids, keep, neighbors, weigh)
    else:
        tiles = _tile(size, grid, window // 2, tokens.device)
        out = _rebuild_from_window(values, x, centroids, keep, neighbors, weigh, tiles)
    return out.to(refined.dtype).unflatten(1, size)


# (scores (B, ..., k), how to get the distances to the nearest (B, N)) to weights (B, ..., k)
_Weigh = Callable[[Tensor, Callable[[], Tensor]], Tensor]


def _rebuild_from_all(
    values: Tensor, x: Tensor, centroids: Tensor, keep: Tensor | None, neighbors: int, weigh: _Weigh
) -> Tensor:
    """Neighbors among all M clusters, (B, N, D)."""
    score = _score(x, centroids)  # (B, N, M)
    if keep is not None:
        score = score.masked_fill(~keep[:, None], _NEVER)
    score, index = score.topk(neighbors, dim=-1)
    weights = weigh(score, lambda: _nearest_distance(x, centroids, index[..., 0]))
    # Each token sums its k clusters in place: no (N, k, D) tensor.
    batch, total, channels = shape_of(values)
    offset = torch.arange(batch, device=index.device)[:, None, None] * total
    out = F.embedding_bag(
        (index + offset).flatten(0, 1),
        values.flatten(0, 1),
        per_sample_weights=weights.flatten(0, 1),
        mode="sum",
    )
    return out.view(batch, -1, channels)


def _rebuild_from_window(
    values: Tensor,
    x: Tensor,
    centroids: Tensor,
    keep: Tensor | None,
    neighbors: int,
    weigh: _Weigh,
    tiles: _Tiles,
) -> Tensor:
    """Neighbors among the clusters near a token's home cell, (B, N, D)."""
    tiled = _take(x, tiles.tokens)  # (B, T, R, C)
    score = _score(tiled, centroids, tiles.cells)  # (B, T, R, P)
    allowed = tiles.allowed
    if keep is not None:
        allowed = allowed & keep[:, tiles.cells][..., None, :]
    score = score.masked_fill(~allowed, _NEVER)
    best, index = score.topk(min(neighbors, shape_of(score)[-1]), dim=-1)

    def nearest_distance() -> Tensor:
        nearest = tiles.cells.expand(x.shape[0], -1, -1).gather(2, index[..., 0])
        return _nearest_distance(x, centroids, nearest.flatten(1)[:, tiles.place])

    weights = torch.zeros_like(score).scatter(-1, index, weigh(best, nearest_distance))
    out = _meet(weights, values, tiles.cells, torch.matmul)  # (B, T, R, D)
    return out.flatten(1, 2).index_select(1, tiles.place)


def check_temperature(temperature: float | str) -> None:
    """Raise ValueError unless ``temperature`` is ``"auto"`` or a positive, finite number."""
    number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    if temperature != AUTO and not (number and 0 < temperature < math.inf):
        raise ValueError(
            f'temperature must be "auto" or a positive finite number, got {temperature!r}'
        )


def check_window(window: int, name: str = "window") -> None:
    """Raise ValueError unless ``window`` is a positive odd integer."""
    if not isinstance(window, int) or isinstance(window, bool) or window < 1 or window % 2 == 0:
        raise ValueError(f"{name} must be a positive odd integer, got {window!r}")


def check_grid(grid: tuple[int, int]) -> None:
    """Raise ValueError unless ``grid`` is two positive integers (h, w)."""
    ok = isinstance(grid, (tuple, list)) and len(grid) == 2
    if not ok or not all(type(side) is int and side >= 1 for side in grid):
        raise ValueError(f"grid must be two positive integers (h, w), got {grid!r}")


class TokenClustering(nn.Module):
    """`cluster_tokens` as a layer, (B, H, W, C) to (B, h, w, C). No parameters, no state.

    Args:
        grid, iterations, temperature, window: see `cluster_tokens`.

    Raises:
        ValueError: for settings outside their range.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        iterations: int = 5,
        temperature: float | str = AUTO,
        window: int = 5,
    ) -> None:
        super().__init__()
        check_grid(grid)
        check_temperature(temperature)
        check_window(window)
        if not isinstance(iterations, int) or iterations < 1:
            raise ValueError(f"iterations must be a positive integer, got {iterations!r}")
        self.grid = tuple(grid)
        self.iterations = iterations
        self.temperature = temperature
        self.window = window

    def forward(
        self, tokens: Tensor, weights: Tensor | None = None, return_sizes: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Clusters (B, h, w, C) and, on request, their sizes (B, h, w); see `cluster_tokens`."""
        clusters = cluster_tokens(
            tokens, self.grid, self.iterations, self.temperature, self.window, weights
        )
        return (clusters.features, clusters.sizes) if return_sizes else clusters.features

    def extra_repr(self) -> str:
        return (
            f"grid={self.grid}, iterations={self.iterations}, "
            f"temperature={self.temperature!r}, window={self.window}"
        )


class TokenReconstruction(nn.Module):
    """`reconstruct_tokens` as a layer, (B, h, w, D) to (B, H, W, D). No parameters, no state.

    Args:
        neighbors, temperature, normalize, window: see `reconstruct_tokens`.

    Raises:
        ValueError: for settings outside their range.
    """

    def __init__(
        self,
        neighbors: int = 20,
        temperature: float | str = AUTO,
        normalize: str = "l1",
        window: int | None = None,
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        if window is not None:
            check_window(window)
        if not isinstance(neighbors, int) or neighbors < 1:
            raise ValueError(f"neighbors must be a positive integer, got {neighbors!r}")
        if normalize not in NORMALIZATIONS:
            raise ValueError(f"normalize must be one of {NORMALIZATIONS}, got {normalize!r}")
        self.neighbors = neighbors
        self.temperature = temperature
        self.normalize = normalize
        self.window = window

    def forward(
        self,
        refined: Tensor,
        tokens: Tensor,
        clusters: Tensor,
        valid: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Rebuilt tokens (B, H, W, D); see `reconstruct_tokens`."""
        return reconstruct_tokens(
            refined,
            tokens,
            clusters,
            self.neighbors,
            self.temperature,
            self.normalize,
            self.window,
            valid,
            weights,
        )

    def extra_repr(self) -> str:
        return (
            f"neighbors={self.neighbors}, temperature={self.temperature!r}, "
            f"normalize={self.normalize!r}, window={self.window}"
        )
