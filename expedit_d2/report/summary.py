"""What a comparison comes to: its best setting, a sentence on it, the points of its plots."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from ..comparison import Comparison, Row, pareto
from .figures import Point

__all__ = ["AGREEMENT", "KEPT", "Tradeoff", "best_row", "headline", "headline_row", "tradeoffs"]

#: Percent of every metric that the headline's setting keeps, at least.
KEPT = 99.5
#: Percent of agreement that it has, at least, where there are no metrics.
AGREEMENT = 98.0


def _quality(comparison: Comparison, row: Row) -> float | None:
    """Percent of the worst metric that is kept; without metrics, the lowest agreement."""
    return comparison.lowest_kept(row) if row.metrics else row.lowest_agreement


def _gain(comparison: Comparison, row: Row) -> float:
    """Measured speed-up at batch 1; without timing, the one that FLOPs would give."""
    speedup = comparison.speedup(row)
    return comparison.flops_ratio(row) if speedup is None else speedup


def best_row(comparison: Comparison) -> Row | None:
    """The fastest setting that keeps `KEPT` of every metric, or without metrics agrees in
    `AGREEMENT`; None if there is none that is faster than the plain model."""
    enough = KEPT if comparison.plain.metrics else AGREEMENT
    eligible = [
        row
        for row in comparison.rows[1:]
        if (_quality(comparison, row) or 0) >= enough and _gain(comparison, row) > 1
    ]
    return max(eligible, key=lambda row: _gain(comparison, row), default=None)


def headline_row(comparison: Comparison) -> Row | None:
    """The best setting; if there is none, the one that keeps most; None without settings."""
    return best_row(comparison) or max(
        comparison.rows[1:], key=lambda row: _quality(comparison, row) or 0, default=None
    )


def headline(comparison: Comparison) -> str:
    """One sentence on the best setting, or on why there is none."""
    row = headline_row(comparison)
    if row is None:
        return "Only the plain model was evaluated."
    sentence = f"{row.name}: {_in_words(comparison, row)}."
    if row is best_row(comparison):
        return sentence
    aim = (
        f"keeps {KEPT:g} % of every metric"
        if comparison.plain.metrics
        else f"agrees with the plain model in {AGREEMENT:g} %"
    )
    return f"No setting is faster and {aim}; nearest is {sentence}"


def _in_words(comparison: Comparison, row: Row) -> str:
    saved = comparison.saved(row, "transformer")
    words = [f"{abs(saved):.0f} % {'fewer' if saved >= 0 else 'more'} GFLOPs in the transformer"]
    speedup = comparison.speedup(row)
    if speedup is not None:
        words.append(f"{speedup:.2f} times as fast")
    quality = _quality(comparison, row)
    if not row.metrics:
        least = " or more" if len(row.agreement) > 1 else ""
        words.append(f"{quality:.1f} %{least} agreement with the plain model")
    elif quality is not None:
        of = (
            f"of {next(iter(row.metrics))}"
            if len(row.metrics) == 1
            else f"or more of every metric ({', '.join(row.metrics)})"
        )
        words.append(f"{quality:.1f} % {of} kept")
    return ", ".join(words)


class Tradeoff(NamedTuple):
    """The data of one plot."""

    points: list[Point]
    x_label: str
    y_label: str


def tradeoffs(comparison: Comparison) -> list[Tradeoff]:
    """What is kept against what is gained, for every pair that two settings or more have."""
    kept = "lowest metric kept, %"
    if len(comparison.plain.metrics) == 1:
        kept = f"{next(iter(comparison.plain.metrics))} kept, %"
    qualities: list[tuple[Callable[[Row], float | None], str]] = []
    if comparison.plain.metrics:
        qualities.append((comparison.lowest_kept, kept))
    if comparison.plain.agreement:
        lowest = "lowest agreement" if len(comparison.plain.agreement) > 1 else "agreement"
        qualities.append((lambda row: row.lowest_agreement, f"{lowest} with the plain model, %"))
    gains: list[tuple[Callable[[Row], float | None], str]] = [
        (comparison.speedup, "speed-up, measured at batch 1"),
        (lambda row: comparison.saved(row, "transformer"), "GFLOPs of the transformer saved, %"),
    ]
    plots = []
    for y, y_label in qualities:
        for x, x_label in gains:
            rows = [row for row in comparison.rows if _is_known(x(row)) and _is_known(y(row))]
            front = {id(row) for row in pareto(rows, x, y)}
            points = [
                Point(row.name, _method(row), x(row), y(row), id(row) in front) for row in rows
            ]
            if len(points) > 1:
                plots.append(Tradeoff(points, x_label, y_label))
    return plots


def _is_known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _method(row: Row) -> str:
    if row.settings is None:
        return row.name
    return row.settings.method or "by budget"  # which chooses a method for each transformer
