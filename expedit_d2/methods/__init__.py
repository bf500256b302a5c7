"""Ways to reduce tokens and to rebuild the map: one file each, all with the same interface."""

from __future__ import annotations

from torch import nn

from ..settings import Settings
from .density import Density
from .expedit import Expedit
from .hard import Hard
from .merge import Merge
from .pool import Pool
from .tome import ToMe

__all__ = ["METHODS", "build_method"]

#: Name in ``METHOD`` -> class, built from what `build_method` takes.
METHODS = {
    "expedit": Expedit,
    "merge": Merge,
    "tome": ToMe,
    "density": Density,
    "pool": Pool,
    "hard": Hard,
}


def build_method(settings: Settings, attention_window: int | None, index: int = 0) -> nn.Module:
    """The method that ``settings.method`` names.

    Args:
        settings: checked settings.
        attention_window: side, in tokens, of the model's attention windows; None without windows.
        index: which of the settings' alphas, from the first, it reduces at.

    Raises:
        ValueError: for settings that do not fit the windows.
    """
    return METHODS[settings.method](settings, attention_window, index)
