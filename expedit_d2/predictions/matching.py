"""Segments of two outputs that are the same, and the panoptic quality of these."""

from __future__ import annotations

import numpy as np

__all__ = ["match", "quality_terms"]

_IOU = 0.5


def match(iou: np.ndarray) -> list[tuple[int, int]]:
    """Greedy one-to-one matching at IoU above 0.5.

    Args:
        iou: (P, Q) overlaps of this model's P and the plain model's Q segments; 0 where the
            classes differ.

    Returns:
        pairs of their indices, the best overlap first.
    """
    left, pairs = iou.copy(), []
    while left.size and left.max() > _IOU:
        row, col = np.unravel_index(left.argmax(), left.shape)
        pairs.append((int(row), int(col)))
        left[row, :] = 0
        left[:, col] = 0
    return pairs


def quality_terms(iou: np.ndarray) -> np.ndarray:
    """Two summands of a panoptic quality: the overlaps, and the number of segments, halved."""
    overlap = sum(iou[pair] for pair in match(iou))
    return np.array([overlap, sum(iou.shape) / 2])
