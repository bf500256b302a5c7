"""Token clustering: a few steps of local soft k-means (arXiv 2210.01035, section 3.2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..tracing import cached, shape_of
from .checks import AUTO, check_grid, check_temperature, check_window
from .distances import (
    TINY,
    auto_scale,
    centered,
    in_fp32,
    nearest_distance,
    tiled_scores,
)
from .maps import adaptive_pool, grid_positions
from .tiling import MASKED_LOGIT, sum_into_clusters, tile

__all__ = ["Clusters", "TokenClustering", "cluster_tokens"]

# Largest product of temperature and squared distance: already a hard assignment, and far from
# overflow.
_MAX_LOGIT = 1e30


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


@cached
def _ones_and_places(height: int, width: int, device: torch.device) -> Tensor:
    """What the tokens of a map carry, (1, H, W, 4)."""
    return _with_one(grid_positions(height, width, device))


def _with_one(positions: Tensor) -> Tensor:
    """What tokens at (B, H, W, 2) carry besides their channels: one, row, column, zero.

    Sums over tokens then include the size and the position of a cluster. The zero keeps rows
    aligned in memory.
    """
    one = positions.new_ones((1, 1, 1, 1)).expand(*shape_of(positions)[:-1], 1)
    return torch.cat([one, positions, torch.zeros_like(one)], dim=-1)


@in_fp32
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
    flat = None if weights is None else weights.flatten(1).float()
    x, mean = centered(tokens.flatten(1, 2), flat)
    if positions is None:
        more = _ones_and_places(height, width, tokens.device)
    else:
        more = _with_one(positions.float())
    more = more.expand(batch, -1, -1, -1).flatten(1, 2)
    carried = torch.cat([x, more], dim=-1)  # (B, N, C + 4)
    x = carried[..., :channels]

    tiles = tile((height, width), tuple(grid), window // 2, batch, tokens.device)
    tiled = tiles.take(carried).mul_(tiles.real)  # (B, T, R, C + 4)
    centroids = adaptive_pool(carried.unflatten(1, (height, width)), grid)
    counts, mask = None, tiles.mask
    if flat is not None:
        counts = tiles.take(flat[..., None])  # (B, T, R, 1) tokens that each one stands for
        # The content of padding does not count.
        tiled = tiled.masked_fill(counts == 0, 0)
        total = adaptive_pool(flat.view(batch, height, width, 1), grid)
        means = adaptive_pool((x * flat[..., None]).unflatten(1, (height, width)), grid)
        # Positions of cells are not weighted: cells of padding have a position too.
        centroids = torch.cat([means / total.clamp_min(TINY), centroids[..., channels:]], dim=-1)
        # A cell of padding alone is not a candidate for a token (padding itself joins nothing).
        empty = (total <= 0).flatten().take(tiles.cells).unflatten(0, (batch, -1))  # (B, T, P)
        mask = mask.masked_fill(empty[:, :, None] & (counts > 0), MASKED_LOGIT)
    centroids = centroids.flatten(0, 2)  # (B * M, C + 4), like all that follow

    tiled = tiled.flatten(0, 1)
    seen = tiled[..., :channels]
    scale = None if temperature == AUTO else _scale(temperature, seen, batch)
    for _ in range(iterations):
        score = tiled_scores(seen, centroids, tiles.cells).unflatten(0, (batch, -1))
        if scale is None:
            best = (score.detach() + mask).argmax(-1).flatten(0, 1)
            best = tiles.put(tiles.cells.gather(1, best).unflatten(0, (batch, -1)))
            scale = auto_scale(nearest_distance(x, centroids, best), x, flat).view(-1, 1, 1, 1)
        affinity = torch.addcdiv(mask, score, scale).softmax(-1)  # (B, T, R, P)
        if counts is not None:
            affinity = affinity * counts
        # The tiny weight of its old place keeps a cluster that no token joins in place.
        sums = sum_into_clusters(affinity.flatten(0, 1), tiled, tiles.cells, centroids * TINY)
        sizes = sums[:, channels : channels + 1]
        centroids = sums / sizes
    sizes = (sizes - TINY).view(batch, *grid)
    centroids = centroids.unflatten(0, (batch, *grid))
    features = centroids[..., :channels] + mean[:, None]
    positions = centroids[..., channels + 1 : channels + 3]
    return Clusters(features.to(tokens.dtype), sizes, positions)


@torch.no_grad()
def _scale(temperature: float, x: Tensor, batch: int) -> Tensor:
    """The inverse of a temperature, (B, 1, 1, 1), or the smallest at which nothing overflows.

    Args:
        temperature: the requested one.
        x: (B * T, R, C) tokens around their mean.
        batch: B.
    """
    spread = torch.linalg.vector_norm(x.unflatten(0, (batch, -1)), dim=(1, 2, 3), keepdim=True)
    return (spread.square() / _MAX_LOGIT).clamp_min(min(max(1 / temperature, 1e-37), 1e37))


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
