"""Finding the setting for a target: a cheap sweep, then the best few on everything."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tqdm import tqdm

from ..settings import Settings
from .rows import PLAIN, Comparison, Row, pareto
from .session import Options, Session
from .store import Store
from .subject import Subject

__all__ = ["Target", "Tuning", "tune"]


@dataclass(frozen=True)
class Target:
    """What a setting has to reach; whatever is None is not asked for.

    Attributes:
        kept: percent of the plain model's metric, of every task's or of ``metric``.
        metric: a name as in tables: PQ, mIoU, "box AP".
        agreement: percent, with the plain model's output, of every task.
        speedup: how many times faster than the plain model, at batch 1.

    Raises:
        ValueError: if nothing is asked for, or a value is out of range.
    """

    kept: float | None = None
    metric: str | None = None
    agreement: float | None = None
    speedup: float | None = None

    def __post_init__(self) -> None:
        if self.metric is not None and self.kept is None:
            raise ValueError(f"the metric {self.metric!r} needs the percentage to keep of it")
        if self.kept is self.agreement is self.speedup is None:
            raise ValueError("there is no target: give what to keep, an agreement or a speed-up")
        for name in ("kept", "agreement"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 100:
                raise ValueError(f"{name} must be a percentage in (0, 100], got {value}")
        if self.speedup is not None and self.speedup <= 0:
            raise ValueError(f"speedup must be positive, got {self.speedup}")

    def __str__(self) -> str:
        parts = []
        if self.kept is not None:
            parts.append(f"keep {self.kept:g} % of {self.metric or 'every metric'}")
        if self.agreement is not None:
            parts.append(f"agreement at least {self.agreement:g} %")
        if self.speedup is not None:
            parts.append(f"at least {self.speedup:g}x faster")
        return ", ".join(parts)

    @property
    def asks_for_quality(self) -> bool:
        return self.kept is not None or self.agreement is not None

    def check(self, plain: Row) -> None:
        """
        Raises:
            ValueError: if the plain model's row lacks what is asked for.
        """
        if self.kept is not None and not plain.metrics:
            raise ValueError("without labels there is no metric to keep; ask for an agreement")
        if self.metric is not None and self.metric not in plain.metrics:
            raise ValueError(
                f"the metric must be one of {list(plain.metrics)}, got {self.metric!r}"
            )
        if self.speedup is not None and plain.latency is None:
            raise ValueError("a speed-up needs images to time, got 0")

    def quality_met(self, comparison: Comparison, row: Row) -> bool:
        """Whether a row has the metrics and the agreement."""
        kept = comparison.kept(row, self.metric) if self.metric else comparison.lowest_kept(row)
        return (self.kept is None or (kept is not None and kept >= self.kept)) and (
            self.agreement is None or row.lowest_agreement >= self.agreement
        )

    def speed_met(self, comparison: Comparison, row: Row) -> bool:
        """Whether a row is fast enough."""
        return self.speedup is None or comparison.speedup(row) >= self.speedup

    def met(self, comparison: Comparison, row: Row) -> bool:
        """Whether a row has all of it."""
        return self.quality_met(comparison, row) and self.speed_met(comparison, row)


@dataclass(frozen=True)
class Tuning:
    """What was found.

    Attributes:
        target: what was asked for.
        sweep: every candidate on a few images; None if not even the plain model was run.
        front: of the finished sweep, by falling agreement and falling GFLOPs.
        confirmed: the best few on all images; None if none was.
        winner: of these; None if none reaches the target.
        skipped: candidates that the model cannot run with, and why.
        interrupted: whether it ended early.
    """

    target: Target
    sweep: Comparison | None = None
    front: list[Row] = field(default_factory=list)
    confirmed: Comparison | None = None
    winner: Row | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False


def _front(sweep: Comparison) -> list[Row]:
    useful = [row for row in sweep.rows[1:] if row.flops.total < sweep.plain.flops.total]
    return pareto(useful, lambda row: row.lowest_agreement, lambda row: -row.flops.total)


def _last_met(count: int, met: Callable[[int], bool]) -> int:
    """The last index of a run of True that is followed by False only; -1 without any."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if met(middle) else (low, middle)
    return low - 1


