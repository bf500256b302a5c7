"""``BUDGET``: from a share of the blocks' GFLOPs to alpha and counts, by rules that were measured.

- Methods that reduce "evenly", such as METHOD merge: a few merges spread over the depth (`MERGES`),
  each of the same share, down to the share of tokens that meets the budget. Every merge launches
  about 60 kernels, so there are few.
- Methods that reduce "late", such as those that leave a grid: few clusters late are more accurate
  than many clusters early, until they become too few. So alpha is the latest one at which the
  budget is met with at least the share of clusters that the family tolerates (`GridRule`).
- Methods that reduce in "every" block.

Where ``ALPHA`` is given as well, it stays, and only the counts follow.

Costs are multiply-adds, computed from shapes alone (approximately for the operators), at the size
that the transformer was made for. On larger images attention is a larger part of the cost, and
somewhat more is saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from .adapters import TransformerSpec
from .adapters.spec import BlockCosts
from .methods import METHOD_REGISTRY, Method
from .settings import Settings, default_method

__all__ = ["Costs", "within_budget"]


@dataclass(frozen=True)
class Costs:
    """Multiply-adds of the blocks of a container.

    Attributes:
        blocks: of each, in order.
        size: (H, W) of the map.
        padded: tokens of the map with the padding of the windows.
    """

    blocks: tuple[BlockCosts, ...]
    size: tuple[int, int]
    padded: int

    @classmethod
    def of(cls, spec: TransformerSpec) -> Costs:
        """Costs of the blocks at the size the transformer was made for."""
        side = spec.window or 1
        return cls(
            blocks=tuple(spec.costs(block) for block in spec.blocks.children()),
            size=spec.size,
            padded=math.prod(-(-n // side) * side for n in spec.size),
        )

    @property
    def tokens(self) -> int:
        return math.prod(self.size)

    @property
    def channels(self) -> int:
        return self.blocks[0].channels

    @property
    def total(self) -> float:
        return sum(self._on_grid(block, 1, 1) for block in self.blocks)

    def _on_grid(self, block: BlockCosts, entering: float, share: float) -> float:
        """A block whose attention runs on one share of the tokens, and its MLP on another."""
        tokens = (self.padded if block.window else self.tokens) * entering
        keys = entering * (block.window**2 or self.tokens)
        attention = tokens * (block.attention + 2 * keys * block.channels)
        if block.position_heads:  # a product with the rows of both tables
            attention += tokens * self._sides(block) * block.channels
        return attention + self.tokens * share * (block.linear - block.attention)

    def _unstructured(self, block: BlockCosts, entering: float, share: float) -> float:
        """The same for unstructured tokens, where windows keep a place for every token."""
        linear = entering * block.attention + share * (block.linear - block.attention)
        tokens, keys = self.padded, block.window**2
        if not block.window:
            tokens = keys = self.tokens * entering
        attention = 2 * keys * block.channels
        if block.position_heads:  # see `expedit_d2.attention.position_term`
            attention += self._sides(block) * (2 * block.channels + keys * block.position_heads)
        return self.tokens * linear + tokens * attention

    def _sides(self, block: BlockCosts) -> int:
        """Sum of the rows and columns of an attention."""
        return 2 * block.window or sum(self.size)

    def clustered(self, alpha: int, share: float, operators: float) -> float:
        """Blocks from alpha on run on a share of the tokens, on a grid.

        Args:
            operators: what clustering and rebuilding cost.
        """
        before, after = self.blocks[:alpha], self.blocks[alpha:]
        blocks = sum(self._on_grid(block, 1, 1) for block in before)
        return blocks + sum(self._on_grid(block, share, share) for block in after) + operators

    def merged(
        self, method: type[Method], settings: Settings, keep: float, alphas: Sequence[int]
    ) -> float:
        """A merge before, or inside, each of the given blocks; including the matching.

        Args:
            method: the method that merges.
            settings: its settings, except alpha and keep.
            keep: share of the tokens that is left at the end.
            alphas: the blocks that merge.
        """
        spread = method.spread(settings)
        total, entering, before = 0.0, 1.0, True
        for index, block in enumerate(self.blocks):
            left = entering
            if index in alphas:
                before = False
                left = spread(keep, alphas.index(index), len(alphas))
                left = max(left, method.least(entering))
                tokens = self.tokens * entering
                total += method.cost(settings, tokens, self.tokens * left, self.channels)
            grid = before or (method.inside and entering == 1)
            cost = self._on_grid if grid else self._unstructured
            total += cost(block, entering if method.inside else left, left)
            entering = left
        return total


def _least(meets: Callable[[float], bool]) -> float:
    """The largest value in (0, 1) for which ``meets`` is true, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if meets(middle) else (low, middle)
    return low


