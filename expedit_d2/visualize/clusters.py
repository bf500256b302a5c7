"""Pictures: where the clusters lie, and predictions side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from detectron2.data.catalog import Metadata
from detectron2.structures import Instances
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from .operators import cluster_tokens, reconstruct_tokens
from .settings import Settings
from .windows import partition, unpartition

__all__ = ["cluster_labels", "draw_clusters", "draw_instances", "save_panels"]

matplotlib.use("Agg")  # only files are written


def cluster_labels(
    tokens: Tensor, settings: Settings, attention_window: int | None = None
) -> Tensor:
    """The cluster each token is nearest to.

    Args:
        tokens: (B, H, W, C) tokens as they enter the clustering.
        settings: of the "expedit" method.
        attention_window: side of the model's attention windows, for scope "window".

    Returns:
        (B, H, W) index of the cluster; no two windows share one.
    """
    size = (tokens.shape[1], tokens.shape[2])
    windowed = settings.scope == "window"
    if windowed:
        tokens = partition(tokens, (attention_window, attention_window))
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


def draw_instances(
    image: np.ndarray, instances: Instances, metadata: Metadata, threshold: float = 0.5
) -> np.ndarray:
    """Detections over an image, enlarged to at least 512 pixels so that the names can be read.

    Drawn by torchvision; Detectron2's visualizer would need OpenCV.

    Args:
        image: (height, width, 3) uint8 RGB.
        instances: Detectron2's predictions for it.
        metadata: of the data set, for the names and colours of the classes.
        threshold: lowest score that is drawn.
    """
    instances = instances.to("cpu")
    instances = instances[instances.scores >= threshold]
    scale = max(1, round(512 / max(image.shape[:2])))
    canvas = torch.as_tensor(image).permute(2, 0, 1).repeat_interleave(scale, 1)
    canvas = canvas.repeat_interleave(scale, 2)
    if len(instances) == 0:
        return canvas.permute(1, 2, 0).numpy()
    names = metadata.get("thing_classes", None)
    palette = metadata.get("thing_colors", None) or list(matplotlib.colormaps["tab10"].colors)
    classes = instances.pred_classes.tolist()
    colors = [_color(palette[index % len(palette)]) for index in classes]
    labels = [
        f"{names[index] if names else index} {score:.0%}"
        for index, score in zip(classes, instances.scores.tolist(), strict=True)
    ]
    if instances.has("pred_masks"):
        masks = instances.pred_masks.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        canvas = draw_segmentation_masks(canvas, masks, alpha=0.5, colors=colors)
    boxes = instances.pred_boxes.tensor * scale
    canvas = draw_bounding_boxes(canvas, boxes, labels=labels, colors=colors, width=2)
    return canvas.permute(1, 2, 0).numpy()


def _color(color: Sequence[float]) -> tuple[int, int, int]:
    """0 to 255, from that or from 0 to 1 as matplotlib has it."""
    scale = 255 if max(color) <= 1 else 1
    return tuple(int(scale * value) for value in color)


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
