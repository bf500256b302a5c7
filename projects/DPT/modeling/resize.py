"""The size of the network's input."""

from __future__ import annotations

import math

__all__ = ["SIZE_METHODS", "network_size"]

SIZE_METHODS = ("minimal", "lower_bound", "upper_bound")


def network_size(
    size: tuple[int, int], target: tuple[int, int] | None, multiple: int, method: str
) -> tuple[int, int]:
    """Scale the size of an image to a target, keeping the aspect ratio, and round to a multiple.

    Args:
        size: (H, W) of the image.
        target: (H, W); None keeps the image's size.
        multiple: of both sides, in pixels.
        method: which side meets the target if the aspect ratios differ: "lower_bound", the one that
            leaves the other larger (Depth Anything), "upper_bound", smaller, or "minimal", the one
            that changes least (DPT).

    Returns:
        (H, W), each at least one multiple.
    """
    target = size if target is None else target
    scales = [to / of for to, of in zip(target, size, strict=True)]
    pick = {
        "lower_bound": max,
        "upper_bound": min,
        "minimal": lambda s: s[1] if abs(1 - s[1]) < abs(1 - s[0]) else s[0],
    }
    scale = pick[method](scales)

    def fit(side: int, bound: int) -> int:
        steps = side * scale / multiple
        count = round(steps)
        if method == "lower_bound" and count * multiple < bound:
            count = math.ceil(steps)
        if method == "upper_bound" and count * multiple > bound:
            count = math.floor(steps)
        return max(count, 1) * multiple

    return fit(size[0], target[0]), fit(size[1], target[1])
