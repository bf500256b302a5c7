"""Kernel launches of a forward pass.

On a GPU even a tiny kernel takes some microseconds, so many small kernels can be slower than more
arithmetic in fewer. Operators are counted as PyTorch dispatches them, on any device: one launch
each, except for views and allocations. Some operators launch several kernels (a sort, a large
softmax) and a compiler fuses some, so this number is for comparisons and differs from a profiler's.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from ..compat import TorchDispatchMode, schema_of

__all__ = ["count_launches"]

# In addition to views, which are recognised by their schema.
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
def count_launches(model: nn.Module, *inputs: Any, warm: bool = False) -> Counter[str]:
    """Launches of one forward pass, by operator; ``.total()`` is their sum.

    Args:
        model: any model.
        *inputs: its inputs.
        warm: it has run on inputs of these sizes before. Otherwise it runs once first, so that
            values it caches are not counted.
    """
    if not warm:
        model(*inputs)
    with _Counting() as counting:
        model(*inputs)
    return counting.counts
