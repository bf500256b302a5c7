"""Methods that leave tokens on no grid: those that are alike become one, wherever they lie.

Each says which tokens become one; what that means for features, sizes and positions is here. On
the way through the blocks, tokens are in the order of `snake_order`: near ones are near each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, nn

from ..operators import grid_positions
from ..settings import Settings
from ..tokens import Keys, Tokens
from ..tracing import shape_of
from .matching import cluster_means, cluster_sizes, snake_order, take_rows

__all__ = ["Choose", "OffGridMethod", "Record"]

#: Windows of tokens that are matched with each other where attention has none.
_WINDOW = 14

#: (keys (B, n, d), sizes (B, n) or None, clusters to leave, group of each token (B, n) or None) to
#: the cluster of each token (B, n), 0 to clusters - 1.
Choose = Callable[[Tensor, Tensor | None, int, Tensor | None], Tensor]


@dataclass(frozen=True)
class Record:
    """What rebuilding needs to know of a reduction.

    Attributes:
        index: (B, n) cluster of each token.
        shape: of the tokens, (H, W) or (n,).
        offsets: (B, n, C), what each token was off its cluster; None without RESIDUAL.
    """

    index: Tensor
    shape: tuple[int, ...]
    offsets: Tensor | None = None

    def then(self, later: Record) -> Record:
        """This reduction and a later one of its clusters, as one."""
        offsets = self.offsets
        if offsets is not None:
            offsets = offsets + take_rows(later.offsets, self.index)
        return Record(later.index.gather(1, self.index), self.shape, offsets)


class _Reduction(nn.Module):
    """Means of the tokens that become one, weighted by what they stand for."""

    def __init__(
        self, settings: Settings, window: int | None, index: int, spread: str, choose: Choose
    ) -> None:
        super().__init__()
        self.settings = settings
        self.window = window
        self.index = index
        self.spread = spread
        self.choose = choose

    def forward(self, tokens: Tokens, keys: Keys) -> tuple[Tokens, Record]:
        shape = shape_of(tokens.features)[1:-1]
        if len(shape) == 2:
            tokens, back = self._in_order(tokens)
        features, sizes, positions = tokens.features, tokens.sizes, tokens.positions
        batch, total, _ = shape_of(features)
        whole = tokens.size[0] * tokens.size[1]
        count = min(self.settings.count(self.index, whole, self.spread), total)
        groups = None
        if self.window is not None:
            groups = _window_of(tokens.places, tokens.size, self.window)
        index = self.choose(keys(features), sizes, count, groups)
        sizes, shares = cluster_sizes(sizes, index, count)
        clusters = cluster_means(features, index, shares, count)
        offsets = None
        if self.settings.residual:
            offsets = features - take_rows(clusters, index)
        reduced = replace(
            tokens,
            features=clusters,
            sizes=sizes,
            positions=None if positions is None else cluster_means(positions, index, shares, count),
            places=tokens.places.new_empty(batch, count).scatter_(1, index, tokens.places)
            if self.window is not None
            else None,
        )
        if len(shape) == 2:
            index = index.index_select(1, back)
            offsets = None if offsets is None else offsets.index_select(1, back)
        return reduced, Record(index, shape, offsets)

    def _in_order(self, tokens: Tokens) -> tuple[Tokens, Tensor]:
        """The tokens of a map as a list (B, N, C), and where each place of the map is in it."""
        side = self.window or _WINDOW
        order, back = snake_order(tokens.size, (side, side), tokens.features.device)
        batch = shape_of(tokens.features)[0]
        positions = tokens.positions
        if positions is None and tokens.tracked and self.settings.positions == "clusters":
            positions = grid_positions(*tokens.size, order.device)

        def listed(x: Tensor | None, dims: int) -> Tensor | None:
            if x is None:
                return None
            return x.flatten(1, 2).index_select(1, order).expand(batch, *[-1] * dims)

        return replace(
            tokens,
            features=listed(tokens.features, 2),
            sizes=listed(tokens.sizes, 1),
            positions=listed(positions, 2),
            places=order.expand(batch, -1),
        ), back


def _window_of(places: Tensor, size: tuple[int, int], window: int) -> Tensor:
    """The attention window that each place of a map lies in."""
    row, col = places // size[1], places % size[1]
    return row // window * -(-size[1] // window) + col // window


class _Rebuilding(nn.Module):
    """Every token gets what became of its cluster, with RESIDUAL plus what it was off it."""

    def forward(self, features: Tensor, record: Record, residual: bool | None = None) -> Tensor:
        out = take_rows(features, record.index)
        if record.offsets is not None and residual is not False:
            out = out + record.offsets
        return out.unflatten(1, record.shape)


class OffGridMethod(nn.Module):
    """Both directions, by the function ``choose`` of a subclass."""

    #: How one KEEP is spread over several alphas, see `Settings.count`; None: as SCHEDULE says.
    spread: str | None = None

    def __init__(self, settings: Settings, attention_window: int | None, index: int = 0) -> None:
        super().__init__()
        spread = self.spread or settings.schedule
        self.reduce = _Reduction(
            settings, attention_window, index, spread, partial(self.choose, settings)
        )
        self.rebuild = _Rebuilding()

    @staticmethod
    def choose(
        settings: Settings, keys: Tensor, sizes: Tensor | None, count: int, groups: Tensor | None
    ) -> Tensor:
        """Which tokens become one; see `Choose`. ``count`` is at most n."""
        raise NotImplementedError
