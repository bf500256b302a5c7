"""Agreement of a model's output with the plain model's: needs no labels and has little noise."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Instances
from detectron2.utils import comm
from torch import Tensor

from .finite import FiniteWatch, all_finite

__all__ = ["Agreement", "image_key", "match", "match_segments"]

_IOU = 0.5

#: What is remembered of one output, small: arrays by name, so that it can be kept in a file.
Record = dict[str, np.ndarray]


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

    def keep(self, output: Any) -> Record:
        """What has to be remembered of an image. Segments without a pixel are none."""

    def terms(self, mine: Record, plain: Record) -> np.ndarray:
        """Numerator and denominator of the agreement, to be summed over the images."""


class _InstanceMeasure:
    """Masks are compared where there are any, else boxes; score 0.5 and more."""

    key = "instances"
    threshold = 0.5

    def keep(self, output: Instances) -> Record:
        """``classes`` (N,), and ``boxes`` (N, 4) or run-length masks, one after the other."""
        instances = output.to("cpu")
        instances = instances[instances.scores >= self.threshold]
        if not instances.has("pred_masks"):
            boxes = instances.pred_boxes.tensor.double().numpy()
            there = (boxes[:, 2:] > boxes[:, :2]).all(1)
            return {"classes": instances.pred_classes.numpy()[there], "boxes": boxes[there]}
        there = instances.pred_masks.flatten(1).any(1)
        codes = [
            mask_util.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))["counts"]
            for mask in instances.pred_masks[there]
        ]
        return {
            "classes": instances.pred_classes[there].numpy(),
            "size": np.array(instances.pred_masks.shape[1:]),
            "lengths": np.array([len(code) for code in codes], np.int64),
            "codes": np.frombuffer(b"".join(codes), np.uint8),
        }

    @staticmethod
    def _masks(record: Record) -> list[dict[str, Any]]:
        ends = np.cumsum(record["lengths"])
        codes = np.split(record["codes"], ends[:-1])
        return [{"size": record["size"].tolist(), "counts": code.tobytes()} for code in codes]

    def terms(self, mine: Record, plain: Record) -> np.ndarray:
        same = mine["classes"][:, None] == plain["classes"][None, :]
        if not same.size:
            return _quality_terms(np.zeros(same.shape))
        if "boxes" in mine:
            return _quality_terms(_box_overlaps(mine["boxes"], plain["boxes"]) * same)
        masks = self._masks(plain)
        iou = mask_util.iou(self._masks(mine), masks, [0] * len(masks))
        return _quality_terms(np.asarray(iou) * same)


def _box_overlaps(mine: np.ndarray, plain: np.ndarray) -> np.ndarray:
    """IoU (P, Q) of boxes (P, 4) and (Q, 4), each with an area."""
    areas = [np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) for boxes in (mine, plain)]
    low = np.maximum(mine[:, None, :2], plain[None, :, :2])
    high = np.minimum(mine[:, None, 2:], plain[None, :, 2:])
    together = np.prod(np.maximum(high - low, 0), axis=2)
    return together / (areas[0][:, None] + areas[1][None] - together)


def _pack(values: np.ndarray) -> Record:
    """A map, all pixels row by row, compressed."""
    return {"data": np.frombuffer(zlib.compress(values.tobytes(), 1), np.uint8)}


def _unpack(record: Record, dtype: type) -> np.ndarray:
    return np.frombuffer(zlib.decompress(record["data"].tobytes()), dtype)


def _pack_labels(labels: Tensor) -> Record:
    return _pack(labels.to("cpu", torch.int32).numpy())


class _PanopticMeasure:
    """Things and stuff alike; pixels of no segment (0) lower the overlap of the segment there."""

    key = "panoptic_seg"

    def keep(self, output: tuple[Tensor, list[dict]]) -> Record:
        """The map, and ``segments`` (K, 2): id and class."""
        labels, segments = output
        there = set(labels.unique().tolist())
        pairs = [(s["id"], s["category_id"]) for s in segments if s["id"] in there]
        return {**_pack_labels(labels), "segments": np.array(pairs, np.int64).reshape(-1, 2)}

    def terms(self, mine: Record, plain: Record) -> np.ndarray:
        return _quality_terms(_segment_overlaps(mine, plain))


def _segment_overlaps(mine: Record, plain: Record) -> np.ndarray:
    """IoU (P, Q) of the segments of two panoptic maps, 0 where the classes differ."""
    classes = [dict(record["segments"].tolist()) for record in (mine, plain)]
    together = np.zeros((len(classes[0]), len(classes[1])))
    rows, cols = ({segment: place for place, segment in enumerate(c)} for c in classes)
    labels = np.stack([_unpack(record, np.int32) for record in (mine, plain)])
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
    """Segments of one panoptic output that are found in another, as a panoptic quality has it.

    Args:
        mine, plain: segment of each pixel (height, width), and Detectron2's ``segments_info``.

    Returns:
        id of a segment to the id of its twin; segments without one are left out.
    """
    ours, theirs = (_PanopticMeasure().keep(output) for output in (mine, plain))
    pairs = match(_segment_overlaps(ours, theirs))
    return {int(ours["segments"][row, 0]): int(theirs["segments"][col, 0]) for row, col in pairs}


class _SemanticMeasure:
    """The share of the pixels with the same label."""

    key = "sem_seg"

    def keep(self, output: Tensor) -> Record:
        return _pack_labels(output.argmax(0))

    def terms(self, mine: Record, plain: Record) -> np.ndarray:
        same = _unpack(mine, np.int32) == _unpack(plain, np.int32)
        return np.array([same.sum(), same.size])


class _DepthMeasure:
    """The share of the pixels whose depth is within 5 % of the plain model's."""

    key = "depth"
    ratio = 1.05

    def keep(self, output: Tensor) -> Record:
        return _pack(output.to("cpu", torch.float32).numpy())

    def terms(self, mine: Record, plain: Record) -> np.ndarray:
        ours, theirs = (_unpack(record, np.float32) for record in (mine, plain))
        # Products, as inverse depth may be zero.
        low, high = np.minimum(ours, theirs), np.maximum(ours, theirs)
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
      + half of the additional + half of the lost). None where neither model finds anything.
    - semantic: pixels with the same label.
    - depth: pixels within 5 % of the plain model's depth (or inverse depth).

    Whatever of these a model puts out is compared. The plain model is run first, with an evaluator
    of its own, which the others are given. An image on which either output is not finite counts as
    one that disagrees in everything.

    Attributes:
        not_finite: images on which this model's output is not finite.
    """

    def __init__(
        self, reference: Agreement | None = None, watch: FiniteWatch | None = None
    ) -> None:
        """
        Args:
            reference: the evaluator that has seen the plain model's outputs; None makes this one.
            watch: of the model's parts, see `watch_finite`; None: its output alone is looked at.
        """
        self.reference = reference
        self.watch = watch
        self.reset()

    def reset(self) -> None:
        self.kept: dict[tuple[str, int | str], Record] = {}
        self.not_finite: set[int | str] = set()
        self.sums: dict[str, np.ndarray] = {}
        self.lowest: tuple[float, int | str] | None = None

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        seen = self.watch is None or self.watch.take()
        for item, output in zip(inputs, outputs, strict=True):
            image = image_key(item)
            if not (seen and all_finite(output)):
                self.not_finite.add(image)
            for task, measure in _MEASURES.items():
                if measure.key in output:
                    self._compare(task, image, measure.keep(output[measure.key]))

    def _compare(self, task: str, image: int | str, mine: Record) -> None:
        plain, not_finite = mine, self.not_finite
        if self.reference is None:
            self.kept[task, image] = mine
        else:
            plain = self.reference.kept[task, image]
            not_finite = not_finite | self.reference.not_finite
        terms = _MEASURES[task].terms(mine, plain)
        if image in not_finite:
            terms = np.array([0.0, max(terms[1], 1.0)])
        self.sums[task] = self.sums.get(task, 0) + terms
        if terms[1] and (self.lowest is None or terms[0] / terms[1] < self.lowest[0]):
            self.lowest = float(terms[0] / terms[1]), image

    def evaluate(self) -> dict[str, dict[str, Any]]:
        """``agreement`` by task; ``outputs``: how many images are not finite, and the image that
        agrees least with its percentage."""
        sums: dict[str, Any] = {}
        not_finite, lowest = 0, []
        for part, found, least in comm.all_gather((self.sums, len(self.not_finite), self.lowest)):
            not_finite += found
            lowest += [] if least is None else [least]
            for task, terms in part.items():
                sums[task] = sums.get(task, 0) + terms
        least, image = min(lowest, key=lambda pair: pair[0], default=(None, None))
        return {
            "agreement": {
                task: 100.0 * float(part / whole) if whole else None
                for task, (part, whole) in sums.items()
            },
            "outputs": {
                "not_finite": not_finite,
                "worst_image": image,
                "worst_agreement": None if least is None else 100 * least,
            },
        }

    def to_arrays(self) -> dict[str, np.ndarray]:
        """What a reference has to remember, for a file; `from_arrays` is the opposite."""
        index = {"kept": list(self.kept), "not_finite": list(self.not_finite)}
        arrays = {"index": np.frombuffer(json.dumps(index).encode(), np.uint8)}
        for number, record in enumerate(self.kept.values()):
            arrays |= {f"{number}.{name}": array for name, array in record.items()}
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Agreement:
        """A reference.

        Raises:
            ValueError: if these are not the arrays of one.
        """
        found = cls()
        records: dict[str, Record] = {}
        for name, array in arrays.items():
            number, _, part = name.partition(".")
            records.setdefault(number, {})[part] = array
        try:
            index = json.loads(arrays["index"].tobytes())
            found.not_finite = set(index["not_finite"])
            for number, (task, image) in enumerate(index["kept"]):
                found.kept[task, image] = records[str(number)]
        except (KeyError, TypeError, ValueError):
            raise ValueError("these arrays are not those of an agreement's reference") from None
        return found


def image_key(item: Mapping[str, Any]) -> int | str:
    """What tells an image from the others, in a form that JSON can hold."""
    image = item.get("image_id", item.get("file_name"))
    return int(image) if isinstance(image, (int, np.integer)) else str(image)
