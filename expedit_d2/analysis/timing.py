"""Wall-clock time of things that are to be compared, taken in one interleaved run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from tqdm import tqdm

__all__ = ["Timing", "interleaved"]


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


def _synchronize() -> None:
    """Wait for the GPU, if this process uses one: its work is only queued by a call."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _summary(seconds: list[float]) -> Timing:
    if len(seconds) == 1:
        return Timing(seconds[0], seconds[0], seconds[0])
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(median, low, high)


def interleaved(
    fns: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int = 1,
    progress: bool = False,
) -> dict[str, Timing]:
    """Time every function ``repeats`` times, in turns.

    Taking turns lets a change of clock speed or another process fall on all of them alike; every
    other round runs backwards, so that none always follows the same one.

    Args:
        fns: what to call, by name.
        repeats: timed rounds, at least 1.
        warmup: rounds before these that are not timed.
        progress: show a progress bar.

    Returns:
        The time of each function, by its name, in seconds.

    Raises:
        ValueError: for fewer than one repeat or a negative warm-up.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"need repeats >= 1 and warmup >= 0, got {repeats} and {warmup}")
    seconds: dict[str, list[float]] = {name: [] for name in fns}
    names = list(fns)
    turns = range(-warmup, repeats)
    for turn in tqdm(turns, desc="timing in turns", unit="round", disable=not progress):
        for name in names if turn % 2 == 0 else reversed(names):
            _synchronize()
            start = time.perf_counter()
            fns[name]()
            _synchronize()
            elapsed = time.perf_counter() - start
            if turn >= 0:
                seconds[name].append(elapsed)
    return {name: _summary(taken) for name, taken in seconds.items()}
