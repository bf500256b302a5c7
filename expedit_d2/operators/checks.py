"""Range checks of the settings of the two operators."""

from __future__ import annotations

import math

__all__ = ["AUTO", "NORMALIZATIONS", "check_grid", "check_temperature", "check_window"]

AUTO = "auto"
NORMALIZATIONS = ("l1", "l2")


def check_temperature(temperature: float | str) -> None:
    """Raise ValueError unless ``temperature`` is ``"auto"`` or a positive, finite number."""
    number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    if temperature != AUTO and not (number and 0 < temperature < math.inf):
        raise ValueError(
            f'temperature must be "auto" or a positive finite number, got {temperature!r}'
        )


def check_window(window: int, name: str = "window") -> None:
    """Raise ValueError unless ``window`` is a positive odd integer."""
    if not isinstance(window, int) or isinstance(window, bool) or window < 1 or window % 2 == 0:
        raise ValueError(f"{name} must be a positive odd integer, got {window!r}")


def check_grid(grid: tuple[int, int]) -> None:
    """Raise ValueError unless ``grid`` is two positive integers (h, w)."""
    ok = isinstance(grid, (tuple, list)) and len(grid) == 2
    if not ok or not all(type(side) is int and side >= 1 for side in grid):
        raise ValueError(f"grid must be two positive integers (h, w), got {grid!r}")
