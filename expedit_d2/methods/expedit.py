"""Expedit: local soft k-means down, k nearest clusters up (arXiv 2210.01035, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..operators import cluster_tokens, reconstruct_tokens, shape_of
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
        features, weights, s = tokens.features, tokens.sizes, self.settings
        size = shape_of(features)[1:3]
        valid = None
        if self.window is not None:
            padded = size[0] % self.window[0] or size[1] % self.window[1]
            if padded and weights is None:
                weights = features.new_ones(features.shape[:3], dtype=torch.float32)
            features = partition(features, self.window)
            if weights is not None:
                weights = partition(weights[..., None], self.window)[..., 0]
        grid = s.grid_for(*shape_of(features)[1:3])
        clusters, sizes = cluster_tokens(
            features, grid, s.iterations, s.temperature, s.window, weights
        )
        if self.window is not None and padded:
            valid = F.adaptive_max_pool2d(weights[:, None], grid)[:, 0] > 0
        record = Record(features, clusters, weights, valid, size)
        if self.window is None:
            return replace(tokens, features=clusters, sizes=sizes), record

        windows = [-(-side // w) for side, w in zip(size, self.window, strict=True)]
        whole = (windows[0] * grid[0], windows[1] * grid[1])

        def to_map(x: Tensor | None) -> Tensor | None:
            return None if x is None else unpartition(x[..., None], whole)[..., 0]

        span = (windows[0] * self.window[0], windows[1] * self.window[1])
        features = unpartition(clusters, whole)
        return Tokens(features, tokens.size, span, to_map(sizes), to_map(valid)), record


class _Reconstruction(nn.Module):
    """Features of the clusters back to features of the map."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, features: Tensor, record: Record) -> Tensor:
        s = self.settings
        grid = shape_of(record.clusters)[1:3]
        refined = features if shape_of(features)[1:3] == grid else partition(features, grid)
        if s.residual:
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
        if s.residual:
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
