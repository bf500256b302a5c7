"""Agreement of a model's output with the plain model's: needs no labels and has little noise."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from ..predictions import PREDICTIONS, Prediction, Record
from .finite import FiniteWatch, all_finite

__all__ = ["Agreement", "image_key"]


class Agreement(DatasetEvaluator):
    """How far a model's outputs are those of the plain model, in percent; 100 is identical.

    - instances, panoptic: the panoptic quality (Kirillov et al., arXiv 1801.00868, equation 1)
      between the segments of the two, over all classes at once: the sum of matched IoUs, over
      matched segments plus half of the additional and half of the lost ones. None where neither
      model finds anything.
    - semantic: pixels with the same label.
    - depth: pixels within 5 % of the plain model's depth (or inverse depth).

    Every kind that a model outputs is compared. The plain model is run first, with an evaluator
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
        self.records: dict[tuple[str, int | str], Record] = {}
        self.not_finite: set[int | str] = set()
        self.sums: dict[str, np.ndarray] = {}
        self.lowest: tuple[float, int | str] | None = None

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        seen = self.watch is None or self.watch.take()
        for item, output in zip(inputs, outputs, strict=True):
            image = image_key(item)
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
        index = {"records": list(self.records), "not_finite": list(self.not_finite)}
        arrays = {"index": np.frombuffer(json.dumps(index).encode(), np.uint8)}
        for number, record in enumerate(self.records.values()):
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
            for number, (task, image) in enumerate(index["records"]):
                found.records[task, image] = records[str(number)]
        except (KeyError, TypeError, ValueError):
            raise ValueError("these arrays are not those of an agreement's reference") from None
        return found


def image_key(item: Mapping[str, Any]) -> int | str:
    """What tells an image from the others, in a form that JSON can hold."""
    image = item.get("image_id", item.get("file_name"))
    return int(image) if isinstance(image, (int, np.integer)) else str(image)
