"""Where the clusters of an image lie, whichever method made them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..hook import ExpeditedBlocks
from ..predictions.drawing import spread_over
from ..tokens import Tokens
from ..tracing import shape_of

__all__ = ["Reduction", "cluster_labels", "draw_clusters", "record_reductions"]


class Reduction(NamedTuple):
    """What one reduction left.

    Attributes:
        method: whose ``rebuild`` takes the record.
        tokens: the reduced ones.
        record: of the reduction.
    """

    method: nn.Module
    tokens: Tokens
    record: Any


@contextmanager
def record_reductions(blocks: ExpeditedBlocks) -> Iterator[list[Reduction]]:
    """Collect every reduction of the forwards run inside, in order.

    A forward that runs the blocks once leaves one for each of ``blocks.methods``.
    """
    reductions: list[Reduction] = []

    def hook(method: nn.Module) -> Any:
        return method.reduce.register_forward_hook(
            lambda _, args, result: reductions.append(Reduction(method, *result))
        )

    hooks = [hook(method) for method in blocks.methods.values()]
    try:
        yield reductions
    finally:
        for handle in hooks:
            handle.remove()


@torch.no_grad()
def cluster_labels(reductions: Sequence[Reduction]) -> Tensor:
    """The cluster that each token is rebuilt from, or most of it where there are several.

    Args:
        reductions: of one run through the blocks, in order; each starts from what the one before
            it has left.

    Returns:
        (B, H, W) long, index of the cluster after the last reduction.
    """
    final = reductions[-1].tokens.features
    batch, *shape, _ = shape_of(final)
    count = prod(shape)
    # One-hot clusters, rebuilt, are the share that each cluster has in each token.
    shares = torch.eye(count, device=final.device).view(1, *shape, count)
    shares = shares.expand(batch, *shares.shape[1:])
    for method, _, record in reversed(reductions):
        shares = method.rebuild(shares, record, residual=False)
    return shares.argmax(-1)


def draw_clusters(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Cluster boundaries over an image: where neighbouring tokens are not in the same cluster.

    Args:
        image: (height, width, 3) uint8 RGB.
        labels: (H, W) cluster of each token.
    """
    size = image.shape[:2]
    full = spread_over(labels, size)
    edge = np.zeros(size, dtype=bool)
    edge[1:] |= full[1:] != full[:-1]
    edge[:, 1:] |= full[:, 1:] != full[:, :-1]
    drawn = image.copy()
    drawn[edge] = (255, 230, 0)
    return drawn
