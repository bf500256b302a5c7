"""Helpers for code that is also traced, compiled and exported; needs torch and nothing else."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["cached", "cached_results", "in_graph", "is_compiling", "is_exporting", "shape_of"]

_R = TypeVar("_R")

#: Results that `cached` keeps for each function.
_CACHE_SIZE = 64
_caches: list[OrderedDict[tuple, object]] = []


def shape_of(x: Tensor) -> tuple[int, ...]:
    """The shape as numbers, even while torch.jit traces, where sizes are tensors."""
    return tuple(int(n) if isinstance(n, Tensor) else n for n in x.shape)


def in_graph() -> bool:
    """Whether a graph is being recorded, which unrolls every loop."""
    # torch before 2.3 cannot tell whether it is compiling.
    compiling = getattr(torch.compiler, "is_compiling", lambda: False)()
    return compiling or torch.jit.is_tracing()


def is_compiling() -> bool:
    """Whether torch.compile records a graph; False where torch, before 2.7, cannot tell."""
    known = hasattr(torch.compiler, "is_exporting")
    return known and torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def is_exporting() -> bool:
    """Whether torch.export is tracing; torch before 2.7 cannot tell."""
    return getattr(torch.compiler, "is_exporting", lambda: False)()


def cached(function: Callable[..., _R]) -> Callable[..., _R]:
    """Keep the latest results of a function of sizes and a device.

    For index tensors and masks that depend on nothing else, so that a forward pass does not make
    them again. While a graph is recorded, or where tensors are not real ones (FakeTensorMode, meta
    devices), the cache is neither read nor written.

    Args:
        function: its positional arguments are hashable and determine the result.
    """
    results: OrderedDict[tuple, _R] = OrderedDict()
    _caches.append(results)

    @wraps(function)
    def run(*args: object) -> _R:
        if in_graph() or type(torch.empty(0)) is not Tensor:
            return function(*args)
        result = results.get(args)
        if result is None:
            with torch.inference_mode(False):  # it may be used where gradients are recorded
                result = results[args] = function(*args)
            while len(results) > _CACHE_SIZE:
                results.popitem(last=False)
        return result

    return run


def cached_results() -> list[object]:
    """All results that `cached` keeps now: who holds them keeps their memory from being reused."""
    return [result for results in _caches for result in list(results.values())]
