"""`TransformerSpec`: what the hook has to know about a transformer."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ..settings import SCOPES
from ..tokens import Layout

__all__ = [
    "BlockCosts",
    "GridRule",
    "MERGES",
    "TransformerSpec",
    "WINDOWED_MERGES",
    "block_costs",
    "is_class",
    "linear_weights",
    "mean_keys",
    "mean_of_heads",
]


@dataclass(frozen=True)
class GridRule:
    """Where BUDGET clusters a family's tokens: late, as long as many clusters remain. Measured.

    Attributes:
        latest: the latest alpha worth using, as a share of the blocks.
        least_latest: the share of the tokens along a side that must remain at that alpha; with
            fewer, an earlier alpha is better.
        least_earlier: the same for every earlier alpha.
    """

    latest: float = 0.5
    least_latest: float = 0.5
    least_earlier: float = 0.6


#: How often METHOD merge merges with BUDGET. Spread evenly over the depth, outputs agree in 0.1 to
#: 9 % more of the pixels than early (semantic, panoptic and depth heads).
MERGES = 4
#: The same with windowed attention. Two more merges keep 1.4 % more of a detector's AP.
WINDOWED_MERGES = 6


class BlockCosts(NamedTuple):
    """What a block costs, in multiply-adds.

    Attributes:
        linear: all its products with weights, per token.
        attention: the linear layers of the attention alone, per token.
        channels: width of the attention.
        window: side of its attention windows in tokens; 0 if it is global.
        position_heads: heads that add decomposed relative positions to their logits; 0: none, or a
            table of all pairs, which costs no product.
    """

    linear: int
    attention: int
    channels: int
    window: int = 0
    position_heads: int = 0


def linear_weights(module: nn.Module) -> int:
    """Weights of the linear layers in a module."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def block_costs(
    block: nn.Module, attention: nn.Module, channels: int, window: int = 0, position_heads: int = 0
) -> BlockCosts:
    """Costs of a block whose only weights in products are those of linear layers.

    Args:
        attention: the part of the block that holds the linear layers of its attention.
        channels, window, position_heads: see `BlockCosts`.
    """
    linear = linear_weights(block)
    return BlockCosts(linear, linear_weights(attention), channels, window, position_heads)


