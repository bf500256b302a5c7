"""Hard k-means and nearest clusters: the simplest form of clustering, for comparison.

Lloyd's algorithm (1982), with Expedit's start and windows: each token belongs to the nearest
cluster near it, and is rebuilt from the nearest one alone.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..operators import Clusters
from ..settings import METHOD_REGISTRY, Settings
from .expedit import Expedit
from .grid import GridMethod, Record

__all__ = ["Hard"]

_HARD = 1e6  # times squared distances: the softmax becomes a choice


@METHOD_REGISTRY.register("hard")
class Hard(GridMethod):
    """Soft k-means in the limit of a high temperature."""

    reads = GridMethod.reads | {"iterations", "window", "neighbor_window"}
    cost = staticmethod(Expedit.cost)

    @staticmethod
    def cluster(
        settings: Settings,
        features: Tensor,
        grid: tuple[int, int],
        weights: Tensor | None,
        positions: Tensor | None,
    ) -> Clusters:
        hard = replace(settings, method="expedit", temperature=_HARD)
        return Expedit.cluster(hard, features, grid, weights, positions)

    @staticmethod
    def restore(settings: Settings, features: Tensor, record: Record) -> Tensor:
        nearest = replace(settings, method="expedit", neighbors=1, temperature=1.0)
        return Expedit.restore(nearest, features, record)
