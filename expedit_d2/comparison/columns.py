"""Columns of a comparison, defined once for terminal, Markdown, CSV and HTML.

To add one, yield another `Column` in a function below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial

from ..analysis.flops import Flops
from ..analysis.timing import Ratio
from ..settings import describe
from .rows import Comparison, Row

__all__ = ["GROUPS", "HTML", "MARKDOWN", "TERMINAL", "Column", "columns_of", "describe_settings"]

TERMINAL, MARKDOWN, HTML = "terminal", "Markdown", "HTML"
_FULL = (MARKDOWN, HTML)
_ALL = (TERMINAL, *_FULL)

#: Titles of the tables in Markdown, in order.
GROUPS = ("Quality", "GFLOPs", "Cost")

_PARTS = tuple(field.name for field in fields(Flops) if field.name != "uncounted")


@dataclass(frozen=True)
class Column:
    """A column of tables.

    Attributes:
        key: head in CSV, where numbers are in base units and not rounded.
        value: value of a row; None if it was not measured or is undefined.
        group: the table that shows it, of `GROUPS`.
        head: head in other tables.
        form: number format there.
        unit: unit after the number.
        scale: base units per unit.
        where: formats that show it, besides CSV.
        below: whether HTML shows it as a further line in the previous column.
        note: remark on the number of a row, in brackets.
    """

    key: str
    value: Callable[[Row], float | None]
    group: str
    head: str = ""
    form: str = ".2f"
    unit: str = ""
    scale: float = 1
    where: tuple[str, ...] = ()
    below: bool = False
    note: Callable[[Row], str] = lambda row: ""

    def shown(self, row: Row) -> float | None:
        """The number in its unit; None if it is not finite."""
        value = self.value(row)
        return None if value is None or not math.isfinite(value) else value / self.scale

    def text(self, row: Row) -> str:
        """The formatted number without the note; "-" for None."""
        value = self.shown(row)
        return "-" if value is None else f"{value:{self.form}}{self.unit}"

    def full_text(self, row: Row) -> str:
        """The formatted number with the note."""
        note = self.note(row)
        return f"{self.text(row)} ({note})" if note else self.text(row)


def columns_of(comparison: Comparison, where: str | None = None) -> list[Column]:
    """The columns to show, without costs that no row has.

    Args:
        comparison: its plain model determines the metrics and kinds of output.
        where: `TERMINAL`, `MARKDOWN` or `HTML`; None: all columns, for CSV.
    """
    columns = [*_quality(comparison), *_flops(comparison), *_cost(comparison)]
    if where is None:
        return columns
    rows = comparison.rows
    return [
        column
        for column in columns
        if where in column.where
        and (column.group != "Cost" or any(column.value(row) is not None for row in rows))
    ]


def describe_settings(row: Row) -> str:
    """Settings of a row as a line to paste, and after an arrow those that a budget has chosen."""
    if row.settings is None:
        return ""
    text = describe(row.settings)
    chosen = row.settings.budget is not None and row.resolved is not None
    return f"{text} -> {describe(row.resolved)}" if chosen else text


def _quality(comparison: Comparison) -> Iterator[Column]:
    column = partial(Column, group="Quality")
    for metric in comparison.plain.metrics:
        value, retained = (
            partial(_entry, "metrics", metric),
            partial(comparison.retained, metric=metric),
        )
        yield column(metric, value, head=metric, where=_ALL)
        yield column(
            f"{metric} kept", retained, head="kept", unit=" %", form=".1f", where=_ALL, below=True
        )
    if comparison.plain.agreement:
        lowest = lambda row: row.lowest_agreement  # noqa: E731
        yield column("agreement", lowest, head="agree", unit=" %", form=".1f", where=(TERMINAL,))
    for task in comparison.plain.agreement:
        value = partial(_entry, "agreement", task)
        yield column(f"agreement, {task}", value, head=f"agree, {task}", unit=" %", where=_FULL)
    broken = any(row.not_finite for row in comparison.rows)
    yield column(
        "images not finite",
        lambda row: row.not_finite,
        head="not finite",
        form=".0f",
        where=_ALL if broken else (),
    )


def _entry(attribute: str, name: str, row: Row) -> float | None:
    return getattr(row, attribute).get(name)


def _flops(comparison: Comparison) -> Iterator[Column]:
    column = partial(Column, group="GFLOPs")

    def part(name: str, head: str, form: str, where: tuple[str, ...]) -> Column:
        value = lambda row: getattr(row.flops, name)  # noqa: E731
        key = "flops" if name == "total" else f"flops, {name}"
        return column(key, value, head=head, form=form, scale=1e9, where=where)

    def saved(name: str, where: tuple[str, ...]) -> Column:
        key = "flops saved" if name == "total" else f"flops saved, {name}"
        value = partial(comparison.saved, part=name)
        return column(key, value, head="saved", form=".1f", unit=" %", where=where, below=True)

    for name in _PARTS:
        yield part(name, name, ".3f", (MARKDOWN,))
    yield part("transformer", "GFLOPs, ViT", ".2f", _FULL)
    yield saved("transformer", _FULL)
    yield part("total", "GFLOPs", ".2f", _ALL)
    yield saved("total", _ALL)


def _cost(comparison: Comparison) -> Iterator[Column]:
    column = partial(Column, group="Cost")
    batch = comparison.conditions.batch

    def spread(ratio: Callable[[Row], Ratio | None], row: Row) -> str:
        value = ratio(row)
        return f"{value.low:.2f}-{value.high:.2f}" if value and value.is_wide else ""

    def seconds(name: str, row: Row) -> float | None:
        return getattr(comparison.latency(row), name, None)

    def middle_half(row: Row) -> str:
        time = comparison.latency(row)
        return "" if time is None else f"{1e3 * time.low:.1f}-{1e3 * time.high:.1f}"

    yield column(
        "speed-up",
        comparison.speedup,
        head="speed-up",
        unit="×",
        where=_ALL,
        note=partial(spread, comparison.ratio),
    )
    timed = comparison.plain.latency is not None
    yield column(
        "flops ratio",
        comparison.flops_ratio,
        head="by GFLOPs",
        unit="×",
        where=_ALL if timed else (),
    )
    yield column("images per second", comparison.fps, head="FPS", where=_ALL)
    median = partial(seconds, "median")
    yield column(
        "seconds, median",
        median,
        head="ms (middle half)",
        form=".1f",
        scale=1e-3,
        where=_FULL,
        note=middle_half,
    )
    yield column("seconds, low", partial(seconds, "low"))
    yield column("seconds, high", partial(seconds, "high"))
    yield column(
        "images per second in batches",
        comparison.throughput,
        head=f"images/s, batch {batch}",
        where=_FULL,
    )
    yield column(
        "speed-up in batches",
        comparison.batched_speedup,
        head="speed-up",
        unit="×",
        where=_FULL,
        below=True,
        note=partial(spread, comparison.batched_ratio),
    )
    yield column(
        "peak memory",
        lambda row: row.peak_memory,
        head="memory",
        form=".1f",
        unit=" MiB",
        scale=2**20,
        where=_ALL,
    )
    yield column(
        "launches",
        lambda row: row.launches,
        head="launches",
        form=".0f",
        where=_FULL,
    )
    yield column(
        "parameters",
        lambda row: row.parameters,
        head="parameters",
        unit=" M",
        scale=1e6,
        where=(MARKDOWN,),
    )
