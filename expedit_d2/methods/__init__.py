"""Ways to reduce tokens and to rebuild the map: one file each, all with the same interface."""

from __future__ import annotations

from torch import nn

from ..settings import METHOD_REGISTRY, Settings
from . import density, expedit, hard, merge, pool, tome  # noqa: F401  they register themselves
from .base import Method
from .grid import GridMethod
from .unstructured import UnstructuredMethod

__all__ = [
    "METHOD_REGISTRY",
    "GridMethod",
    "Method",
    "UnstructuredMethod",
    "build_method",
]


def build_method(settings: Settings, attention_window: int | None, index: int = 0) -> Method:
    """The method that ``settings.method`` names; arguments and errors are those of `Method`.

    Raises:
        TypeError: if it lacks one of its two modules.
    """
    method = METHOD_REGISTRY[settings.method](settings, attention_window, index)
    for part in ("reduce", "rebuild"):
        if not isinstance(getattr(method, part, None), nn.Module):
            raise TypeError(f"METHOD {settings.method} has no module {part!r}")
    return method
