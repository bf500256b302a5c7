"""Merging before every block, by a schedule that falls with depth.

From ToMe (Bolya et al., arXiv 2210.09461) come bipartite matching on keys and proportional
attention: the tokens most alike become one. Different here: the share that is merged falls from
block to block, where ToMe's constant number takes ever larger shares; tokens are merged before a
block, by the keys that it would compute, averaged over the heads; and pairs of large clusters wait
a little longer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from ..operators import grid_positions, shape_of
from ..settings import Settings
from ..tokens import Keys, Tokens
from .matching import match, take_rows

__all__ = ["Merge", "Record", "Unmerge", "merge_tokens"]

# A quarter of Ward's exponent: features stay nearer to the plain model's than without, and labels
# do not suffer as with all of it.
_WARD = 0.25


@dataclass(frozen=True)
class Record:
    """What rebuilding needs to know of a merge.

    Attributes:
        index: (B, n) cluster of each token.
        shape: of the tokens, (H, W) or (n,).
    """

    index: Tensor
    shape: tuple[int, ...]

    def then(self, later: Record) -> Record:
        """This merge and a later one of its clusters, as one."""
        return Record(later.index.gather(1, self.index), self.shape)


def merge_tokens(
    tokens: Tokens,
    keys: Tensor,
    count: int,
    rounds: int = 1,
    ward: float = 0.0,
    checkerboard: bool = True,
) -> tuple[Tokens, Record]:
    """Merge tokens down to ``count``; means are weighted by what the tokens stand for.

    Args:
        tokens: on a grid or off it.
        keys: (B, n, d) what they are compared by.
        count: tokens to leave, 1 to n.
        rounds, ward: see `match`.
        checkerboard: on a grid, match its two colours; else every second token with the others.
    """
    shape = shape_of(tokens.features)[1:-1]
    features = tokens.features.flatten(1, -2)
    batch, total, _ = shape_of(features)
    sizes, positions = tokens.sizes, tokens.positions
    if sizes is None:
        sizes = keys.new_ones(batch, total).float()
    if positions is None:
        positions = grid_positions(*shape, features.device)
    sizes = sizes.flatten(1)
    positions = positions.flatten(-len(shape) - 1, -2).expand(batch, -1, -1)
    merging = match(keys, sizes, count, rounds, shape if checkerboard else (total,), ward)
    reduced = replace(
        tokens,
        features=merging.mean(features, sizes),
        sizes=merging.sizes(sizes),
        positions=merging.mean(positions, sizes),
    )
    return reduced, Record(merging.index(), shape)


class _Merging(nn.Module):
    def __init__(self, settings: Settings, index: int) -> None:
        super().__init__()
        self.settings = settings
        self.index = index

    def forward(self, tokens: Tokens, keys: Keys) -> tuple[Tokens, Record]:
        features = tokens.features.flatten(1, -2)
        total = tokens.size[0] * tokens.size[1]
        count = self.settings.count(self.index, total, self.settings.schedule)
        count = min(count, shape_of(features)[1])
        return merge_tokens(tokens, keys(features), count, self.settings.rounds, _WARD)


class Unmerge(nn.Module):
    """Every token gets what became of its cluster.

    RESIDUAL does not matter: adding a token's distance from its cluster, as it was when they were
    merged, changes the labels of one pixel in two thousand.
    """

    def forward(self, features: Tensor, record: Record, residual: bool | None = None) -> Tensor:
        return take_rows(features, record.index).unflatten(1, record.shape)


class Merge(nn.Module):
    """Before each alpha, the share of the tokens that SCHEDULE gives."""

    def __init__(self, settings: Settings, attention_window: int | None, index: int = 0) -> None:
        super().__init__()
        self.reduce = _Merging(settings, index)
        self.rebuild = Unmerge()
