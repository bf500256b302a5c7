"""Semantic segmentation: scores (classes, height, width)."""

from __future__ import annotations

import numpy as np
from detectron2.data.catalog import Metadata
from torch import Tensor

from .drawing import draw_masks
from .packing import pack_labels, unpack
from .prediction import Metric, Prediction, Record

__all__ = ["SemanticPrediction", "draw_semantic"]


def draw_semantic(image: np.ndarray, scores: Tensor, metadata: Metadata) -> np.ndarray:
    """The best class of each pixel.

    Args:
        image: (height, width, 3) uint8 RGB.
        scores: (classes, height, width).
        metadata: of the data set; names under ``stuff_`` are those of all classes.
    """
    labels = scores.argmax(0).cpu()
    classes = labels.unique().tolist()
    return draw_masks(image, [labels == index for index in classes], classes, metadata)


class SemanticPrediction(Prediction):
    """Pixels with the same label agree."""

    key = "sem_seg"
    name = "semantic"
    metrics = (Metric("sem_seg", "mIoU", "mIoU"),)
    detail = 1

    draw = staticmethod(draw_semantic)

    def keep(self, output: Tensor) -> Record:
        return pack_labels(output.argmax(0))

    def terms(self, mine: Record, plain: Record) -> np.ndarray:
        same = unpack(mine, np.int32) == unpack(plain, np.int32)
        return np.array([same.sum(), same.size])

    def differ(self, plain: Tensor, other: Tensor) -> np.ndarray:
        return (plain.argmax(0) != other.argmax(0)).cpu().numpy()
