"""Draw masks and names on images with torchvision and Pillow; Detectron2's needs OpenCV.

Small images are enlarged by an integer factor, to about 512 pixels, so that names are readable.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from detectron2.data.catalog import Metadata
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.utils import draw_segmentation_masks

__all__ = [
    "canvas_of",
    "class_color",
    "class_name",
    "draw_difference",
    "draw_masks",
    "enlarge",
    "spread_over",
    "to_image",
    "write_names",
]

_LEAST = 512  # pixels


def enlarge(planes: Tensor) -> Tensor:
    """Enlarge images or masks (N, h, w), with each pixel as a square."""
    scale = max(1, round(_LEAST / max(planes.shape[-2:])))
    return planes.repeat_interleave(scale, -2).repeat_interleave(scale, -1)


def spread_over(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize labels (h, w), below 2**24, to (height, width), nearest neighbour, float32."""
    planes = torch.as_tensor(labels)[None, None].float()
    return F.interpolate(planes, size=size, mode="nearest")[0, 0].numpy()


def canvas_of(image: np.ndarray) -> Tensor:
    """An image (height, width, 3) as an enlarged canvas (3, height, width)."""
    return enlarge(torch.tensor(image).permute(2, 0, 1))


def to_image(canvas: Tensor) -> np.ndarray:
    """A canvas (3, height, width) as an image (height, width, 3)."""
    return canvas.permute(1, 2, 0).numpy()


def class_name(names: Sequence[str] | None, index: int) -> str:
    """Name of a class, or its number."""
    return names[index] if names and index < len(names) else str(index)


def class_color(palette: Sequence[Sequence[float]] | None, index: int) -> tuple[int, int, int]:
    """Colour of a class, 0 to 255; palettes may also have values of 0 to 1, as in matplotlib."""
    palette = palette or matplotlib.colormaps["tab20"].colors
    color = palette[index % len(palette)]
    scale = 255 if max(color) <= 1 else 1
    return tuple(int(scale * value) for value in color)


def draw_masks(
    image: np.ndarray, masks: Sequence[Tensor], classes: Sequence[int], metadata: Metadata
) -> np.ndarray:
    """Draw masks in the colours of their classes, with outlines and names; skips empty ones.

    Args:
        image: (height, width, 3) uint8 RGB.
        masks: bool (height, width), without overlap.
        classes: class of each mask.
        metadata: of the data set; ``stuff_classes`` has the names of all classes.
    """
    canvas = canvas_of(image)
    kept = [index for index, mask in enumerate(masks) if mask.any()]
    if not kept:
        return to_image(canvas)
    classes = [classes[index] for index in kept]
    planes = enlarge(torch.stack([masks[index] for index in kept]))
    names, palette = metadata.get("stuff_classes"), metadata.get("stuff_colors")
    colors = [class_color(palette, index) for index in classes]
    canvas = draw_segmentation_masks(canvas, planes, alpha=0.6, colors=colors)
    canvas[:, _edges(planes)] = 255
    names = [class_name(names, index) for index in classes]
    return write_names(canvas, [*zip(names, map(_middle, planes), strict=True)], anchor="mm")


def _middle(plane: Tensor) -> tuple[int, int]:
    """A pixel (x, y) in the middle of a segment that belongs to it."""
    rows, cols = torch.nonzero(plane, as_tuple=True)
    return int(cols[len(rows) // 2]), int(rows[len(rows) // 2])


def write_names(
    canvas: Tensor, names: Sequence[tuple[str, tuple[int, int]]], anchor: str
) -> np.ndarray:
    """Write names at positions (x, y), in white with a black outline, moved up or down so that they
    do not overlap.

    Args:
        canvas: (3, height, width), uint8.
        names: names with their positions.
        anchor: Pillow's text anchor.
    """
    picture = Image.fromarray(to_image(canvas))
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
    """Whether two boxes (left, top, right, bottom) overlap."""
    return all(one[a] < other[a + 2] and other[a] < one[a + 2] for a in (0, 1))


def _inside(
    place: tuple[int, int], box: Sequence[float], size: tuple[int, int]
) -> tuple[float, float]:
    """A position moved so that the text's box (left, top, right, bottom) is inside the picture."""
    return tuple(
        at + max(0, -box[axis]) - max(0, box[axis + 2] - size[axis])
        for axis, at in enumerate(place)
    )


def _edges(planes: Tensor) -> Tensor:
    """Pixels (h, w) at the boundary of a mask."""
    edge = torch.zeros(planes.shape[1:], dtype=torch.bool)
    edge[1:] |= (planes[:, 1:] != planes[:, :-1]).any(0)
    edge[:, 1:] |= (planes[:, :, 1:] != planes[:, :, :-1]).any(0)
    return edge


def draw_difference(image: np.ndarray, different: np.ndarray) -> np.ndarray:
    """The image in grey, with the pixels that differ in red.

    Args:
        image: (height, width, 3) uint8 RGB.
        different: (height, width) bool, or coarser.
    """
    grey = np.repeat(image.mean(-1, keepdims=True) * 0.5 + 64, 3, axis=-1)
    grey[spread_over(different, image.shape[:2]) > 0] = (230, 30, 60)
    return to_image(canvas_of(grey.astype(np.uint8)))
