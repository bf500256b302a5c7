"""Pictures: where the clusters lie, and predictions side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from detectron2.data.catalog import Metadata
from detectron2.structures import Instances
from detectron2.utils.visualizer import ColorMode, Visualizer
from matplotlib.figure import Figure
from torch import Tensor

from .operators import cluster_tokens, reconstruct_tokens
from .settings import Settings

__all__ = ["cluster_labels", "draw_clusters", "draw_instances", "save_panels"]

matplotlib.use("Agg")  # only files are written


def cluster_labels(tokens: Tensor, settings: Settings) -> Tensor:
    """The cluster each token is nearest to.

    Args:
        tokens: (B, H, W, C) tokens as they enter the clustering.
        settings: of the "expedit" method, over the whole map.

    Returns:
        (B, H, W) index of the cluster, row-major on the grid.
    """
    grid = settings.grid_for(tokens.shape[1], tokens.shape[2])
    clusters, _ = cluster_tokens(
        tokens, grid, settings.iterations, settings.temperature, settings.window
    )
    # Rebuilding one-hot clusters from the single nearest one gives its index.
    count = grid[0] * grid[1]
    one_hot = torch.eye(count, device=tokens.device).view(1, *grid, count)
    one_hot = one_hot.expand(tokens.shape[0], -1, -1, -1)
    nearest = reconstruct_tokens(
        one_hot, tokens, clusters, neighbors=1, window=settings.window, temperature=1.0
    )
    return nearest.argmax(-1)


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


def draw_instances(
    image: np.ndarray, instances: Instances, metadata: Metadata, threshold: float = 0.5
) -> np.ndarray:
    """Detections over an image (height, width, 3) uint8 RGB, by Detectron2's visualizer."""
    instances = instances.to("cpu")
    scale = max(1.0, 512 / max(image.shape[:2]))
    visualizer = Visualizer(image, metadata, scale=scale, instance_mode=ColorMode.SEGMENTATION)
    return visualizer.draw_instance_predictions(
        instances[instances.scores >= threshold]
    ).get_image()


def save_panels(rows: list[Mapping[str, np.ndarray]], path: str | Path) -> None:
    """Write a picture with one row of titled panels for each image.

    Args:
        rows: for each image, title to (height, width, 3) uint8 RGB.
        path: of the file; its folder is made if missing.
    """
    columns = max(len(row) for row in rows)
    figure = Figure(figsize=(3.2 * columns, 3.4 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        for axis in line:
            axis.set_axis_off()
        for axis, (title, panel) in zip(line, row.items(), strict=False):
            axis.imshow(panel)
            axis.set_title(title, fontsize=9)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
