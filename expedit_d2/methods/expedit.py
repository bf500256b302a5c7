"""Expedit: local soft k-means down, k nearest clusters up (arXiv 2210.01035, section 3.2)."""

from __future__ import annotations

from torch import Tensor

from ..operators import AUTO, Clusters, cluster_tokens, reconstruct_tokens
from ..settings import METHOD_REGISTRY, Settings
from ..tracing import shape_of
from .grid import GridMethod, Record

__all__ = ["Expedit"]


# Clusters assumed to be compared with a token: 8 x 8 cells and their rim. expedit_d2.operators uses
# tiles of 4 x 4, which are compared with fewer, so the choice of BUDGET costs a little less.
_NEAR = 144


@METHOD_REGISTRY.register("expedit")
class Expedit(GridMethod):
    """The published operators; the default settings add what was found to help since."""

    reads = GridMethod.reads | {
        *("iterations", "temperature", "window", "neighbors", "neighbor_window", "normalize")
    }

    @staticmethod
    def cost(settings: Settings, tokens: float, clusters: float, channels: int) -> float:
        # A token is compared with the clusters around its own: two products in each step and two to
        # rebuild it.
        return (2 * settings.iterations + 2) * min(_NEAR, clusters) * tokens * channels

    @staticmethod
    def cluster(
        settings: Settings,
        features: Tensor,
        grid: tuple[int, int],
        weights: Tensor | None,
        positions: Tensor | None,
    ) -> Clusters:
        s = settings
        return cluster_tokens(
            features, grid, s.iterations, s.temperature or AUTO, s.window, weights, positions
        )

    @staticmethod
    def restore(settings: Settings, features: Tensor, record: Record) -> Tensor:
        s = settings
        grid = shape_of(record.clusters)[1:3]
        return reconstruct_tokens(
            features,
            record.tokens,
            record.clusters,
            min(s.neighbors, grid[0] * grid[1]),
            s.temperature or AUTO,
            s.normalize,
            s.neighbor_window or None,
            record.valid,
            record.weights,
        )
