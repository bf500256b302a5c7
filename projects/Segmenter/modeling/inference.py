"""Inference by sliding windows, as the official code runs it (arXiv 2105.05633, section 4.2).

Shorthand: an image of H x W pixels, K classes, windows of h x w pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from expedit_d2.tracing import shape_of

__all__ = ["enlarged_size", "sliding_window"]


class _Window(NamedTuple):
    """Position of a window, and the index of its image."""

    image: int
    rows: slice
    cols: slice

    @property
    def size(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.cols.stop - self.cols.start


def _starts(length: int, window: int, stride: int) -> list[int]:
    """Window starts every ``stride`` pixels; the last window is flush with the end."""
    return [*range(0, length - window, stride), length - window]


def _windows(image: int, size: tuple[int, int], window: int, stride: int) -> Iterator[_Window]:
    if not window:
        yield _Window(image, slice(0, size[0]), slice(0, size[1]))
        return
    for top in _starts(size[0], window, stride):
        for left in _starts(size[1], window, stride):
            yield _Window(image, slice(top, top + window), slice(left, left + window))


def enlarged_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """(H, W) of an image whose shorter side is enlarged to ``side``, keeping the aspect ratio.

    This is the official arithmetic, in which rounding of the aspect ratio may cost a pixel.
    """
    height, width = size
    if height < width:
        return side, int(width / height * side)
    return int(height / width * side), side


def _at_least(image: Tensor, side: int) -> Tensor:
    """Enlarge an image (3, H, W), keeping the aspect ratio, until no side is below ``side``."""
    size = shape_of(image)[1:]
    if min(size) >= side:
        return image
    size = enlarged_size(size, side)
    return F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]


def sliding_window(
    predict: Callable[[Tensor], Tensor],
    images: Sequence[Tensor],
    window: int,
    stride: int,
    batch: int = 4,
) -> list[Tensor]:
    """Class scores of images of any size, averaged over overlapping windows.

    Args:
        predict: windows (B, 3, h, w) to scores (B, K, h, w).
        images: each (3, H, W); one with a side below ``window`` is enlarged to it.
        window: side of the windows in pixels; 0: each image as a whole.
        stride: pixels from one window to the next.
        batch: windows, of all images together, per forward pass.

    Returns:
        For each image the scores (K, H, W), fp32, at the size to which it was enlarged.
    """
    images = [_at_least(image, window) for image in images]
    windows = [
        place
        for index, image in enumerate(images)
        for place in _windows(index, shape_of(image)[1:], window, stride)
    ]
    sums: dict[int, Tensor] = {}
    counts = [image.new_zeros(shape_of(image)[1:], dtype=torch.float32) for image in images]
    for _, group in groupby(windows, key=lambda place: place.size):
        same_size = list(group)
        for start in range(0, len(same_size), batch):
            places = same_size[start : start + batch]
            scores = predict(
                torch.stack([images[p.image][:, p.rows, p.cols] for p in places])
            ).float()
            for place, score in zip(places, scores, strict=True):
                size = shape_of(images[place.image])[1:]
                if place.image not in sums:
                    sums[place.image] = score.new_zeros((shape_of(score)[0], *size))
                sums[place.image][:, place.rows, place.cols].add_(score)
                counts[place.image][place.rows, place.cols].add_(1)
    return [sums[index] / count for index, count in enumerate(counts)]
