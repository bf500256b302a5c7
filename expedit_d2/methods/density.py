"""Density peaks: the tokens that are dense and far from denser ones are the clusters' centres.

Rodriguez and Laio (Science 2014), with the density by nearest neighbours of Du et al. (2016).
AiluRus (Li et al., NeurIPS 2023, arXiv 2311.01197) reduces tokens for dense prediction in this
way, once, after an early block; its authors add a position term, for which they published no code.
Every token joins the nearest centre, and is rebuilt from it alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..settings import METHOD_REGISTRY, Settings
from ..tracing import shape_of
from .unstructured import UnstructuredMethod, Windows

__all__ = ["Density", "density_peaks"]

_NEIGHBORS = 5


def density_peaks(keys: Tensor, count: int, neighbors: int = _NEIGHBORS) -> Tensor:
    """The cluster, 0 to count - 1, of each token: (B, n, d) to (B, n).

    Args:
        keys: compared by squared distance.
        count: clusters, 1 to n.
        neighbors: number of nearest tokens that a token's density is computed from.
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
    # A centre belongs to its own cluster, even if another centre is equal to it.
    clusters = torch.arange(count, device=keys.device).expand(batch, -1)
    return index.scatter(1, centres, clusters)


@METHOD_REGISTRY.register("density")
class Density(UnstructuredMethod):
    """Density peaks before each alpha."""

    @staticmethod
    def choose(
        settings: Settings, keys: Tensor, sizes: Tensor | None, count: int, windows: Windows | None
    ) -> tuple[Tensor, int]:
        return density_peaks(keys, count), count
