"""Expedit: local soft k-means down, k nearest clusters up (arXiv 2210.01035, section 3.2)."""

from __future__ import annotations

from torch import Tensor

from ..operators import Clusters, cluster_tokens, reconstruct_tokens
from ..settings import Settings
from ..tracing import shape_of
from .grid import GridMethod, Record

__all__ = ["Expedit"]


class Expedit(GridMethod):
    """The published operators, with what was found to matter since as the default settings."""

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
            features, grid, s.iterations, s.temperature, s.window, weights, positions
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
            s.temperature,
            s.normalize,
            s.neighbor_window or None,
            record.valid,
            record.weights,
        )
