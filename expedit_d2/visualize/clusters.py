"""Cluster maps of any method."""

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
    """Result of one reduction.

    Attributes:
        method: the method, whose ``rebuild`` takes the record.
        tokens: the reduced tokens.
        record: what reconstruction needs.
    """

    method: nn.Module
    tokens: Tokens
    record: Any


@contextmanager
def record_reductions(blocks: ExpeditedBlocks) -> Iterator[list[Reduction]]:
    """Record all reductions of the forward passes inside the context, in order.

    Each pass through the blocks adds one for each of ``blocks.methods``.
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
    """The cluster with the largest weight in the reconstruction of each token.

    Args:
        reductions: of one pass through the blocks, in order; each reduces the tokens of the
            previous one.

    Returns:
        (B, H, W) long, index of the cluster after the last reduction.
    """
    final = reductions[-1].tokens.features
    batch, *shape, _ = shape_of(final)
    count = prod(shape)
    # Reconstructing one-hot clusters gives the weight of each cluster in each token.
    shares = torch.eye(count, device=final.device).view(1, *shape, count)
    shares = shares.expand(batch, *shares.shape[1:])
    for method, _, record in reversed(reductions):
        shares = method.rebuild(shares, record, residual=False)
    return shares.argmax(-1)


def draw_clusters(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Draw cluster boundaries on an image, between neighbouring tokens of different clusters.

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
