"""Summary of a comparison: the best setting, a headline, and the data of plots."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from ..analysis.timing import Ratio
from ..comparison import Comparison, Row, pareto
from .figures import Point

__all__ = ["AGREEMENT", "RETAINED", "Tradeoff", "best_row", "headline", "headline_row", "tradeoffs"]

#: Percent of every metric that a recommended setting must keep, if there are metrics.
RETAINED = 99.5
#: Percent of agreement with the plain model that it must have.
AGREEMENT = 98.0


def _quality(comparison: Comparison, row: Row) -> float | None:
    """At least 1 if the agreement and all metrics are good enough; None if one is undefined."""
    agreement = row.lowest_agreement
    if agreement is None or row.not_finite or comparison.undefined():
        return None
    if not comparison.plain.metrics:
        return agreement / AGREEMENT
    retained = comparison.lowest_retained(row)
    return None if retained is None else min(retained / RETAINED, agreement / AGREEMENT)


def _gain(comparison: Comparison, row: Row) -> float:
    """Measured speed-up at batch 1; without timing, the one expected from FLOPs."""
    speedup = comparison.sure_speedup(row)
    return comparison.flops_ratio(row) if speedup is None else speedup


def best_row(comparison: Comparison) -> Row | None:
    """The fastest setting that reaches `AGREEMENT` and `RETAINED`; None if none is faster than the
    plain model."""
    eligible = [
        row
        for row in comparison.rows[1:]
        if (_quality(comparison, row) or 0) >= 1 and _gain(comparison, row) > 1
    ]
    return max(eligible, key=lambda row: _gain(comparison, row), default=None)


def headline_row(comparison: Comparison) -> Row | None:
    """The best setting, or else the one with the best quality; None if all are undefined."""
    known = [row for row in comparison.rows[1:] if _quality(comparison, row) is not None]
    return best_row(comparison) or max(
        known, key=lambda row: _quality(comparison, row), default=None
    )


def headline(comparison: Comparison) -> str:
    """A sentence on the best setting, or on why none is recommended."""
    if len(comparison.rows) == 1:
        return "Only the plain model was evaluated."
    row = headline_row(comparison)
    if row is None:
        why = comparison.undefined() or ["No setting has a defined agreement with finite outputs."]
        return f"No setting can be recommended. {' '.join(why)}"
    sentence = f"{row.name}: {_in_words(comparison, row)}."
    if row is best_row(comparison):
        return sentence
    aim = f"agrees with the plain model in {AGREEMENT:g} %"
    if comparison.plain.metrics:
        aim = f"keeps {RETAINED:g} % of every metric and {aim}"
    return f"No setting is faster and {aim}; nearest is {sentence}"


def _in_words(comparison: Comparison, row: Row) -> str:
    saved = comparison.saved(row, "transformer")
    words = [f"{abs(saved):.0f} % {'fewer' if saved >= 0 else 'more'} GFLOPs in the transformer"]
    ratio = comparison.ratio(row)
    if ratio is not None:
        spread = f" (spread widely: {ratio.low:.2f} to {ratio.high:.2f})" if ratio.is_wide else ""
        words.append(f"{ratio.median:.2f} times as fast{spread}")
    retained = comparison.lowest_retained(row)
    if retained is not None:
        metrics = list(comparison.plain.metrics)
        of = f"or more of every metric ({', '.join(metrics)})" if len(metrics) > 1 else metrics[0]
        words.append(f"{retained:.1f} % {'of ' if len(metrics) == 1 else ''}{of} kept")
    least = " or more" if len(row.agreement) > 1 else ""
    words.append(f"{row.lowest_agreement:.1f} %{least} agreement with the plain model")
    return ", ".join(words)


class Tradeoff(NamedTuple):
    """The data of one plot."""

    points: list[Point]
    x_label: str
    y_label: str


def tradeoffs(comparison: Comparison) -> list[Tradeoff]:
    """Plots of each quality against each gain that at least two rows have."""
    label = "lowest metric kept, %"
    if len(comparison.plain.metrics) == 1:
        label = f"{next(iter(comparison.plain.metrics))} kept, %"
    qualities: list[tuple[Callable[[Row], float | None], str]] = []
    if comparison.plain.metrics:
        qualities.append((comparison.lowest_retained, label))
    if comparison.plain.agreement:
        lowest = "lowest agreement" if len(comparison.plain.agreement) > 1 else "agreement"
        qualities.append((lambda row: row.lowest_agreement, f"{lowest} with the plain model, %"))
    gains: list[tuple[Callable[[Row], float | None], Callable[[Row], Ratio | None], str]] = [
        (comparison.speedup, comparison.ratio, "speed-up, measured at batch 1"),
        (
            lambda row: comparison.saved(row, "transformer"),
            lambda row: None,
            "GFLOPs of the transformer saved, %",
        ),
    ]
    plots = []
    for y, y_label in qualities:
        for x, measured, x_label in gains:
            rows = [row for row in comparison.rows if _is_known(x(row)) and _is_known(y(row))]
            wide = {row.name: ratio for row in rows if (ratio := measured(row)) and ratio.is_wide}
            sure = [row for row in rows if not row.not_finite and row.name not in wide]
            front = {row.name for row in pareto(sure, x, y)}
            points = [
                Point(
                    row.name,
                    _method(row),
                    x(row),
                    y(row),
                    row.name in front,
                    (wide[row.name].low, wide[row.name].high) if row.name in wide else None,
                )
                for row in rows
            ]
            if len(points) > 1:
                plots.append(Tradeoff(points, x_label, y_label))
    return plots


def _is_known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _method(row: Row) -> str:
    if row.settings is None:
        return row.name
    # A budget chooses a method for each transformer.
    return (row.resolved or row.settings).method or "by budget"
