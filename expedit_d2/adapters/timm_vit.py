"""timm's ``VisionTransformer``: tokens (B, prefix + H * W, C), global attention in every block.

Covers plain ViTs, DINOv2 (registers, LayerScale), CLIP and AugReg encoders. timm's blocks take an
additive ``attn_mask``, so nothing of theirs is replaced.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import key_bias
from ..operators import shape_of
from ..tokens import Tokens
from .host import Host, is_class
from .map_size import MapSizes, Size

FAMILY = "timm's VisionTransformer"


def matches(module: nn.Module) -> bool:
    return is_class(module, "VisionTransformer", "timm.models.vision_transformer")


def adapt(vit: nn.Module) -> Host:
    return host_of(vit, PrefixLayout)


def host_of(vit: nn.Module, layout: Callable[..., PrefixLayout]) -> Host:
    """The host of a timm transformer; ``layout`` takes ``prefix``, ``size_aware`` and
    ``sizes``.
    """

    sizes = MapSizes()

    def build(size_aware: bool) -> PrefixLayout:
        if size_aware and not all(
            "attn_mask" in inspect.signature(block.forward).parameters for block in vit.blocks
        ):
            raise ValueError(
                f"SIZE_AWARE needs blocks that take attn_mask, and {type(vit.blocks[0]).__name__} "
                "does not; set SIZE_AWARE False or update timm"
            )
        return layout(prefix=vit.num_prefix_tokens, size_aware=size_aware, sizes=sizes)

    return Host(
        owner=vit,
        attribute="blocks",
        layout=build,
        # Known to who drives the model (`expedit_d2.backbones.timm_vit`), else it may read any.
        outputs=getattr(vit, "expedit_outputs", None),
        attach=lambda model: sizes.attach(model, vit),
        off_grid=True,
        size=tuple(vit.patch_embed.grid_size or (32, 32)),
    )


@dataclass(frozen=True)
class PrefixLayout:
    """Class and register tokens, then the map's: (B, prefix + H * W, C).

    Attributes:
        prefix: number of class and register tokens.
        size_aware: clusters have as many votes as they stand for tokens.
        sizes: knows the size of this run's map.
        size: that size, (H, W); None before the run, or if it is not known.
    """

    prefix: int
    size_aware: bool
    sizes: MapSizes
    size: Size | None = None

    def begin(self, x: Tensor, block: nn.Module, size: Size | None) -> PrefixLayout:
        return replace(self, size=size or self.sizes.of(x, self.prefix))

    def split(self, x: Tensor) -> tuple[Tensor, Tokens]:
        size = self.size
        tokens = x[:, self.prefix :]
        if size is None:
            raise self.sizes.unknown(shape_of(tokens)[1])
        if tokens.shape[1] != size[0] * size[1]:
            raise ValueError(
                f"expected a map of {size[0]} x {size[1]} tokens, got {tokens.shape[1]}; "
                "dropping patches and adding tokens are not supported"
            )
        return x[:, : self.prefix], Tokens(tokens.unflatten(1, size), size=size, span=size)

    def join(self, prefix: Tensor, features: Tensor) -> Tensor:
        return torch.cat([prefix, features.flatten(1, -2)], dim=1)

    def keys(self, block: nn.Module, features: Tensor) -> Tensor:
        """Its keys, averaged over the heads: linear in the tokens, so one small product."""
        attention = block.attn
        if getattr(attention, "qkv", None) is not None:
            weight, bias = attention.qkv.weight, attention.qkv.bias
            rows = shape_of(weight)[0] // 3
            weight, bias = weight[rows : 2 * rows], None if bias is None else bias[rows : 2 * rows]
        else:
            weight, bias = attention.k_proj.weight, attention.k_proj.bias
        weight = weight.unflatten(0, (attention.num_heads, -1)).mean(0)
        if bias is not None:
            bias = bias.unflatten(0, (attention.num_heads, -1)).mean(0)
        return F.linear(block.norm1(features), weight, bias)

    def run(
        self, block: nn.Module, prefix: Tensor, tokens: Tokens, **kwargs
    ) -> tuple[Tensor, Tokens]:
        x = self.join(prefix, tokens.features)
        return self._taken_apart(block(x, **self._weighed(x, tokens, kwargs)), tokens)

    def run_reducing(
        self, block: nn.Module, prefix: Tensor, tokens: Tokens, reduce: nn.Module, **kwargs
    ) -> tuple[Tensor, Tokens, Any]:
        if not all(hasattr(block, name) for name in ("ls1", "ls2", "drop_path1", "drop_path2")):
            raise ValueError(
                f"METHOD tome needs timm's Block, to work inside of it; got {type(block).__name__}"
            )
        x = self.join(prefix, tokens.features)
        kwargs = self._weighed(x, tokens, kwargs)
        attended = x + block.drop_path1(block.ls1(block.attn(block.norm1(x), **kwargs)))
        before = tokens.features.flatten(1, -2)
        prefix, tokens = self._taken_apart(attended, tokens)
        # The keys are those of this attention, whatever came out of it.
        tokens, record = reduce(tokens, lambda _: self.keys(block, before))
        x = self.join(prefix, tokens.features)
        x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return *self._taken_apart(x, tokens), record

    def _weighed(self, x: Tensor, tokens: Tokens, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a block, with the votes of each token of ``x``."""
        if kwargs.get("attn_mask") is not None or kwargs.get("is_causal"):
            raise ValueError("a model with Expedit takes no attn_mask: it is for all tokens")
        if not self.size_aware or tokens.sizes is None:
            return kwargs
        # Class and register tokens count one each.
        ones = tokens.sizes.new_ones(x.shape[0], self.prefix)
        votes = torch.cat([ones, tokens.sizes.flatten(1)], dim=1)
        return {**kwargs, "attn_mask": key_bias(votes)[:, None, None].to(x.dtype)}

    def _taken_apart(self, x: Tensor, tokens: Tokens) -> tuple[Tensor, Tokens]:
        shape = shape_of(tokens.features)[1:-1]
        features = x[:, self.prefix :].unflatten(1, shape)
        return x[:, : self.prefix], replace(tokens, features=features)
