"""Depth in colours."""

from __future__ import annotations

import matplotlib
import numpy as np
import torch
from torch import Tensor

__all__ = ["colorize_depth"]


def colorize_depth(
    depth: Tensor | np.ndarray,
    limits: tuple[float, float] | None = None,
    colormap: str = "Spectral_r",
) -> np.ndarray:
    """Draw depth, or inverse depth, with a colour map.

    Args:
        depth: (H, W); what is not finite is drawn black.
        limits: values of the first and the last colour; None: the 2nd and 98th percentile.
        colormap: of matplotlib.

    Returns:
        uint8 RGB (H, W, 3).

    Raises:
        ValueError: for another shape.
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
