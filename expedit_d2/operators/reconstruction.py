"""Token reconstruction: each token from its nearest clusters (arXiv 2210.01035, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..tracing import cached, shape_of
from .checks import AUTO, NORMALIZATIONS, check_temperature, check_window
from .distances import auto_scale, centered, in_fp32, nearest_distance, tiled_scores
from .tiling import MASKED_LOGIT, Tiles, multiply_tiles, tile

__all__ = ["TokenReconstruction", "reconstruct_tokens"]

# The highest temperature that fits fp32.
_MAX_TEMPERATURE = 1e38


def _normalize(similarity: Tensor, normalize: str) -> Tensor:
    """Weights from log similarities over the last axis: they sum to one, or have unit L2 norm.

    Computed in log space, so that similarities too small for the type still give weights.
    """
    if normalize == "l1":
        return similarity.softmax(-1)
    return (similarity - 0.5 * (2 * similarity).logsumexp(-1, keepdim=True)).exp()


@in_fp32
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
        clusters: (B, h, w, C) clusters that the clustering returned.
        neighbors: how many clusters a token is rebuilt from.
        temperature: multiplies the squared distances; ``"auto"`` follows the features' scale.
        normalize: ``"l1"``, weights sum to one (the paper), or ``"l2"``, weights have unit L2
            norm (the published code).
        window: look for neighbors only within this odd side, in cells, around the token's home
            cell; None looks at all clusters, as published.
        valid: optional (B, h, w) bool, False for clusters that stand for no token.
        weights: optional (B, H, W), 0 for padding, which does not count for the automatic
            temperature.

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
    x, mean = centered(tokens.flatten(1, 2), weights)
    centroids = clusters.flatten(1, 2).float() - mean
    values = refined.flatten(1, 2).float()
    keep = None if valid is None else valid.flatten(1)

    def weigh(best: Tensor, nearest: Callable[[], Tensor]) -> Tensor:
        """Scores (B, ..., k), the best first, to weights; the nearest clusters are (B, N)."""
        # Never above 0, so that nothing overflows.
        below = best - best[..., :1].detach()
        if temperature != AUTO:
            return _normalize(below * min(temperature, _MAX_TEMPERATURE), normalize)
        distances = nearest_distance(x, centroids.flatten(0, 1), nearest())
        scale = auto_scale(distances, x, weights)
        return _normalize(below / scale.view(-1, *[1] * (best.dim() - 1)), normalize)

    if window is None:
        out = _rebuild_from_all(values, x, centroids, keep, neighbors, weigh)
    else:
        tiles = tile(size, grid, window // 2, shape_of(tokens)[0], tokens.device)
        out = _rebuild_from_window(values, x, centroids, keep, neighbors, weigh, tiles)
    return out.to(refined.dtype).unflatten(1, size)


# (scores (B, ..., k), how to get the index of the nearest among the clusters of all images (B, N))
# to weights (B, ..., k)
_Weigh = Callable[[Tensor, Callable[[], Tensor]], Tensor]


def _rebuild_from_all(
    values: Tensor, x: Tensor, centroids: Tensor, keep: Tensor | None, neighbors: int, weigh: _Weigh
) -> Tensor:
    """Neighbors among all M clusters, (B, N, D)."""
    norms = centroids.square().sum(-1)[:, None]
    score = torch.baddbmm(norms, x, centroids.transpose(1, 2), beta=-1, alpha=2)  # (B, N, M)
    if keep is not None:
        score = score.masked_fill(~keep[:, None], MASKED_LOGIT)
    best, index = score.topk(neighbors, dim=-1)
    batch, total, channels = shape_of(values)
    if batch > 1:
        index = index + _first_of_image(batch, total, index.device)
    weights = weigh(best, lambda: index[..., 0])
    # Each token sums its k clusters in place: no (N, k, D) tensor.
    out = F.embedding_bag(
        index.flatten(0, 1),
        values.flatten(0, 1),
        per_sample_weights=weights.flatten(0, 1),
        mode="sum",
    )
    return out.view(batch, -1, channels)


@cached
def _first_of_image(batch: int, total: int, device: torch.device) -> Tensor:
    """(B, 1, 1) index of the first cluster of each image, with ``total`` per image."""
    return torch.arange(batch, device=device)[:, None, None] * total


def _rebuild_from_window(
    values: Tensor,
    x: Tensor,
    centroids: Tensor,
    keep: Tensor | None,
    neighbors: int,
    weigh: _Weigh,
    tiles: Tiles,
) -> Tensor:
    """Neighbors among the clusters near a token's home cell, (B, N, D)."""
    batch = shape_of(x)[0]
    score = tiled_scores(tiles.take(x).flatten(0, 1), centroids.flatten(0, 1), tiles.cells)
    score = score.unflatten(0, (batch, -1)) + tiles.mask  # (B, T, R, P)
    if keep is not None:
        hidden = ~keep.flatten().take(tiles.cells).unflatten(0, (batch, -1))  # (B, T, P)
        score = score.masked_fill(hidden[:, :, None], MASKED_LOGIT)
    best, index = score.topk(min(neighbors, shape_of(score)[-1]), dim=-1)

    def nearest() -> Tensor:
        cells = tiles.cells.gather(1, index[..., 0].flatten(0, 1))
        return tiles.put(cells.unflatten(0, (batch, -1)))

    weights = torch.zeros_like(score).scatter_(-1, index, weigh(best, nearest))
    out = multiply_tiles(
        weights.flatten(0, 1),
        values.flatten(0, 1),
        tiles.cells,
        lambda weights, near, _: weights @ near,
    )
    return tiles.put(out.unflatten(0, (batch, -1)))


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
