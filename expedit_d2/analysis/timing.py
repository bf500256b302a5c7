"""Interleaved timing of functions that are compared with each other."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..dtypes import DTYPES

__all__ = [
    "DTYPES",
    "Ratio",
    "Timing",
    "interleaved",
    "processor",
    "rounds",
    "summarize",
    "synchronize",
]

#: Interquartile ranges above this share of the median are called wide.
WIDE = 0.2


@dataclass(frozen=True)
class Timing:
    """Seconds of a call: median and quartiles of the repeats."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{1e3 * self.median:.1f} ({1e3 * self.low:.1f}-{1e3 * self.high:.1f}) ms"

    def scaled(self, factor: float) -> Timing:
        """Time of ``factor`` such calls."""
        return Timing(self.median * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True)
class Ratio:
    """Speed-up of one function over another: median and quartiles of the ratios of each round."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, slow: Sequence[float], fast: Sequence[float]) -> Ratio:
        """From the seconds of each round."""
        ratios = summarize([a / b for a, b in zip(slow, fast, strict=True)])
        return cls(ratios.median, ratios.low, ratios.high)

    @property
    def is_wide(self) -> bool:
        """Whether the rounds vary too much, as on a busy machine, for the median to say much."""
        return self.high - self.low > WIDE * self.median


def _uses_gpu() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def synchronize() -> None:
    """Wait for queued kernels, if this process uses a GPU."""
    if _uses_gpu():
        torch.cuda.synchronize()


def _elapsed(call: Callable[[], object], clock: Callable[[], float] | None) -> float:
    """Seconds of a call, including the kernels that it queues."""
    synchronize()
    if clock is None and _uses_gpu():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        synchronize()
        return start.elapsed_time(end) / 1e3
    now = clock or time.perf_counter
    start = now()
    call()
    synchronize()
    return now() - start


def summarize(seconds: Sequence[float]) -> Timing:
    """Median and quartiles of times."""
    if len(seconds) == 1:
        return Timing(seconds[0], seconds[0], seconds[0])
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(median, low, high)


def rounds(
    fns: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int = 1,
    progress: bool = False,
    clock: Callable[[], float] | None = None,
    label: str = "timing in turns",
) -> dict[str, list[float]]:
    """Time functions interleaved: each once per round.

    So changes of clock speed and other processes affect all of them alike. Every other round runs
    in reverse order, so that none always follows the same one.

    Args:
        fns: functions by name.
        repeats: timed rounds, at least 1.
        warmup: untimed rounds before them.
        progress: show a progress bar.
        clock: returns seconds, such as ``time.process_time`` on a shared CPU with one thread. None:
            wall-clock time, or CUDA events if this process uses a GPU.
        label: of the progress bar.

    Returns:
        The seconds of each round, by name.

    Raises:
        ValueError: for fewer than one repeat or a negative warm-up.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"need repeats >= 1 and warmup >= 0, got {repeats} and {warmup}")
    seconds: dict[str, list[float]] = {name: [] for name in fns}
    names = list(fns)
    turns = range(-warmup, repeats)
    disable = None if progress else True  # None: disabled unless in a terminal
    for turn in tqdm(turns, desc=label, unit="round", leave=False, disable=disable):
        for name in names if turn % 2 == 0 else reversed(names):
            elapsed = _elapsed(fns[name], clock)
            if turn >= 0:
                seconds[name].append(elapsed)
    return seconds


def interleaved(
    fns: Mapping[str, Callable[[], object]], repeats: int, *args: Any, **kwargs: Any
) -> dict[str, Timing]:
    """Time functions as `rounds` does, with its arguments, and summarize the rounds."""
    times = rounds(fns, repeats, *args, **kwargs)
    return {name: summarize(taken) for name, taken in times.items()}


def processor(device: str) -> str:
    """Name of the CPU, or of the GPU for ``"cuda"``."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
