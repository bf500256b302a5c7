"""Agreement of a model's output with the plain model's: needs no labels and has little noise."""

from __future__ import annotations

import zlib
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils import comm
from torch import Tensor

__all__ = ["Agreement", "match", "match_segments"]

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


def _quality_terms(iou: np.ndarray) -> np.ndarray:
    """Two summands of a panoptic quality: the overlaps, and the number of segments, halved."""
    overlap = sum(iou[pair] for pair in match(iou))
    return np.array([overlap, sum(iou.shape) / 2])


class _Measure(Protocol):
    """How one kind of output is kept, and compared with the plain model's."""

    key: str  # of the model's output

    def keep(self, output: Any) -> Any:
        """What has to be remembered of an image, small."""

    def terms(self, mine: Any, plain: Any) -> np.ndarray:
        """Numerator and denominator of the agreement, to be summed over the images."""


@dataclass(frozen=True)
class _Segments:
    """Instances: classes (N,), boxes, run-length masks or None."""

    classes: Tensor
    boxes: Boxes
    masks: list[dict] | None


class _InstanceMeasure:
    """Masks are compared where there are any, else boxes; score 0.5 and more."""

    key = "instances"
    threshold = 0.5

    def keep(self, output: Instances) -> _Segments:
        instances = output.to("cpu")
        instances = instances[instances.scores >= self.threshold]
        masks = None
        if instances.has("pred_masks"):
            masks = [
                mask_util.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
                for mask in instances.pred_masks
            ]
        return _Segments(instances.pred_classes, instances.pred_boxes, masks)

    def terms(self, mine: _Segments, plain: _Segments) -> np.ndarray:
        same = (mine.classes[:, None] == plain.classes[None, :]).numpy()
        if not same.size:
            return _quality_terms(np.zeros(same.shape))
        if mine.masks is not None:
            iou = mask_util.iou(mine.masks, plain.masks, [0] * len(plain.masks))
        else:
            iou = pairwise_iou(mine.boxes, plain.boxes).to(torch.float64).numpy()
        return _quality_terms(np.asarray(iou) * same)


@dataclass(frozen=True)
class _Map:
    """An integer map, compressed; and for a panoptic one the class of each segment."""

    data: bytes
    classes: dict[int, int] | None = None

    @classmethod
    def of(cls, labels: Tensor, classes: dict[int, int] | None = None) -> _Map:
        return cls(zlib.compress(labels.to("cpu", torch.int32).numpy().tobytes(), 1), classes)

    @property
    def labels(self) -> np.ndarray:
        """All pixels, row by row."""
        return np.frombuffer(zlib.decompress(self.data), np.int32)


class _PanopticMeasure:
    """Things and stuff alike; pixels of no segment (0) lower the overlap of the segment there."""

    key = "panoptic_seg"

    def keep(self, output: tuple[Tensor, list[dict]]) -> _Map:
        labels, segments = output
        return _Map.of(labels, {s["id"]: s["category_id"] for s in segments})

    def terms(self, mine: _Map, plain: _Map) -> np.ndarray:
        return _quality_terms(_segment_overlaps(mine, plain))


def _segment_overlaps(mine: _Map, plain: _Map) -> np.ndarray:
    """IoU (P, Q) of the segments of two panoptic maps, 0 where the classes differ."""
    together = np.zeros((len(mine.classes), len(plain.classes)))
    rows = {segment: row for row, segment in enumerate(mine.classes)}
    cols = {segment: col for col, segment in enumerate(plain.classes)}
    pairs, counts = np.unique(np.stack([mine.labels, plain.labels]), axis=1, return_counts=True)
    areas = [np.zeros(len(rows)), np.zeros(len(cols))]
    for ours, theirs, count in zip(*pairs.tolist(), counts.tolist(), strict=True):
        if ours in rows:
            areas[0][rows[ours]] += count
        if theirs in cols:
            areas[1][cols[theirs]] += count
        if ours in rows and theirs in cols and mine.classes[ours] == plain.classes[theirs]:
            together[rows[ours], cols[theirs]] = count
    return together / np.maximum(areas[0][:, None] + areas[1][None] - together, 1)


