"""Predictions over an image: instances, panoptic segments, semantic labels, depth; differences.

Drawn by torchvision and Pillow; Detectron2's visualizer would need OpenCV. Small images are
enlarged by a whole factor, to at least 512 pixels, so that names can be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import torch
from detectron2.data.catalog import Metadata
from detectron2.structures import Instances
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from ..evaluation.agreement import match_segments
from .depth import colorize_depth

__all__ = [
    "DRAWN",
    "draw_depth",
    "draw_difference",
    "draw_instances",
    "draw_panoptic",
    "draw_semantic",
]

_LEAST = 512  # pixels
_SCORE = 0.5


def enlarge(planes: Tensor) -> Tensor:
    """Images or masks (N, h, w), each pixel a square."""
    scale = max(1, round(_LEAST / max(planes.shape[-2:])))
    return planes.repeat_interleave(scale, -2).repeat_interleave(scale, -1)


def _canvas(image: np.ndarray) -> Tensor:
    return enlarge(torch.tensor(image).permute(2, 0, 1))


def _to_image(canvas: Tensor) -> np.ndarray:
    return canvas.permute(1, 2, 0).numpy()


def _name(names: Sequence[str] | None, index: int) -> str:
    return names[index] if names and index < len(names) else str(index)


def _color(palette: Sequence[Sequence[float]] | None, index: int) -> tuple[int, int, int]:
    """0 to 255, from that or from 0 to 1 as matplotlib has it."""
    palette = palette or matplotlib.colormaps["tab20"].colors
    color = palette[index % len(palette)]
    scale = 255 if max(color) <= 1 else 1
    return tuple(int(scale * value) for value in color)


def draw_instances(image: np.ndarray, instances: Instances, metadata: Metadata) -> np.ndarray:
    """Detections of score 0.5 and more, with masks where there are any.

    Args:
        image: (height, width, 3) uint8 RGB.
        instances: Detectron2's predictions for it.
        metadata: of the data set, for the names and colours of the classes.
    """
    instances = instances.to("cpu")
    instances = instances[instances.scores >= _SCORE]
    canvas = _canvas(image)
    if len(instances) == 0:
        return _to_image(canvas)
    names, palette = metadata.get("thing_classes"), metadata.get("thing_colors")
    classes = instances.pred_classes.tolist()
    colors = [_color(palette, index) for index in classes]
    labels = [
        f"{_name(names, index)} {score:.0%}"
        for index, score in zip(classes, instances.scores.tolist(), strict=True)
    ]
    if instances.has("pred_masks"):
        masks = enlarge(instances.pred_masks.bool())
        canvas = draw_segmentation_masks(canvas, masks, alpha=0.5, colors=colors)
    boxes = instances.pred_boxes.tensor * (canvas.shape[-1] / image.shape[1])
    canvas = draw_bounding_boxes(canvas, boxes, colors=colors, width=2)
    corners = [(int(x) + 4, int(y) + 4) for x, y, *_ in boxes.tolist()]
    # The surest ones stand where they belong, if names are many.
    return _write(canvas, [*zip(labels, corners, strict=True)], anchor="la")


def draw_panoptic(
    image: np.ndarray, panoptic: tuple[Tensor, list[dict]], metadata: Metadata
) -> np.ndarray:
    """Segments in the colours of their classes, outlined and named; pixels of none stay bare.

    Args:
        image: (height, width, 3) uint8 RGB.
        panoptic: segment of each pixel (height, width), and Detectron2's ``segments_info``.
        metadata: of the data set; names under ``stuff_`` are those of all classes.
    """
    labels, segments = panoptic
    classes = [segment["category_id"] for segment in segments]
    masks = [labels.cpu() == segment["id"] for segment in segments]
    return _draw_masks(image, masks, classes, metadata)


def draw_semantic(image: np.ndarray, scores: Tensor, metadata: Metadata) -> np.ndarray:
    """The best class of each pixel.

    Args:
        image: (height, width, 3) uint8 RGB.
        scores: (classes, height, width).
        metadata: of the data set; names under ``stuff_`` are those of all classes.
    """
    labels = scores.argmax(0).cpu()
    classes = labels.unique().tolist()
    return _draw_masks(image, [labels == index for index in classes], classes, metadata)


def draw_depth(image: np.ndarray, depth: Tensor, metadata: Metadata) -> np.ndarray:
    """Depth in colours.

    Args:
        image: (height, width, 3) uint8 RGB; only for the same size as other drawings.
        depth: (height, width).
        metadata: of the data set; nothing of it is needed.
    """
    return _to_image(_canvas(colorize_depth(depth)))


def _draw_masks(
    image: np.ndarray, masks: Sequence[Tensor], classes: Sequence[int], metadata: Metadata
) -> np.ndarray:
    canvas = _canvas(image)
    kept = [index for index, mask in enumerate(masks) if mask.any()]
    if not kept:
        return _to_image(canvas)
    classes = [classes[index] for index in kept]
    planes = enlarge(torch.stack([masks[index] for index in kept]))
    names, palette = metadata.get("stuff_classes"), metadata.get("stuff_colors")
    colors = [_color(palette, index) for index in classes]
    canvas = draw_segmentation_masks(canvas, planes, alpha=0.6, colors=colors)
    canvas[:, _edges(planes)] = 255
    names = [_name(names, index) for index in classes]
    return _write(canvas, [*zip(names, map(_middle, planes), strict=True)], anchor="mm")


def _middle(plane: Tensor) -> tuple[int, int]:
    """A pixel (x, y) of the segment itself, in its middle, also where it is no blob."""
    rows, cols = torch.nonzero(plane, as_tuple=True)
    return int(cols[len(rows) // 2]), int(rows[len(rows) // 2])


def _write(canvas: Tensor, names: Sequence[tuple[str, tuple[int, int]]], anchor: str) -> np.ndarray:
    """Names at places (x, y), in white with a black outline; none covers one before it as far as
    there is room above or below.

    Args:
        canvas: (3, height, width), uint8.
        names: each with its place.
        anchor: of the text there, Pillow's.
    """
    picture = Image.fromarray(_to_image(canvas))
    pen = ImageDraw.Draw(picture)
    size = max(16, max(picture.size) // 24)
    style = {"anchor": anchor, "font_size": size, "stroke_width": size // 8}
    taken: list[Sequence[float]] = []
    for name, place in names:
        # Where it is wanted, else line by line above and below.
        lines = sorted(range(-20, 21), key=abs)
        tried = [(place[0], place[1] + line * (size + 4)) for line in lines]
        tried = [_inside(at, pen.textbbox(at, name, **style), picture.size) for at in tried]
        boxes = [pen.textbbox(at, name, **style) for at in tried]
        free = [n for n, box in enumerate(boxes) if not any(_overlap(box, t) for t in taken)]
        best = free[0] if free else 0
        taken.append(boxes[best])
        pen.text(tried[best], name, fill="white", stroke_fill="black", **style)
    return np.asarray(picture)


def _overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two boxes (left, top, right, bottom) do."""
    return all(one[a] < other[a + 2] and other[a] < one[a + 2] for a in (0, 1))


