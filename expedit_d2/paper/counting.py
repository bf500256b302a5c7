"""GFLOPs of a row by both counts, on PyTorch's meta device: no weights, no arithmetic."""

from __future__ import annotations

from ..analysis.flops import count_flops
from ..analysis.meta import traceable
from .report import Result
from .rules import RULES, count_published
from .tables import Row, Table

__all__ = ["count_row"]


def count_row(table: Table, row: Row) -> Result:
    """Count the GFLOPs of a row by the published rule and by fvcore."""
    model, inputs = table.build(row, "meta")
    with traceable():
        fvcore = count_flops(model, inputs).total
    rule = RULES.get(table.model)
    published = count_published(model, inputs, rule) if rule else fvcore
    return Result(
        model=table.model,
        dataset=table.dataset,
        alpha=row.alpha,
        grid=row.grid and list(row.grid),
        gflops_published=row.gflops,
        gflops_published_rule=published / 1e9,
        gflops_fvcore=fvcore / 1e9,
        speedup_published=row.fps / table.plain.fps,
    )
