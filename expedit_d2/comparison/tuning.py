"""Find the best setting for a target: a sweep on a few images, then the best ones on all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tqdm import tqdm

from ..engine.interrupt import check_interrupt, interruptible
from ..settings import Settings
from .rows import PLAIN, Comparison, Row, pareto
from .session import Options, Session
from .store import Store
from .workload import Workload

__all__ = ["Target", "Tuning", "tune"]


@dataclass(frozen=True)
class Target:
    """Requirements on a setting; None: not required.

    Attributes:
        retained: percent of the plain model's metrics to keep, of all or of ``metric``.
        metric: name in tables: PQ, mIoU, "box AP".
        agreement: with the plain model, in percent, for all tasks.
        speedup: over the plain model, at batch 1.

    Raises:
        ValueError: if nothing is required, or a value is out of range.
    """

    retained: float | None = None
    metric: str | None = None
    agreement: float | None = None
    speedup: float | None = None

    def __post_init__(self) -> None:
        if self.metric is not None and self.retained is None:
            raise ValueError(f"the metric {self.metric!r} needs a percentage of it to keep")
        if self.retained is self.agreement is self.speedup is None:
            raise ValueError("there is no target: give what to keep, an agreement or a speed-up")
        for name in ("retained", "agreement"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 100:
                raise ValueError(f"{name} must be a percentage in (0, 100], got {value}")
        if self.speedup is not None and self.speedup <= 0:
            raise ValueError(f"speedup must be positive, got {self.speedup}")

    def __str__(self) -> str:
        parts = []
        if self.retained is not None:
            parts.append(f"keep {self.retained:g} % of {self.metric or 'every metric'}")
        if self.agreement is not None:
            parts.append(f"agreement at least {self.agreement:g} %")
        if self.speedup is not None:
            parts.append(f"at least {self.speedup:g}x faster")
        return ", ".join(parts)

    @property
    def asks_for_quality(self) -> bool:
        return self.retained is not None or self.agreement is not None

    def check(self, comparison: Comparison) -> None:
        """
        Raises:
            ValueError: if the plain model lacks what the target requires.
        """
        plain = comparison.plain
        if plain.not_finite:
            raise ValueError(f"there is nothing to tune for: {comparison.undefined()[-1]}")
        if self.retained is not None and not plain.metrics:
            raise ValueError("without labels there is no metric to keep; give an agreement instead")
        if self.metric is not None and self.metric not in plain.metrics:
            raise ValueError(
                f"the metric must be one of {list(plain.metrics)}, got {self.metric!r}"
            )
        for metric in plain.metrics if self.metric is None else [self.metric]:
            if self.retained is not None and comparison.retained(plain, metric) is None:
                raise ValueError(
                    f"the plain model's {metric} is {plain.metrics[metric]:g}, so no share of it "
                    "can be kept; give another metric, or an agreement"
                )
        if self.agreement is not None and plain.lowest_agreement is None:
            raise ValueError(f"an agreement cannot be reached: {_no_agreement(comparison)}")
        if self.speedup is not None and plain.latency is None:
            raise ValueError("a speed-up needs images to time, got 0")

    def quality_met(self, comparison: Comparison, row: Row) -> bool:
        """Whether a row reaches the metrics and the agreement, and is finite."""
        retained = (
            comparison.retained(row, self.metric)
            if self.metric
            else comparison.lowest_retained(row)
        )
        return (
            not row.not_finite
            and _reaches(retained, self.retained)
            and _reaches(row.lowest_agreement, self.agreement)
        )

    def speed_met(self, comparison: Comparison, row: Row) -> bool:
        """Whether a row is fast enough, also if its spread is wide."""
        return _reaches(comparison.sure_speedup(row), self.speedup)

    def met(self, comparison: Comparison, row: Row) -> bool:
        """Whether a row meets all requirements."""
        return self.quality_met(comparison, row) and self.speed_met(comparison, row)


def _reaches(value: float | None, least: float | None) -> bool:
    return least is None or (value is not None and value >= least)


def _no_agreement(comparison: Comparison) -> str:
    """Why the plain model has no agreement."""
    tasks = [task for task, value in comparison.plain.agreement.items() if value is None]
    if not tasks:
        return "the model has no outputs that can be compared"
    return f"the plain model finds nothing ({', '.join(tasks)})"


@dataclass(frozen=True)
class Tuning:
    """The result of tuning.

    Attributes:
        target: the target.
        sweep: all candidates on a few images; None if not even the plain model was run.
        front: Pareto front of the finished sweep, by decreasing agreement and GFLOPs.
        confirmed: the best candidates on all images; None if none was run.
        best: the best of these; None if none meets the target.
        skipped: candidates that failed, and the reasons.
        interrupted: whether tuning was interrupted.
    """

    target: Target
    sweep: Comparison | None = None
    front: list[Row] = field(default_factory=list)
    confirmed: Comparison | None = None
    best: Row | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False


def _front(sweep: Comparison) -> list[Row]:
    useful = [
        row
        for row in sweep.rows[1:]
        if row.flops.total < sweep.plain.flops.total and not row.not_finite
    ]
    return pareto(useful, lambda row: row.lowest_agreement, lambda row: -row.flops.total)


def _last_met(count: int, met: Callable[[int], bool]) -> int:
    """The last index for which ``met`` is True, by bisection; -1 if there is none."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if met(middle) else (low, middle)
    return low - 1


