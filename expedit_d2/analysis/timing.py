"""Wall-clock time of things that are to be compared, taken in one interleaved run."""

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

#: A middle half that is wider than this share of its median is a wide spread.
WIDE = 0.2


@dataclass(frozen=True)
class Timing:
    """Seconds a call takes: the median and the middle half of the repeats."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{1e3 * self.median:.1f} ({1e3 * self.low:.1f}-{1e3 * self.high:.1f}) ms"

    def scaled(self, factor: float) -> Timing:
        """The time of ``factor`` such calls."""
        return Timing(self.median * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True)
class Ratio:
    """How many times faster one thing is than another.

    Of the ratios in the rounds that both were timed in: the median and the middle half.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, slow: Sequence[float], fast: Sequence[float]) -> Ratio:
        """From the seconds of each round."""
        found = summarize([a / b for a, b in zip(slow, fast, strict=True)])
        return cls(found.median, found.low, found.high)

    @property
    def is_wide(self) -> bool:
        """Whether the rounds disagree so much, on a busy machine, that the median says little."""
        return self.high - self.low > WIDE * self.median


def _uses_gpu() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def synchronize() -> None:
    """Wait for the GPU, if this process uses one: its work is only queued by a call."""
    if _uses_gpu():
        torch.cuda.synchronize()


def _elapsed(call: Callable[[], object], clock: Callable[[], float] | None) -> float:
    """Seconds of a call, the work that it leaves in the GPU's queue included."""
    synchronize()
    if clock is None and _uses_gpu():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        synchronize()
        return start.elapsed_time(end) / 1e3
    now = clock or time.perf_counter
    begun = now()
    call()
    synchronize()
    return now() - begun


def summarize(seconds: Sequence[float]) -> Timing:
    """Median and middle half of times."""
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
    """Time every function ``repeats`` times, in turns.

    Taking turns lets a change of clock speed or another process fall on all of them alike; every
    other round runs backwards, so that none always follows the same one.

    Args:
        fns: what to call, by name.
        repeats: timed rounds, at least 1.
        warmup: rounds before these that are not timed.
        progress: show a progress bar.
        clock: seconds; ``time.process_time`` on a CPU that others use too, with one thread. None:
            wall-clock time, by CUDA events where this process uses a GPU.
        label: of the progress bar.

    Returns:
        The seconds of each function in each round, by its name.

    Raises:
        ValueError: for fewer than one repeat or a negative warm-up.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"need repeats >= 1 and warmup >= 0, got {repeats} and {warmup}")
    seconds: dict[str, list[float]] = {name: [] for name in fns}
    names = list(fns)
    turns = range(-warmup, repeats)
    # None: no bar where the output is a file.
    hidden = None if progress else True
    for turn in tqdm(turns, desc=label, unit="round", leave=False, disable=hidden):
        for name in names if turn % 2 == 0 else reversed(names):
            elapsed = _elapsed(fns[name], clock)
            if turn >= 0:
                seconds[name].append(elapsed)
    return seconds


def interleaved(
    fns: Mapping[str, Callable[[], object]], repeats: int, *args: Any, **kwargs: Any
) -> dict[str, Timing]:
    """The same, summarized: the time of each function. Takes the arguments of `rounds`."""
    times = rounds(fns, repeats, *args, **kwargs)
    return {name: summarize(taken) for name, taken in times.items()}


def processor(device: str) -> str:
    """The name of the CPU, or of the GPU with ``"cuda"``: what numbers were taken on."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
