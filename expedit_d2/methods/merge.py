"""Merging by equal shares: before each alpha, the tokens most alike become one.

From ToMe (Bolya et al., arXiv 2210.09461) come bipartite matching on keys and proportional
attention. Different here: every merge keeps the same share of the tokens, in the first blocks and
none after; tokens are merged before a block, by the keys that it would compute, averaged over the
heads; and a merge takes several rounds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..operators import grid_positions, shape_of
from ..settings import Settings
from ..tokens import Keys, Tokens
from .matching import match

__all__ = ["Merge", "Record", "Unmerge", "merge_tokens"]


@dataclass(frozen=True)
class Record:
    """What rebuilding needs to know of a merge.

    Attributes:
        tokens: (B, *shape, C) as they went in.
        clusters: (B, M, C) as they came out.
        index: (B, n) cluster of each token.
    """

    tokens: Tensor
    clusters: Tensor
    index: Tensor


def merge_tokens(
    tokens: Tokens, keys: Tensor, count: int, rounds: int, checkerboard: bool = True
) -> tuple[Tokens, Record]:
    """Merge tokens down to ``count``; means are weighted by what the tokens stand for.

    Args:
        tokens: on a grid or off it.
        keys: (B, n, d) what they are compared by.
        count: tokens to leave, 1 to n.
        rounds: of bipartite matching.
        checkerboard: on a grid, match its two colours; else every second token with the others.
    """
    shape = shape_of(tokens.features)[1:-1]
    features = tokens.features.flatten(1, -2)
    sizes, positions = tokens.sizes, tokens.positions
    if sizes is None:
        sizes = features.new_ones(shape_of(features)[:2], dtype=torch.float32)
    if positions is None:
        positions = grid_positions(*shape, features.device)
    sizes = sizes.flatten(1)
    positions = positions.flatten(-len(shape) - 1, -2).expand(shape_of(features)[0], -1, -1)
    merging = match(keys, sizes, count, rounds, shape if checkerboard else (shape_of(keys)[1],))
    summed = merging.reduce(
        torch.cat([features.float(), positions, torch.ones_like(positions[..., :1])], dim=-1)
        * sizes[..., None]
    )
    fewer = summed[..., -1]
    means = summed[..., :-1] / fewer[..., None]
    reduced = replace(
        tokens,
        features=means[..., :-2].to(features.dtype),
        sizes=fewer,
        positions=means[..., -2:],
    )
    return reduced, Record(tokens.features, reduced.features, merging.index())


class _Merging(nn.Module):
    def __init__(self, settings: Settings, index: int) -> None:
        super().__init__()
        self.settings = settings
        self.index = index

    def forward(self, tokens: Tokens, keys: Keys) -> tuple[Tokens, Record]:
        features = tokens.features.flatten(1, -2)
        now = shape_of(features)[1]
        count = self.settings.count(self.index, tokens.size[0] * tokens.size[1], equal="shares")
        return merge_tokens(tokens, keys(features), min(count, now), self.settings.rounds)


class Unmerge(nn.Module):
    """Every token gets what became of its cluster, or the change of that on top of itself."""

    def __init__(self, residual: bool) -> None:
        super().__init__()
        self.residual = residual

    def forward(self, features: Tensor, record: Record, residual: bool | None = None) -> Tensor:
        residual = self.residual if residual is None else residual
        if residual:
            features = features - record.clusters
        index = record.index[..., None].expand(-1, -1, shape_of(features)[-1])
        out = features.gather(1, index).unflatten(1, shape_of(record.tokens)[1:-1])
        return out + record.tokens if residual else out


class Merge(nn.Module):
    """Equal shares before each alpha."""

    def __init__(self, settings: Settings, attention_window: int | None, index: int = 0) -> None:
        super().__init__()
        self.reduce = _Merging(settings, index)
        self.rebuild = Unmerge(settings.residual)
