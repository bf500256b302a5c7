"""Where families of transformers are registered, those of other packages too."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, Protocol

from torch import nn

from .host import Host

__all__ = ["ADAPTER_REGISTRY", "Adapter"]


class Adapter(Protocol):
    """One family of transformers: a module, or a class with static methods."""

    #: What messages call it.
    FAMILY: str

    @staticmethod
    def matches(module: nn.Module) -> bool:
        """Whether a part of a model is a transformer of this family; see `is_class`."""

    @staticmethod
    def adapt(module: nn.Module) -> Host:
        """What the hook needs to know of it.

        Raises:
            ValueError: if it is one that this adapter does not support.
        """


class _AdapterRegistry:
    """As fvcore's `Registry`, which the operators must not need; checks what is registered."""

    def __init__(self) -> None:
        self._adapters: dict[str, Adapter] = {}

    def __iter__(self) -> Iterator[tuple[str, Adapter]]:
        return iter(self._adapters.items())

    def __contains__(self, name: str) -> bool:
        return name in self._adapters

    def register(self, adapter: Any = None) -> Any:
        """Register an adapter by its name; without one, a decorator that does so.

        Raises:
            TypeError: if it lacks something of the protocol.
            KeyError: if there is one of this name.
        """
        if adapter is None:
            return self.register
        self._register(adapter.__name__, adapter)
        return adapter

    def _register(self, name: str, obj: Any) -> None:
        missing = _missing(obj)
        if missing:
            raise TypeError(
                f"adapter {name} needs {missing}: FAMILY is a name, and matches(module) and "
                "adapt(module) are functions of a module, or static methods of a class"
            )
        if name in self._adapters:
            raise KeyError(f"an adapter {name} is registered already")
        self._adapters[name] = obj


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
ADAPTER_REGISTRY = _AdapterRegistry()
