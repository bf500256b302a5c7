"""Peak memory of a call, on the CPU or a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable

# Keep the profiler from logging that it finds no GPU.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch  # noqa: E402

from ..compat import allocations  # noqa: E402

__all__ = ["peak_memory"]


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Most bytes allocated at once during a call, beyond those allocated before it.

    On the CPU, temporary memory inside a kernel is not counted.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    now = peak = 0
    for change in allocations(profile):
        now += change
        peak = max(peak, now)
    return peak
