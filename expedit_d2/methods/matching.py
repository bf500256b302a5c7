"""Bipartite matching: which tokens to merge with which (ToMe, arXiv 2210.09461, section 3.1).

Half of the tokens look for their most similar one in the other half, and the most similar pairs are
merged. Several rounds find merges of more than two, and of two in the same half.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..operators import shape_of

__all__ = ["Merging", "match"]


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

    def reduce(self, x: Tensor) -> Tensor:
        """Sums over the clusters: (B, n, D) to (B, k, D)."""
        batch, count = self.kept.shape
        channels = shape_of(x)[2]
        out = _rows(x, self.kept).flatten(0, 1)
        first = torch.arange(batch, device=x.device)[:, None] * count
        out = out.index_add(0, (self.into + first).flatten(), _rows(x, self.merged).flatten(0, 1))
        return out.view(batch, count, channels)

    def index(self) -> Tensor:
        """(B, n): the cluster of each token."""
        count = shape_of(self.kept)[1]
        clusters = torch.arange(count, device=self.kept.device).expand_as(self.kept)
        tokens = torch.cat([self.kept, self.merged], dim=1)
        index = torch.cat([clusters, self.into], dim=1)
        return torch.empty_like(tokens).scatter(1, tokens, index)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x (B, n, D) at index (B, k): (B, k, D)."""
    return x.gather(1, index[..., None].expand(-1, -1, shape_of(x)[2]))


def halves(count: int, shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The two sides of a matching: a checkerboard on a grid, every second token off it."""
    index = torch.arange(count, device=device)
    odd = index % 2
    if len(shape) == 2:
        odd = (index // shape[1] + index % shape[1]) % 2
    # A stable sort by side has a length that does not depend on values.
    order = odd.argsort(stable=True)
    return order[: (count + 1) // 2], order[(count + 1) // 2 :]


def match(keys: Tensor, sizes: Tensor, count: int, rounds: int, shape: tuple[int, ...]) -> Merging:
    """Choose n - count merges, in rounds of about the same number.

    Args:
        keys: (B, n, d); tokens are compared by the cosine of their angle.
        sizes: (B, n) weights of the means that stand for merged keys in the next round.
        count: clusters to leave. A round merges half of the tokens at most.
        rounds: at least 1; more where a round's half does not do.
        shape: (H, W) of a map, (n,) off the grid.
    """
    batch, tokens, _ = keys.shape
    kept = torch.arange(tokens, device=keys.device).expand(batch, -1)
    merged, into = [], []
    keys = keys.float()
    sizes = sizes[..., None].float()
    while kept.shape[1] > count:
        now = kept.shape[1]
        left, right = halves(now, shape, keys.device)
        number = min(-(-(now - count) // max(rounds, 1)), len(right), len(left))
        rounds -= 1
        unit = F.normalize(keys, dim=-1)
        similarity, partner = (unit[:, left] @ unit[:, right].transpose(1, 2)).max(-1)
        order = similarity.argsort(dim=-1, descending=True)
        chosen, rest = order[:, :number], order[:, number:].sort(-1).values
        step = Merging(
            kept=torch.cat([left[rest], right.expand(batch, -1)], dim=1),
            merged=left[chosen],
            into=partner.gather(1, chosen) + rest.shape[1],
        )
        index = step.index()
        into = [index.gather(1, earlier) for earlier in into] + [step.into]
        merged.append(kept.gather(1, step.merged))
        kept = kept.gather(1, step.kept)
        if kept.shape[1] > count:
            keys = step.reduce(keys * sizes)
            sizes = step.reduce(sizes)
            keys = keys / sizes
        shape = (kept.shape[1],)
    nothing = kept[:, :0]
    return Merging(kept, torch.cat([*merged, nothing], dim=1), torch.cat([*into, nothing], dim=1))