@dataclass(frozen=True)
class TransformerSpec:
    """A transformer with a container of blocks that can be replaced.

    Attributes:
        owner: the module that loops over its blocks.
        attribute: name of the container in it.
        layout: builds the family's layout, given ``size_aware``.
        costs: the costs of a block, for BUDGET; see `block_costs`.
        window: side of the attention windows in tokens; None if attention is global everywhere.
        outputs: indices of the blocks whose outputs the model reads; None if it may read any.
        end: blocks from this index on also run on tokens that are not part of the map, and are left
            as they are; None if there are no such blocks.
        attach: registers what the layout needs on the whole model, which contains ``owner``;
            returns the function that undoes it.
        scopes: valid values of ``SCOPE``.
        unstructured: whether the blocks can run on tokens that do not lie on a grid.
        inside: whether the blocks can be taken apart, for methods that reduce inside a block.
        size: (H, W) in tokens of the map that the model was made for; costs are computed there.
        grid_rule: for BUDGET, where methods that leave a grid reduce.
        merges: how often METHOD merge merges with BUDGET.
        fused: computes the output of an attention layer (``block.attn``) from the layer and its
            arguments, by scaled dot-product attention; None where the layers do so themselves.
        taken_apart: the modules of a block, itself included, that the layout does not call but runs
            the parts of; by default none. Blocks with other code there are refused.
        packages: top-level packages that define the code of these, and of the blocks; (): of any.
        stages: where the blocks lie in several containers, one spec each, in order; tokens
            are then reduced in one of them. ``attribute`` names the container of these stages.
        transformer: the whole transformer, where ``owner`` is a part of it; see ``whole``.
    """

    owner: nn.Module
    attribute: str
    layout: Callable[[bool], Layout]
    costs: Callable[[nn.Module], BlockCosts]
    window: int | None = None
    outputs: tuple[int, ...] | None = None
    end: int | None = None
    attach: Callable[[nn.Module], Callable[[], None]] = field(default=lambda model: lambda: None)
    scopes: tuple[str, ...] = SCOPES
    unstructured: bool = False
    inside: bool = False
    size: tuple[int, int] = (64, 64)
    grid_rule: GridRule = GridRule()
    merges: int = MERGES
    fused: Callable[..., Tensor] | None = None
    taken_apart: Callable[[nn.Module], tuple[nn.Module, ...]] = field(default=lambda block: ())
    packages: tuple[str, ...] = ()
    stages: tuple[TransformerSpec, ...] = ()
    transformer: nn.Module | None = None

    @property
    def whole(self) -> nn.Module:
        """The whole transformer."""
        return self.owner if self.transformer is None else self.transformer

    @property
    def blocks(self) -> nn.Module:
        return getattr(self.owner, self.attribute)

    @property
    def longest_stage(self) -> tuple[TransformerSpec, int]:
        """The stage with the most blocks, and the number of blocks before its first."""
        stages = self.stages or (self,)
        index = max(range(len(stages)), key=lambda i: len(stages[i].blocks))
        return stages[index], sum(len(stage.blocks) for stage in stages[:index])

    def stage_of(self, alphas: Collection[int]) -> tuple[TransformerSpec, int]:
        """The stage that the alphas lie in, and the number of blocks before its first.

        Raises:
            ValueError: if an alpha is outside 0 to the number of blocks - 1 (or `end` - 1), or they
                do not lie in one stage.
        """
        stages = self.stages or (self,)
        ends = list(accumulate(len(stage.blocks) for stage in stages))
        depth, end = ends[-1], ends[-1] if self.end is None else self.end
        for alpha in alphas:
            if not 0 <= alpha < end:
                rest = ", whose others are not for the map alone" if end < depth else ""
                raise ValueError(
                    f"ALPHA must be in 0 to {end - 1} (blocks run before clustering, of "
                    f"{depth}{rest}), got {alpha}"
                )
        index = bisect_right(ends, min(alphas))
        first = ends[index] - len(stages[index].blocks)
        if max(alphas) >= ends[index]:
            raise ValueError(
                f"ALPHA must stay inside one stage, here {first} to {ends[index] - 1}, got "
                f"{tuple(alphas)}"
            )
        return stages[index], first


def is_class(module: nn.Module, name: str, defined_in: str) -> bool:
    """Whether a module is an instance of a class, or of a subclass, without importing it."""
    return _derives(type(module), name, defined_in)


# Every adapter asks it of every module of a model.
@lru_cache(maxsize=4096)
def _derives(kind: type, name: str, defined_in: str) -> bool:
    return any(cls.__name__ == name and cls.__module__ == defined_in for cls in kind.__mro__)


def mean_keys(qkv: nn.Linear, heads: int, x: Tensor) -> Tensor:
    """`mean_of_heads` for the keys of a layer whose rows are queries, keys and values.

    Raises:
        ValueError: for something else than a linear layer, such as one with LoRA.
    """
    if not (hasattr(qkv, "weight") and hasattr(qkv, "bias")):
        raise ValueError(
            f"keys cannot be taken from a {type(qkv).__name__}, which has no weight and bias: "
            "merge what it adds into the linear layer, or use METHOD expedit"
        )
    bias = None if qkv.bias is None else qkv.bias.chunk(3)[1]
    return mean_of_heads(qkv.weight.chunk(3)[1], bias, heads, x)


def mean_of_heads(weight: Tensor, bias: Tensor | None, heads: int, x: Tensor) -> Tensor:
    """A linear layer's outputs, averaged over its heads: linear in x, so one small product.

    Args:
        weight, bias: parameters of the layer, head by head.
        heads: number of heads.
        x: (..., C) the input of the layer.

    Returns:
        (..., D).
    """
    bias = None if bias is None else bias.unflatten(0, (heads, -1)).mean(0)
    return F.linear(x, weight.unflatten(0, (heads, -1)).mean(0), bias)
