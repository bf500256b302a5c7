"""Kernel launches of a forward pass: what a GPU is asked to do, however small each thing is.

On a GPU a small kernel takes some microseconds whatever it computes, so a pass of many small ones
can be slower than one with more arithmetic. Operators are counted as PyTorch's dispatcher hands
them out, on any device: one launch each, but for those that only look at memory in another way or
reserve it. Some operators are several kernels on a GPU (a sort, a softmax over many numbers), and
a compiler fuses some, so this is a measure to compare with, not a number of a profiler's.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from ..compat import TorchDispatchMode, schema_of

__all__ = ["count_launches"]

# Beside views, which say so in their schema.
_FREE = frozenset(
    {
        "aten::_reshape_alias",
        "aten::_unsafe_view",
        "aten::empty",
        "aten::empty_like",
        "aten::empty_strided",
        "aten::is_same_size",
        "aten::lift_fresh",
        "aten::new_empty",
        "aten::new_empty_strided",
        "aten::set_",
    }
)


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        schema = schema_of(func)
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        if not views and schema.name not in _FREE and schema.name.startswith("aten::"):
            self.counts[schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def count_launches(model: nn.Module, *inputs: Any) -> Counter[str]:
    """Launches of one forward pass, by operator; ``.total()`` is their number.

    The model runs once before, so that what it computes once and keeps is not counted.

    Args:
        model: any model.
        *inputs: what it is called with.
    """
    model(*inputs)
    with _Counting() as counting:
        model(*inputs)
    return counting.counts
