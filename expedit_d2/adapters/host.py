"""What an adapter tells the hook about a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from ..tokens import Layout

__all__ = ["Host", "is_class"]


@dataclass(frozen=True)
class Host:
    """A transformer with a container of blocks that can be replaced.

    Attributes:
        owner: the module that loops over its blocks.
        attribute: name of the container in it.
        layout: builds the family's layout; its argument is ``size_aware``.
        window: side of the attention windows in tokens; None if attention is global everywhere.
        outputs: indices of the blocks whose outputs the model reads; None if it may read any.
        attach: registers what the layout needs on the model, if anything; returns the undo.
    """

    owner: nn.Module
    attribute: str
    layout: Callable[[bool], Layout]
    window: int | None = None
    outputs: tuple[int, ...] | None = None
    attach: Callable[[], Callable[[], None]] = field(default=lambda: lambda: None)

    @property
    def blocks(self) -> nn.Module:
        return getattr(self.owner, self.attribute)


def is_class(module: nn.Module, name: str, defined_in: str) -> bool:
    """Whether a module is an instance of a class, or of a subclass, without importing it."""
    return any(
        cls.__name__ == name and cls.__module__ == defined_in for cls in type(module).__mro__
    )
