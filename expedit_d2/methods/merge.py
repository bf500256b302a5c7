"""Merging before every block, by a schedule that falls with depth.

From ToMe (Bolya et al., arXiv 2210.09461) come bipartite matching on keys and proportional
attention: the tokens most alike become one. Different here: the share that is merged falls from
block to block, where ToMe's constant number takes ever larger shares; tokens are merged before a
block, by the keys that it would compute, averaged over the heads; and pairs of large clusters wait
a little longer.
"""

from __future__ import annotations

from torch import Tensor

from ..settings import Settings
from .matching import match
from .off_grid import OffGridMethod, Windows

__all__ = ["Merge"]

# A quarter of Ward's exponent: features stay nearer to the plain model's than without, and labels
# do not suffer as with all of it.
_WARD = 0.25


class Merge(OffGridMethod):
    """Before each alpha, the share of the tokens that SCHEDULE gives."""

    @staticmethod
    def choose(
        settings: Settings, keys: Tensor, sizes: Tensor | None, count: int, windows: Windows | None
    ) -> tuple[Tensor, int]:
        groups = None if windows is None else windows.of
        return match(keys, sizes, count, settings.rounds, _WARD, groups), count
