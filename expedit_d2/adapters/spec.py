"""What an adapter tells the hook about a model."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ..settings import SCOPES
from ..tokens import Layout

__all__ = [
    "BlockCosts",
    "GridRule",
    "TransformerSpec",
    "MergeRule",
    "block_costs",
    "is_class",
    "linear_weights",
    "mean_keys",
    "mean_of_heads",
]


@dataclass(frozen=True)
class GridRule:
    """For BUDGET, where a family's tokens become a grid: late, while clusters stay many. Measured.

    Attributes:
        latest: the latest alpha worth taking, as a share of the blocks.
        least_latest: clusters along a side at that alpha, as a share of the tokens, below which an
            earlier alpha is better.
        least_earlier: the same at every earlier alpha.
    """

    latest: float = 0.5
    least_latest: float = 0.5
    least_earlier: float = 0.6


@dataclass(frozen=True)
class MergeRule:
    """For BUDGET, where METHOD merge merges a family's tokens. Measured.

    Attributes:
        alphas: as shares of the depth.
        schedule: see `Settings.schedule`.
    """

    alphas: tuple[float, ...] = (0, 1 / 6, 1 / 3, 7 / 12)
    schedule: str = "falling"

    @classmethod
    def windowed(cls) -> MergeRule:
        """Where attention has windows: on DINOv2-S with windows of 12 at half of the GFLOPs 0.6 %
        more of the pixels agree than by the rule for global attention."""
        return cls((0, 1 / 6, 5 / 12, 2 / 3), "equal")


class BlockCosts(NamedTuple):
    """What a block costs, in multiply-adds.

    Attributes:
        linear: of all its products with weights, for each token.
        attention: of those before and after the attention's own products, for each token.
        channels: width of the attention.
        window: side of its attention windows in tokens; 0 if it is global.
        position_heads: heads that add decomposed relative positions to their logits; 0: none do,
            or by a table of all pairs, which costs no product.
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
    """Costs of a block all of whose products with weights are linear layers.

    Args:
        attention: the part of the block that holds those of its attention.
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
        layout: builds the family's layout; its argument is ``size_aware``.
        costs: what a block costs, for BUDGET; see `block_costs`.
        window: side of the attention windows in tokens; None if attention is global everywhere.
        outputs: indices of the blocks whose outputs the model reads; None if it may read any.
        end: blocks from this one on are not for the map's tokens alone and run on all of them; None
            if there are none such.
        attach: registers what the layout needs, if anything, on the whole model that it is given,
            which contains ``owner``; returns the undo.
        scopes: what ``SCOPE`` may be.
        unstructured: whether the blocks run on tokens that lie on no grid.
        inside: whether they can be taken apart, for methods that reduce inside of a block.
        size: (H, W) tokens of the map that the model was made for, where costs are reckoned.
        grid_rule: for BUDGET, where methods that leave a grid reduce.
        merge_rule: for BUDGET, where METHOD merge does.
        fused: an attention layer, ``block.attn``, and its arguments to its output, by scaled
            dot-product attention; None where the family's own layers do so.
        stages: where the blocks lie in several containers, one spec each, in order; tokens
            are then reduced in one of them. ``attribute`` names what holds these stages.
        transformer: all of it, where ``owner`` is a part; see ``whole``.
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
    merge_rule: MergeRule = MergeRule()
    fused: Callable[..., Tensor] | None = None
    stages: tuple[TransformerSpec, ...] = ()
    transformer: nn.Module | None = None

    @property
    def whole(self) -> nn.Module:
        """All of the transformer."""
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
            ValueError: if the alphas do not lie in one of the stages.
        """
        if not self.stages:
            return self, 0
        first = 0
        for stage in self.stages:
            end = first + len(stage.blocks)
            if first <= min(alphas) < end:
                if max(alphas) >= end:
                    raise ValueError(
                        f"ALPHA must stay inside one stage, here {first} to {end - 1}, got "
                        f"{tuple(alphas)}"
                    )
                return stage, first
            first = end
        raise ValueError(
            f"ALPHA must be in 0 to {first - 1} (blocks run before clustering, of {first}), got "
            f"{min(alphas)}"
        )


def is_class(module: nn.Module, name: str, defined_in: str) -> bool:
    """Whether a module is an instance of a class, or of a subclass, without importing it."""
    return any(
        cls.__name__ == name and cls.__module__ == defined_in for cls in type(module).__mro__
    )


def mean_keys(qkv: nn.Linear, heads: int, x: Tensor) -> Tensor:
    """`mean_of_heads` for the keys of a layer whose rows are queries, keys and values."""
    bias = None if qkv.bias is None else qkv.bias.chunk(3)[1]
    return mean_of_heads(qkv.weight.chunk(3)[1], bias, heads, x)


def mean_of_heads(weight: Tensor, bias: Tensor | None, heads: int, x: Tensor) -> Tensor:
    """A linear layer's outputs, averaged over its heads: linear in x, so one small product.

    Args:
        weight, bias: of the layer, head by head.
        heads: number of heads.
        x: (..., C) what the layer is given.

    Returns:
        (..., D).
    """
    bias = None if bias is None else bias.unflatten(0, (heads, -1)).mean(0)
    return F.linear(x, weight.unflatten(0, (heads, -1)).mean(0), bias)