class _Confirmation:
    """Runs settings of the front on all images, each once."""

    def __init__(self, session: Session, plain: Row, front: Sequence[Row], target: Target) -> None:
        self.session = session
        self.plain = plain
        self.front = front
        self.target = target
        self.rows: dict[int, Row | None] = {}
        self.failed: dict[str, str] = {}

    def row(self, index: int) -> Row | None:
        """The row of a setting on all images; None if the model fails on one."""
        if index not in self.rows:
            check_interrupt()
            candidate = self.front[index]
            try:
                self.rows[index] = self.session.row(candidate.name, candidate.settings)
            except ValueError as error:
                self.rows[index] = None
                self.failed[candidate.name] = str(error)
        return self.rows[index]

    def comparison(self) -> Comparison:
        run = [self.rows[index] for index in sorted(self.rows) if self.rows[index] is not None]
        return self.session.comparison([self.plain, *run], failed=self.failed)

    def _is(self, index: int, met: Callable[[Comparison, Row], bool]) -> bool:
        row = self.row(index)
        return row is not None and met(self.comparison(), row)

    def search(self, count: int) -> None:
        """Find the last setting of the front that is good enough, then run its neighbors.

        Along the front, quality decreases and speed increases, so a bisection finds where the
        target is just met. The order is not strict, so neighbors may be better.
        """
        if not self.front:
            return
        total, target = len(self.front), self.target
        if target.asks_for_quality:
            edge = _last_met(total, lambda i: self._is(i, target.quality_met))
        else:
            edge = _last_met(total, lambda i: not self._is(i, target.speed_met)) + 1
        for index in sorted(range(total), key=lambda i: abs(i - edge)):
            if len(self.rows) >= count:
                return
            self.row(index)

    def best(self) -> Row | None:
        """The fastest with the quality; if only speed is required, the one with most agreement."""
        comparison = self.comparison()
        met = [row for row in comparison.rows[1:] if self.target.met(comparison, row)]
        if not self.target.asks_for_quality:
            known = [row for row in met if row.lowest_agreement is not None]
            return max(known, key=lambda row: row.lowest_agreement, default=None)
        timed = comparison.plain.latency is not None
        gain = comparison.sure_speedup if timed else comparison.flops_ratio
        return max(met, key=gain, default=None)


def tune(
    workload: Workload,
    settings: Mapping[str, Settings],
    target: Target,
    sweep_images: int = 8,
    confirm: int = 6,
    options: Options | None = None,
    store: Store | None = None,
) -> Tuning:
    """Find the setting that meets a target at the lowest cost.

    All settings run on a few images, for agreement with the plain model and GFLOPs. On the Pareto
    front of these two, a bisection finds the setting that just meets the target on all images, with
    metrics and timing.

    Args:
        workload: the model and its data.
        settings: candidates by name, see `candidates`.
        target: the requirements.
        sweep_images: images of the sweep.
        confirm: settings to run on all images, at least; the bisection may need a few more.
        options: measurement options.
        store: saves results, so that the same call resumes after an interruption.

    Returns:
        The result, partial after an interruption.

    Raises:
        ValueError: if the data cannot provide what the target requires.
    """
    options, store = options or Options(), store or Store(None)
    full = Session(workload, options, store)
    few = replace(workload, limit=min(sweep_images, len(workload)), make_evaluator=None)
    sweep = Session(few, replace(options, timed_images=0, progress=False), store)
    rows: list[Row] = []
    skipped: dict[str, str] = {}
    front: list[Row] = []
    confirmation = None
    interrupted = False
    with interruptible():
        try:
            plain = full.row(PLAIN, None)
            target.check(full.comparison([plain]))
            rows.append(sweep.row(PLAIN, None))
            _check_sweep(sweep.comparison(rows))
            for name, setting in tqdm(
                settings.items(), desc="sweep", unit="setting", disable=not options.progress
            ):
                check_interrupt()
                try:
                    rows.append(sweep.row(name, setting))
                except ValueError as error:  # such as more clusters than a window has tokens
                    skipped[name] = str(error)
            front = _front(sweep.comparison(rows))
            confirmation = _Confirmation(full, plain, front, target)
            confirmation.search(confirm)
        except KeyboardInterrupt:
            interrupted = True
    return Tuning(
        target=target,
        sweep=sweep.comparison(rows, failed=skipped) if rows else None,
        front=front,
        confirmed=confirmation.comparison() if confirmation else None,
        best=confirmation.best() if confirmation and not interrupted else None,
        skipped=skipped | (confirmation.failed if confirmation else {}),
        interrupted=interrupted,
    )


def _check_sweep(sweep: Comparison) -> None:
    """
    Raises:
        ValueError: if agreement is undefined on these images.
    """
    if sweep.plain.lowest_agreement is None:
        raise ValueError(
            f"on the {sweep.images} images of the sweep {_no_agreement(sweep)}; use more images"
        )
