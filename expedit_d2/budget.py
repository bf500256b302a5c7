"""``BUDGET``: from a share of the blocks' GFLOPs to alpha and counts, by rules that were measured.

- Attention that is global in every block: METHOD "merge" before each of the first three quarters,
  with a falling schedule, for the share of tokens that meets the budget.
- Windows, or a method that leaves a grid: few clusters late keep more than many clusters early,
  until they become too few. So alpha is the latest one at which the budget is met with clusters
  not fewer than a share of the tokens that the family bears (`Host.latest`, `Host.least`).

Costs are those of products, by shapes alone and the operators' about, at the size that the
transformer was made for. On larger images attention has a larger part, and somewhat more is saved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from torch import nn

from .adapters import Host
from .settings import OFF_GRID, Settings, spread_share

__all__ = ["Costs", "within_budget"]


# Part of the blocks that merge: in the last ones a merge costs about what it saves.
_MERGED = 0.75
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
        windows: tokens in each block's attention windows; all tokens where it is global.
    """

    linear: int
    attention: int
    channels: int
    tokens: float
    windows: tuple[float, ...]

    @classmethod
    def of(cls, host: Host) -> Costs:
        """Of a host's blocks at its nominal size."""
        block = next(iter(host.blocks.children()))
        tokens = host.size[0] * host.size[1]

        def weights(module: nn.Module) -> int:
            return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))

        sides = (getattr(b, "window_size", 0) for b in host.blocks.children())
        return cls(
            linear=weights(block),
            attention=weights(block.attn),
            channels=block.attn.proj.in_features,
            tokens=tokens,
            windows=tuple(min(side * side or tokens, tokens) for side in sides),
        )

    def block(self, index: int, entering: float, share: float) -> float:
        """One block, whose attention runs on a share of the tokens and whose MLP on another."""
        keys = self.windows[index] * entering
        attention = entering * (self.attention + 2 * keys * self.channels)
        return self.tokens * (attention + share * (self.linear - self.attention))

    @property
    def total(self) -> float:
        return sum(self.block(index, 1, 1) for index in range(len(self.windows)))

    def clustered(self, alpha: int, share: float, products: float) -> float:
        """Blocks from alpha on run on a share of the tokens.

        Args:
            products: of the operators, for each token and channel.
        """
        shares = [1 if index < alpha else share for index in range(len(self.windows))]
        blocks = sum(self.block(index, s, s) for index, s in enumerate(shares))
        return blocks + products * self.tokens * self.channels

    def merged(self, keep: float, merges: int, spread: str, inside: bool) -> float:
        """A merge in each of the first blocks, before it or inside of it; matching included."""
        dim = self.channels // 12 or 1  # of a head, about; matching is a percent
        total, entering = 0.0, 1.0
        for index in range(len(self.windows)):
            left = entering
            if index < merges:
                left = spread_share(keep, index, merges, spread)
                tokens = self.tokens * entering
                total += tokens * dim * (self.channels + tokens / 4)
            total += self.block(index, entering if inside else left, left)
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
    off_grid = host.off_grid if settings.method is None else settings.method in OFF_GRID
    if off_grid and settings.method != "density":
        return _merging(settings, host)
    return _clustering(settings, host, off_grid)


def _merging(settings: Settings, host: Host) -> Settings:
    method = settings.method or "merge"
    costs = Costs.of(host)
    inside = method == "tome"
    spread = "numbers" if inside else settings.schedule
    depth = len(costs.windows)
    merges = depth if inside else max(1, round(_MERGED * depth))

    def share(keep: float) -> float:
        return costs.merged(keep, merges, spread, inside) / costs.total

    keep = _least(lambda keep: share(keep) <= settings.budget)
    if keep * costs.tokens < 1:
        raise _too_small(settings, share(1 / costs.tokens))
    return _chosen(settings, method, tuple(range(merges)), keep=round(keep, 4))


def _clustering(settings: Settings, host: Host, off_grid: bool) -> Settings:
    stage, first = host.longest_stage
    own = Costs.of(stage)
    whole = sum(Costs.of(other).total for other in host.stages or (host,))
    limit = settings.budget * whole - (whole - own.total)

    method = settings.method or "expedit"
    # A token meets the clusters around its own: twice a step, and twice to be rebuilt.
    meetings = 2 * settings.iterations + 2 if method in ("expedit", "hard") else 0
    near = min(own.tokens, stage.window**2) if stage.window else own.tokens

    def fits(alpha: int, sides: float) -> bool:
        products = meetings * min(_NEAR, near * sides**2)
        return own.clustered(alpha, sides**2, products) <= limit

    latest = min(int(host.latest * len(own.windows)), len(own.windows) - 1)
    for alpha in range(latest, -1, -1):
        meets = partial(fits, alpha)
        if off_grid:
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
    least = whole - own.total + own.clustered(0, 1 / own.tokens, 0)
    raise _too_small(settings, least / whole)


def _chosen(settings: Settings, method: str, alpha: int | tuple[int, ...], **counts) -> Settings:
    return replace(settings, budget=None, method=method, alpha=alpha, **counts)


def _too_small(settings: Settings, least: float) -> ValueError:
    return ValueError(
        f"BUDGET must be above {least:.2f} for this transformer, got {settings.budget}: its other "
        "blocks cost that much"
    )
