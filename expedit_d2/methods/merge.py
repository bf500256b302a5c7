"""Merging before every block, by a schedule that falls with depth.

From ToMe (Bolya et al., arXiv 2210.09461) come bipartite matching on keys and proportional
attention: the tokens most alike become one. Different here: the share that is merged falls from
block to block, where ToMe's constant number takes ever larger shares; tokens are merged before a
block, by the keys that it would compute, averaged over the heads; and pairs of large clusters wait
a little longer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .base import METHOD_REGISTRY
from .matching import match, matching_cost
from .spread import SCHEDULES, Spread
from .unstructured import UnstructuredMethod, Windows

if TYPE_CHECKING:
    from ..settings import Settings

__all__ = ["Merge"]

# A quarter of Ward's exponent: features stay nearer to the plain model's than without, and labels
# do not suffer as with all of it.
_WARD = 0.25
# Tokens that one is compared with, about: half of a run, in two rounds.
_MATCHED = 256


@METHOD_REGISTRY.register("merge")
class Merge(UnstructuredMethod):
    """Before each alpha, the share of the tokens that SCHEDULE gives."""

    reads = UnstructuredMethod.reads | {"schedule", "rounds"}
    budget_rule = "early"

    @staticmethod
    def spread(settings: Settings) -> Spread:
        return SCHEDULES[settings.schedule or "falling"]

    @staticmethod
    def cost(settings: Settings, tokens: float, clusters: float, channels: int) -> float:
        return matching_cost(tokens, _MATCHED, channels)

    @staticmethod
    def choose(
        settings: Settings, keys: Tensor, sizes: Tensor | None, count: int, windows: Windows | None
    ) -> tuple[Tensor, int]:
        groups = None if windows is None else windows.of
        return match(keys, sizes, count, settings.rounds, _WARD, groups), count
