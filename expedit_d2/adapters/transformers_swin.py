"""Hugging Face's Swin: ``SwinModel``, also the backbone of Mask2Former, OneFormer and UperNet, and
``MaskFormerSwinModel``.

Blocks take tokens (B, H * W, C) and the size of their map, and return tuples. Hidden states are the
outputs of stages, which are whole maps.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..tokens import Tokens
from .spec import BlockCosts, TransformerSpec, block_costs, is_class
from .swin import Parts, SwinLayout, laid_out, looked_up, spec_of
from .transformers_parts import check_parts, refuse_attentions

FAMILY = "Hugging Face's Swin (Mask2Former's, OneFormer's, MaskFormer's, UperNet's)"

_SWIN = ("SwinModel", "transformers.models.swin.modeling_swin")
_MASKFORMER = ("MaskFormerSwinModel", "transformers.models.maskformer.modeling_maskformer_swin")


def matches(module: nn.Module) -> bool:
    return is_class(module, *_SWIN) or is_class(module, *_MASKFORMER)


def adapt(swin: nn.Module) -> TransformerSpec:
    layout, names = _MaskFormer, _MASKFORMER_PARTS
    if is_class(swin, *_SWIN):
        layout, names = _Layout, _PARTS
    check_parts(swin, [swin], "encoder.layers", "config.window_size")
    blocks = [block for stage in swin.encoder.layers for block in stage.blocks]
    check_parts(swin, blocks, "layernorm_before", "layernorm_after", "shift_size", *names)
    return spec_of(
        swin.encoder,
        swin.config.window_size,
        partial(layout, flat=True),
        _costs,
        ("transformers",),
        "attention",
        transformer=swin,
    )


_PARTS = (
    *("mlp", "dropout", "drop_path", "set_shift_and_window_size"),
    *(f"attention.{name}" for name in ("k_proj", "o_proj", "head_dim", "scaling")),
    "attention.relative_position_bias.relative_position_bias_table",
)
_MASKFORMER_PARTS = (
    *("intermediate", "output", "drop_path", "attention.output"),
    *(f"attention.self.{name}" for name in ("key", "dropout", "attention_head_size")),
    "attention.self.relative_position_bias_table",
)


def _costs(block: nn.Module, window: int) -> BlockCosts:
    channels = block.layernorm_before.normalized_shape[0]
    return block_costs(block, block.attention, channels, window)


class _Layout(SwinLayout):
    def begin(
        self,
        x: Tensor,
        block: nn.Module,
        size: tuple[int, int] | None,
        input_dimensions: tuple[int, int],
        *args: Any,
        **kwargs: Any,
    ) -> _Layout:
        return replace(self, size=size or tuple(input_dimensions))

    def returned(self, x: Tensor) -> tuple[Tensor, None]:
        """The tokens, and None for the attention weights."""
        return x, None

    def run(
        self,
        block: nn.Module,
        x: Tensor,
        tokens: Tokens,
        input_dimensions: tuple[int, int],
        always_partition: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        refuse_attentions(kwargs.get("output_attentions", block.attention.config.output_attentions))
        if not always_partition:  # no shift on maps of a single window
            block.set_shift_and_window_size(input_dimensions)
        return super().run(block, x, tokens)

    def parts(self, block: nn.Module) -> Parts:
        attn = block.attention
        table = attn.relative_position_bias
        return _split_parts(
            (attn.q_proj, attn.k_proj, attn.v_proj),
            heads=attn.num_attention_heads,
            scale=attn.scaling,
            dropout=attn.attention_dropout if attn.training else 0.0,
            proj=lambda x: block.dropout(attn.o_proj(x)),
            table=laid_out(table.relative_position_bias_table, table.window_size),
            bias=table,
        )

    def normed(self, block: nn.Module, x: Tensor, index: int) -> Tensor:
        return (block.layernorm_before, block.layernorm_after)[index](x)

    def transformed(self, block: nn.Module, x: Tensor, normed: Tensor) -> Tensor:
        return x + block.dropout(block.mlp(normed))


class _MaskFormer(_Layout):
    def returned(self, x: Tensor) -> tuple[Tensor]:
        return (x,)

    def run(
        self,
        block: nn.Module,
        x: Tensor,
        tokens: Tokens,
        input_dimensions: tuple[int, int],
        output_attentions: bool = False,
    ) -> Tensor:
        refuse_attentions(output_attentions)
        return SwinLayout.run(self, block, x, tokens)

    def parts(self, block: nn.Module) -> Parts:
        attn, output = block.attention.self, block.attention.output
        table = attn.relative_position_bias_table
        return _split_parts(
            (attn.query, attn.key, attn.value),
            heads=attn.num_attention_heads,
            scale=attn.attention_head_size**-0.5,
            dropout=attn.dropout.p if attn.training else 0.0,
            proj=lambda x: output(x, x),
            table=laid_out(table, attn.window_size),
            bias=lambda: looked_up(table, attn.relative_position_index),
        )

    def transformed(self, block: nn.Module, x: Tensor, normed: Tensor) -> Tensor:
        return x + block.output(block.intermediate(normed))


def _split_parts(layers: tuple[nn.Linear, nn.Linear, nn.Linear], **others: Any) -> Parts:
    """`Parts` of an attention with separate layers for queries, keys and values."""
    keys = layers[1]
    return Parts(
        qkv=lambda x: torch.cat([layer(x) for layer in layers], dim=-1),
        blank=None if keys.bias is None else torch.cat([layer.bias for layer in layers]),
        key=(keys.weight, keys.bias),
        **others,
    )
