"""Base class and registry of the kinds of predictions."""

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

#: A compact record of an output: arrays by name, which can be stored in a file.
Record = dict[str, np.ndarray]


@dataclass(frozen=True)
class Metric:
    """The main metric of a task in an evaluator's results, ``{task: {key: value}}``.

    Attributes:
        task: of the evaluator.
        key: of the metric in the task's results.
        name: in tables.
        lower_is_better: whether lower values are better.
    """

    task: str
    key: str
    name: str
    lower_is_better: bool = False


class Prediction(ABC):
    """A kind of prediction.

    Attributes:
        key: key in the model's output for an image.
        name: in tables and titles.
        meaning: explanation of the agreement in captions, if the name is not clear.
        metrics: main metrics of its evaluators, for tables.
        detail: of several kinds of a model, reports show the one with the highest detail; pictures
            are ordered by it.
    """

    key: str
    name: str
    meaning: str = ""
    metrics: tuple[Metric, ...] = ()
    detail: int = 0

    @abstractmethod
    def keep(self, output: Any) -> Record:
        """A record of an output that others can be compared with."""

    @abstractmethod
    def terms(self, mine: Record, plain: Record) -> np.ndarray:
        """Numerator and denominator of the agreement, to sum over images."""

    @abstractmethod
    def draw(self, image: np.ndarray, output: Any, metadata: Metadata) -> np.ndarray:
        """Draw the output on its image, both uint8 RGB (height, width, 3)."""

    @abstractmethod
    def differ(self, plain: Any, other: Any) -> np.ndarray:
        """Pixels where two outputs differ, bool (height, width)."""


#: Kinds by their keys in the model's output.
PREDICTIONS: dict[str, Prediction] = {}


def register_prediction(kind: type[Prediction]) -> type[Prediction]:
    """Class decorator that registers a kind.

    Raises:
        ValueError: if another kind has the same key, name or metric.
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
    """Whether lower values of a metric, by its name in tables, are better."""
    return any(metric.name == name and metric.lower_is_better for metric in _metrics())
