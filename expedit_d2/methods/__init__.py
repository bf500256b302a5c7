"""Ways to reduce tokens and to rebuild the map: one file each, all with the same interface."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from . import density, expedit, hard, merge, pool, tome  # noqa: F401  they register themselves
from .base import METHOD_REGISTRY, Method
from .grid import GridMethod
from .unstructured import UnstructuredMethod

if TYPE_CHECKING:
    from ..settings import Settings

__all__ = [
    "METHODS",
    "METHOD_REGISTRY",
    "GridMethod",
    "Method",
    "UnstructuredMethod",
    "build_method",
    "default_method",
]

#: Name in ``METHOD`` -> class.
METHODS = METHOD_REGISTRY


def default_method(unstructured: bool) -> str:
    """The method for METHOD None, unstructured or on a grid."""
    return "merge" if unstructured else "expedit"


def build_method(settings: Settings, attention_window: int | None, index: int = 0) -> Method:
    """The method that ``settings.method`` names; arguments and errors are those of `Method`.

    Raises:
        TypeError: if it lacks one of its two modules.
    """
    method = METHODS[settings.method](settings, attention_window, index)
    for part in ("reduce", "rebuild"):
        if not isinstance(getattr(method, part, None), nn.Module):
            raise TypeError(f"METHOD {settings.method} has no module {part!r}")
    return method
