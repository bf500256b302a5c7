"""A comparison as text: a summary for the terminal, all columns in Markdown and CSV."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from tabulate import tabulate

from ..predictions import PREDICTIONS
from .columns import GROUPS, MARKDOWN, TERMINAL, Column, columns_of, describe_settings
from .rows import Comparison, Row

__all__ = ["caption", "save_tables", "table_stem", "to_csv", "to_markdown", "to_terminal"]


def _tabulate(rows: Sequence[Row], columns: Sequence[Column], style: str) -> str:
    heads = ["setting", *(column.head for column in columns)]
    lines = [[row.name, *(column.full_text(row) for column in columns)] for row in rows]
    align = ["left"] + ["right"] * len(columns)
    return tabulate(lines, heads, tablefmt=style, disable_numparse=True, colalign=align)


def to_terminal(comparison: Comparison) -> str:
    """A table that fits a terminal, and its caption."""
    table = _tabulate(comparison.rows, columns_of(comparison, TERMINAL), "simple")
    return "\n\n".join([table, *_chosen(comparison), caption(comparison)])


def _chosen(comparison: Comparison) -> list[str]:
    """A paragraph with the choices of budgets, one line each; an empty list without budgets."""
    lines = [
        f"{row.name}: {describe_settings(row)}"
        for row in comparison.rows
        if row.settings is not None and row.settings.budget is not None and row.resolved
    ]
    return ["\n".join(lines)] if lines else []


def caption(comparison: Comparison) -> str:
    """What was measured and how, and the meaning of the columns."""
    now, plain = comparison.conditions, comparison.plain
    lines = [f"{comparison.model} on {comparison.dataset}, {_count(comparison.images, 'image')}."]
    if plain.metrics:
        lines.append("kept: share of the plain model's metric.")
    if plain.agreement:
        lowest = "the lowest of " if len(plain.agreement) > 1 else ""
        lines.append(f"agree: with the plain model's output, {lowest}{', '.join(plain.agreement)}.")
        kinds = [kind for kind in PREDICTIONS.values() if kind.name in plain.agreement]
        lines += [f"{kind.name}: {kind.meaning}." for kind in kinds if kind.meaning]
    lines.append("GFLOPs: of the first image.")
    if plain.latency is not None:
        threads = f", {_count(now.threads, 'thread')}"
        lines += [
            f"Speed: {now.device}{threads}, {now.dtype}, torch {now.torch};",
            f"batch 1, median of {_count(now.timed_images, 'image')}.",
            "speed-up: over the plain model, measured interleaved, with quartiles if the spread is "
            "wide;",
            "FPS: the plain model's times the speed-up; by GFLOPs: the speed-up from these.",
            "memory: peak of a forward pass, without weights.",
        ]
    return "\n".join([*lines, *remarks(comparison)])


def remarks(comparison: Comparison) -> list[str]:
    """Sentences on undefined, non-finite, failed and unfinished results."""
    sentences = dict.fromkeys([*comparison.undefined(), *comparison.not_finite()])
    lines = [*sentences, *(f"Failed: {name}: {why}" for name, why in comparison.failed.items())]
    if comparison.unfinished:
        lines.append(f"Not finished: {', '.join(comparison.unfinished)}.")
    return lines


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def to_markdown(comparison: Comparison) -> str:
    """Tables of quality, GFLOPs by part, and cost, and the settings."""
    rows, columns = comparison.rows, columns_of(comparison, MARKDOWN)
    parts = [caption(comparison).replace("\n", "  \n")]
    for title in GROUPS:
        group = [column for column in columns if column.group == title]
        parts.append(f"**{title}**\n\n{_tabulate(rows, group, 'github')}")
    settings = [f"- {row.name}: `{describe_settings(row)}`" for row in rows if row.settings]
    parts += ["**Settings**\n\n" + "\n".join(settings)] if settings else []
    now = comparison.conditions
    parts.append(f"{now.date}: `{now.command}`")
    return "\n\n".join(parts) + "\n"


def to_csv(comparison: Comparison) -> str:
    """One line per row, in base units (seconds, bytes, FLOPs, percent), not rounded; values that
    were not measured or are undefined are empty."""
    columns = columns_of(comparison)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", "settings", *(column.key for column in columns)])
    for row in comparison.rows:
        values = [column.value(row) for column in columns]
        writer.writerow([row.name, describe_settings(row), *values])
    return text.getvalue()


def table_stem(folder: str | Path, name: str, config_file: str) -> Path:
    """Path of a model's tables without suffix: ``name`` in the folder, or ``name-2``, ``name-3``, …
    if the folder has tables of another config with that name.

    Args:
        folder: of the results.
        name: of the model, such as the name of its config.
        config_file: of the model.
    """
    here = str(Path(config_file).resolve()) if config_file else ""
    for number in count(1):
        stem = Path(folder) / (name if number == 1 else f"{name}-{number}")
        if _is_mine(stem.with_name(f"{stem.name}.json"), here):
            return stem


def _is_mine(file: Path, config_file: str) -> bool:
    """Whether a file may be overwritten: it is missing, empty, or of the same config."""
    if not file.exists():
        return True
    try:
        text = file.read_text(encoding="utf-8").strip("\0 \n")
        # Files of older versions have no config_file.
        return not text or json.loads(text).get("config_file", config_file) == config_file
    except (OSError, ValueError, AttributeError):
        return False


def save_tables(comparison: Comparison, stem: str | Path) -> list[Path]:
    """Write ``stem`` with the suffixes .md, .csv and .json, each atomically."""
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
        unfinished = stem.with_name(f"{stem.name}{ending}.unfinished")
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, file)
        files.append(file)
    return files
