"""The HTML page of comparisons and pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image

from .. import __version__
from ..comparison import Comparison
from ..comparison.columns import HTML, columns_of, describe_settings
from ..comparison.tables import remarks
from .figures import draw_tradeoff
from .pictures import Picture
from .summary import best_row, headline, tradeoffs

__all__ = ["write_report"]

#: Largest side in pixels of one of several panels, and of a single picture.
_PANEL, _WHOLE = 1024, 1600


def write_report(
    comparisons: Sequence[Comparison], pictures: Sequence[Picture], path: str | Path
) -> Path:
    """Write a self-contained HTML file.

    Args:
        comparisons: at least one; each gets a section.
        pictures: a few; each panel takes about 100 kB.
        path: of the file; missing folders are created.

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
    # Names of settings and other text are escaped.
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
            # `draw_tradeoff` escapes its text.
            Markup(draw_tradeoff(*plot, key=f"{key}p{number}"))
            for number, plot in enumerate(plots)
        ],
        "figures_note": "Up and right is better. The line is the Pareto front; the vertical axis "
        "is stretched around 100\N{NO-BREAK SPACE}%.",
        "table": _table(comparison),
        "table_note": _table_note(comparison),
        "remarks": remarks(comparison),
        "settings": [(row.name, describe_settings(row)) for row in comparison.rows if row.settings],
        "conditions": _conditions(comparison),
    }


class _Cell(NamedTuple):
    """A cell of the table: text, value for sorting, and further lines."""

    text: str
    value: float | None
    small: tuple[str, ...] = ()


def _table(comparison: Comparison) -> dict[str, Any]:
    best = best_row(comparison)
    columns = columns_of(comparison, HTML)
    lines = []
    for row in comparison.rows:
        cells: list[_Cell] = []
        for column in columns:
            note = column.note(row)
            if not column.below:
                small = (note,) if note else ()
                cells.append(_Cell(column.text(row), column.shown(row), small))
            elif column.shown(row) is not None:
                more = f"{column.full_text(row)} {column.head}"
                cells[-1] = cells[-1]._replace(small=(*cells[-1].small, more))
        lines.append({"name": row.name, "best": row is best, "cells": cells})
    heads = [column.head for column in columns if not column.below]
    return {"columns": ["setting", *heads], "lines": lines}


def _table_note(comparison: Comparison) -> str:
    note = (
        "Kept and saved are relative to the plain model. Agreement compares outputs with the plain "
        "model's, without labels; it is undefined (-) if neither model finds anything. One FLOP is "
        "one multiply-add."
    )
    if comparison.plain.latency is not None:
        note += (
            " The speed-up is over the plain model, measured interleaved, at batch 1; if the "
            "spread is wide, the quartiles are below it, and the setting is on no front of speed. "
            "FPS and times follow from it and the plain model's time; quartiles are below times."
        )
    best = best_row(comparison)
    if best is not None:
        note += f" Shaded: {best.name}, the setting of the headline."
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
    """Source and size of an ``<img>`` for a panel of at most ``side`` pixels."""
    image = Image.fromarray(panel)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=82, optimize=True)
    data = base64.b64encode(out.getvalue()).decode()
    source = f"data:image/jpeg;base64,{data}"
    return {"source": source, "width": image.width, "height": image.height}
