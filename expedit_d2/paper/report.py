"""What was found for a row, as a line of text and as an object of JSON."""

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
    """One row; its fields are those of the JSON.

    Attributes:
        model, dataset: as in `Table`.
        alpha, grid: as published; None for the plain model.
        gflops_published: as published.
        gflops_published_rule: ours, counted as the published ones were.
        gflops_fvcore: ours, by fvcore: every operator that costs, one FLOP a multiply-add.
        speedup_published: ratio of the row's FPS to the plain model's.
        speedup_measured: the same here; None where it was not measured.
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
        """Of ours by the published rule from the published figure, relative."""
        return self.gflops_published_rule / self.gflops_published - 1


def write_json(results: Sequence[Result], path: Path) -> None:
    """Write results as a list of objects; at no moment is there half a file."""
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
    """Results as a table, ``style`` is one of tabulate's, and what the columns mean below it."""
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
        "Weights are random: neither GFLOPs nor speed depend on them, and nothing here is about "
        "accuracy.",
        "α and h × w are as published.",
        "fvcore: one FLOP a multiply-add; every product, convolution, norm and interpolation, the "
        "two operators as they run here and the decoder included; no softmax, GELU or sums.",
    ]
    for model in dict.fromkeys(result.model for result in results):
        note = RULES[model].note if model in RULES else "fvcore's, of the backbone alone"
        notes.append(f"Published rule, {model}: {note}.")
    return "\n".join([table, "", *notes])
