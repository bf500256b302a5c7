"""The data of a comparison: a row for the plain model and for each setting, and JSON."""

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
    """One row of a comparison.

    Attributes:
        name: of the setting; `PLAIN` for the plain model.
        settings: as requested; None for the plain model.
        metrics: main metric of each task, in percent; empty without labels.
        agreement: with the plain model, by kind of output, in percent; None if neither model
            detects anything.
        flops: of a forward pass on the first image.
        parameters: of the model; independent of settings.
        latency: seconds of a forward pass at batch 1; None if not timed.
        baseline: latency of the plain model, measured interleaved with this one.
        throughput: images per second in batches; None if not timed.
        baseline_throughput: throughput of the plain model, measured interleaved with this one.
        peak_memory: most bytes allocated at once by a forward pass at batch 1, without the weights
            and the image; None if not measured.
        resolved: the settings that a budget has chosen; None if not recorded.
        ratio: speed-up over the plain model at batch 1, by round.
        batched_ratio: speed-up in batches.
        not_finite: number of images whose output has NaN or infinity.
        worst: the image with the lowest agreement, and its agreement in percent.
        launches: kernel launches of a forward pass on the first image; None if not counted.
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
        """The lowest agreement over all tasks; None if one is undefined or there are none."""
        values = self.agreement.values()
        return None if None in values else min(values, default=None)


@dataclass(frozen=True)
class Conditions:
    """Conditions of the measurements.

    Attributes:
        device: name of the GPU or CPU.
        threads: CPU threads of PyTorch.
        dtype: of autocast; "float32" without it.
        torch: version of PyTorch.
        date: day and time, ISO 8601.
        timed_images: images timed at batch 1; the latency is their median.
        batch: batch size of the throughput; 1: not measured.
        command: the command that reproduces the table.
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
        KeyboardInterrupt: if settings are missing after an interruption.
        ValueError: if settings failed; names them and the reasons.
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
        model: name of the model.
        dataset: name of the data set, or path of the images.
        images: number of images evaluated.
        conditions: of the measurements.
        rows: the plain model's first.
        unfinished: names of settings that are missing after an interruption.
        failed: names of settings that failed, and the reasons.
        config_file: of the model; empty if there is none.

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
            raise ValueError("a comparison needs at least the plain model's row, got no rows")

    @property
    def plain(self) -> Row:
        return self.rows[0]

    def retained(self, row: Row, metric: str) -> float | None:
        """Retained metric in percent; above 100 is better than the plain model.

        None if it is undefined: a metric is missing or not finite, or the divisor is 0.
        """
        value, base = row.metrics.get(metric), self.plain.metrics.get(metric)
        if value is None or base is None:
            return None
        if lower_is_better(metric):
            value, base = base, value
        defined = math.isfinite(value) and math.isfinite(base) and base > 0
        return 100 * value / base if defined else None

    def lowest_retained(self, row: Row) -> float | None:
        """The lowest retained metric; None if one is undefined or there are none."""
        retained = [self.retained(row, metric) for metric in self.plain.metrics]
        return None if None in retained else min(retained, default=None)

    def undefined(self) -> list[str]:
        """Sentences on metrics and agreements that are undefined for the plain model."""
        sentences = []
        for metric in self.plain.metrics:
            if self.retained(self.plain, metric) is None:
                value = self.plain.metrics[metric]
                sentences.append(
                    f"The plain model's {metric} is {value:g}: nothing can be kept of it."
                )
        for task, value in self.plain.agreement.items():
            if value is None:
                sentences.append(
                    f"The plain model finds nothing ({task}): no agreement is defined."
                )
        if self.plain.not_finite:
            sentences.append(self._not_finite(self.plain))
        return sentences

    def not_finite(self) -> list[str]:
        """A sentence for each row with outputs that are not finite."""
        return [self._not_finite(row) for row in self.rows if row.not_finite]

    def _not_finite(self, row: Row) -> str:
        return (
            f"The output of {row.name} is not finite (NaN or infinite) on {row.not_finite} of "
            f"{self.images} image{'' if self.images == 1 else 's'}."
        )

    def saved(self, row: Row, part: str = "total") -> float:
        """Saved FLOPs in percent of the plain model's; ``part`` is an attribute of `Flops`."""
        base = getattr(self.plain.flops, part)
        return 100 * (1 - getattr(row.flops, part) / base) if base else 0.0

    def flops_ratio(self, row: Row) -> float:
        """The plain model's FLOPs divided by the row's: the speed-up expected from these."""
        return self.plain.flops.total / row.flops.total

    def ratio(self, row: Row) -> Ratio | None:
        """Speed-up over the plain model at batch 1, measured interleaved with it."""
        if row.ratio is not None or row.latency is None or row.baseline is None:
            return row.ratio
        median = row.baseline.median / row.latency.median  # from an old file without rounds
        return Ratio(median, median, median)

    def batched_ratio(self, row: Row) -> Ratio | None:
        """Speed-up over the plain model in batches, measured interleaved with it."""
        if row.batched_ratio is not None or None in (row.throughput, row.baseline_throughput):
            return row.batched_ratio
        ratio = row.throughput / row.baseline_throughput
        return Ratio(ratio, ratio, ratio)

    def speedup(self, row: Row) -> float | None:
        """The median of `ratio`."""
        ratio = self.ratio(row)
        return None if ratio is None else ratio.median

    def batched_speedup(self, row: Row) -> float | None:
        """The median of `batched_ratio`."""
        ratio = self.batched_ratio(row)
        return None if ratio is None else ratio.median

    def sure_speedup(self, row: Row) -> float | None:
        """The speed-up or, if its spread is wide, its lower quartile."""
        ratio = self.ratio(row)
        return None if ratio is None else ratio.low if ratio.is_wide else ratio.median

    def latency(self, row: Row) -> Timing | None:
        """Latency at batch 1.

        Its median is the plain model's latency divided by the speed-up, so that the three are
        consistent even if the machine was busier during one measurement.
        """
        if row.latency is None or self.plain.latency is None:
            return None
        median = self.plain.latency.median / self.speedup(row)
        return row.latency.scaled(median / row.latency.median)

    def fps(self, row: Row) -> float | None:
        """Images per second at batch 1: the plain model's times the speed-up."""
        latency = self.latency(row)
        return None if latency is None else 1 / latency.median

    def throughput(self, row: Row) -> float | None:
        """Images per second in batches: the plain model's times the speed-up in batches."""
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
            ValueError: if it is not the JSON of a comparison.
        """
        return read_dataclass(cls, json.loads(text), "the comparison")


def pareto(
    rows: Sequence[_Item],
    x: Callable[[_Item], float | None],
    y: Callable[[_Item], float | None],
) -> list[_Item]:
    """The Pareto front of two values that are maximised.

    Args:
        rows: the candidates; those with None for a value are omitted.
        x, y: the values of a row.

    Returns:
        The front by decreasing x, so increasing y; of equal rows, only the first.
    """
    known = [row for row in rows if x(row) is not None and y(row) is not None]
    front: list[_Item] = []
    for row in sorted(known, key=lambda row: (-x(row), -y(row))):
        if not front or y(row) > y(front[-1]):
            front.append(row)
    return front
