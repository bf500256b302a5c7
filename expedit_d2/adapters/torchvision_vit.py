"""torchvision's ``VisionTransformer``: a class token before the map's tokens, global attention.

Its attention is PyTorch's ``nn.MultiheadAttention``, which adds a float ``key_padding_mask`` to the
logits of each key. So nothing of it is replaced.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..tokens import Tokens
from .map_size import MapSizes, Size
from .spec import BlockCosts, TransformerSpec, is_class, linear_weights, mean_of_heads
from .timm_vit import PrefixLayout

FAMILY = "torchvision's VisionTransformer"


def matches(module: nn.Module) -> bool:
    return is_class(module, "VisionTransformer", "torchvision.models.vision_transformer")


def adapt(vit: nn.Module) -> TransformerSpec:
    def layout(size_aware: bool) -> _Layout:
        return _Layout(prefix=1, size_aware=size_aware, sizes=MapSizes(), vit=vit)

    return TransformerSpec(
        owner=vit.encoder,
        attribute="layers",
        transformer=vit,
        layout=layout,
        # An nn.Sequential, whose last output alone is read.
        outputs=(len(vit.encoder.layers) - 1,),
        taken_apart=lambda block: (block,),
        packages=("torchvision",),
        unstructured=True,
        inside=True,
        size=_size(vit),
        costs=_costs,
    )


def _size(vit: nn.Module) -> Size:
    """The one size of its map: the model refuses other images."""
    return (vit.image_size // vit.patch_size,) * 2


def _costs(block: nn.Module) -> BlockCosts:
    layer = block.self_attention
    attention = layer.in_proj_weight.numel() + linear_weights(layer)
    return BlockCosts(attention + linear_weights(block.mlp), attention, layer.embed_dim)


@dataclass(frozen=True)
class _Layout(PrefixLayout):
    """Attributes: ``vit``, the model."""

    vit: nn.Module | None = None

    def begin(
        self, x: Tensor, block: nn.Module, size: Size | None, *args: Any, **kwargs: Any
    ) -> _Layout:
        return replace(self, size=size or _size(self.vit))

    def prepare(self, x: Tensor, tokens: Tokens) -> Tensor | None:
        """The mask (B, N) of cluster sizes, in the type of ``x``."""
        mask = super().prepare(x, tokens)
        return None if mask is None else mask[:, 0, 0]

    def keys(self, block: nn.Module, features: Tensor) -> Tensor:
        """Its keys, averaged over the heads: linear in the tokens, so one small product."""
        layer = block.self_attention
        weight, bias = layer.in_proj_weight.chunk(3)[1], layer.in_proj_bias
        bias = None if bias is None else bias.chunk(3)[1]
        return mean_of_heads(weight, bias, layer.num_heads, block.ln_1(features))

    def run(self, block: nn.Module, x: Tensor, tokens: Tokens) -> Tensor:
        x = self._attended(block, x, tokens)
        return x + block.mlp(block.ln_2(x))

    def run_reducing(
        self, block: nn.Module, x: Tensor, tokens: Tokens, reduce: nn.Module
    ) -> tuple[Tensor, Tokens, Any]:
        attended, before = self._attended(block, x, tokens), tokens.features.flatten(1, -2)
        # The keys are those of this attention, whatever came out of it.
        tokens, record = reduce(self.split(attended, tokens), lambda _: self.keys(block, before))
        x = self.join(attended, tokens.features)
        tokens = replace(tokens, context=self.prepare(x, tokens))
        return x + block.mlp(block.ln_2(x)), tokens, record

    @staticmethod
    def _attended(block: nn.Module, x: Tensor, tokens: Tokens) -> Tensor:
        normed = block.ln_1(x)
        out, _ = block.self_attention(
            normed, normed, normed, need_weights=False, key_padding_mask=tokens.context
        )
        return x + block.dropout(out)
