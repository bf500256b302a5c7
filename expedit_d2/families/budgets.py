"""One model at several budgets: GFLOPs, speed and memory, with fused attention in all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from ..analysis.flops import count_flops
from ..analysis.memory import peak_memory
from ..analysis.timing import Ratio, rounds, summarize
from ..api import apply
from ..budget import within_budget
from ..comparison import share_weights
from ..fused import fuse_attention
from ..settings import Settings, describe
from .models import Family

__all__ = ["BudgetRow", "budget_table", "measure_budgets"]


@dataclass(frozen=True)
class BudgetRow:
    """A model at one budget.

    Attributes:
        model, size: of the family.
        budget: share of the GFLOPs of the blocks; 1.0 for the plain model.
        setting: what the budget chose.
        gflops, block_gflops: of the whole model, and of the blocks of its transformer.
        memory: bytes allocated at once, at most, beyond the weights and the image.
        seconds: of each round.
    """

    model: str
    size: int
    budget: float
    setting: str
    gflops: float
    block_gflops: float
    memory: int
    seconds: list[float]


@torch.no_grad()
def measure_budgets(
    family: Family, budgets: Sequence[float], repeats: int, warmup: int = 1
) -> list[BudgetRow]:
    """Measure a model on the CPU, plain and at several budgets in turns; the plain one first.

    Arguments and errors are those of `measure`.
    """
    model, spec, x = family.prepare()
    chosen = {budget: within_budget(Settings(budget=budget), spec) for budget in budgets}
    models = {1.0: model} | {budget: share_weights(model) for budget in budgets}
    if spec.fused is not None:  # else it is fused as it is
        fuse_attention(model)
    for budget, settings in chosen.items():
        apply(models[budget], replace(settings, fused_attention=spec.fused is not None))
    calls = {str(budget): partial(each, x) for budget, each in models.items()}
    seconds = rounds(calls, repeats, warmup, progress=True, label=str(family))
    rows = []
    for budget, each in models.items():
        counted = count_flops(each, x)
        rows.append(
            BudgetRow(
                model=family.model,
                size=family.size,
                budget=budget,
                setting=describe(chosen[budget], method=True) if budget in chosen else "",
                gflops=counted.total / 1e9,
                block_gflops=counted.blocks / 1e9,
                memory=peak_memory(calls[str(budget)], x.device),
                seconds=seconds[str(budget)],
            )
        )
    return rows


def budget_table(rows: Sequence[BudgetRow]) -> str:
    """Rows as a Markdown table; a plain model's row comes before those that refer to it."""
    head = ["model", "budget", "GFLOPs", "saved (blocks)", "seconds", "speed-up", "of the GFLOPs"]
    lines = [[*head, "memory"], ["---"] * (len(head) + 1)]
    for row in rows:
        if row.budget == 1.0:
            plain = row
        ratio = Ratio.of(plain.seconds, row.seconds)
        lines.append(
            [
                f"{row.model}, {row.size}²",
                "plain" if row is plain else f"{row.budget:g}",
                f"{row.gflops:.0f}",
                f"{1 - row.block_gflops / plain.block_gflops:.0%}",
                f"{summarize(row.seconds).median:.1f}",
                f"{ratio.median:.2f}×" + (" (uneven)" if ratio.is_wide else ""),
                f"{ratio.median * row.gflops / plain.gflops:.2f}",
                f"{row.memory / 2**20:.0f} MiB",
            ]
        )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
