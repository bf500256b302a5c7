"""Bipartite matching: which tokens to merge with which (ToMe, arXiv 2210.09461, section 3.1).

Tokens come in an order in which neighbours on the map are near each other, `snake_order`, and are
cut into runs of a few hundred. Every second token of a run looks for the nearest one among the
others of its run, and the nearest pairs of the whole image are merged. So the cost of matching
per token is the same for images of any size. A second round allows merges of more than two tokens,
and of two from the same side.

Shorthand: B images, n tokens, k clusters, d channels of the keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..tracing import cached, in_graph, shape_of

__all__ = [
    "cluster_means",
    "cluster_sizes",
    "match",
    "matching_cost",
    "snake_order",
    "take_rows",
]

#: Tokens that are matched with each other. Runs of 144 and of 1728 find equally good pairs.
_RUN = 256


@cached
def snake_order(
    size: tuple[int, int], window: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Places of a map window by window, and within a window back and forth, row by row.

    Every second place in this order forms a checkerboard in each window, so that each token has
    neighbours among its possible partners.

    Args:
        size: (H, W).
        window: its height and width; those at the bottom and right may be smaller.
        device: device of the result.

    Returns:
        The places (H * W,), numbered row by row, in this order; and the inverse, the index of each
        place in it.
    """
    row = torch.arange(size[0], device=device)[:, None]
    col = torch.arange(size[1], device=device)[None]
    in_row, in_col = row % window[0], col % window[1]
    in_col = torch.where(in_row % 2 == 1, window[1] - 1 - in_col, in_col)
    columns = -(-size[1] // window[1])
    which = row // window[0] * columns + col // window[1]
    order = ((which * window[0] + in_row) * window[1] + in_col).flatten().argsort()
    return order, order.argsort()


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """x (B, n, D) at index (B, k): (B, k, D)."""
    # Whole rows: several times as fast as a gather of single numbers.
    rows = x.flatten(0, 1).index_select(0, _flat(index, shape_of(x)[1]))
    return rows.unflatten(0, shape_of(index))


def cluster_means(x: Tensor, index: Tensor, shares: Tensor, count: int) -> Tensor:
    """Weighted sums of the tokens of each cluster; a token with share 1 stays as it is, exactly.

    Args:
        x: (B, n, D).
        index: (B, n) cluster of each token, 0 to ``count`` - 1.
        shares: (B, n) fp32, of each token in its cluster; they sum to one.
        count: number of clusters.

    Returns:
        (B, count, D) in the type of ``x``.
    """
    batch, _, channels = shape_of(x)
    weighted = x * shares[..., None]  # in fp32
    sums = _zeros((batch * count, channels), weighted.dtype, index.device)
    sums = sums.index_add(0, _flat(index, count), weighted.flatten(0, 1))
    return sums.unflatten(0, (batch, count)).to(x.dtype)


def cluster_sizes(sizes: Tensor | None, index: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sizes of the clusters (B, count), and the share (B, n) of each token in its cluster.

    Args:
        sizes: (B, n) fp32, the sizes of the tokens; None: one each.
        index: (B, n) cluster of each token, 0 to ``count`` - 1.
        count: number of clusters.
    """
    if sizes is None:
        sizes = _constant(1.0, torch.float32, index.device).expand_as(index)
    total = _zeros((shape_of(index)[0], count), sizes.dtype, index.device)
    total = total.scatter_add(1, index, sizes)
    return total, sizes / total.gather(1, index)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros to add to, out of place."""
    if in_graph():  # torch 2.11 compiles sums onto an expanded number to wrong ones
        return torch.zeros(shape, dtype=dtype, device=device)
    return _constant(0.0, dtype, device).expand(shape)


@cached
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One number; expanded, it is a tensor of them that no kernel has to fill."""
    return torch.full((), value, dtype=dtype, device=device)


def _flat(index: Tensor, total: int) -> Tensor:
    """An index (B, m) into the rows of each image as one (B * m,) into the rows of all."""
    batch = shape_of(index)[0]
    if batch > 1:
        index = index + _first_rows(batch, total, index.device)
    return index.flatten()


@cached
def _first_rows(batch: int, total: int, device: torch.device) -> Tensor:
    """Index of the first row of each image in the rows of all images, (B, 1)."""
    return torch.arange(batch, device=device)[:, None] * total


def matching_cost(tokens: float, partners: float, channels: int) -> float:
    """Multiply-adds of matching half of the tokens with ``partners`` others each."""
    dim = channels // 12 or 1  # of a head, about; matching is a percent of what blocks cost
    return dim * (tokens * channels + tokens / 2 * partners)


def match(
    keys: Tensor,
    sizes: Tensor | None,
    count: int,
    rounds: int = 1,
    ward: float = 0.0,
    groups: Tensor | None = None,
    everywhere: bool = False,
) -> Tensor:
    """Choose n - count merges, in rounds of about equal numbers.

    Args:
        keys: (B, n, d) in an order in which near tokens are near, such as `snake_order`; compared
            by squared distance.
        sizes: (B, n) sizes of the tokens, which weight the means that are the keys of clusters in
            the next round; None: one each.
        count: clusters to leave. A round merges half of the tokens at most.
        rounds: at least 1; more are run where merging half of the tokens is not enough.
        ward: pairs are ranked by distance x (product of their sizes / sum)^ward. With 1 that is
            what merging adds to the squared error (Ward, 1963); less lets large clusters grow.
        groups: (B, n); tokens of different groups are not merged. None: one group.
        everywhere: look for partners among all tokens, not in runs of them.

    Returns:
        (B, n): the cluster of each token. Clusters are in the order of the tokens that the others
        were merged into, so neighbours stay near each other.
    """
    keys = keys.float()
    index = None
    now = shape_of(keys)[1]
    while now > count:
        runs = 1 if everywhere else max(1, now // _RUN)
        number = min(-(-(now - count) // max(rounds, 1)), runs * (now // (2 * runs)))
        rounds -= 1
        step = _match_once(keys, sizes, number, runs, ward, groups)
        index = step if index is None else step.gather(1, index)
        now -= number
        if now > count:
            sizes, shares = cluster_sizes(sizes, step, now)
            keys = cluster_means(keys, step, shares, now)
            if groups is not None:
                groups = groups.new_empty(shape_of(sizes)).scatter_(1, step, groups)
    if index is None:
        index = torch.arange(now, device=keys.device).expand(shape_of(keys)[0], -1)
    return index


def _match_once(
    keys: Tensor, sizes: Tensor | None, number: int, runs: int, ward: float, groups: Tensor | None
) -> Tensor:
    """One round of ``number`` merges, in ``runs`` runs of the tokens; see `match`."""
    batch, total, _ = shape_of(keys)
    pairs = total // (2 * runs)
    matched = 2 * runs * pairs  # a few tokens at the end may have no place in a run

    def sides(x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, n, ...) to the two sides (B * runs, pairs, ...); the first one chooses partners."""
        x = x[:, :matched].reshape(batch * runs, pairs, 2, *shape_of(x)[2:])
        return x[:, :, 0], x[:, :, 1]

    a, b = sides(keys)
    norm_a, norm_b = sides(keys.square().sum(-1))
    # The nearest has the largest a b - |b|^2 / 2: one product and one pass over it.
    closeness = torch.baddbmm(norm_b[:, None], a, b.transpose(1, 2), beta=-0.5)
    if groups is not None:
        group_a, group_b = sides(groups)
        closeness = closeness.masked_fill(group_a[:, :, None] != group_b[:, None], -torch.inf)
    # Not `max` in a graph: torch 2.11 compiles that of masked numbers to wrong indices on a CPU.
    nearest = closeness.topk(1) if in_graph() else closeness.max(-1, keepdim=True)
    closeness, partner = (x.squeeze(-1) for x in nearest)
    cost = torch.sub(norm_a, closeness, alpha=2)
    if ward and sizes is not None:
        inverse_a, inverse_b = sides(sizes.reciprocal())
        cost = cost * (inverse_a + inverse_b.gather(1, partner)) ** -ward
    # From the whole image, whatever the run.
    chosen = cost.view(batch, -1).topk(number, largest=False, sorted=False).indices
    # Remaining tokens are numbered in their order; a merged one takes the number of its partner.
    stays = keys.new_ones(batch, total, dtype=torch.long)
    stays[:, :matched:2].scatter_(1, chosen, 0)
    rank = stays.cumsum(1).sub_(1)
    second = rank[:, :matched].unflatten(1, (runs, pairs, 2))[..., 1]
    of_partner = second.gather(2, partner.view(batch, runs, pairs)).flatten(1)
    rank[:, :matched:2].scatter_(1, chosen, of_partner.gather(1, chosen))
    return rank
