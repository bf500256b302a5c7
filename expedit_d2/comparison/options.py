"""Measurement options of a comparison."""

from __future__ import annotations

from dataclasses import dataclass

from ..analysis.timing import DTYPES

__all__ = ["Options"]


@dataclass(frozen=True)
class Options:
    """Measurement options.

    Attributes:
        dtype: of autocast; "float32" disables it.
        timed_images: images to time at batch 1, after one warm-up; 0: no speed and no memory.
        batch: batch size for the throughput; 1: not measured.
        progress: show progress bars.
        time_together: time all settings in turns with each other, before anything else. The plain
            model then runs once a round and not once for each setting; but an interruption loses
            what was timed.

    Raises:
        ValueError: for values out of range.
    """

    dtype: str = "float32"
    timed_images: int = 20
    batch: int = 4
    progress: bool = True
    time_together: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {DTYPES}, got {self.dtype!r}")
        for name, least in (("timed_images", 0), ("batch", 1)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name} must be {least} or more, got {value}")
