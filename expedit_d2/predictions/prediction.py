"""The interface of a kind of prediction, and the table of all kinds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.data.catalog import Metadata

__all__ = [
    "PREDICTIONS",
    "Metric",
    "Prediction",
    "Record",
    "lower_is_better",
    "main_metrics",
    "register_prediction",
]

#: A small record of one output: arrays by name, so that it can be stored in a file.
Record = dict[str, np.ndarray]


@dataclass(frozen=True)
class Metric:
    """The main metric of a task in an evaluator's results, ``{task: {key: value}}``.

    Attributes:
        task: of the evaluator.
        key: of the metric there.
        name: in tables.
        lower_is_better: whether less of it is better.
    """

    task: str
    key: str
    name: str
    lower_is_better: bool = False


class Prediction(ABC):
    """A kind of prediction.

    Attributes:
        key: of the model's output for an image.
        name: in tables and titles.
        meaning: what the agreement is the percentage of, for tables where the name does not say.
        metrics: of its evaluators, those that tables have.
        detail: where a model has several kinds, they are drawn by rising detail, and reports show
            the last one.
    """

    key: str
    name: str
    meaning: str = ""
    metrics: tuple[Metric, ...] = ()
    detail: int = 0

    @abstractmethod
    def keep(self, output: Any) -> Record:
        """What has to be remembered of an output, to compare others with it."""

    @abstractmethod
    def terms(self, mine: Record, plain: Record) -> np.ndarray:
        """Numerator and denominator of the agreement, to be summed over the images."""

    @abstractmethod
    def draw(self, image: np.ndarray, output: Any, metadata: Metadata) -> np.ndarray:
        """The output over its image, both uint8 RGB (height, width, 3)."""

    @abstractmethod
    def differ(self, plain: Any, other: Any) -> np.ndarray:
        """Pixels, bool (height, width), where two outputs differ."""


#: Kinds by the key of the model's output.
PREDICTIONS: dict[str, Prediction] = {}


def register_prediction(kind: type[Prediction]) -> type[Prediction]:
    """Add a kind, as a decorator of its class.

    Raises:
        ValueError: if there is one of that key, name or metric.
    """
    new = kind()
    names = [metric.name for metric in new.metrics]
    for known in PREDICTIONS.values():
        taken = {known.name, *(metric.name for metric in known.metrics)}
        if new.key == known.key or taken & {new.name, *names}:
            raise ValueError(
                f"the prediction {new.name!r} ({new.key!r}, metrics {names}) shares a key, name or "
                f"metric with {known.name!r}; give it others"
            )
    PREDICTIONS[new.key] = new
    return kind


def _metrics() -> list[Metric]:
    return [metric for kind in PREDICTIONS.values() for metric in kind.metrics]


def main_metrics(results: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The main metric of each task in an evaluator's results: ``{"box AP": 41.2, …}``."""
    return {m.name: results[m.task][m.key] for m in _metrics() if m.task in results}


def lower_is_better(name: str) -> bool:
    """Whether less is better of a metric, by its name in tables."""
    return any(metric.name == name and metric.lower_is_better for metric in _metrics())
