"""A comparison as text: the essentials for the terminal, everything for Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from tabulate import tabulate

from ..analysis.flops import Flops
from ..analysis.timing import Timing
from .rows import Comparison, Row
from .spelling import describe

__all__ = ["caption", "save_tables", "to_csv", "to_markdown", "to_terminal"]

#: Heads of columns and what stands below them.
Cells = list[tuple[str, str]]

PARTS = tuple(field.name for field in fields(Flops) if field.name != "uncounted")


def _number(value: float | None, form: str = ".1f", unit: str = "") -> str:
    """ "-" for what was not measured."""
    return "-" if value is None else f"{value:{form}}{unit}"


def _tabulate(rows: list[Cells], style: str) -> str:
    heads = [head for head, _ in rows[0]]
    align = ["left"] + ["right"] * (len(heads) - 1)
    lines = [[cell for _, cell in row] for row in rows]
    return tabulate(lines, heads, tablefmt=style, disable_numparse=True, colalign=align)


def _essentials(comparison: Comparison, row: Row) -> Cells:
    cells = [("setting", row.name)]
    for metric, value in row.metrics.items():
        cells += [
            (metric, _number(value)),
            ("kept", _number(comparison.kept(row, metric), unit=" %")),
        ]
    if row.agreement:
        cells.append(("agree", _number(row.lowest_agreement, unit=" %")))
    cells += [
        ("GFLOPs", _number(row.flops.total / 1e9, ".2f")),
        ("saved", _number(comparison.saved(row), ".0f", " %")),
    ]
    if comparison.plain.latency is not None:
        cells += [
            ("FPS", _number(row.fps, ".2f")),
            ("speed-up", _number(comparison.speedup(row), ".2f", "x")),
            ("by GFLOPs", _number(comparison.flops_ratio(row), ".2f", "x")),
            ("memory", _number(_mib(row), ".0f", " MiB")),
        ]
    return cells


def _mib(row: Row) -> float | None:
    return None if row.peak_memory is None else row.peak_memory / 2**20


def to_terminal(comparison: Comparison) -> str:
    """The table that fits a terminal, and what its columns mean."""
    table = _tabulate([_essentials(comparison, row) for row in comparison.rows], "simple")
    return f"{table}\n\n{caption(comparison)}"


def caption(comparison: Comparison) -> str:
    """What was measured, how, and what the columns mean."""
    now, plain = comparison.conditions, comparison.plain
    lines = [f"{comparison.model} on {comparison.dataset}, {_count(comparison.images, 'image')}."]
    if plain.metrics:
        lines.append("kept: share of the plain model's metric.")
    if plain.agreement:
        lowest = "the lowest of " if len(plain.agreement) > 1 else ""
        lines.append(f"agree: with the plain model's output, {lowest}{', '.join(plain.agreement)}.")
    lines.append("GFLOPs: of the first image.")
    if plain.latency is not None:
        threads = f", {_count(now.threads, 'thread')}"
        lines += [
            f"Speed: {now.device}{threads}, {now.dtype}, torch {now.torch};",
            f"batch 1, median of {_count(now.timed_images, 'image')}.",
            "speed-up: against the plain model in the same turns; by GFLOPs: by these alone.",
            "memory: peak of a forward, weights not included.",
        ]
    if comparison.unfinished:
        lines.append(f"Not finished: {', '.join(comparison.unfinished)}.")
    return "\n".join(lines)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _span(timing: Timing | None) -> str:
    if timing is None:
        return "-"
    return f"{1e3 * timing.median:.1f} ({1e3 * timing.low:.1f}-{1e3 * timing.high:.1f})"


def _quality(comparison: Comparison, row: Row) -> Cells:
    cells = [("setting", row.name)]
    for metric, value in row.metrics.items():
        kept = _number(comparison.kept(row, metric), ".2f", " %")
        cells += [(metric, _number(value, ".2f")), ("kept", kept)]
    for task, value in row.agreement.items():
        cells.append((f"agree, {task}", _number(value, ".2f", " %")))
    spelled = "" if row.settings is None else f"`{describe(row.settings)}`"
    return [*cells, ("settings", spelled)]


def _cost(comparison: Comparison, row: Row) -> Cells:
    batch = comparison.conditions.batch
    cells = [
        ("setting", row.name),
        ("ms (middle half)", _span(row.latency)),
        ("FPS", _number(row.fps, ".2f")),
        ("speed-up", _number(comparison.speedup(row), ".2f", "x")),
        ("by GFLOPs", _number(comparison.flops_ratio(row), ".2f", "x")),
    ]
    if comparison.plain.throughput is not None:
        cells += [
            (f"images/s, batch {batch}", _number(row.throughput, ".2f")),
            (f"speed-up, batch {batch}", _number(comparison.batched_speedup(row), ".2f", "x")),
        ]
    return [
        *cells,
        ("memory, MiB", _number(_mib(row))),
        ("launches", _number(row.launches, "d")),
        ("parameters, M", _number(row.parameters / 1e6, ".2f")),
    ]


def _flops(comparison: Comparison, row: Row) -> Cells:
    return [
        ("setting", row.name),
        *((part, _number(getattr(row.flops, part) / 1e9, ".3f")) for part in PARTS),
        ("transformer", _number(row.flops.transformer / 1e9, ".3f")),
        ("saved", _number(comparison.saved(row, "transformer"), ".1f", " %")),
        ("total", _number(row.flops.total / 1e9, ".3f")),
        ("saved", _number(comparison.saved(row), ".1f", " %")),
    ]


def to_markdown(comparison: Comparison) -> str:
    """Three tables: quality, cost, and GFLOPs by part."""
    parts = [caption(comparison).replace("\n", "  \n")]
    for title, cells in (("Quality", _quality), ("Cost", _cost), ("GFLOPs", _flops)):
        rows = [cells(comparison, row) for row in comparison.rows]
        parts.append(f"**{title}**\n\n{_tabulate(rows, 'github')}")
    now = comparison.conditions
    parts.append(f"{now.date}: `{now.command}`")
    return "\n\n".join(parts) + "\n"


def _values(comparison: Comparison, row: Row) -> Mapping[str, object]:
    """A row in full precision; seconds, bytes, FLOPs and percent."""
    values: dict[str, object] = {"name": row.name}
    values["settings"] = "" if row.settings is None else describe(row.settings)
    for metric, value in row.metrics.items():
        values |= {metric: value, f"{metric} kept": comparison.kept(row, metric)}
    values |= {f"agreement, {task}": value for task, value in row.agreement.items()}
    values |= {f"flops, {part}": getattr(row.flops, part) for part in PARTS}
    values["flops"] = row.flops.total
    values["flops saved"] = comparison.saved(row)
    values["flops ratio"] = comparison.flops_ratio(row)
    values["parameters"] = row.parameters
    for name in ("median", "low", "high"):
        values[f"seconds, {name}"] = getattr(row.latency, name, None)
    values["speed-up"] = comparison.speedup(row)
    values["images per second in batches"] = row.throughput
    values["speed-up in batches"] = comparison.batched_speedup(row)
    values["peak memory"] = row.peak_memory
    values["launches"] = row.launches
    return values


def to_csv(comparison: Comparison) -> str:
    """A line per row, numbers unrounded; empty where something was not measured."""
    rows = [_values(comparison, row) for row in comparison.rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def save_tables(comparison: Comparison, stem: str | Path) -> list[Path]:
    """Write ``stem`` with the endings .md, .csv and .json; returns the files."""
    stem = Path(stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    texts = {
        ".md": to_markdown(comparison),
        ".csv": to_csv(comparison),
        ".json": comparison.to_json(),
    }
    files = []
    for ending, text in texts.items():
        file = stem.with_name(stem.name + ending)
        file.write_text(text, encoding="utf-8")
        files.append(file)
    return files
