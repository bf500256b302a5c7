"""Distances of tokens to clusters in fp32, and the scale that suits them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..tracing import is_exporting, shape_of
from .tiling import multiply_tiles

__all__ = [
    "TINY",
    "auto_scale",
    "centered",
    "in_fp32",
    "nearest_distance",
    "tiled_scores",
]

_R = TypeVar("_R")

# A temperature of 6 / (median squared distance to the nearest centroid) makes a token of median
# fit favour its nearest centroid without ignoring the next ones. 3 to 12 work about as well.
AUTO_FACTOR = 6.0
# Squared distances below this share of the tokens' variance are rounding, not structure.
_NOISE = 1e-6
# Below this no fp32 product of temperature and distance can overflow.
TINY = 1e-30


def in_fp32(function: Callable[..., _R]) -> Callable[..., _R]:
    """Run a function of tokens outside autocast, which would compute its products in half
    precision."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> _R:
        tokens = args[0] if args else next(iter(kwargs.values()))
        device = tokens.device.type
        # torch.export cannot read back its own file if there is a needless change of autocast.
        needless = is_exporting() and not torch.is_autocast_enabled(device)
        if tokens.is_meta or needless:  # "meta" has no autocast
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return run


def centered(tokens: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """fp32 tokens (B, N, C) around their mean, and the mean (B, 1, C).

    Distances do not change, but the squared norms that cancel in them become small.
    """
    tokens = tokens.float()
    if weights is None:
        mean = tokens.mean(1, keepdim=True)
    else:
        share = weights / weights.sum(1, keepdim=True).clamp_min(TINY)
        mean = (tokens * share[..., None]).sum(1, keepdim=True)
    return tokens - mean, mean


def squared_norms(x: Tensor) -> Tensor:
    """(..., C) to (...)."""
    return torch.linalg.vector_norm(x, dim=-1).square()


def tiled_scores(x: Tensor, centroids: Tensor, cells: Tensor) -> Tensor:
    """|x|^2 - |x - centroid|^2 for the clusters of each tile: larger is closer.

    Args:
        x: (B * T, R, C) tokens.
        centroids: (B * M, C or more), of which the first C channels count.
        cells: (B * T, P), see `Tiles`.

    Returns:
        (B * T, R, P).
    """
    channels = shape_of(x)[-1]
    norms = centroids[:, :channels].square().sum(-1)  # once a centroid, not once a tile
    norms = norms.index_select(0, cells.flatten()).view_as(cells)[:, None]

    def product(x: Tensor, near: Tensor, group: slice) -> Tensor:
        near = near[..., :channels].transpose(1, 2)
        return torch.baddbmm(norms[group], x, near, beta=-1, alpha=2)

    return multiply_tiles(x, centroids, cells, product)


@torch.no_grad()
def nearest_distance(x: Tensor, centroids: Tensor, nearest: Tensor) -> Tensor:
    """Squared distances (B, N) of tokens to the given clusters.

    Computed from the difference itself: expanding the square would leave rounding errors of either
    sign where a token equals its cluster.

    Args:
        x: (B, N, C).
        centroids: (B * M, C or more), of which the first C channels count.
        nearest: (B, N) index into them.
    """
    # Whole rows are taken by index_select several times as fast as by gather.
    chosen = centroids.index_select(0, nearest.flatten())[:, : shape_of(x)[-1]]
    return squared_norms(x - chosen.unflatten(0, shape_of(x)[:2]))


@torch.no_grad()
def auto_scale(distances: Tensor, x: Tensor, weights: Tensor | None = None) -> Tensor:
    """Inverse of the automatic temperature, which follows the scale of the features of each image.

    ``median / AUTO_FACTOR`` over the tokens' squared distances to their nearest centroid, so that
    scaling the features by s scales it by s**2 and affinities do not change. Tokens that sit on
    their centroid (flat regions) say nothing about the scale and are left out; where all tokens do,
    it is so small that every token joins its nearest centroid alone, which is then exact.

    Args:
        distances: (B, N) squared distance of each token to its nearest centroid.
        x: (B, N, C) tokens around their mean.
        weights: (B, N), 0 for padding; None counts all.

    Returns:
        (B,) squared distances, finite and positive.
    """
    tokens = shape_of(x)[1]
    if weights is None:
        floor = torch.linalg.vector_norm(x, dim=(1, 2)).square() * (_NOISE / tokens)
    else:
        floor = (squared_norms(x) * weights).sum(1) / weights.sum(1).clamp_min(TINY) * _NOISE
    floor = floor.clamp_min(TINY)
    informative = distances > floor[:, None]
    if weights is not None:
        informative = informative & (weights > 0)
    # The (lower) median of the informative ones, which sort after the zeros of the others.
    ordered = (distances * informative).sort(dim=1).values
    middle = (tokens - 1) - informative.sum(1, keepdim=True) // 2
    median = ordered.gather(1, middle).squeeze(1)
    return torch.maximum(median, floor) / AUTO_FACTOR
