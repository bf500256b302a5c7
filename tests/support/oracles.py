"""Clustering, reconstruction and relative positions in the slowest, plainest form.

Written from the paper (section 3.2) and not from `expedit_d2.operators`: one image at a time, in
float64, every token against every cluster, the difference squared and not expanded. All of it can
be differentiated.
"""

from __future__ import annotations

import math
import statistics
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor


def home_cells(size: int, cells: int) -> list[int]:
    """For each of ``size`` tokens in a row, the cell out of ``cells`` equal ones it starts in."""
    homes = []
    for token in range(size):
        for cell in range(cells):
            start, end = Fraction(cell * size, cells), Fraction((cell + 1) * size, cells)
            if start <= token < end:
                homes.append(cell)
    assert len(homes) == size
    return homes


@lru_cache
def allowed_pairs(size: tuple[int, int], grid: tuple[int, int], window: int | None) -> Tensor:
    """(H * W, h * w) bool: the cluster lies in the window around the token's home cell."""
    mask = torch.ones(size[0] * size[1], grid[0] * grid[1], dtype=torch.bool)
    if window is None:
        return mask
    rows, cols = home_cells(size[0], grid[0]), home_cells(size[1], grid[1])
    for i in range(size[0]):
        for j in range(size[1]):
            for row in range(grid[0]):
                for col in range(grid[1]):
                    near = abs(rows[i] - row) <= window // 2 and abs(cols[j] - col) <= window // 2
                    mask[i * size[1] + j, row * grid[1] + col] = near
    return mask


def pool(tokens: Tensor, weights: Tensor, grid: tuple[int, int]) -> Tensor:
    """Weighted adaptive average pooling, (H, W, C) to (h * w, C).

    A cell without any weight starts at the mean of the image: there is nothing better to say.
    """
    height, width, _ = tokens.shape
    cells = []
    for row in range(grid[0]):
        for col in range(grid[1]):
            # From the floor of the cell's start to the ceiling of its end.
            top, bottom = row * height // grid[0], -(-(row + 1) * height // grid[0])
            left, right = col * width // grid[1], -(-(col + 1) * width // grid[1])
            part = tokens[top:bottom, left:right].flatten(0, 1)
            share = weights[top:bottom, left:right].flatten()
            if share.sum() == 0:
                part, share = tokens.flatten(0, 1), weights.flatten()
            cells.append((part * share[:, None]).sum(0) / share.sum())
    return torch.stack(cells)


def filled_cells(weights: Tensor, grid: tuple[int, int]) -> Tensor:
    """(h * w,) bool: any token of the cell, as it is pooled, has a weight."""
    return pool(weights[..., None], torch.ones_like(weights), grid)[:, 0] > 0


def coordinates(size: tuple[int, int]) -> Tensor:
    """(H * W, 2): the row and column of every token."""
    return torch.tensor([[i, j] for i in range(size[0]) for j in range(size[1])]).double()


def squared_distances(x: Tensor, clusters: Tensor) -> Tensor:
    """(N, C) and (M, C) to (N, M)."""
    return (x[:, None, :] - clusters[None, :, :]).square().sum(-1)


def auto_temperature(distances: Tensor, x: Tensor, weights: Tensor) -> float:
    """6 / median of the distances (N, M) to the nearest cluster, over tokens with any.

    A distance below a millionth of the variance of the tokens counts as none; if all do, this
    threshold takes the place of the median. A number: gradients do not pass through it.
    """
    mean = (x * weights[:, None]).sum(0) / weights.sum()
    variance = ((x - mean).square().sum(1) * weights).sum() / weights.sum()
    floor = max(1e-6 * variance.item(), 1e-30)
    nearest = distances.min(1).values.tolist()
    informative = [d for d, w in zip(nearest, weights, strict=True) if w > 0 and d > floor]
    return 6 / (statistics.median_low(informative) if informative else floor)


