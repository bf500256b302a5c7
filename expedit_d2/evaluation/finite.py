"""Whether numbers are finite: NaN and infinity compare as anything, also as perfect."""

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
    """Whether no number in tensors, Detectron2's structures, lists and dicts is NaN or infinite."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
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
    """Remembers whether everything that it has seen since it was asked last was finite."""

    def __init__(self) -> None:
        self._finite = True

    def see(self, value: Any) -> None:
        self._finite = self._finite and all_finite(value)

    def take(self) -> bool:
        """Whether it was; then starts again."""
        finite, self._finite = self._finite, True
        return finite


@contextmanager
def watch_finite(model: nn.Module) -> Iterator[FiniteWatch]:
    """Watch the outputs of a model, its parts (backbone, heads) and the parts of these.

    The output alone does not tell: detectors drop boxes that are not finite, and a panoptic map of
    them is empty, as if there were nothing to find.
    """
    watch = FiniteWatch()
    parts = [part for name, part in model.named_modules() if name.count(".") <= 1]
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(part.register_forward_hook(lambda *args: watch.see(args[-1])))
        yield watch
