"""Panoptic segmentation: segments of things and stuff."""

from __future__ import annotations

import numpy as np
from detectron2.data.catalog import Metadata
from torch import Tensor

from .drawing import draw_masks
from .matching import match, quality_terms
from .packing import pack_labels, unpack
from .prediction import Metric, Prediction, Record

__all__ = ["PanopticPrediction", "draw_panoptic", "match_segments"]


def draw_panoptic(
    image: np.ndarray, panoptic: tuple[Tensor, list[dict]], metadata: Metadata
) -> np.ndarray:
    """Draw segments in the colours of their classes, with outlines and names.

    Args:
        image: (height, width, 3) uint8 RGB.
        panoptic: segment of each pixel (height, width), and Detectron2's ``segments_info``.
        metadata: of the data set; ``stuff_classes`` has the names of all classes.
    """
    labels, segments = panoptic
    classes = [segment["category_id"] for segment in segments]
    masks = [labels.cpu() == segment["id"] for segment in segments]
    return draw_masks(image, masks, classes, metadata)


def _record(output: tuple[Tensor, list[dict]]) -> Record:
    """The map, and ``segments`` (K, 2): id and class, without empty segments."""
    labels, segments = output
    ids = set(labels.unique().tolist())
    pairs = [(s["id"], s["category_id"]) for s in segments if s["id"] in ids]
    return {**pack_labels(labels), "segments": np.array(pairs, np.int64).reshape(-1, 2)}


def _segment_overlaps(mine: Record, plain: Record) -> np.ndarray:
    """IoU (P, Q) of the segments of two panoptic maps, 0 if classes differ."""
    classes = [dict(record["segments"].tolist()) for record in (mine, plain)]
    together = np.zeros((len(classes[0]), len(classes[1])))
    rows, cols = ({segment: place for place, segment in enumerate(c)} for c in classes)
    labels = np.stack([unpack(record, np.int32) for record in (mine, plain)])
    pairs, counts = np.unique(labels, axis=1, return_counts=True)
    areas = [np.zeros(len(rows)), np.zeros(len(cols))]
    for ours, theirs, count in zip(*pairs.tolist(), counts.tolist(), strict=True):
        if ours in rows:
            areas[0][rows[ours]] += count
        if theirs in cols:
            areas[1][cols[theirs]] += count
        if ours in rows and theirs in cols and classes[0][ours] == classes[1][theirs]:
            together[rows[ours], cols[theirs]] = count
    return together / (areas[0][:, None] + areas[1][None] - together)


def match_segments(
    mine: tuple[Tensor, list[dict]], plain: tuple[Tensor, list[dict]]
) -> dict[int, int]:
    """Match the segments of two panoptic outputs as in panoptic quality.

    Args:
        mine, plain: segment of each pixel (height, width), and Detectron2's ``segments_info``.

    Returns:
        Ids of matched segments of ``mine`` to those of ``plain``.
    """
    ours, theirs = (_record(output) for output in (mine, plain))
    pairs = match(_segment_overlaps(ours, theirs))
    return {int(ours["segments"][row, 0]): int(theirs["segments"][col, 0]) for row, col in pairs}


class PanopticPrediction(Prediction):
    """Panoptic segmentation, things and stuff alike; pixels without a segment (0) lower the IoU."""

    key = "panoptic_seg"
    name = "panoptic"
    metrics = (Metric("panoptic_seg", "PQ", "PQ"),)
    detail = 2

    keep = staticmethod(_record)
    draw = staticmethod(draw_panoptic)

    def terms(self, mine: Record, plain: Record) -> np.ndarray:
        return quality_terms(_segment_overlaps(mine, plain))

    def differ(
        self, plain: tuple[Tensor, list[dict]], other: tuple[Tensor, list[dict]]
    ) -> np.ndarray:
        """Pixels that are not in matching segments."""
        mine = other[0].cpu().numpy()
        matched = np.zeros_like(mine)
        for ours, theirs in match_segments(other, plain).items():
            matched[mine == ours] = theirs
        theirs = plain[0].cpu().numpy()
        unsegmented = (mine == 0) & (theirs == 0)
        return ((matched != theirs) | (matched == 0)) & ~unsegmented