def cluster_image(
    tokens: Tensor,
    grid: tuple[int, int],
    iterations: int,
    temperature: float | str,
    window: int,
    weights: Tensor | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Dense soft k-means of one image (H, W, C).

    Clusters (h, w, C), sizes (h, w) and mean positions (h, w, 2). A cell without any weight is
    no candidate.
    """
    tokens = tokens.double()
    size = (tokens.shape[0], tokens.shape[1])
    weights = tokens.new_ones(size) if weights is None else weights.double()
    allowed = allowed_pairs(size, grid, window)
    x, counts = tokens.flatten(0, 1), weights.flatten()
    if counts.sum() > 0:
        # What padding would like to join does not matter.
        allowed = allowed & (filled_cells(weights, grid) | (counts == 0)[:, None])
    places = coordinates(size) if positions is None else positions.double().flatten(0, 1)
    clusters = pool(tokens, weights, grid)
    centers = pool(places.unflatten(0, size), torch.ones_like(weights), grid)
    for _ in range(iterations):
        distances = squared_distances(x, clusters)
        if temperature == "auto":
            nearby = distances.masked_fill(~allowed, torch.inf)
            temperature = auto_temperature(nearby, x, counts)
        logits = (-temperature * distances).masked_fill(~allowed, -torch.inf)
        affinity = logits.softmax(1) * counts[:, None]
        sizes = affinity.sum(0)
        # Less than this is joined by no one: fp32 could not say where such a cluster is.
        empty = sizes < 1e-30
        means = affinity.T @ x / sizes.masked_fill(empty, 1.0)[:, None]
        clusters = torch.where(empty[:, None], clusters, means)
        means = affinity.T @ places / sizes.masked_fill(empty, 1.0)[:, None]
        centers = torch.where(empty[:, None], centers, means)
    return tuple(result.unflatten(0, grid) for result in (clusters, sizes, centers))


def rebuild_image(
    refined: Tensor,
    tokens: Tensor,
    clusters: Tensor,
    neighbors: int,
    temperature: float | str,
    normalize: str,
    window: int | None = None,
    valid: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Dense k-nearest-neighbour reconstruction of one image, (h, w, D) to (H, W, D)."""
    size, grid = (tokens.shape[0], tokens.shape[1]), (clusters.shape[0], clusters.shape[1])
    x, centers = tokens.double().flatten(0, 1), clusters.double().flatten(0, 1)
    values = refined.double().flatten(0, 1)
    allowed = allowed_pairs(size, grid, window)
    if valid is not None:
        allowed = allowed & valid.flatten()
    distances = squared_distances(x, centers).masked_fill(~allowed, torch.inf)
    if temperature == "auto":
        counts = x.new_ones(len(x)) if weights is None else weights.double().flatten()
        temperature = auto_temperature(distances, x, counts)
    rebuilt = []
    for distance, candidates in zip(distances, allowed, strict=True):
        nearest = distance.argsort()[: min(neighbors, int(candidates.sum()))]
        # The distance to the nearest cancels in either normalisation.
        weight = (-temperature * (distance[nearest] - distance[nearest[0]])).exp()
        total = weight.sum() if normalize == "l1" else weight.square().sum().sqrt()
        rebuilt.append((weight / total) @ values[nearest])
    return torch.stack(rebuilt).unflatten(0, size)


def _images(batch: int, items: tuple) -> list[tuple]:
    """The arguments of every image: tensors are split, the rest is the same for all."""
    return [tuple(i[b] if isinstance(i, Tensor) else i for i in items) for b in range(batch)]


def cluster(
    tokens: Tensor, *args, weights: Tensor | None = None, positions: Tensor | None = None
) -> tuple[Tensor, ...]:
    """`cluster_image` for every image of (B, H, W, C)."""
    images = _images(len(tokens), (tokens, *args, weights, positions))
    results = zip(*(cluster_image(*image) for image in images), strict=True)
    return tuple(torch.stack(result) for result in results)


def rebuild(
    refined: Tensor,
    tokens: Tensor,
    clusters: Tensor,
    *args,
    window: int | None = None,
    valid: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """`rebuild_image` for every image of a batch."""
    items = (refined, tokens, clusters, *args, window, valid, weights)
    return torch.stack([rebuild_image(*image) for image in _images(len(tokens), items)])


def offset_row(table: Tensor, offset: float, size: int) -> Tensor:
    """Row of a relative-position table for an offset in tokens, by linear interpolation.

    The offset is stretched as ``F.interpolate`` resamples the table for ``size`` tokens.
    """
    rows = table.shape[0]
    at = (rows - 1) / 2 + offset * rows / (2 * size - 1)
    at = min(max(at, 0.0), rows - 1.0)
    low = int(at)
    high = min(low + 1, rows - 1)
    return table[low] + (at - low) * (table[high] - table[low])


def position_row(table: Tensor, here: float, there: float, size: int, margin: int = 0) -> Tensor:
    """The same for a query and a key at any positions: the key shared by two whole rows."""
    first, last = -margin, size - 1 + margin
    here, there = min(max(here, first), last), min(max(there, first), last)
    low = math.floor(there)
    share = there - low
    above, below = (offset_row(table, here - row, size) for row in (low, low + 1))
    return above * (1 - share) + below * share


def plain_matching(
    keys: Tensor, sizes: Tensor, count: int, rounds: int, ward: float = 0.0, groups=None
) -> list[set[int]]:
    """Clusters of one image, as sets of tokens: one pair at a time, in float64."""
    clusters = [{i} for i in range(len(keys))]
    keys, sizes = list(keys.double()), sizes.double().tolist()
    groups = [0] * len(keys) if groups is None else groups.tolist()
    while len(clusters) > count:
        now = len(clusters)
        left, right = range(0, now // 2 * 2, 2), range(1, now, 2)
        number = min(-(-(now - count) // max(rounds, 1)), now // 2)
        rounds -= 1
        best = []
        for i in left:
            others = [j for j in right if groups[j] == groups[i]]
            if not others:
                continue
            distances = [(keys[i] - keys[j]).square().sum().item() for j in others]
            j = others[distances.index(min(distances))]
            weight = (sizes[i] * sizes[j] / (sizes[i] + sizes[j])) ** ward
            best.append((min(distances) * weight, i, j))
        into = {i: j for _, i, j in sorted(best)[:number]}
        new = {i: (set(clusters[i]), keys[i] * sizes[i], sizes[i]) for i in range(now)}
        for i, j in into.items():
            members, total, size = new[j]
            new[j] = (members | clusters[i], total + keys[i] * sizes[i], size + sizes[i])
        order = [i for i in range(now) if i not in into]
        clusters = [new[i][0] for i in order]
        keys = [new[i][1] / new[i][2] for i in order]
        sizes = [new[i][2] for i in order]
        groups = [groups[i] for i in order]
    return clusters
