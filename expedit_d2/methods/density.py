"""Density peaks: the tokens that are dense and far from denser ones are the clusters' centres.

Rodriguez and Laio (Science 2014), with the density by nearest neighbours of Du et al. (2016).
AiluRus (Li et al., NeurIPS 2023, arXiv 2311.01197) reduces tokens for dense prediction so, once,
behind an early block; its authors add a weight of position, for which there is no published code.
Every token joins the centre that is nearest, and is rebuilt from it alone.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..operators import grid_positions, shape_of
from ..settings import Settings
from ..tokens import Keys, Tokens
from .merge import Record, Unmerge

__all__ = ["Density", "density_peaks"]

_NEIGHBORS = 5


def density_peaks(keys: Tensor, count: int, neighbors: int = _NEIGHBORS) -> Tensor:
    """The cluster, 0 to count - 1, of each token: (B, n, d) to (B, n).

    Args:
        keys: compared by squared distance.
        count: clusters, 1 to n.
        neighbors: nearest others that a token's density is taken from.
    """
    keys = keys.float()
    batch, total, _ = shape_of(keys)
    distance = torch.cdist(keys, keys).square()  # (B, n, n)
    near = distance.topk(min(neighbors + 1, total), largest=False).values[..., 1:]
    mean = near.mean(-1)
    # Scaled by its mean over the image, which changes no order and keeps exp from underflowing.
    density = (-mean / mean.mean(1, keepdim=True).clamp_min(1e-30)).exp()
    denser = density[:, None, :] > density[:, :, None]
    farthest = distance.flatten(1).amax(1)[:, None]
    gap = distance.masked_fill(~denser, torch.inf).amin(-1)
    gap = torch.minimum(gap, farthest)  # nothing is denser than the peak
    centres = (density * gap).topk(count).indices
    to_centres = distance.gather(2, centres[:, None].expand(-1, total, -1))
    index = to_centres.argmin(-1)
    # A centre is its own, also where another one is equal to it.
    clusters = torch.arange(count, device=keys.device).expand(batch, -1)
    return index.scatter(1, centres, clusters)


class _Clustering(nn.Module):
    def __init__(self, settings: Settings, index: int) -> None:
        super().__init__()
        self.settings = settings
        self.index = index

    def forward(self, tokens: Tokens, keys: Keys) -> tuple[Tokens, Record]:
        shape = shape_of(tokens.features)[1:-1]
        features = tokens.features.flatten(1, -2)
        batch, total, _ = shape_of(features)
        count = self.settings.count(self.index, tokens.size[0] * tokens.size[1], "equal")
        index = density_peaks(keys(features), min(count, total))
        sizes, positions = tokens.sizes, tokens.positions
        if sizes is None:
            sizes = features.new_ones(batch, total, dtype=torch.float32)
        if positions is None:
            positions = grid_positions(*shape, features.device)
        sizes = sizes.flatten(1)
        positions = positions.flatten(-len(shape) - 1, -2).expand(batch, -1, -1)
        fewer = sizes.new_zeros(batch, min(count, total)).scatter_add(1, index, sizes)
        shares = sizes / fewer.gather(1, index)

        def mean(x: Tensor) -> Tensor:
            weighted = x.float() * shares[..., None]
            sums = weighted.new_zeros(batch, shape_of(fewer)[1], shape_of(x)[2])
            return sums.scatter_add(1, index[..., None].expand_as(weighted), weighted)

        reduced = replace(
            tokens,
            features=mean(features).to(features.dtype),
            sizes=fewer,
            positions=mean(positions),
        )
        return reduced, Record(index, shape)


class Density(nn.Module):
    """Density peaks before each alpha."""

    def __init__(self, settings: Settings, attention_window: int | None, index: int = 0) -> None:
        super().__init__()
        self.reduce = _Clustering(settings, index)
        self.rebuild = Unmerge()
