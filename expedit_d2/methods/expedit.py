"""Expedit: local soft k-means down, k nearest clusters up (arXiv 2210.01035, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..operators import cluster_tokens, grid_positions, reconstruct_tokens, shape_of
from ..settings import Settings
from ..tokens import Tokens
from ..windows import partition, unpartition

__all__ = ["Expedit"]


@dataclass(frozen=True)
class Record:
    """What rebuilding needs to know of a clustering; everything is per window with SCOPE window.

    Attributes:
        tokens: (B, H, W, C) as they went in.
        clusters: (B, h, w, C) as they came out.
        weights: (B, H, W) or None, what each token stood for; 0 for padding.
        valid: (B, h, w) bool or None.
        size: (H, W) of the whole map.
    """

    tokens: Tensor
    clusters: Tensor
    weights: Tensor | None
    valid: Tensor | None
    size: tuple[int, int]


class _Clustering(nn.Module):
    """Tokens of a map to tokens of a smaller grid, over the map or window by window."""

    def __init__(self, settings: Settings, attention_window: int | None) -> None:
        super().__init__()
        self.settings = settings
        self.window = (attention_window,) * 2 if settings.scope == "window" else None

    def forward(self, tokens: Tokens) -> tuple[Tokens, Record]:
        features, weights, positions = tokens.features, tokens.sizes, tokens.positions
        size, s = shape_of(features)[1:3], self.settings
        padded = False
        if self.window is not None:
            # An earlier clustering has shrunken the windows, but not changed their number.
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
        clusters = cluster_tokens(
            features, grid, s.iterations, s.temperature, s.window, weights, positions
        )
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


class _Reconstruction(nn.Module):
    """Features of the clusters back to features of the map."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, features: Tensor, record: Record, residual: bool | None = None) -> Tensor:
        s = self.settings
        residual = s.residual if residual is None else residual
        grid = shape_of(record.clusters)[1:3]
        refined = features if shape_of(features)[1:3] == grid else partition(features, grid)
        if residual:
            refined = refined - record.clusters
        out = reconstruct_tokens(
            refined,
            record.tokens,
            record.clusters,
            min(s.neighbors, grid[0] * grid[1]),
            s.temperature,
            s.normalize,
            s.neighbor_window or None,
            record.valid,
            record.weights,
        )
        if residual:
            out = out + record.tokens
        windowed = shape_of(record.tokens)[1:3] != record.size
        return unpartition(out, record.size) if windowed else out


class Expedit(nn.Module):
    """The published operators, with what was found to matter since as the default settings."""

    def __init__(self, settings: Settings, attention_window: int | None) -> None:
        super().__init__()
        if settings.scope == "window":
            if not attention_window:
                raise ValueError('SCOPE "window" needs a model with window attention')
            settings.grid_for(attention_window, attention_window)
        self.reduce = _Clustering(settings, attention_window)
        self.rebuild = _Reconstruction(settings)
