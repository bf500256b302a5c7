"""timm's ``VisionTransformer``: tokens (B, prefix + H * W, C), global attention in every block.

Covers plain ViTs, DINOv2 (registers, LayerScale), CLIP and AugReg encoders. timm's blocks take an
additive ``attn_mask``, so nothing of theirs is replaced.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import MasksAsChannels, key_bias
from ..tokens import Layout, Tokens
from ..tracing import shape_of
from .map_size import MapSizes, Size
from .spec import BlockCosts, TransformerSpec, block_costs, is_class, mean_keys, mean_of_heads
from .versions import unfit

FAMILY = "timm's VisionTransformer"


def matches(module: nn.Module) -> bool:
    return is_class(module, "VisionTransformer", "timm.models.vision_transformer")


def adapt(vit: nn.Module) -> TransformerSpec:
    return spec_of(vit, PrefixLayout)


def spec_of(vit: nn.Module, layout: Callable[..., PrefixLayout]) -> TransformerSpec:
    """`TransformerSpec` of a timm transformer; ``layout`` takes ``prefix``, ``size_aware`` and
    ``sizes``.
    """

    sizes = MapSizes()
    # By index: an expedited container may refuse to be looped over.
    blocks = [vit.blocks[index] for index in range(len(vit.blocks))]

    def build(size_aware: bool) -> PrefixLayout:
        if size_aware and not all(
            "attn_mask" in inspect.signature(block.forward).parameters for block in vit.blocks
        ):
            raise unfit(type(vit.blocks[0]).__name__, "timm")
        return layout(prefix=vit.num_prefix_tokens, size_aware=size_aware, sizes=sizes)

    return TransformerSpec(
        owner=vit,
        attribute="blocks",
        layout=build,
        costs=_costs,
        # Known if `expedit_d2.backbones.timm_vit` runs the model; otherwise it may read any.
        outputs=getattr(vit, "expedit_outputs", None),
        attach=lambda model: sizes.attach(model, vit),
        packages=("timm",),
        unstructured=True,
        inside=all(hasattr(block, part) for block in blocks for part in _PARTS),
        size=tuple(vit.patch_embed.grid_size or (32, 32)),
    )


#: `PrefixLayout.run_reducing` needs blocks that are timm's ``Block``.
_PARTS = ("ls1", "ls2", "drop_path1", "drop_path2")


def _costs(block: nn.Module) -> BlockCosts:
    return block_costs(block, block.attn, block.attn.proj.in_features)


@dataclass(frozen=True)
class PrefixLayout(Layout):
    """Class and register tokens, then the map's: (B, prefix + H * W, C).

    Attributes:
        prefix: number of class and register tokens.
        size_aware: attention counts a cluster once for each of its tokens.
        sizes: knows the size of this run's map.
        size: that size, (H, W); None before the run, or if it is not known.
    """

    prefix: int
    size_aware: bool
    sizes: MapSizes
    size: Size | None = None

    def begin(
        self, x: Tensor, block: nn.Module, size: Size | None, *args: Any, **kwargs: Any
    ) -> PrefixLayout:
        return replace(self, size=size or self.sizes.of(x, self.prefix))

    def split(self, x: Tensor, tokens: Tokens | None = None) -> Tokens:
        features = x[:, self.prefix :]
        if tokens is not None:
            return replace(tokens, features=features.unflatten(1, tokens.shape))
        size, count = self.size, shape_of(features)[1]
        if size is None:
            raise self.sizes.unknown(count)
        if count != size[0] * size[1]:
            raise ValueError(
                f"expected a map of {size[0]} x {size[1]} tokens, got {count}; "
                "dropping patches and adding tokens are not supported"
            )
        return Tokens(
            features.unflatten(1, size), size=size, span=size, tracked=self.reads_positions
        )

    @property
    def reads_positions(self) -> bool:
        """Whether blocks need to know where tokens are."""
        return False

    def join(self, x: Tensor, features: Tensor) -> Tensor:
        return torch.cat([x[:, : self.prefix], features.flatten(1, -2)], dim=1)

    def prepare(self, x: Tensor, tokens: Tokens) -> Tensor | None:
        """The additive mask (B, 1, 1, N) of cluster sizes, in the type of ``x``."""
        if not self.size_aware or tokens.sizes is None:
            return None
        sizes = tokens.sizes
        # An unstructured token has a size of at least one.
        bias = sizes.log() if sizes.dim() == 2 else key_bias(sizes).flatten(1)
        # Class and register tokens count one each: their logarithm is zero.
        bias = F.pad(bias, (self.prefix, 0))
        return bias[:, None, None].to(x.dtype)

    def keys(self, block: nn.Module, features: Tensor) -> Tensor:
        """Its keys, averaged over the heads: linear in the tokens, so one small product."""
        attention, normed = block.attn, block.norm1(features)
        if getattr(attention, "qkv", None) is not None:
            return mean_keys(attention.qkv, attention.num_heads, normed)
        keys = attention.k_proj
        return mean_of_heads(keys.weight, keys.bias, attention.num_heads, normed)

    def run(self, block: nn.Module, x: Tensor, tokens: Tokens, **kwargs: Any) -> Tensor:
        with self._masks(x):
            return block(x, **self._weighed(tokens, kwargs))

    def run_reducing(
        self, block: nn.Module, x: Tensor, tokens: Tokens, reduce: nn.Module, **kwargs: Any
    ) -> tuple[Tensor, Tokens, Any]:
        with self._masks(x):
            attended = block.attn(block.norm1(x), **self._weighed(tokens, kwargs))
        attended = x + block.drop_path1(block.ls1(attended))
        before = tokens.features.flatten(1, -2)
        # The keys are those of this attention, whatever came out of it.
        tokens, record = reduce(self.split(attended, tokens), lambda _: self.keys(block, before))
        x = self.join(attended, tokens.features)
        tokens = replace(tokens, context=self.prepare(x, tokens))
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))), tokens, record

    def _weighed(self, tokens: Tokens, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a block, with the sizes of the tokens."""
        if kwargs.get("attn_mask") is not None or kwargs.get("is_causal"):
            raise ValueError("a model with Expedit takes no attn_mask: it is for all tokens")
        if tokens.context is None:
            return kwargs
        return {**kwargs, "attn_mask": tokens.context}

    @staticmethod
    def _masks(x: Tensor) -> AbstractContextManager:
        """On a GPU, flash attention takes no mask."""
        return MasksAsChannels() if x.is_cuda else nullcontext()
