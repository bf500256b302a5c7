"""The data of a comparison: the plain model's row and one per setting, with their JSON form."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TypeVar

from ..analysis.flops import Flops
from ..analysis.timing import Ratio, Timing
from ..predictions import lower_is_better
from ..settings import Settings
from .reading import read_dataclass

__all__ = [
    "PLAIN",
    "Comparison",
    "Conditions",
    "Row",
    "check_finished",
    "pareto",
]

PLAIN = "plain"

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Row:
    """One line of a comparison.

    Attributes:
        name: of the setting; `PLAIN` is the model as it is.
        settings: as requested; None for the plain model.
        metrics: headline metric of each task, in percent; empty without labels.
        agreement: of each kind of output with the plain model's, in percent; None where neither
            model finds anything.
        flops: of one forward on the first image.
        parameters: of the model; no setting changes them.
        latency: seconds of one forward at batch 1; None if it was not timed.
        baseline: the plain model's latency, measured alternately with this one.
        throughput: images per second in batches; None if these were not timed.
        baseline_throughput: the plain model's, measured alternately with this one.
        peak_memory: most bytes allocated at once by one forward at batch 1, without the weights
            and the image; None if it was not measured.
        resolved: the settings in force, after a budget has chosen; None if not recorded.
        ratio: how many times faster than the plain model at batch 1, round by round.
        batched_ratio: the same in batches.
        not_finite: images on which the output is NaN or infinite somewhere.
        worst: the image that agrees least with the plain model, and its agreement in percent.
        launches: kernels that one forward on the first image launches; None if not counted.
    """

    name: str
    settings: Settings | None
    metrics: dict[str, float]
    agreement: dict[str, float | None]
    flops: Flops
    parameters: int
    latency: Timing | None = None
    baseline: Timing | None = None
    throughput: float | None = None
    baseline_throughput: float | None = None
    peak_memory: int | None = None
    resolved: Settings | None = None
    ratio: Ratio | None = None
    batched_ratio: Ratio | None = None
    not_finite: int = 0
    worst: tuple[int | str, float] | None = None
    launches: int | None = None

    @property
    def lowest_agreement(self) -> float | None:
        """The lowest over all tasks; None if one is undefined or there are none."""
        values = self.agreement.values()
        return None if None in values else min(values, default=None)


@dataclass(frozen=True)
class Conditions:
    """How the numbers were taken.

    Attributes:
        device: name of the GPU or processor.
        threads: of torch on the CPU.
        dtype: of the forward, by autocast where it is not "float32".
        torch: its version.
        date: day and time, ISO 8601.
        timed_images: at batch 1; their median is the latency.
        batch: images in a batch for the throughput; 1: no batches were timed.
        command: the command that gives the same table.
    """

    device: str
    threads: int
    dtype: str
    torch: str
    date: str
    timed_images: int
    batch: int
    command: str


def check_finished(comparisons: Iterable[Comparison]) -> None:
    """
    Raises:
        KeyboardInterrupt: if an interruption left settings out.
        ValueError: names the settings that failed, and why.
    """
    comparisons = list(comparisons)
    if any(comparison.unfinished for comparison in comparisons):
        raise KeyboardInterrupt
    failed = [f"{name}: {why}" for c in comparisons for name, why in c.failed.items()]
    if failed:
        raise ValueError(f"these settings failed, the others are finished: {'; '.join(failed)}")


@dataclass(frozen=True)
class Comparison:
    """Rows of one model on one data set, the plain model's first.

    Attributes:
        model: its name.
        dataset: name of the data set, or where the images are.
        images: how many were evaluated.
        conditions: how the numbers were taken.
        rows: the plain model's first.
        unfinished: names of the settings that an interruption left out.
        failed: names of the settings that could not be run to the end, and why.
        config_file: of the model; empty if it came from no file.

    Raises:
        ValueError: without a row.
    """

    model: str
    dataset: str
    images: int
    conditions: Conditions
    rows: list[Row]
    unfinished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    config_file: str = ""

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("a comparison needs at least the plain model's row, it has none")

    @property
    def plain(self) -> Row:
        return self.rows[0]

    def retained(self, row: Row, metric: str) -> float | None:
        """Percent of the plain model's metric; above 100 is better than the plain model.

        None where the ratio is undefined: one of the two is missing or not finite, or the divisor
        is 0.
        """
        now, was = row.metrics.get(metric), self.plain.metrics.get(metric)
        if now is None or was is None:
            return None
        if lower_is_better(metric):
            now, was = was, now
        return 100 * now / was if math.isfinite(now) and math.isfinite(was) and was > 0 else None

    def lowest_retained(self, row: Row) -> float | None:
        """The lowest over the plain model's metrics; None if one is undefined or there are none."""
        retained = [self.retained(row, metric) for metric in self.plain.metrics]
        return None if None in retained else min(retained, default=None)

    def undefined(self) -> list[str]:
        """Sentences on metrics and agreements that are undefined for the plain model."""
        said = []
        for metric in self.plain.metrics:
            if self.retained(self.plain, metric) is None:
                value = self.plain.metrics[metric]
                said.append(f"The plain model's {metric} is {value:g}: nothing can be kept of it.")
        for task, value in self.plain.agreement.items():
            if value is None:
                said.append(f"The plain model finds nothing ({task}): no agreement is defined.")
        if self.plain.not_finite:
            said.append(self._not_finite(self.plain))
        return said

    def not_finite(self) -> list[str]:
        """A sentence on each row with outputs that are not finite."""
        return [self._not_finite(row) for row in self.rows if row.not_finite]

    def _not_finite(self, row: Row) -> str:
        return (
            f"The output of {row.name} is not finite (NaN or infinite) on {row.not_finite} of "
            f"{self.images} image{'' if self.images == 1 else 's'}."
        )

    def saved(self, row: Row, part: str = "total") -> float:
        """Percent of the plain model's FLOPs; ``part`` is an attribute of `Flops`."""
        was = getattr(self.plain.flops, part)
        return 100 * (1 - getattr(row.flops, part) / was) if was else 0.0

    def flops_ratio(self, row: Row) -> float:
        """The plain model's FLOPs divided by the row's: the speed-up these would give."""
        return self.plain.flops.total / row.flops.total

    def ratio(self, row: Row) -> Ratio | None:
        """How many times faster than the plain model at batch 1, measured alternately with it."""
        if row.ratio is not None or row.latency is None or row.baseline is None:
            return row.ratio
        median = row.baseline.median / row.latency.median  # of a file that has no rounds
        return Ratio(median, median, median)

    def batched_ratio(self, row: Row) -> Ratio | None:
        """The same in batches."""
        if row.batched_ratio is not None or None in (row.throughput, row.baseline_throughput):
            return row.batched_ratio
        ratio = row.throughput / row.baseline_throughput
        return Ratio(ratio, ratio, ratio)

    def speedup(self, row: Row) -> float | None:
        """The median of `ratio`."""
        ratio = self.ratio(row)
        return None if ratio is None else ratio.median

    def batched_speedup(self, row: Row) -> float | None:
        """The same in batches."""
        ratio = self.batched_ratio(row)
        return None if ratio is None else ratio.median

    def sure_speedup(self, row: Row) -> float | None:
        """The speed-up or, if its spread is wide, the one that three quarters of the rounds
        reach."""
        ratio = self.ratio(row)
        return None if ratio is None else ratio.low if ratio.is_wide else ratio.median

    def latency(self, row: Row) -> Timing | None:
        """Of one forward at batch 1.

        The plain model's own time and the speed-up give the median, so that the three agree even
        if the machine was busier during one measurement than during another.
        """
        if row.latency is None or self.plain.latency is None:
            return None
        median = self.plain.latency.median / self.speedup(row)
        return row.latency.scaled(median / row.latency.median)

    def fps(self, row: Row) -> float | None:
        """Images per second at batch 1: the plain model's, times the speed-up."""
        latency = self.latency(row)
        return None if latency is None else 1 / latency.median

    def throughput(self, row: Row) -> float | None:
        """Images per second in batches: the plain model's, times the speed-up there."""
        ratio = self.batched_ratio(row)
        if ratio is None or self.plain.throughput is None:
            return None
        return self.plain.throughput * ratio.median

    def to_json(self) -> str:
        """The whole comparison; `from_json` is the inverse."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        """
        Raises:
            ValueError: if this is not the JSON of a comparison.
        """
        return read_dataclass(cls, json.loads(text), "the comparison")


def pareto(
    rows: Sequence[_Item],
    x: Callable[[_Item], float | None],
    y: Callable[[_Item], float | None],
) -> list[_Item]:
    """The Pareto front: no other row is better in one of two figures and as good in the other.

    Args:
        rows: what to choose from; those with None for a figure are left out.
        x, y: the figures, both to be maximised.

    Returns:
        The front by falling x, so by rising y; of equal rows, only the first one.
    """
    known = [row for row in rows if x(row) is not None and y(row) is not None]
    front: list[_Item] = []
    for row in sorted(known, key=lambda row: (-x(row), -y(row))):
        if not front or y(row) > y(front[-1]):
            front.append(row)
    return front
