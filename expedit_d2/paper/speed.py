"""Interleaved timing of the rows of a table."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from ..analysis.timing import Timing, interleaved
from ..api import apply
from ..comparison import share_weights
from .tables import Table

__all__ = ["time_table"]


def time_table(
    table: Table,
    repeats: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> list[Timing]:
    """Time forward passes of all rows of a table, interleaved; they share their weights.

    Args:
        table: the table.
        repeats: timed rounds, after one warm-up.
        device: "cpu" or "cuda".
        dtype: of autocast; float32 disables it.
        progress: show a progress bar.

    Returns:
        Seconds of each row, in order.

    Raises:
        ValueError: for fewer than one repeat.
    """
    plain, inputs = table.build(table.plain, device)
    models = [plain]
    for row in table.rows[1:]:
        models.append(share_weights(plain))
        apply(models[-1], table.settings(row, device))

    def forward(model: nn.Module) -> None:
        with torch.no_grad(), torch.autocast(device, dtype, enabled=dtype != torch.float32):
            model(inputs)

    runs = {str(index): partial(forward, model) for index, model in enumerate(models)}
    return list(interleaved(runs, repeats, progress=progress).values())
