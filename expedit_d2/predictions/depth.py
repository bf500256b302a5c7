"""Depth, or inverse depth, (height, width)."""

from __future__ import annotations

import matplotlib
import numpy as np
import torch
from detectron2.data.catalog import Metadata
from torch import Tensor

from .drawing import canvas_of, to_image
from .packing import pack, unpack
from .prediction import Metric, Prediction, Record

__all__ = ["DepthPrediction", "colorize_depth", "draw_depth"]

_RATIO = 1.05


def colorize_depth(
    depth: Tensor | np.ndarray,
    limits: tuple[float, float] | None = None,
    colormap: str = "Spectral_r",
) -> np.ndarray:
    """Draw depth, or inverse depth, with a colour map.

    Args:
        depth: (H, W); values that are not finite are black.
        limits: values of the first and the last colour; None: the 2nd and 98th percentile.
        colormap: of matplotlib.

    Returns:
        uint8 RGB (H, W, 3).

    Raises:
        ValueError: for a wrong shape.
    """
    values = depth.detach().float().cpu().numpy() if torch.is_tensor(depth) else np.asarray(depth)
    if values.ndim != 2:
        raise ValueError(f"depth must have shape (H, W), got {values.shape}")
    values = values.astype(np.float64)
    finite = np.isfinite(values)
    if not finite.any():
        return np.zeros((*values.shape, 3), np.uint8)
    low, high = limits or np.percentile(values[finite], (2, 98))
    shares = (np.where(finite, values, low) - low) / max(high - low, 1e-12)
    colors = matplotlib.colormaps[colormap](np.clip(shares, 0, 1))[..., :3]
    return np.rint(255 * colors * finite[..., None]).astype(np.uint8)


def draw_depth(image: np.ndarray, depth: Tensor, metadata: Metadata) -> np.ndarray:
    """Draw depth in colours.

    Args:
        image: not used.
        depth: (height, width).
        metadata: not used.
    """
    return to_image(canvas_of(colorize_depth(depth)))


def _near(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Pixels within 5 % of each other, without division, as inverse depth may be zero."""
    return np.maximum(ours, theirs) <= _RATIO * np.minimum(ours, theirs)


class DepthPrediction(Prediction):
    """Depth; pixels within 5 % of the plain model's agree."""

    key = "depth"
    name = "depth"
    metrics = (Metric("depth", "d1", "δ1"),)
    detail = 3

    draw = staticmethod(draw_depth)

    def keep(self, output: Tensor) -> Record:
        return pack(output.to("cpu", torch.float32).numpy())

    def terms(self, mine: Record, plain: Record) -> np.ndarray:
        near = _near(unpack(mine, np.float32), unpack(plain, np.float32))
        return np.array([near.sum(), near.size])

    def differ(self, plain: Tensor, other: Tensor) -> np.ndarray:
        return ~_near(*(depth.to("cpu", torch.float32).numpy() for depth in (plain, other)))