def within_budget(settings: Settings, spec: TransformerSpec) -> Settings:
    """Settings with alpha and counts in place of their budget.

    Args:
        settings: with ``budget``; all other settings, also a given method or alpha, stay.
        spec: the transformer, see `find_transformer`.

    Raises:
        ValueError: if no setting meets the budget; names the smallest budget that can be met. For
            an alpha that does not fit the transformer, or several for a method that leaves a grid.
    """
    name = settings.method or default_method(spec.unstructured)
    rule = _reducing_late if METHOD_REGISTRY[name].budget_rule == "late" else _merging
    return rule(settings, spec, name)


def _merging(settings: Settings, spec: TransformerSpec, name: str) -> Settings:
    stage, first = _stage(settings, spec)
    costs, elsewhere, whole = _costs(spec, stage)
    method, depth = METHOD_REGISTRY[name], len(costs.blocks)
    alphas: Sequence[int] = range(depth)
    if settings.alphas:
        alphas = [alpha - first for alpha in settings.alphas]
    elif method.budget_rule == "evenly":
        alphas = sorted({depth * merge // stage.merges for merge in range(stage.merges)})

    def share(keep: float) -> float:
        return (elsewhere + costs.merged(method, settings, keep, alphas)) / whole

    keep = _least(lambda keep: share(keep) <= settings.budget)
    if keep * costs.tokens < 1:
        raise _too_small(settings, share(1 / costs.tokens))
    return _chosen(settings, name, tuple(first + alpha for alpha in alphas), keep=round(keep, 4))


def _stage(settings: Settings, spec: TransformerSpec) -> tuple[TransformerSpec, int]:
    """The stage to reduce in, and the number of blocks before its first."""
    return spec.stage_of(settings.alphas) if settings.alphas else spec.longest_stage


def _costs(spec: TransformerSpec, stage: TransformerSpec) -> tuple[Costs, float, float]:
    """Costs of the stage that reduces, of the others together, and of all."""
    own = Costs.of(stage)
    own = replace(own, blocks=own.blocks[: stage.end])
    whole = sum(Costs.of(other).total for other in spec.stages or (spec,))
    return own, whole - own.total, whole


def _reducing_late(settings: Settings, spec: TransformerSpec, name: str) -> Settings:
    if len(settings.alphas) > 1:
        raise ValueError(
            f"BUDGET with METHOD {name} takes one ALPHA, got {settings.alphas}; METHOD merge takes "
            "several"
        )
    stage, first = _stage(settings, spec)
    own, elsewhere, whole = _costs(spec, stage)
    limit = settings.budget * whole - elsewhere
    method, rule, depth = METHOD_REGISTRY[name], stage.grid_rule, len(own.blocks)
    # Where attention has windows, each of them becomes a grid.
    area = min(own.tokens, stage.window**2) if stage.window else own.tokens

    def fits(alpha: int, sides: float) -> bool:
        operators = method.cost(settings, own.tokens, area * sides**2, own.channels)
        return own.clustered(alpha, sides**2, operators) <= limit

    alphas = [alpha - first for alpha in settings.alphas]
    alphas = alphas or range(min(int(rule.latest * depth), depth - 1), -1, -1)
    for alpha in alphas:
        meets = partial(fits, alpha)
        if method.unstructured:
            share = _least(lambda share, meets=meets: meets(share**0.5))
            counts, sides, smallest = {"keep": round(share, 4)}, share**0.5, share * own.tokens >= 1
        elif stage.window:
            side = max((n for n in range(1, stage.window) if meets(n / stage.window)), default=0)
            counts = {"grid": (side, side), "scope": "window"}
            sides, smallest = side / stage.window, side >= 1
        else:
            sides = _least(meets)
            counts, smallest = {"ratio": round(sides, 3)}, sides * min(stage.size) >= 1
        enough = rule.least_latest if alpha == alphas[0] else rule.least_earlier
        if smallest and (sides >= enough or alpha == alphas[-1]):
            return _chosen(settings, name, first + alpha, **counts)
    least = elsewhere + own.clustered(alphas[-1], 1 / own.tokens, 0)
    raise _too_small(settings, least / whole)


def _chosen(
    settings: Settings, method: str, alpha: int | tuple[int, ...], **counts: Any
) -> Settings:
    return replace(settings, budget=None, method=method, alpha=alpha, **counts)


def _too_small(settings: Settings, least: float) -> ValueError:
    if least >= 1:
        return ValueError(
            f"no BUDGET fits this transformer with METHOD {settings.method or 'merge'}: reducing "
            "its tokens costs more than its blocks"
        )
    return ValueError(
        f"BUDGET must be above {least:.2f} for this transformer"
        + (f" with ALPHA {settings.alpha}" if settings.alphas else "")
        + f", got {settings.budget}: its other blocks cost that much"
    )
