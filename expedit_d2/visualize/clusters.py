"""Where the clusters of an image lie."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..operators import cluster_tokens, reconstruct_tokens
from ..settings import Settings
from ..windows import partition, unpartition

__all__ = ["cluster_labels", "draw_clusters"]


def cluster_labels(
    tokens: Tensor, settings: Settings, attention_window: tuple[int, int] | None = None
) -> Tensor:
    """The cluster each token is nearest to.

    Args:
        tokens: (B, H, W, C) tokens as they enter the clustering.
        settings: of the "expedit" method.
        attention_window: sides of the model's attention windows, for scope "window".

    Returns:
        (B, H, W) index of the cluster; no two windows share one.
    """
    size = (tokens.shape[1], tokens.shape[2])
    windowed = settings.scope == "window"
    if windowed:
        tokens = partition(tokens, attention_window)
    grid = settings.grid_for(tokens.shape[1], tokens.shape[2])
    clusters = cluster_tokens(
        tokens, grid, settings.iterations, settings.temperature, settings.window
    ).features
    # Rebuilding one-hot clusters from the single nearest one gives its index.
    count = grid[0] * grid[1]
    one_hot = torch.eye(count, device=tokens.device).view(1, *grid, count)
    one_hot = one_hot.expand(tokens.shape[0], -1, -1, -1)
    nearest = reconstruct_tokens(
        one_hot, tokens, clusters, neighbors=1, window=settings.window, temperature=1.0
    )
    labels = nearest.argmax(-1)
    if not windowed:
        return labels
    first = torch.arange(len(labels), device=labels.device)[:, None, None] * count
    return unpartition((labels + first)[..., None], size)[..., 0]


def draw_clusters(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Cluster boundaries over an image.

    Args:
        image: (height, width, 3) uint8 RGB.
        labels: (H, W) cluster of each token.
    """
    size = image.shape[:2]
    # Labels are below 2**24, so float32 holds them exactly.
    full = torch.as_tensor(labels)[None, None].float()
    full = F.interpolate(full, size=size, mode="nearest")[0, 0].numpy()
    edge = np.zeros(size, dtype=bool)
    edge[1:] |= full[1:] != full[:-1]
    edge[:, 1:] |= full[:, 1:] != full[:, :-1]
    drawn = image.copy()
    drawn[edge] = (255, 230, 0)
    return drawn
