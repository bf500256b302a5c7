"""Methods that leave a grid: over the whole map, or over each attention window separately.

A method provides two operators on plain maps; windows and padding are handled here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..operators import Clusters, grid_positions
from ..settings import Settings
from ..tokens import Keys, Tokens
from ..tracing import shape_of
from ..windows import partition, unpartition
from .base import Method

__all__ = ["GridMethod", "Record"]

#: (features (B, H, W, C), grid (h, w), weights (B, H, W) or None, positions (B, H, W, 2) or None)
#: to clusters.
Reduce = Callable[[Tensor, tuple[int, int], Tensor | None, Tensor | None], Clusters]
#: (features of the clusters (B, h, w, D), record) to features of the tokens (B, H, W, D).
Restore = Callable[[Tensor, "Record"], Tensor]


@dataclass(frozen=True)
class Record:
    """What rebuilding needs to know about a clustering; everything is per window with SCOPE window.

    Attributes:
        tokens: (B, H, W, C), the input.
        clusters: (B, h, w, C), the output.
        weights: (B, H, W) or None, the size of each token; 0 for padding.
        valid: (B, h, w) bool or None.
        size: (H, W) of the whole map.
    """

    tokens: Tensor
    clusters: Tensor
    weights: Tensor | None
    valid: Tensor | None
    size: tuple[int, int]


class _Reduction(nn.Module):
    """Tokens of a map to tokens of a smaller grid, over the map or window by window."""

    def __init__(self, settings: Settings, attention_window: int | None, operator: Reduce) -> None:
        super().__init__()
        self.settings = settings
        self.operator = operator
        self.window = (attention_window,) * 2 if settings.scope == "window" else None

    def forward(self, tokens: Tokens, keys: Keys | None = None) -> tuple[Tokens, Record]:
        # Detectron2's ViT leaves channels first in memory, which makes every read of a row strided.
        features = tokens.features.contiguous()
        weights, positions = tokens.sizes, tokens.positions
        size, s = shape_of(features)[1:3], self.settings
        padded = False
        if self.window is not None:
            # An earlier clustering has made the windows smaller, but not changed their number.
            count = [-(-span // w) for span, w in zip(tokens.span, self.window, strict=True)]
            window = self.window
            if tokens.sizes is not None:
                window = tuple(side // n for side, n in zip(size, count, strict=True))
            padded = tokens.valid is not None or any(
                side % w for side, w in zip(size, window, strict=True)
            )
            if padded and weights is None:
                weights = features.new_ones(features.shape[:3], dtype=torch.float32)
            if positions is None:  # of padding too
                whole = (n * w for n, w in zip(count, window, strict=True))
                positions = grid_positions(*whole, features.device)
            positions = positions.expand(features.shape[0], -1, -1, -1)
            features, positions = partition(features, window), partition(positions, window)
            if weights is not None:
                weights = partition(weights[..., None], window)[..., 0]
        grid = s.grid_for(*shape_of(features)[1:3])
        clusters = self.operator(features, grid, weights, positions)
        valid = None
        if padded:
            valid = F.adaptive_max_pool2d(weights[:, None], grid)[:, 0] > 0
        record = Record(features, clusters.features, weights, valid, size)
        reduced = replace(
            tokens,
            features=clusters.features,
            sizes=clusters.sizes,
            positions=clusters.positions if s.positions == "clusters" else None,
            valid=valid,
        )
        if self.window is None:
            return reduced, record

        whole = tuple(n * g for n, g in zip(count, grid, strict=True))

        def to_map(x: Tensor) -> Tensor:
            return unpartition(x, whole) if x.dim() == 4 else to_map(x[..., None])[..., 0]

        return replace(
            reduced,
            features=to_map(reduced.features),
            span=tuple(n * w for n, w in zip(count, self.window, strict=True)),
            sizes=to_map(reduced.sizes),
            positions=None if reduced.positions is None else to_map(reduced.positions),
            valid=None if valid is None else to_map(valid),
        ), record


class _Rebuilding(nn.Module):
    """Features of the clusters back to features of the map."""

    def __init__(self, operator: Restore, residual: bool) -> None:
        super().__init__()
        self.operator = operator
        self.residual = residual

    def forward(self, features: Tensor, record: Record, residual: bool | None = None) -> Tensor:
        if residual is None:
            residual = self.residual
        grid = shape_of(record.clusters)[1:3]
        refined = features if shape_of(features)[1:3] == grid else partition(features, grid)
        if residual:
            refined = refined - record.clusters
        out = self.operator(refined, record)
        if residual:
            out = out + record.tokens
        windowed = shape_of(record.tokens)[1:3] != record.size
        return unpartition(out, record.size) if windowed else out


class GridMethod(Method):
    """Reduces and rebuilds by the operators ``cluster`` and ``restore`` of a subclass."""

    counts = ("grid", "ratio")
    residual = True
    reads = Method.reads | {"scope"}

    def __init__(self, settings: Settings, attention_window: int | None, index: int = 0) -> None:
        super().__init__(settings, attention_window, index)
        if settings.scope == "window":
            if not attention_window:
                raise ValueError('SCOPE "window" needs a model with window attention')
            settings.grid_for(attention_window, attention_window)
        self.reduce = _Reduction(settings, attention_window, partial(self.cluster, settings))
        self.rebuild = _Rebuilding(partial(self.restore, settings), self.adds_residual(settings))

    @staticmethod
    @abstractmethod
    def cluster(
        settings: Settings,
        features: Tensor,
        grid: tuple[int, int],
        weights: Tensor | None,
        positions: Tensor | None,
    ) -> Clusters:
        """Tokens (B, H, W, C) to clusters on a grid.

        Args:
            settings: settings of the method.
            features: (B, H, W, C), of a map or of each window.
            grid: clusters (h, w).
            weights: (B, H, W), the size of each token, 0 for padding; None: one each.
            positions: (B, H, W, 2), rows and columns of the tokens; None: their places in the map.
        """

    @staticmethod
    @abstractmethod
    def restore(settings: Settings, features: Tensor, record: Record) -> Tensor:
        """Features of clusters (B, h, w, D) to features of tokens (B, H, W, D)."""
