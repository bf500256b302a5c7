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
    """Segments in the colours of their classes, outlined and named; pixels of none stay bare.

    Args:
        image: (height, width, 3) uint8 RGB.
        panoptic: segment of each pixel (height, width), and Detectron2's ``segments_info``.
        metadata: of the data set; names under ``stuff_`` are those of all classes.
    """
    labels, segments = panoptic
    classes = [segment["category_id"] for segment in segments]
    masks = [labels.cpu() == segment["id"] for segment in segments]
    return draw_masks(image, masks, classes, metadata)


def _record(output: tuple[Tensor, list[dict]]) -> Record:
    """The map, and ``segments`` (K, 2): id and class. Segments without a pixel are left out."""
    labels, segments = output
    there = set(labels.unique().tolist())
    pairs = [(s["id"], s["category_id"]) for s in segments if s["id"] in there]
    return {**pack_labels(labels), "segments": np.array(pairs, np.int64).reshape(-1, 2)}


def _segment_overlaps(mine: Record, plain: Record) -> np.ndarray:
    """IoU (P, Q) of the segments of two panoptic maps, 0 where the classes differ."""
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
    """Segments of one panoptic output that are found in another, matched as in the panoptic
    quality.

    Args:
        mine, plain: segment of each pixel (height, width), and Detectron2's ``segments_info``.

    Returns:
        id of a segment to the id of its twin; segments without one are left out.
    """
    ours, theirs = (_record(output) for output in (mine, plain))
    pairs = match(_segment_overlaps(ours, theirs))
    return {int(ours["segments"][row, 0]): int(theirs["segments"][col, 0]) for row, col in pairs}


class PanopticPrediction(Prediction):
    """Things and stuff alike; pixels of no segment (0) lower the overlap of the segment there."""

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
        """Pixels that do not lie in the same segment, matched as in the panoptic quality."""
        twins = match_segments(other, plain)
        mine = other[0].cpu().numpy()
        known = np.zeros_like(mine)
        for ours, theirs in twins.items():
            known[mine == ours] = theirs
        theirs = plain[0].cpu().numpy()
        unsegmented = (mine == 0) & (theirs == 0)
        return ((known != theirs) | (known == 0)) & ~unsegmented
