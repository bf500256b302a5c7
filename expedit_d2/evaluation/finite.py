"""Detect NaN and infinity, with which comparisons can give any result, even a perfect one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

__all__ = ["FiniteWatch", "all_finite", "watch_finite"]


def all_finite(value: Any) -> bool:
    """Whether all numbers in tensors, Detectron2's structures, lists and dicts are finite."""
    if isinstance(value, Tensor):
        if not value.is_floating_point() or value.numel() == 0:
            return True
        # NaN is the least and the greatest of all; one pass, and no tensor of the same size.
        return bool(torch.isfinite(torch.stack(value.aminmax())).all())
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, Instances):
        return all_finite(value.get_fields())
    if isinstance(value, (Boxes, ImageList)):
        return all_finite(value.tensor)
    if isinstance(value, Mapping):
        return all(map(all_finite, value.values()))
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return all(map(all_finite, value))
    return True


class FiniteWatch:
    """Records whether all values since the last `take` were finite."""

    def __init__(self) -> None:
        self._finite = True

    def see(self, value: Any) -> None:
        self._finite = self._finite and all_finite(value)

    def take(self) -> bool:
        """Whether all values were finite; resets the record."""
        finite, self._finite = self._finite, True
        return finite


@contextmanager
def watch_finite(model: nn.Module) -> Iterator[FiniteWatch]:
    """Watch the outputs of a model, its parts (backbone, heads) and their parts.

    The output alone is not enough, as detectors drop boxes that are not finite, and panoptic maps
    become empty.
    """
    watch = FiniteWatch()
    parts = [part for name, part in model.named_modules() if name.count(".") <= 1]
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(part.register_forward_hook(lambda *args: watch.see(args[-1])))
        yield watch
