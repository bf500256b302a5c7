"""Maps of tokens and clusters to test the operators with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from expedit_d2.operators import (
    cluster_tokens,
    reconstruct_tokens,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest deviation as a share of the largest value."""
    assert actual.shape == expected.shape
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())


def smooth_map(batch: int, size: tuple[int, int], channels: int) -> Tensor:
    """(B, H, W, C) of unit scale: regions and some noise, as features have."""
    regions = F.interpolate(torch.randn(batch, channels, 4, 4), size=size, mode="bilinear")
    return regions.permute(0, 2, 3, 1) + 0.3 * torch.randn(batch, *size, channels)


def upsample(cells: Tensor, factor: tuple[int, int]) -> Tensor:
    """(B, h, w, C) to (B, h * fh, w * fw, C): every cell constant."""
    return cells.repeat_interleave(factor[0], 1).repeat_interleave(factor[1], 2)


def spread_clusters(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Clusters of a map, moved apart: which of two near-equal ones is the k-th is chance."""
    clusters, *_ = cluster_tokens(tokens, grid)
    return clusters + 0.2 * torch.randn_like(clusters)


def weights_of(tokens: Tensor, clusters: Tensor, **settings) -> Tensor:
    """The reconstruction's weights (B, H * W, h * w): what it makes of one-hot clusters."""
    batch, h, w, _ = clusters.shape
    one_hot = torch.eye(h * w).view(1, h, w, h * w).expand(batch, -1, -1, -1)
    return reconstruct_tokens(one_hot, tokens, clusters, **settings).flatten(1, 2)


def padding(batch: int, size: tuple[int, int]) -> Tensor:
    """1, and 0 in the last rows and columns, more of them in the later images."""
    weights = torch.ones(batch, *size)
    for index in range(batch):
        weights[index, size[0] - 3 - index :] = 0
        weights[index, :, size[1] - 2 - 3 * index :] = 0
    return weights
