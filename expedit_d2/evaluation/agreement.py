"""Agreement of a model with the plain model, which needs no labels and has little noise."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from ..predictions import PREDICTIONS, Prediction, Record
from .finite import FiniteWatch, all_finite

__all__ = ["Agreement", "image_key"]


class Agreement(DatasetEvaluator):
    """Agreement with the outputs of the plain model, in percent; 100 is identical.

    - instances, panoptic: panoptic quality (Kirillov et al., arXiv 1801.00868, equation 1) between
      the segments of the two, over all classes at once: the sum of matched IoUs divided by the
      matched segments plus half of the unmatched ones. None if neither model detects anything.
    - semantic: pixels with the same label.
    - depth: pixels within 5 % of the plain model's depth (or inverse depth).

    All kinds of output are compared. The plain model runs first, and its evaluator is the reference
    of the others. An image on which either output is not finite counts as complete disagreement.

    Attributes:
        not_finite: images on which this model's output is not finite.
    """

    def __init__(
        self, reference: Agreement | None = None, watch: FiniteWatch | None = None
    ) -> None:
        """
        Args:
            reference: evaluator with the plain model's outputs; None: this is the reference.
            watch: watches the model's parts, see `watch_finite`; None: only outputs are checked.
        """
        self.reference = reference
        self.watch = watch
        self.reset()

    def reset(self) -> None:
        self.records: dict[tuple[str, int | str], Record] = {}
        self.not_finite: set[int | str] = set()
        self.sums: dict[str, np.ndarray] = {}
        self.lowest: tuple[float, int | str] | None = None
        self.seen: Counter[int | str] = Counter()

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        seen = self.watch is None or self.watch.take()
        for item, output in zip(inputs, outputs, strict=True):
            image = image_key(item)
            self.seen[image] += 1
            if self.seen[image] > 1:  # an image of another data set
                image = f"{image} ({self.seen[image]})"
            if not (seen and all_finite(output)):
                self.not_finite.add(image)
            for kind in PREDICTIONS.values():
                if kind.key in output:
                    self._compare(kind, image, kind.keep(output[kind.key]))

    def _compare(self, kind: Prediction, image: int | str, mine: Record) -> None:
        task, plain, not_finite = kind.name, mine, self.not_finite
        if self.reference is None:
            self.records[task, image] = mine
        else:
            plain = self.reference.records[task, image]
            not_finite = not_finite | self.reference.not_finite
        terms = kind.terms(mine, plain)
        if image in not_finite:
            terms = np.array([0.0, max(terms[1], 1.0)])
        self.sums[task] = self.sums.get(task, 0) + terms
        if terms[1] and (self.lowest is None or terms[0] / terms[1] < self.lowest[0]):
            self.lowest = float(terms[0] / terms[1]), image

    def evaluate(self) -> dict[str, dict[str, Any]]:
        """``agreement`` by task; ``outputs``: the number of images that are not finite, and the
        image with the lowest agreement."""
        sums: dict[str, Any] = {}
        not_finite, lowest = 0, []
        for part, count, least in comm.all_gather((self.sums, len(self.not_finite), self.lowest)):
            not_finite += count
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
        """The reference as arrays for a file; `from_arrays` is the inverse."""
        index = {"records": list(self.records), "not_finite": list(self.not_finite)}
        arrays = {"index": np.frombuffer(json.dumps(index).encode(), np.uint8)}
        for number, record in enumerate(self.records.values()):
            arrays |= {f"{number}.{name}": array for name, array in record.items()}
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Agreement:
        """A reference from arrays.

        Raises:
            ValueError: if they are not those of a reference.
        """
        reference = cls()
        records: dict[str, Record] = {}
        for name, array in arrays.items():
            number, _, part = name.partition(".")
            records.setdefault(number, {})[part] = array
        try:
            index = json.loads(arrays["index"].tobytes())
            reference.not_finite = set(index["not_finite"])
            for number, (task, image) in enumerate(index["records"]):
                reference.records[task, image] = records[str(number)]
        except (KeyError, TypeError, ValueError):
            raise ValueError("these arrays are not those of an agreement's reference") from None
        return reference


def image_key(item: Mapping[str, Any]) -> int | str:
    """Unique id of an image that can be stored as JSON."""
    image = item.get("image_id", item.get("file_name"))
    return int(image) if isinstance(image, (int, np.integer)) else str(image)
