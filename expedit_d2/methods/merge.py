"""Merging before a few of the blocks, each time the same share of the tokens.

Bipartite matching on keys and proportional attention come from ToMe (Bolya et al., arXiv
2210.09461): the most similar tokens become one. The differences are: every merge takes the same
share of the tokens that are left, where ToMe's constant number is a growing share; tokens are
merged before a block, by the keys that it would compute, averaged over the heads; pairs of large
clusters are merged a little later; and every token is rebuilt with its difference from its cluster.
"""

from __future__ import annotations

from torch import Tensor

from ..settings import METHOD_REGISTRY, Settings
from ..settings.spread import SCHEDULES, Spread
from .matching import match, matching_cost
from .unstructured import UnstructuredMethod, Windows

__all__ = ["Merge"]

# A quarter of Ward's exponent: features stay closer to the plain model's than without it, and
# labels do not suffer as they do with the full exponent.
_WARD = 0.25
# About how many tokens each one is compared with: half of a run, in two rounds.
_MATCHED = 256


@METHOD_REGISTRY.register("merge")
class Merge(UnstructuredMethod):
    """Merges the share of the tokens given by SCHEDULE before each alpha."""

    reads = UnstructuredMethod.reads | {"schedule", "rounds"}
    budget_rule = "evenly"
    residual = True

    @staticmethod
    def spread(settings: Settings) -> Spread:
        return SCHEDULES[settings.schedule or "equal"]

    @staticmethod
    def cost(settings: Settings, tokens: float, clusters: float, channels: int) -> float:
        return matching_cost(tokens, _MATCHED, channels)

    @staticmethod
    def choose(
        settings: Settings, keys: Tensor, sizes: Tensor | None, count: int, windows: Windows | None
    ) -> tuple[Tensor, int]:
        groups = None if windows is None else windows.of
        return match(keys, sizes, count, settings.rounds, _WARD, groups), count
