"""What a comparison is: a plain model's row and one for each setting, with their JSON form."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from ..analysis.flops import Flops
from ..analysis.timing import Timing
from ..settings import Settings

__all__ = ["LOWER_IS_BETTER", "PLAIN", "Comparison", "Conditions", "Row", "pareto"]

PLAIN = "plain"

#: Metrics of which less is better; all that `main_metrics` has today are better when higher.
LOWER_IS_BETTER = frozenset({"AbsRel", "RMSE", "SILog"})

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Row:
    """One line of a comparison.

    Attributes:
        name: of the setting; `PLAIN` is the model as it is.
        settings: None for the plain model.
        metrics: headline metric of each task, in percent; empty without labels.
        agreement: of each kind of output with the plain model's, in percent.
        flops: of one forward on the first image.
        parameters: of the model; no setting changes them.
        latency: seconds of one forward at batch 1; None if it was not timed.
        baseline: the plain model's latency, measured in turns with this one.
        throughput: images per second in batches; None if these were not timed.
        baseline_throughput: the plain model's, measured in turns with this one.
        peak_memory: bytes that one forward at batch 1 has allocated at once, beyond the weights
            and the image; None if it was not measured.
        launches: kernels that one forward on the first image launches; None if not counted.
    """

    name: str
    settings: Settings | None
    metrics: dict[str, float]
    agreement: dict[str, float]
    flops: Flops
    parameters: int
    latency: Timing | None = None
    baseline: Timing | None = None
    throughput: float | None = None
    baseline_throughput: float | None = None
    peak_memory: int | None = None
    launches: int | None = None

    @property
    def fps(self) -> float | None:
        """Images per second at batch 1."""
        return 1 / self.latency.median if self.latency else None

    @property
    def lowest_agreement(self) -> float:
        """Of all tasks; 100 where a model put out nothing to compare."""
        return min(self.agreement.values(), default=100.0)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Row:
        """The opposite of `dataclasses.asdict`, also after a trip through JSON."""
        values = dict(values)
        for name, kind in (
            ("settings", Settings),
            ("flops", Flops),
            ("latency", Timing),
            ("baseline", Timing),
        ):
            if values[name] is not None:
                values[name] = kind(**values[name])
        return cls(**values)


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
        command: that gives the same table.
    """

    device: str
    threads: int
    dtype: str
    torch: str
    date: str
    timed_images: int
    batch: int
    command: str


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
    """

    model: str
    dataset: str
    images: int
    conditions: Conditions
    rows: list[Row]
    unfinished: list[str] = field(default_factory=list)

    @property
    def plain(self) -> Row:
        return self.rows[0]

    def kept(self, row: Row, metric: str) -> float | None:
        """Percent of the plain model's metric; above 100 is better than the plain model.

        None where the ratio has no meaning, as one of the two is 0.
        """
        now, was = row.metrics[metric], self.plain.metrics[metric]
        if metric in LOWER_IS_BETTER:
            now, was = was, now
        return 100 * now / was if was > 0 else None

    def lowest_kept(self, row: Row) -> float | None:
        """Of all metrics; None where there is none."""
        kept = [self.kept(row, metric) for metric in row.metrics]
        return min((value for value in kept if value is not None), default=None)

    def saved(self, row: Row, part: str = "total") -> float:
        """Percent of the plain model's FLOPs; ``part`` is an attribute of `Flops`."""
        was = getattr(self.plain.flops, part)
        return 100 * (1 - getattr(row.flops, part) / was) if was else 0.0

    def flops_ratio(self, row: Row) -> float:
        """How many times less FLOPs than the plain model's; the speed-up these would give."""
        return self.plain.flops.total / row.flops.total

    def speedup(self, row: Row) -> float | None:
        """How many times faster than the plain model at batch 1, a ratio of medians."""
        if row.latency is None or row.baseline is None:
            return None
        return row.baseline.median / row.latency.median

    def batched_speedup(self, row: Row) -> float | None:
        """The same in batches."""
        if row.throughput is None or row.baseline_throughput is None:
            return None
        return row.throughput / row.baseline_throughput

    def to_json(self) -> str:
        """All of it; `from_json` is the opposite."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        values = json.loads(text)
        values["conditions"] = Conditions(**values["conditions"])
        values["rows"] = [Row.from_dict(row) for row in values["rows"]]
        return cls(**values)


def pareto(
    rows: Sequence[_Item],
    x: Callable[[_Item], float | None],
    y: Callable[[_Item], float | None],
) -> list[_Item]:
    """Rows that no other one is better than in one of two figures and as good in the other.

    Args:
        rows: what to choose from; those with None for a figure are left out.
        x, y: the figures, both to be maximised.

    Returns:
        The front by falling x, so by rising y; of equals, the first one alone.
    """
    known = [row for row in rows if x(row) is not None and y(row) is not None]
    front: list[_Item] = []
    for row in sorted(known, key=lambda row: (-x(row), -y(row))):
        if not front or y(row) > y(front[-1]):
            front.append(row)
    return front
