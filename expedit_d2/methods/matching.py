"""Bipartite matching: which tokens to merge with which (ToMe, arXiv 2210.09461, section 3.1).

Half of the tokens look for the nearest one in the other half, and the nearest pairs are merged.
Several rounds find merges of more than two, and of two in the same half.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..operators import shape_of

__all__ = ["Merging", "match", "take_rows"]


@dataclass(frozen=True)
class Merging:
    """Which of n tokens become which of k clusters.

    Attributes:
        kept: (B, k) index of the first token of each cluster.
        merged: (B, n - k) index of the other tokens.
        into: (B, n - k) cluster of each of these.
    """

    kept: Tensor
    merged: Tensor
    into: Tensor

    def sizes(self, sizes: Tensor) -> Tensor:
        """What the clusters stand for (B, k), of what the tokens do (B, n)."""
        return sizes.gather(1, self.kept).scatter_add(1, self.into, sizes.gather(1, self.merged))

    def mean(self, x: Tensor, sizes: Tensor) -> Tensor:
        """Means over the clusters, weighted by ``sizes`` (B, n): (B, n, D) to (B, k, D).

        A cluster's first token is moved by the others, so only these cost anything; with one
        merge in every block they are few.
        """
        first, others = take_rows(x, self.kept), take_rows(x, self.merged)
        shares = sizes.gather(1, self.merged) / self.sizes(sizes).gather(1, self.into)
        moves = (others - take_rows(first, self.into)) * shares[..., None]
        return _add_rows(first, self.into, moves.to(x.dtype))

    def index(self) -> Tensor:
        """(B, n): the cluster of each token."""
        count = shape_of(self.kept)[1]
        clusters = torch.arange(count, device=self.kept.device).expand_as(self.kept)
        tokens = torch.cat([self.kept, self.merged], dim=1)
        index = torch.cat([clusters, self.into], dim=1)
        return torch.empty_like(tokens).scatter(1, tokens, index)


def _add_rows(x: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """x (B, n, D) with rows (B, k, D) added at index (B, k)."""
    return x.flatten(0, 1).index_add(0, _flat(index, x), rows.flatten(0, 1)).view_as(x)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """x (B, n, D) at index (B, k): (B, k, D)."""
    # Whole rows: several times as fast as a gather of single numbers.
    rows = x.flatten(0, 1).index_select(0, _flat(index, x))
    return rows.unflatten(0, shape_of(index))


def _flat(index: Tensor, x: Tensor) -> Tensor:
    """An index (B, k) into the rows of each image as one (B * k,) into the rows of all."""
    batch, total, _ = shape_of(x)
    if batch > 1:
        index = index + torch.arange(batch, device=x.device)[:, None] * total
    return index.flatten()


def _halves(count: int, shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The two sides of a matching: a checkerboard on a grid, every second token off it."""
    index = torch.arange(count, device=device)
    odd = index % 2
    if len(shape) == 2:
        odd = (index // shape[1] + index % shape[1]) % 2
    # A stable sort by side has a length that does not depend on values.
    order = odd.argsort(stable=True)
    return order[: (count + 1) // 2], order[(count + 1) // 2 :]


def match(
    keys: Tensor,
    sizes: Tensor,
    count: int,
    rounds: int,
    shape: tuple[int, ...],
    ward: float = 0.0,
) -> Merging:
    """Choose n - count merges, in rounds of about the same number.

    Args:
        keys: (B, n, d), compared by squared distance; of unit length that is their angle.
        sizes: (B, n) what the tokens stand for: weights of the means that are the keys of clusters
            in the next round.
        count: clusters to leave. A round merges half of the tokens at most.
        rounds: at least 1; more where a round's half does not do.
        shape: (H, W) of a map, (n,) off the grid.
        ward: pairs are ranked by distance x (product of their sizes / sum)^ward. With 1 that is
            what merging adds to the squared error (Ward, 1963); less lets large clusters grow.
    """
    batch, tokens, _ = shape_of(keys)
    kept = torch.arange(tokens, device=keys.device).expand(batch, -1)
    merged, into = [], []
    keys = keys.float()
    sizes = sizes.float()
    now = tokens
    while now > count:
        left, right = _halves(now, shape, keys.device)
        number = min(-(-(now - count) // max(rounds, 1)), now // 2)
        rounds -= 1
        a, b = keys[:, left], keys[:, right]
        # The nearest is that of the largest a b - |b|^2 / 2: one product and one look at it.
        closeness = torch.baddbmm(b.square().sum(-1)[:, None] / -2, a, b.transpose(1, 2))
        closeness, partner = closeness.max(-1)
        cost = (a.square().sum(-1) - 2 * closeness).clamp_min(0)
        if ward:
            mine, theirs = sizes[:, left], sizes[:, right].gather(1, partner)
            cost = cost * (mine * theirs / (mine + theirs)) ** ward
        order = cost.argsort(dim=-1)
        # In their order, so that neighbours stay on different sides of the next matching.
        chosen, rest = order[:, :number], order[:, number:].sort(-1).values
        step = Merging(
            kept=torch.cat([left[rest], right.expand(batch, -1)], dim=1),
            merged=left[chosen],
            into=partner.gather(1, chosen) + ((now + 1) // 2 - number),
        )
        if merged:
            index = step.index()
            into = [index.gather(1, earlier) for earlier in into]
        into.append(step.into)
        merged.append(kept.gather(1, step.merged))
        kept = kept.gather(1, step.kept)
        now -= number
        if now > count:
            keys, sizes = step.mean(keys, sizes), step.sizes(sizes)
        shape = (now,)
    nothing = kept[:, :0]
    return Merging(kept, torch.cat([*merged, nothing], dim=1), torch.cat([*into, nothing], dim=1))
