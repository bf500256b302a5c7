"""What passes between the hook, the methods and the adapters; the contract of the latter.

Shorthand: B images; a map of H x W tokens; after a reduction h x w clusters on a grid, or M
clusters that lie on none; C channels. ``*shape`` is (h, w) on a grid and (M,) off it.
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
    """Spatial tokens on their way through the blocks; class and register tokens are not in it.

    Attributes:
        features: (B, *shape, C); None where the model's own form of them is at hand.
        size: (H, W) of the original map.
        span: what the grid spreads over, in tokens of that map: its size, or more where windows
            are padded.
        sizes: (B, *shape) fp32, how many original tokens each one stands for; None: one each.
        positions: (B, *shape, 2) fp32, mean row and column in the original map; None: where the
            grid has them, or unknown.
        tracked: whether the blocks read positions of tokens off the grid.
        valid: (B, *shape) bool, False for grid places that only hold padding; None: all valid.
        places: (B, M) of tokens off the grid, the place in the original map, counted row by row,
            of one of the tokens that each one stands for; None where nobody asks.
        shape: (h, w) on a grid, (M,) off it; that of the features where there are any.
        context: what the layout makes of all this, once a reduction; see `Layout.prepare`.
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
    """How one family of transformers looks to the hook. One small class a family.

    Below, ``x`` is what the model passes from block to block: the spatial tokens, in the family's
    form, and class and register tokens if it has them.
    """

    #: Whether the model reads its blocks' outputs by forward hooks. Blocks from the first alpha on
    #: are then called as a whole with whole maps, hooks and all, and ``run`` must call
    #: ``block.forward``.
    watched = False

    def begin(
        self, x: Tensor, block: nn.Module, size: tuple[int, int] | None, *args: Any, **kwargs: Any
    ) -> Layout:
        """The layout for one run through the blocks, which begins now.

        Args:
            x: what the first block is given.
            block: that block, with the attributes that the model has set for this run.
            size: (H, W) of the map, if whoever runs the blocks has said it.
            *args, **kwargs: what else the model gives that block.
        """
        return self

    def reads_outputs(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether a model that gives its blocks these keyword arguments reads the output of each,
        beside those that `TransformerSpec.outputs` names."""
        return False

    def returned(self, x: Tensor) -> Any:
        """What a block returns: ``x``, or a tuple that begins with it."""
        return x

    @abstractmethod
    def split(self, x: Tensor, tokens: Tokens | None = None) -> Tokens:
        """The spatial tokens of ``x``: of a whole map, or reduced ones as ``tokens`` are."""

    @abstractmethod
    def join(self, x: Tensor, features: Tensor) -> Tensor:
        """``x`` with other spatial tokens, features (B, *shape, C)."""

    @abstractmethod
    def keys(self, block: nn.Module, features: Tensor) -> Tensor:
        """What a block compares the tokens it is given by: features (B, N, C) to (B, N, d)."""

    @abstractmethod
    def run(self, block: nn.Module, x: Tensor, tokens: Tokens, *args: Any, **kwargs: Any) -> Tensor:
        """Run a block on reduced tokens; further arguments are those the model passed to it."""

    def prepare(self, x: Tensor, tokens: Tokens) -> Any:
        """The context of reduced tokens: what every later block needs, made once."""
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
        """`run`, reducing the tokens between attention and MLP; their record comes third.

        Needed where `TransformerSpec.inside` is True.
        """
        raise NotImplementedError
