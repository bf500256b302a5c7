"""Matching of segments, and panoptic quality."""

from __future__ import annotations

import numpy as np

__all__ = ["match", "quality_terms"]

_IOU = 0.5


def match(iou: np.ndarray) -> list[tuple[int, int]]:
    """Greedy one-to-one matching at IoU above 0.5.

    Args:
        iou: (P, Q) of this model's P and the plain model's Q segments; 0 if classes differ.

    Returns:
        Pairs of indices by decreasing IoU.
    """
    rest, pairs = iou.copy(), []
    while rest.size and rest.max() > _IOU:
        row, col = np.unravel_index(rest.argmax(), rest.shape)
        pairs.append((int(row), int(col)))
        rest[row, :] = 0
        rest[:, col] = 0
    return pairs


def quality_terms(iou: np.ndarray) -> np.ndarray:
    """Numerator and denominator of panoptic quality: sum of IoUs, and half of all segments."""
    overlap = sum(iou[pair] for pair in match(iou))
    return np.array([overlap, sum(iou.shape) / 2])
