"""Plain and expedited predictions side by side, and pages of such panels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
import torch
from detectron2.data.catalog import Metadata
from detectron2.data.detection_utils import convert_image_to_rgb
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from ..api import expedite
from ..settings import Settings
from .clusters import cluster_labels, draw_clusters
from .predictions import DRAWN, draw_difference

__all__ = ["save_panels", "side_by_side"]

matplotlib.use("Agg")  # only files are written

_TITLES = {
    "instances": "instances",
    "panoptic_seg": "panoptic",
    "sem_seg": "semantic",
    "depth": "depth",
}


@torch.no_grad()
def side_by_side(
    model: nn.Module, settings: Settings, item: dict, metadata: Metadata, color_format: str
) -> list[dict[str, np.ndarray]]:
    """Run a plain model without and with Expedit on an image, and draw all it puts out.

    Args:
        model: a plain Detectron2 model in evaluation mode; it is left as it was.
        settings: of the "expedit" method.
        item: Detectron2's input: ``image`` (3, height, width) and the size of the output.
        metadata: of the data set, for names and colours.
        color_format: of the image, ``INPUT.FORMAT``.

    Returns:
        for each kind of output one row of panels, title to uint8 RGB: the image with the clusters'
        borders, the plain prediction, the one with Expedit, and where they differ.
    """
    entering = []
    plain = model([item])[0]
    values = dict(vars(settings))
    with expedite(model, values.pop("alpha"), **values) as handle:
        reduce = next(iter(handle.blocks.methods.values())).reduce
        with reduce.register_forward_pre_hook(lambda _, args: entering.append(args[0].features)):
            ours = model([item])[0]
    labels = cluster_labels(entering[0], settings, reduce.window)[0].cpu().numpy()
    image = convert_image_to_rgb(item["image"].permute(1, 2, 0), color_format).astype(np.uint8)
    clusters = draw_clusters(image, labels)
    # Outputs have the size of the file, which the model's input need not have.
    size = (item.get("width", image.shape[1]), item.get("height", image.shape[0]))
    image = _resize(image, size)
    rows = []
    for key, (draw, differ) in DRAWN.items():
        if key not in plain:
            continue
        different = differ(plain[key], ours[key])
        rows.append(
            {
                "clusters": clusters,
                f"{_TITLES[key]}, plain": draw(image, plain[key], metadata),
                f"{_TITLES[key]}, Expedit": draw(image, ours[key], metadata),
                f"differ: {different.mean():.1%}": draw_difference(image, different),
            }
        )
    return rows


def _resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if image.shape[1::-1] == size:
        return image
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))


def save_panels(rows: list[Mapping[str, np.ndarray]], path: str | Path) -> None:
    """Write a picture with one row of titled panels for each image.

    Args:
        rows: for each image, title to (height, width, 3) uint8 RGB.
        path: of the file; its folder is made if missing.
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
