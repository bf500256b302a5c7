"""Peak memory of a call, on the CPU as on a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable

# The profiler, here for the memory alone, reports on the GPU that it does not find.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch  # noqa: E402

__all__ = ["peak_memory"]


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that a call has allocated at once, beyond what was there before.

    On the CPU, what a kernel takes and gives back itself is not seen.
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
    # Allocations and releases in order.
    now = peak = 0
    for event in sorted(profile.events(), key=lambda event: event.time_range.end):
        now += event.self_cpu_memory_usage
        peak = max(peak, now)
    return peak
