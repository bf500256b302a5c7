"""What the hook, the methods and the adapters exchange; the interface of an adapter's layout.

Shorthand: B images; a map of H x W tokens; after a reduction h x w clusters on a grid, or M
unstructured clusters; C channels. ``*shape`` is (h, w) on a grid and (M,) without one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .tracing import shape_of

__all__ = ["Keys", "Layout", "Tokens"]

#: Tokens (B, N, C) to what the next block compares them by, (B, N, d).
Keys = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Tokens:
    """Spatial tokens on their way through the blocks, without class and register tokens.

    Attributes:
        features: (B, *shape, C); None where the model's own form of them is used.
        size: (H, W) of the original map.
        span: the extent of the grid, in tokens of that map: its size, or more where windows are
            padded.
        sizes: (B, *shape) fp32, cluster sizes: how many original tokens each one stands for; None:
            one each.
        positions: (B, *shape, 2) fp32, mean row and column in the original map; None: those of
            the regular grid, or unknown.
        tracked: whether the blocks read positions of unstructured tokens.
        valid: (B, *shape) bool, False for grid places that only hold padding; None: all valid.
        places: (B, M) for unstructured tokens: the place in the original map, counted row by row,
            of one of the tokens that each one stands for; None where nothing needs it.
        shape: (h, w) on a grid, (M,) without one; that of the features, where there are any.
        context: what the layout computes from all this once per reduction; see `Layout.prepare`.
    """

    features: Tensor | None
    size: tuple[int, int]
    span: tuple[int, int]
    sizes: Tensor | None = None
    positions: Tensor | None = None
    tracked: bool = False
    valid: Tensor | None = None
    places: Tensor | None = None
    shape: tuple[int, ...] = ()
    context: Any = None

    def __post_init__(self) -> None:
        if self.features is not None:
            object.__setattr__(self, "shape", shape_of(self.features)[1:-1])


class Layout(ABC):
    """What one family of transformers looks like to the hook. One small class per family.

    Below, ``x`` is what the model passes from block to block: the spatial tokens, in the family's
    form, and any class and register tokens.
    """

    #: Whether the model reads its blocks' outputs by forward hooks. Blocks from the first alpha on
    #: are then called as a whole, with whole maps and including their hooks, and ``run`` must call
    #: ``block.forward``.
    watched = False

    def begin(
        self, x: Tensor, block: nn.Module, size: tuple[int, int] | None, *args: Any, **kwargs: Any
    ) -> Layout:
        """The layout for one run through the blocks, called when it begins.

        Args:
            x: what the first block is given.
            block: the first block, with the attributes that the model has set for this run.
            size: (H, W) of the map, if the caller has given it.
            *args, **kwargs: the other arguments that the model gives that block.
        """
        return self

    def reads_outputs(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether a model that gives its blocks these keyword arguments reads the output of every
        block, not only of those that `TransformerSpec.outputs` names."""
        return False

    def returned(self, x: Tensor) -> Any:
        """What a block returns: ``x``, or a tuple that begins with it."""
        return x

    @abstractmethod
    def split(self, x: Tensor, tokens: Tokens | None = None) -> Tokens:
        """The spatial tokens of ``x``: of a whole map, or reduced like ``tokens``."""

    @abstractmethod
    def join(self, x: Tensor, features: Tensor) -> Tensor:
        """``x`` with other spatial tokens, features (B, *shape, C)."""

    @abstractmethod
    def keys(self, block: nn.Module, features: Tensor) -> Tensor:
        """What the tokens given to a block are compared by: features (B, N, C) to (B, N, d)."""

    @abstractmethod
    def run(self, block: nn.Module, x: Tensor, tokens: Tokens, *args: Any, **kwargs: Any) -> Tensor:
        """Run a block on reduced tokens; further arguments are those the model passed to it."""

    def prepare(self, x: Tensor, tokens: Tokens) -> Any:
        """The context of reduced tokens: what every later block needs, computed once."""
        return None

    def run_reducing(
        self,
        block: nn.Module,
        x: Tensor,
        tokens: Tokens,
        reduce: nn.Module,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tokens, Any]:
        """`run`, but reducing the tokens between attention and MLP; the record is returned third.

        Needed where `TransformerSpec.inside` is True.
        """
        raise NotImplementedError
