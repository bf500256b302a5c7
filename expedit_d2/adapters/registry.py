"""Where families of transformers are registered, those of other packages too."""

from __future__ import annotations

import inspect
from typing import Any, Protocol

from torch import nn

from ..registry import Registry
from .spec import TransformerSpec

__all__ = ["ADAPTER_REGISTRY", "Adapter"]


class Adapter(Protocol):
    """One family of transformers: a module, or a class with static methods."""

    #: Its name in messages.
    FAMILY: str

    @staticmethod
    def matches(module: nn.Module) -> bool:
        """Whether a part of a model is a transformer of this family; see `is_class`."""

    @staticmethod
    def adapt(module: nn.Module) -> TransformerSpec:
        """What the hook has to know about it.

        Raises:
            ValueError: if it is one that this adapter does not support.
        """


def _check(name: str, adapter: Any) -> None:
    missing = _missing(adapter)
    if missing:
        raise TypeError(
            f"adapter {name} needs {missing}: FAMILY is a name, and matches(module) and "
            "adapt(module) are functions of a module, or static methods of a class"
        )


def _missing(adapter: Any) -> str:
    """The first thing that an adapter lacks; "" if it is complete."""
    if not isinstance(getattr(adapter, "FAMILY", None), str):
        return "FAMILY"
    for name in ("matches", "adapt"):
        function = getattr(adapter, name, None)
        try:
            inspect.signature(function).bind(nn.Identity())
        except TypeError:  # not callable, or not so
            return f"{name}(module)"
    return ""


#: Adapters by name. Where several match, the one that was registered last is taken::
#:
#:     @ADAPTER_REGISTRY.register()
#:     class MyViTAdapter:
#:         FAMILY = "my ViT"
#:         ...
ADAPTER_REGISTRY: Registry[Adapter] = Registry("adapter", "expedit_d2.adapters", _check)
