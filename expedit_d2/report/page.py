"""From comparisons and pictures to the page."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image

from .. import __version__
from ..comparison import Comparison, Row, describe
from .figures import draw_tradeoff
from .pictures import Picture
from .summary import best_row, headline, tradeoffs

__all__ = ["write_report"]

#: Pixels of the longer side: of one panel among several, and of a picture of its own.
_PANEL, _WHOLE = 448, 1600


def write_report(
    comparisons: Sequence[Comparison], pictures: Sequence[Picture], path: str | Path
) -> Path:
    """Write one HTML file that refers to no other.

    Args:
        comparisons: at least one; each gets a section.
        pictures: none, or a handful; each of its panels takes about 40 kB.
        path: of the file; its folder is made if missing.

    Returns:
        The path.

    Raises:
        ValueError: without a comparison.
    """
    if not comparisons:
        raise ValueError("a report needs at least one comparison")
    names = [f"{comparison.model} on {comparison.dataset}" for comparison in comparisons]
    title = "Token reduction"
    if len(names) == 1:
        title, names = f"{title}: {names[0]}", ["Results"]
    # What is not marked up here, such as names of settings, is escaped.
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    template = environment.from_string(
        Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    )
    page = template.render(
        title=title,
        version=__version__,
        sections=[
            {"title": name, **_section(comparison, key=f"c{index}")}
            for index, (name, comparison) in enumerate(zip(names, comparisons, strict=True))
        ],
        pictures=[_picture(picture) for picture in pictures],
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


# --- a comparison -----------------------------------------------------------------------------


def _section(comparison: Comparison, key: str) -> dict[str, Any]:
    plots = tradeoffs(comparison)
    return {
        "headline": headline(comparison),
        "figures": [
            # Of nothing but text that `draw_tradeoff` has escaped.
            Markup(draw_tradeoff(*plot, key=f"{key}p{number}"))
            for number, plot in enumerate(plots)
        ],
        "figures_note": "Up and right is better. The line joins the settings that no other one is "
        "better than in both; the vertical axis is stretched towards 100\N{NO-BREAK SPACE}%.",
        "table": _table(comparison),
        "table_note": _table_note(comparison),
        "settings": [(row.name, describe(row.settings)) for row in comparison.rows if row.settings],
        "conditions": _conditions(comparison),
    }


class _Cell(NamedTuple):
    """One number of the table: as text, with a second line, and for sorting."""

    text: str
    small: str = ""
    value: float | None = None


def _cell(value: float | None, form: str, small: str = "") -> _Cell:
    if value is None or not math.isfinite(value):
        return _Cell("–")
    return _Cell(form.format(value), small, value)


def _table(comparison: Comparison) -> dict[str, Any]:
    best = best_row(comparison)
    rows = comparison.rows
    cells = [_cells(comparison, row) for row in rows]
    # Leave out what was not measured for any row.
    columns = [name for name in cells[0] if any(line[name].value is not None for line in cells)]
    return {
        "columns": ["setting", *columns],
        "lines": [
            {"name": row.name, "best": row is best, "cells": [line[name] for name in columns]}
            for row, line in zip(rows, cells, strict=True)
        ],
    }


def _cells(comparison: Comparison, row: Row) -> dict[str, _Cell]:
    """Column to cell; the same columns for every row."""
    cells = {}
    for metric in comparison.plain.metrics:
        kept = comparison.kept(row, metric)
        small = "" if kept is None else f"{kept:.1f} % kept"
        cells[metric] = _cell(row.metrics.get(metric), "{:.2f}", small)
    for task in comparison.plain.agreement:
        cells[f"agreement, {task}, %"] = _cell(row.agreement.get(task), "{:.2f}")
    for part, name in (("transformer", "GFLOPs, transformer"), ("total", "GFLOPs, all")):
        saved = f"{comparison.saved(row, part):.1f} % saved"
        cells[name] = _cell(getattr(row.flops, part) / 1e9, "{:.2f}", saved)
    time, then = row.latency, row.baseline
    plain = "" if then is None else f"plain {1e3 * then.median:.1f} ms"
    cells["speed-up"] = _cell(comparison.speedup(row), "{:.2f}×", plain)
    cells["ms an image"] = (
        _Cell("–")
        if time is None
        else _cell(1e3 * time.median, "{:.1f}", f"{1e3 * time.low:.1f} to {1e3 * time.high:.1f}")
    )
    batched = comparison.batched_speedup(row)
    faster = "" if batched is None else f"{batched:.2f}×"
    cells["images a second, in batches"] = _cell(row.throughput, "{:.2f}", faster)
    memory = None if row.peak_memory is None else row.peak_memory / 2**20
    cells["peak memory, MiB"] = _cell(memory, "{:.1f}")
    cells["kernel launches"] = _cell(row.launches, "{:d}")
    return cells


def _table_note(comparison: Comparison) -> str:
    note = (
        "Kept and saved are relative to the plain model. Agreement is that of the output with the "
        "plain model's, without labels. One FLOP is one multiply-add."
    )
    if comparison.plain.latency is not None:
        note += (
            " Times are the median and the middle half at batch 1; the speed-up compares a setting "
            "with the plain model measured in turns with it, whose time stands below."
        )
    best = best_row(comparison)
    if best is not None:
        note += f" Shaded: {best.name}, the setting of the headline."
    if comparison.unfinished:
        note += f" Interrupted before: {', '.join(comparison.unfinished)}."
    return note


def _conditions(comparison: Comparison) -> list[tuple[str, str]]:
    c = comparison.conditions
    return [
        ("model", f"{comparison.model}, {comparison.plain.parameters / 1e6:.2f} M parameters"),
        ("data", f"{comparison.dataset}, {comparison.images} images"),
        ("device", c.device),
        ("threads", str(c.threads)),
        ("type", c.dtype),
        ("torch", c.torch),
        ("timed", f"{c.timed_images} images at batch 1"),
        *([("batches", f"of {c.batch}")] if c.batch > 1 else []),
        ("date", c.date),
        ("command", c.command),
    ]


# --- a picture --------------------------------------------------------------------------------


def _picture(picture: Picture) -> dict[str, Any]:
    side = _PANEL if len(picture.panels) > 1 else _WHOLE
    return {
        "title": picture.title,
        "panels": [
            {
                "caption": caption,
                "alt": f"{picture.title}: {caption}" if caption else picture.title,
                **_embedded(panel, side),
            }
            for caption, panel in picture.panels.items()
        ],
    }


def _embedded(panel: np.ndarray, side: int) -> dict[str, Any]:
    """A panel as the source of an ``<img>``, at most ``side`` pixels long, and its size."""
    image = Image.fromarray(panel)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=82, optimize=True)
    data = base64.b64encode(out.getvalue()).decode()
    source = f"data:image/jpeg;base64,{data}"
    return {"source": source, "width": image.width, "height": image.height}
