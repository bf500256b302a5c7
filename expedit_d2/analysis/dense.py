"""The two operators in dense form, as in the published code: a baseline for timing.

All pairs of tokens and clusters are computed: distances by expanding the square, an (h * w) x (H *
W) affinity whose entries outside the window are masked by a large distance, and a reconstruction by
a matrix product in which all but k weights of a token are zero. The results equal those of
`expedit_d2.operators` unless something overflows, underflows or ties.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["dense_clustering", "dense_reconstruction"]

# From the published code. fp16 cannot represent it, so it is limited to the dtype's maximum.
_FAR = 1e16


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances (B, A, C), (B, L, C) to (B, A, L)."""
    squares = a.square().sum(-1)[:, :, None] + b.square().sum(-1)[:, None, :]
    return squares - 2 * torch.einsum("bac,blc->bal", a, b)


def _outside(
    size: tuple[int, int], grid: tuple[int, int], window: int, device: torch.device
) -> Tensor:
    """(h * w, H * W), True where the cluster is outside of the window around the token's cell."""
    # Integers: the published code has labels of the features' dtype, in which they may round.
    home_row = torch.arange(size[0], device=device) * grid[0] // size[0]
    home_col = torch.arange(size[1], device=device) * grid[1] // size[1]
    rows = (torch.arange(grid[0], device=device)[:, None] - home_row).abs() > window // 2
    cols = (torch.arange(grid[1], device=device)[:, None] - home_col).abs() > window // 2
    return (rows[:, None, :, None] | cols[None, :, None, :]).flatten(2).flatten(0, 1)


def dense_clustering(
    tokens: Tensor, grid: tuple[int, int], iterations: int, temperature: float, window: int
) -> Tensor:
    """Clusters (B, h, w, C) of a token map (B, H, W, C).

    Omits the distance matrix that the published code computes after the last iteration.
    """
    x = tokens.flatten(1, 2)
    clusters = F.adaptive_avg_pool2d(tokens.permute(0, 3, 1, 2), grid).flatten(2).transpose(1, 2)
    far = min(_FAR, torch.finfo(tokens.dtype).max)
    outside = _outside(tokens.shape[1:3], grid, window, tokens.device) * far
    for _ in range(iterations):
        distances = _distances(clusters, x) + outside.to(x.dtype)
        affinity = (-temperature * distances).softmax(1)
        clusters = affinity @ x / affinity.sum(2, keepdim=True).clamp_min(1e-16)
    return clusters.unflatten(1, grid)


def dense_reconstruction(
    refined: Tensor,
    tokens: Tensor,
    clusters: Tensor,
    neighbors: int,
    temperature: float,
    normalize: str = "l1",
) -> Tensor:
    """Tokens (B, H, W, D) rebuilt from refined clusters (B, h, w, D)."""
    similarity = (-temperature * _distances(tokens.flatten(1, 2), clusters.flatten(1, 2))).exp()
    last = similarity.topk(neighbors, dim=-1).values[..., -1:]
    similarity = similarity.masked_fill(similarity < last, 0)
    weights = F.normalize(similarity, p=1 if normalize == "l1" else 2, dim=-1)
    return (weights @ refined.flatten(1, 2)).unflatten(1, tokens.shape[1:3])
