"""Unstructured methods, which leave no grid: similar tokens become one, wherever they lie.

A method chooses which tokens become one; features, cluster sizes and positions are computed here.
In the blocks, tokens are in the order of `snake_order`, which keeps neighbours near each other.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..operators import grid_positions
from ..settings import Settings
from ..settings.spread import Spread
from ..tokens import Keys, Tokens
from ..tracing import shape_of
from .base import Method
from .matching import cluster_means, cluster_sizes, snake_order, take_rows

__all__ = ["Choose", "UnstructuredMethod", "Record", "Windows"]

#: Windows of tokens that are matched with each other where attention has none.
_WINDOW = 14


class Windows(NamedTuple):
    """The attention windows that tokens belong to.

    Attributes:
        of: (B, n) the window of each token.
        number: number of windows in an image.
        whole: whether all windows have the same number of tokens: they divide the map.
    """

    of: Tensor
    number: int
    whole: bool


#: (keys (B, n, d), cluster sizes (B, n) or None, clusters to leave, windows or None) to the cluster
#: of each token (B, n) and the number of clusters, which is close to the requested one.
Choose = Callable[[Tensor, Tensor | None, int, Windows | None], tuple[Tensor, int]]


@dataclass(frozen=True)
class Record:
    """What rebuilding needs to know about a reduction.

    Attributes:
        index: (B, n) cluster of each token.
        shape: of the tokens, (H, W) or (n,).
        offsets: (B, n, C), difference of each token from its cluster; None without RESIDUAL.
    """

    index: Tensor
    shape: tuple[int, ...]
    offsets: Tensor | None = None

    def then(self, later: Record) -> Record:
        """This reduction and a later one of its clusters, joined into one."""
        offsets = self.offsets
        if offsets is not None:
            offsets = offsets + take_rows(later.offsets, self.index)
        return Record(later.index.gather(1, self.index), self.shape, offsets)


class _Reduction(nn.Module):
    """Means of the tokens that become one, weighted by their sizes."""

    def __init__(
        self,
        settings: Settings,
        window: int | None,
        index: int,
        spread: Spread,
        choose: Choose,
        residual: bool,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.window = window
        self.index = index
        self.spread = spread
        self.choose = choose
        self.residual = residual

    def forward(self, tokens: Tokens, keys: Keys) -> tuple[Tokens, Record]:
        features, sizes, positions = tokens.features, tokens.sizes, tokens.positions
        places, shape, device = tokens.places, shape_of(features)[1:-1], features.device
        features = features.flatten(1, -2)
        batch, total, _ = shape_of(features)
        compared, side, order = keys(features), self.window or _WINDOW, None
        if len(shape) == 2:  # a map: put into an order that keeps neighbours near each other
            order, back = snake_order(shape, (side, side), device)
            compared = compared.index_select(1, order)
            sizes = None if sizes is None else sizes.flatten(1)
            # In windows, tokens have a place instead.
            followed = self.settings.positions == "clusters" or self.window is None
            if positions is None and tokens.tracked and followed:
                positions = grid_positions(*shape, device)
            if positions is not None:
                positions = positions.flatten(1, 2).expand(batch, -1, -1)
            if self.window is not None:
                places = torch.arange(total, device=device).expand(batch, -1)
        windows = None
        if self.window is not None:
            listed = places if order is None else order.expand(batch, -1)
            windows = _windows(listed, tokens.size, side)
        whole = tokens.size[0] * tokens.size[1]
        count = min(self.settings.count(self.index, whole, self.spread), total)
        listed = sizes if order is None or sizes is None else sizes.index_select(1, order)
        index, count = self.choose(compared, listed, count, windows)
        if order is not None:
            index = index.index_select(1, back)
        sizes, shares = cluster_sizes(sizes, index, count)
        clusters = cluster_means(features, index, shares, count)
        if positions is not None:
            positions = cluster_means(positions, index, shares, count)
        if places is not None:  # the place of the first of a cluster's tokens
            places = places.new_zeros(batch, count).scatter_reduce(
                1, index, places, "amin", include_self=False
            )
        offsets = None
        if self.residual:
            offsets = features - take_rows(clusters, index)
        reduced = replace(
            tokens, features=clusters, sizes=sizes, positions=positions, places=places
        )
        return reduced, Record(index, shape, offsets)


def _windows(places: Tensor, size: tuple[int, int], side: int) -> Windows:
    """The windows of ``side`` x ``side`` that contain the places of a map."""
    rows, columns = (-(-n // side) for n in size)
    row, col = places // size[1], places % size[1]
    whole = size[0] % side == size[1] % side == 0
    return Windows(row // side * columns + col // side, rows * columns, whole)


class _Rebuilding(nn.Module):
    """Every token gets the output of its cluster; with RESIDUAL, plus its difference from it."""

    def forward(self, features: Tensor, record: Record, residual: bool | None = None) -> Tensor:
        out = take_rows(features, record.index)
        if record.offsets is not None and residual is not False:
            out = out + record.offsets
        return out.unflatten(1, record.shape)


class UnstructuredMethod(Method):
    """Reduces and rebuilds by the function ``choose`` of a subclass."""

    counts = ("keep",)
    unstructured = True

    def __init__(self, settings: Settings, attention_window: int | None, index: int = 0) -> None:
        super().__init__(settings, attention_window, index)
        self.reduce = _Reduction(
            settings,
            attention_window,
            index,
            self.spread(settings),
            partial(self.choose, settings),
            self.adds_residual(settings),
        )
        self.rebuild = _Rebuilding()

    @staticmethod
    def joined(earlier: Record, later: Record) -> Record:
        return earlier.then(later)

    @staticmethod
    @abstractmethod
    def choose(
        settings: Settings, keys: Tensor, sizes: Tensor | None, count: int, windows: Windows | None
    ) -> tuple[Tensor, int]:
        """Which tokens become one; see `Choose`. ``count`` is at most n."""
