"""Results of rows as text and JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tabulate import tabulate

from .rules import RULES

__all__ = ["Result", "to_text", "write_json"]


@dataclass(frozen=True)
class Result:
    """Result of one row, with the fields of the JSON.

    Attributes:
        model, dataset: as in `Table`.
        alpha, grid: as published; None for the plain model.
        gflops_published: as published.
        gflops_published_rule: of our model, counted by the published rule.
        gflops_fvcore: of our model, counted by fvcore.
        speedup_published: published FPS relative to the plain model.
        speedup_measured: measured speed-up; None if not measured.
    """

    model: str
    dataset: str
    alpha: int | None
    grid: list[int] | None
    gflops_published: float
    gflops_published_rule: float
    gflops_fvcore: float
    speedup_published: float
    speedup_measured: float | None = None

    @property
    def deviation(self) -> float:
        """Relative deviation of our count by the published rule from the published GFLOPs."""
        return self.gflops_published_rule / self.gflops_published - 1


def write_json(results: Sequence[Result], path: Path) -> None:
    """Write results as a list of objects, atomically."""
    rows = [
        {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(result).items()}
        for result in results
    ]
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(rows, indent=1) + "\n")
    os.replace(part, path)


HEAD = [
    *("model", "data set", "α", "h × w"),
    *("published GFLOPs", "ours, same rule", "off", "ours, fvcore"),
    *("published speed-up", "measured here"),
]


def to_text(results: Sequence[Result], style: str = "github") -> str:
    """Results as a table in one of tabulate's styles, with explanations below."""
    lines = [
        [
            result.model,
            result.dataset,
            "–" if result.alpha is None else str(result.alpha),
            "–" if result.grid is None else "×".join(map(str, result.grid)),
            f"{result.gflops_published:g}",
            f"{result.gflops_published_rule:.2f}",
            f"{100 * result.deviation:+.2f} %",
            f"{result.gflops_fvcore:.2f}",
            f"{result.speedup_published:.2f}×",
            "–" if result.speedup_measured is None else f"{result.speedup_measured:.2f}×",
        ]
        for result in results
    ]
    align = ["left", "left", *["right"] * (len(HEAD) - 2)]
    table = tabulate(lines, HEAD, tablefmt=style, disable_numparse=True, colalign=align)
    notes = [
        "Weights are random, as GFLOPs and speed do not depend on them; this says nothing about "
        "accuracy.",
        "α and h × w are as published.",
        "fvcore: one FLOP per multiply-add; all products, convolutions, norms and interpolations, "
        "including our two operators and the decoder; no softmax, GELU or sums.",
    ]
    for model in dict.fromkeys(result.model for result in results):
        note = RULES[model].note if model in RULES else "that of fvcore, for the backbone only"
        notes.append(f"Published rule, {model}: {note}.")
    return "\n".join([table, "", *notes])