class _Confirmation:
    """Runs settings of the front on everything, each once."""

    def __init__(self, session: Session, plain: Row, front: Sequence[Row], target: Target) -> None:
        self.session = session
        self.plain = plain
        self.front = front
        self.target = target
        self.rows: dict[int, Row] = {}

    def row(self, index: int) -> Row:
        if index not in self.rows:
            found = self.front[index]
            self.rows[index] = self.session.row(found.name, found.settings)
        return self.rows[index]

    def comparison(self) -> Comparison:
        return self.session.comparison([self.plain, *(self.rows[i] for i in sorted(self.rows))])

    def search(self, count: int) -> None:
        """To the end of the front's part that is good enough, and then around it.

        Along the front quality falls and speed rises, so that a bisection finds where the target is
        met just so; where they do not quite, the neighbors may be better.
        """
        if not self.front:
            return
        total, target = len(self.front), self.target
        if target.asks_for_quality:
            edge = _last_met(total, lambda i: target.quality_met(self.comparison(), self.row(i)))
        else:
            slow = _last_met(total, lambda i: not target.speed_met(self.comparison(), self.row(i)))
            edge = slow + 1
        for index in sorted(range(total), key=lambda i: abs(i - edge)):
            if len(self.rows) >= count:
                return
            self.row(index)

    def winner(self) -> Row | None:
        """The fastest that has the quality; or, where only speed is asked for, the best output."""
        comparison = self.comparison()
        met = [row for row in comparison.rows[1:] if self.target.met(comparison, row)]
        if not self.target.asks_for_quality:
            return max(met, key=lambda row: row.lowest_agreement, default=None)
        timed = comparison.plain.latency is not None
        return max(met, key=comparison.speedup if timed else comparison.flops_ratio, default=None)


def tune(
    subject: Subject,
    settings: Mapping[str, Settings],
    target: Target,
    sweep_images: int = 8,
    confirm: int = 6,
    options: Options | None = None,
    store: Store | None = None,
) -> Tuning:
    """Find the setting that reaches a target at the least cost.

    All settings run on a few images, for agreement with the plain model and GFLOPs. Of the front of
    these two, a bisection finds the setting that reaches the target just so on all images, with
    metrics and timing.

    Args:
        subject: the model and its data.
        settings: to choose from, by name; see `candidates`.
        target: what to reach.
        sweep_images: images of the sweep.
        confirm: settings to run on everything, at least; the bisection may take a few more.
        options: how to measure.
        store: keeps results, so that the same call again goes on where this one stopped.

    Returns:
        What was found; after an interruption, what there was by then.

    Raises:
        ValueError: if the target asks for what the data cannot give.
    """
    options, store = options or Options(), store or Store(None)
    full = Session(subject, options, store)
    few = replace(subject, limit=min(sweep_images, len(subject)), make_evaluator=None)
    sweep = Session(few, replace(options, timed_images=0, progress=False), store)
    rows: list[Row] = []
    skipped: dict[str, str] = {}
    front: list[Row] = []
    confirmation = None
    interrupted = False
    try:
        plain = full.row(PLAIN, None)
        target.check(plain)
        rows.append(sweep.row(PLAIN, None))
        for name, setting in tqdm(
            settings.items(), desc="sweep", unit="setting", disable=not options.progress
        ):
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
        sweep=sweep.comparison(rows) if rows else None,
        front=front,
        confirmed=confirmation.comparison() if confirmation else None,
        winner=confirmation.winner() if confirmation and not interrupted else None,
        skipped=skipped,
        interrupted=interrupted,
    )
