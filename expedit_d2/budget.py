"""``BUDGET``: from a share of the blocks' GFLOPs to alpha and counts, by rules that were measured.

- METHOD "merge": a few merges in the first blocks (`Host.merges`), for the share of tokens that
  meets the budget. Four with two rounds of matching keep as much as one before each of the first
  three quarters of the blocks, with far fewer kernels.
- Methods that leave a grid: few clusters late keep more than many clusters early, until they become
  too few. So alpha is the latest one at which the budget is met with clusters not fewer than a
  share of the tokens that the family bears (`Host.latest`, `Host.least`).

Costs are those of products, by shapes alone and the operators' about, at the size that the
transformer was made for. On larger images attention has a larger part, and somewhat more is saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from .adapters import Host
from .settings import OFF_GRID, Settings, spread_share

__all__ = ["Costs", "within_budget"]


# Tokens that one is matched with, about: half of a run, in two rounds.
_MATCHED = 256
# Clusters that a token is reckoned to meet: 8 x 8 cells and their rim. Tiles of 4 x 4, as
# expedit_d2.operators has them, meet fewer, so what is chosen costs a little less than its budget.
_NEAR = 144


@dataclass(frozen=True)
class Costs:
    """Multiply-adds of the blocks of a container.

    Attributes:
        linear: of a block's linear layers, for each token.
        attention: those of its attention, of ``linear``.
        channels: width of its attention.
        tokens: of the map.
        windows: tokens in each block's attention windows; None where it is global.
        padded: tokens of the map with the padding of the windows.
        size: (H, W) of the map.
        heads: of attention with decomposed relative positions; 0 without these.
    """

    linear: int
    attention: int
    channels: int
    tokens: int
    windows: tuple[int | None, ...]
    padded: int
    size: tuple[int, int]
    heads: int = 0

    @classmethod
    def of(cls, host: Host) -> Costs:
        """Of a host's blocks at its nominal size."""
        block = next(iter(host.blocks.children()))
        costs, attention = host.costs(block), getattr(block, "attn", None)
        relative = getattr(attention, "use_rel_pos", False)
        tokens = host.size[0] * host.size[1]
        sides = [getattr(b, "window_size", 0) for b in host.blocks.children()]
        side = host.window or 1
        return cls(
            linear=costs.linear,
            attention=costs.attention,
            channels=costs.channels,
            tokens=tokens,
            windows=tuple(side * side if side else None for side in sides),
            padded=math.prod(-(-n // side) * side for n in host.size),
            size=host.size,
            heads=attention.num_heads if relative else 0,
        )

    @property
    def total(self) -> float:
        return sum(self._block(window, 1, 1) for window in self.windows)

    def _block(self, window: int | None, entering: float, share: float) -> float:
        """A block on a grid; its attention runs on a share of the tokens, its MLP on another."""
        tokens = (self.padded if window else self.tokens) * entering
        keys = entering * (window or self.tokens)
        attention = tokens * (self.attention + 2 * keys * self.channels)
        if self.heads:  # a product with the rows of both tables
            attention += tokens * self._sides(window) * self.channels
        return attention + self.tokens * share * (self.linear - self.attention)

    def _slots(self, window: int | None, entering: float, share: float) -> float:
        """The same off the grid, where windows keep a place for every token."""
        linear = entering * self.attention + share * (self.linear - self.attention)
        tokens, keys = self.padded, window
        if window is None:
            tokens = keys = self.tokens * entering
        attention = 2 * keys * self.channels
        if self.heads:  # see `expedit_d2.attention.position_term`
            attention += self._sides(window) * (2 * self.channels + keys * self.heads)
        return self.tokens * linear + tokens * attention

    def _sides(self, window: int | None) -> float:
        """Rows and columns of an attention, added up."""
        return 2 * window**0.5 if window else sum(self.size)

    def clustered(self, alpha: int, share: float, products: float) -> float:
        """Blocks from alpha on run on a share of the tokens, on a grid.

        Args:
            products: of the operators, for each token and channel.
        """
        shares = [1 if index < alpha else share for index in range(len(self.windows))]
        blocks = sum(self._block(w, s, s) for w, s in zip(self.windows, shares, strict=True))
        return blocks + products * self.tokens * self.channels

    def merged(
        self, keep: float, alphas: Sequence[int], spread: str, inside: bool, matched: int | None
    ) -> float:
        """A merge before each of some blocks, or inside of it; matching included.

        Args:
            keep: share of the tokens that is left in the end.
            alphas: the blocks that merge.
            spread: see `Settings.count`.
            inside: whether tokens are merged between attention and MLP.
            matched: keys that a token is compared with; None: half of all.
        """
        dim = self.channels // 12 or 1  # of a head, about; matching is a percent
        total, entering, before = 0.0, 1.0, True
        for index, window in enumerate(self.windows):
            left = entering
            if index in alphas:
                before = False
                left = spread_share(keep, alphas.index(index), len(alphas), spread)
                tokens = self.tokens * entering
                pairs = tokens / 2 * (matched or tokens / 2)
                total += dim * (tokens * self.channels + pairs)
            cost = self._block if before or (inside and entering == 1) else self._slots
            total += cost(window, entering if inside else left, left)
            entering = left
        return total


def _least(meets: Callable[[float], bool]) -> float:
    """The boundary in (0, 1) of what is true below it."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if meets(middle) else (low, middle)
    return low


def within_budget(settings: Settings, host: Host) -> Settings:
    """Settings with alpha and counts in the place of their budget.

    Args:
        settings: with ``budget``; their method, if given, is kept, and so is all else.
        host: the transformer, as `find_host` gives it.

    Raises:
        ValueError: if no setting meets the budget; names the least one that can be met.
    """
    method = settings.method or ("merge" if host.off_grid else "expedit")
    if method in ("merge", "tome"):
        return _merging(settings, host, method)
    return _clustering(settings, host, method)


def _merging(settings: Settings, host: Host, method: str) -> Settings:
    stage, first = host.longest_stage
    costs, elsewhere, whole = _costs(host, stage)
    inside = method == "tome"
    depth = len(costs.windows)
    parts, schedule = stage.merges
    schedule = settings.schedule or schedule
    spread = "numbers" if inside else schedule
    alphas = range(depth) if inside else sorted({round(depth * part) for part in parts})

    def share(keep: float) -> float:
        matched = None if inside else _MATCHED
        return (elsewhere + costs.merged(keep, alphas, spread, inside, matched)) / whole

    keep = _least(lambda keep: share(keep) <= settings.budget)
    if keep * costs.tokens < 1:
        raise _too_small(settings, share(1 / costs.tokens))
    alphas = tuple(first + alpha for alpha in alphas)
    if not inside:
        settings = replace(settings, schedule=schedule)
    return _chosen(settings, method, alphas, keep=round(keep, 4))


def _costs(host: Host, stage: Host) -> tuple[Costs, float, float]:
    """Costs of the stage that reduces, of the others together, and of all."""
    own = Costs.of(stage)
    whole = sum(Costs.of(other).total for other in host.stages or (host,))
    return own, whole - own.total, whole


def _clustering(settings: Settings, host: Host, method: str) -> Settings:
    stage, first = host.longest_stage
    own, elsewhere, whole = _costs(host, stage)
    limit = settings.budget * whole - elsewhere
    # A token meets the clusters around its own: twice a step, and twice to be rebuilt.
    meetings = 2 * settings.iterations + 2 if method in ("expedit", "hard") else 0
    near = min(own.tokens, stage.window**2) if stage.window else own.tokens

    def fits(alpha: int, sides: float) -> bool:
        products = meetings * min(_NEAR, near * sides**2)
        return own.clustered(alpha, sides**2, products) <= limit

    latest = min(int(host.latest * len(own.windows)), len(own.windows) - 1)
    for alpha in range(latest, -1, -1):
        meets = partial(fits, alpha)
        if method in OFF_GRID:
            share = _least(lambda share, meets=meets: meets(share**0.5))
            counts, sides, smallest = {"keep": round(share, 4)}, share**0.5, share * own.tokens >= 1
        elif stage.window:
            side = max((n for n in range(1, stage.window) if meets(n / stage.window)), default=0)
            counts = {"grid": (side, side), "scope": "window"}
            sides, smallest = side / stage.window, side >= 1
        else:
            sides = _least(meets)
            counts, smallest = {"ratio": round(sides, 3)}, sides * min(stage.size) >= 1
        if smallest and (sides >= host.least[alpha < latest] or alpha == 0):
            return _chosen(settings, method, first + alpha, **counts)
    least = elsewhere + own.clustered(0, 1 / own.tokens, 0)
    raise _too_small(settings, least / whole)


def _chosen(settings: Settings, method: str, alpha: int | tuple[int, ...], **counts) -> Settings:
    return replace(settings, budget=None, method=method, alpha=alpha, **counts)


def _too_small(settings: Settings, least: float) -> ValueError:
    return ValueError(
        f"BUDGET must be above {least:.2f} for this transformer, got {settings.budget}: its other "
        "blocks cost that much"
    )
