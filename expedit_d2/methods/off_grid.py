"""Methods that leave tokens on no grid: those that are alike become one, wherever they lie.

Each says which tokens become one; what that means for features, sizes and positions is here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from torch import Tensor, nn

from ..operators import grid_positions, shape_of
from ..settings import Settings
from ..tokens import Keys, Tokens
from .matching import take_rows

__all__ = ["Clustering", "OffGridMethod", "Record"]


class Clustering(Protocol):
    """Which of n tokens become which of k clusters."""

    def sizes(self, sizes: Tensor) -> Tensor:
        """What the clusters stand for (B, k), of what the tokens do (B, n)."""

    def mean(self, x: Tensor, sizes: Tensor) -> Tensor:
        """Means over the clusters, weighted by ``sizes`` (B, n): (B, n, D) to (B, k, D)."""

    def index(self) -> Tensor:
        """(B, n): the cluster of each token."""


#: (keys (B, n, d), sizes (B, n), clusters to leave, shape of the tokens: (H, W) or (n,)).
Choose = Callable[[Tensor, Tensor, int, tuple[int, ...]], Clustering]


@dataclass(frozen=True)
class Record:
    """What rebuilding needs to know of a reduction.

    Attributes:
        index: (B, n) cluster of each token.
        shape: of the tokens, (H, W) or (n,).
    """

    index: Tensor
    shape: tuple[int, ...]

    def then(self, later: Record) -> Record:
        """This reduction and a later one of its clusters, as one."""
        return Record(later.index.gather(1, self.index), self.shape)


class _Reduction(nn.Module):
    """Means of the tokens that become one, weighted by what they stand for."""

    def __init__(self, settings: Settings, index: int, spread: str, choose: Choose) -> None:
        super().__init__()
        self.settings = settings
        self.index = index
        self.spread = spread
        self.choose = choose

    def forward(self, tokens: Tokens, keys: Keys) -> tuple[Tokens, Record]:
        shape = shape_of(tokens.features)[1:-1]
        features = tokens.features.flatten(1, -2)
        batch, total, _ = shape_of(features)
        sizes, positions = tokens.sizes, tokens.positions
        compared = keys(features).float()
        if sizes is None:
            sizes = compared.new_ones(batch, total)
        if positions is None:
            positions = grid_positions(*shape, features.device)
        sizes = sizes.flatten(1)
        positions = positions.flatten(-len(shape) - 1, -2).expand(batch, -1, -1)
        whole = tokens.size[0] * tokens.size[1]
        count = min(self.settings.count(self.index, whole, self.spread), total)
        clustering = self.choose(compared, sizes, count, shape)
        reduced = replace(
            tokens,
            features=clustering.mean(features, sizes),
            sizes=clustering.sizes(sizes),
            positions=clustering.mean(positions, sizes),
        )
        return reduced, Record(clustering.index(), shape)


class _Rebuilding(nn.Module):
    """Every token gets what became of its cluster.

    RESIDUAL does not matter: adding a token's distance from its cluster, as it was when they were
    merged, changes the labels of one pixel in two thousand.
    """

    def forward(self, features: Tensor, record: Record, residual: bool | None = None) -> Tensor:
        return take_rows(features, record.index).unflatten(1, record.shape)


class OffGridMethod(nn.Module):
    """Both directions, by the function ``choose`` of a subclass."""

    #: How one KEEP is spread over several alphas, see `Settings.count`; None: as SCHEDULE says.
    spread: str | None = None

    def __init__(self, settings: Settings, attention_window: int | None, index: int = 0) -> None:
        super().__init__()
        spread = self.spread or settings.schedule
        self.reduce = _Reduction(settings, index, spread, partial(self.choose, settings))
        self.rebuild = _Rebuilding()

    @staticmethod
    def choose(
        settings: Settings, keys: Tensor, sizes: Tensor, count: int, shape: tuple[int, ...]
    ) -> Clustering:
        """Which tokens become one; see `Choose`. ``count`` is at most n, and a wish."""
        raise NotImplementedError