def _inside(
    place: tuple[int, int], box: Sequence[float], size: tuple[int, int]
) -> tuple[float, float]:
    """The place moved so that a text's box, left, top, right and bottom, lies in the picture."""
    return tuple(
        at + max(0, -box[axis]) - max(0, box[axis + 2] - size[axis])
        for axis, at in enumerate(place)
    )


def _edges(planes: Tensor) -> Tensor:
    """Pixels (h, w) at the border of a mask."""
    edge = torch.zeros(planes.shape[1:], dtype=torch.bool)
    edge[1:] |= (planes[:, 1:] != planes[:, :-1]).any(0)
    edge[:, 1:] |= (planes[:, :, 1:] != planes[:, :, :-1]).any(0)
    return edge


# --- differences ------------------------------------------------------------------------------


def _instance_difference(plain: Instances, other: Instances) -> np.ndarray:
    """Pixels whose topmost class is another one."""
    top = [_topmost(instances.to("cpu")) for instances in (plain, other)]
    return (top[0] != top[1]).numpy()


def _topmost(instances: Instances) -> Tensor:
    """(height, width) class of the surest instance at each pixel, -1 for none."""
    top = torch.full(instances.image_size, -1)
    instances = instances[instances.scores >= _SCORE]
    for index in instances.scores.argsort().tolist():
        if instances.has("pred_masks"):
            inside = instances.pred_masks[index].bool()
        else:
            x0, y0, x1, y1 = instances.pred_boxes.tensor[index].round().int().tolist()
            inside = torch.zeros(instances.image_size, dtype=torch.bool)
            inside[y0:y1, x0:x1] = True
        top[inside] = instances.pred_classes[index]
    return top


def _panoptic_difference(
    plain: tuple[Tensor, list[dict]], other: tuple[Tensor, list[dict]]
) -> np.ndarray:
    """Pixels that do not lie in the same segment, as a panoptic quality matches segments."""
    twins = match_segments(other, plain)
    mine = other[0].cpu().numpy()
    known = np.zeros_like(mine)
    for ours, theirs in twins.items():
        known[mine == ours] = theirs
    theirs = plain[0].cpu().numpy()
    unsegmented = (mine == 0) & (theirs == 0)
    return ((known != theirs) | (known == 0)) & ~unsegmented


def _semantic_difference(plain: Tensor, other: Tensor) -> np.ndarray:
    return (plain.argmax(0) != other.argmax(0)).cpu().numpy()


def _depth_difference(plain: Tensor, other: Tensor) -> np.ndarray:
    """Pixels that differ by more than 5 %, as in the agreement."""
    low, high = torch.minimum(plain, other), torch.maximum(plain, other)
    return (high > 1.05 * low).cpu().numpy()


#: Key of a model's output -> how it is drawn, and where two of them differ (height, width). What
#: says most comes last.
DRAWN: dict[str, tuple[Any, Any]] = {
    "instances": (draw_instances, _instance_difference),
    "sem_seg": (draw_semantic, _semantic_difference),
    "panoptic_seg": (draw_panoptic, _panoptic_difference),
    "depth": (draw_depth, _depth_difference),
}


def draw_difference(image: np.ndarray, different: np.ndarray) -> np.ndarray:
    """The image in grey, with the pixels that differ in red.

    Args:
        image: (height, width, 3) uint8 RGB.
        different: (height, width) bool.
    """
    grey = np.repeat(image.mean(-1, keepdims=True) * 0.5 + 64, 3, axis=-1)
    grey[different] = (230, 30, 60)
    return _to_image(_canvas(grey.astype(np.uint8)))