def match_segments(
    mine: tuple[Tensor, list[dict]], plain: tuple[Tensor, list[dict]]
) -> dict[int, int]:
    """Segments of one panoptic output that are found in another, as a panoptic quality has it.

    Args:
        mine, plain: segment of each pixel (height, width), and Detectron2's ``segments_info``.

    Returns:
        id of a segment to the id of its twin; segments without one are left out.
    """
    keep = _PanopticMeasure().keep
    pairs = match(_segment_overlaps(keep(mine), keep(plain)))
    return {mine[1][ours]["id"]: plain[1][theirs]["id"] for ours, theirs in pairs}


class _SemanticMeasure:
    """The share of the pixels with the same label."""

    key = "sem_seg"

    def keep(self, output: Tensor) -> _Map:
        return _Map.of(output.argmax(0))

    def terms(self, mine: _Map, plain: _Map) -> np.ndarray:
        same = mine.labels == plain.labels
        return np.array([same.sum(), same.size])


@dataclass(frozen=True)
class _Depth:
    """Depths (height * width) in fp32, compressed."""

    data: bytes

    @property
    def values(self) -> np.ndarray:
        return np.frombuffer(zlib.decompress(self.data), np.float32)


class _DepthMeasure:
    """The share of the pixels whose depth is within 5 % of the plain model's."""

    key = "depth"
    ratio = 1.05

    def keep(self, output: Tensor) -> _Depth:
        return _Depth(zlib.compress(output.to("cpu", torch.float32).numpy().tobytes(), 1))

    def terms(self, mine: _Depth, plain: _Depth) -> np.ndarray:
        # Products, as inverse depth may be zero.
        low, high = np.minimum(mine.values, plain.values), np.maximum(mine.values, plain.values)
        return np.array([(high <= self.ratio * low).sum(), high.size])


_MEASURES: dict[str, _Measure] = {
    "instances": _InstanceMeasure(),
    "panoptic": _PanopticMeasure(),
    "semantic": _SemanticMeasure(),
    "depth": _DepthMeasure(),
}


class Agreement(DatasetEvaluator):
    """How far a model's outputs are those of the plain model, in percent; 100 is identical.

    - instances, panoptic: the panoptic quality (Kirillov et al., arXiv 1801.00868, equation 1)
      between the segments of the two, over all classes at once: sum of matched IoUs over (matched
      + half of the additional + half of the lost).
    - semantic: pixels with the same label.
    - depth: pixels within 5 % of the plain model's depth (or inverse depth).

    Whatever of these a model puts out is compared. The plain model is run first, with an evaluator
    of its own, which the others are given.
    """

    def __init__(self, reference: Agreement | None = None) -> None:
        """
        Args:
            reference: the evaluator that has seen the plain model's outputs; None makes this one.
        """
        self.reference = reference
        self.reset()

    def reset(self) -> None:
        self.kept: dict[tuple[str, Hashable], Any] = {}
        self.sums: dict[str, np.ndarray] = {}

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        for item, output in zip(inputs, outputs, strict=True):
            image = item["image_id"] if "image_id" in item else item["file_name"]
            for task, measure in _MEASURES.items():
                if measure.key not in output:
                    continue
                mine = plain = measure.keep(output[measure.key])
                if self.reference is None:
                    self.kept[task, image] = mine
                else:
                    plain = self.reference.kept[task, image]
                self.sums[task] = self.sums.get(task, 0) + measure.terms(mine, plain)

    def evaluate(self) -> dict[str, dict[str, float]]:
        sums: dict[str, Any] = {}
        for part in comm.all_gather(self.sums):
            for task, terms in part.items():
                sums[task] = sums.get(task, 0) + terms
        # Nothing found by either model is agreement, too.
        return {
            "agreement": {
                task: 100.0 * float(part / whole) if whole else 100.0
                for task, (part, whole) in sums.items()
            }
        }
