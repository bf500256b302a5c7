"""Plain and expedited predictions side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
import torch
from detectron2.data.catalog import Metadata
from detectron2.data.detection_utils import convert_image_to_rgb
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from ..adapters import find_transformer
from ..api import apply
from ..predictions import PREDICTIONS
from ..predictions.drawing import draw_difference, enlarge
from ..settings import Settings
from .clusters import cluster_labels, draw_clusters, record_reductions

__all__ = ["save_panels", "side_by_side"]

matplotlib.use("Agg")  # needs no display


@torch.no_grad()
def side_by_side(
    model: nn.Module,
    settings: Settings,
    item: dict,
    metadata: Metadata,
    color_format: str,
    all_kinds: bool = True,
) -> list[dict[str, np.ndarray]]:
    """Run a model on an image without and with token reduction, and draw all outputs.

    Args:
        model: a plain Detectron2 model in evaluation mode; it is restored afterwards.
        settings: settings of any method.
        item: Detectron2's input: ``image`` (3, height, width) and the size of the output.
        metadata: of the data set, for names and colours.
        color_format: of the image, ``INPUT.FORMAT``.
        all_kinds: False: of several kinds of output, draw only the one that says most.

    Returns:
        One row of panels per kind of output, uint8 RGB by title: the image; cluster boundaries on
        the transformer's input (padded; the first window of models with sliding windows); the plain
        prediction; the expedited one; and their difference.

    Raises:
        ValueError: for settings that reduce nothing.
    """
    if not settings.reduces:
        raise ValueError("MODEL.EXPEDIT.ALPHA is not set: there is nothing to compare with")
    plain = model([item])[0]
    with apply(model, settings) as handle:
        with record_reductions(handle.blocks) as reductions, _seen_pixels(model) as seen:
            reduced = model([item])[0]
    labels = cluster_labels(reductions[: len(handle.blocks.methods)])[0].cpu().numpy()
    clusters = draw_clusters(_drawable(seen[0], color_format), labels)
    image = _drawable(item["image"], color_format, large=False)
    # Outputs have the size of the file, which the model's input need not have.
    size = (item.get("width", image.shape[1]), item.get("height", image.shape[0]))
    image = _resize(image, size)
    rows = []
    kinds = [kind for kind in PREDICTIONS.values() if kind.key in plain]
    kinds.sort(key=lambda kind: kind.detail)
    for kind in kinds if all_kinds else kinds[-1:]:
        outputs = plain[kind.key], reduced[kind.key]
        before, after = (kind.draw(image, output, metadata) for output in outputs)
        different = kind.differ(*outputs)
        rows.append(
            {
                "image": image,
                "clusters": clusters,
                f"{kind.name}, plain": before,
                f"{kind.name}, {handle.settings.method}": after,
                f"differ: {different.mean():.1%}": draw_difference(image, different),
            }
        )
    return rows


@contextmanager
def _seen_pixels(model: nn.Module) -> Iterator[list[Tensor]]:
    """Record the transformer's unnormalised input (3, H, W), for the first image of each batch."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0][0] * model.pixel_std + model.pixel_mean)

    owner = find_transformer(model).whole
    first = next(module for module in owner.modules() if isinstance(module, nn.Conv2d))
    with first.register_forward_pre_hook(keep):
        yield seen


def _drawable(pixels: Tensor, color_format: str, large: bool = True) -> np.ndarray:
    """Pixels (3, H, W) as uint8 RGB (H, W, 3), with small images enlarged as for predictions."""
    pixels = enlarge(pixels) if large else pixels
    pixels = pixels.float().round().clamp(0, 255).permute(1, 2, 0)
    return convert_image_to_rgb(pixels, color_format).astype(np.uint8)


def _resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if image.shape[1::-1] == size:
        return image
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))


def save_panels(rows: list[Mapping[str, np.ndarray]], path: str | Path) -> None:
    """Save a figure with one row of titled panels per image.

    Args:
        rows: for each image, (height, width, 3) uint8 RGB panels by title.
        path: of the file; missing folders are created.
    """
    columns = max(len(row) for row in rows)
    shape = next(iter(rows[0].values())).shape
    height = 3.2 * shape[0] / shape[1] + 0.2
    figure = Figure(figsize=(3.2 * columns, height * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        for axis in line:
            axis.set_axis_off()
        for axis, (title, panel) in zip(line, row.items(), strict=False):
            axis.imshow(panel)
            axis.set_title(title, fontsize=9)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
