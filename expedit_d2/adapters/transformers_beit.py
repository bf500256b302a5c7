"""Hugging Face's BEiT, as a model and as the backbone of ZoeDepth, DPT and UperNet.

Tokens (B, 1 + H * W, C). Its relative position bias is shared by all layers, separate for each, or
both. Reduced tokens interpolate it at their mean positions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..tokens import Tokens
from ..tracing import shape_of
from .spec import TransformerSpec, is_class
from .swin import position_bias
from .timm_eva import positions_of
from .transformers_parts import check_parts, checkpointed
from .transformers_vit import Kind, LayerLayout, spec_of

FAMILY = "Hugging Face's BEiT"

_KIND = Kind(
    ("BeitModel",),
    "transformers.models.beit.modeling_beit",
    "",
    "layers",
    ("layernorm_before", "layernorm_after"),
    (("dropout", "lambda_1", "drop_path"), ("dropout", "lambda_2", "drop_path")),
)


def matches(module: nn.Module) -> bool:
    return is_class(module, *_KIND.classes, _KIND.module)


def adapt(beit: nn.Module) -> TransformerSpec:
    spec = spec_of(beit, _KIND, _Layout)
    check_parts(beit, beit.layers, "relative_position_bias")
    check_parts(beit, [beit], "shared_position_bias")
    return replace(spec, taken_apart=lambda block: (block,))


@dataclass(frozen=True)
class _Context:
    """Inputs of all later layers that depend on the reduced tokens.

    Attributes:
        mask: of cluster sizes; see `PrefixLayout.prepare`.
        positions: (B or 1, M, 2) of the tokens; None without a position bias.
    """

    mask: Tensor | None
    positions: Tensor | None


@dataclass(frozen=True)
class _Layout(LayerLayout):
    @property
    def reads_positions(self) -> bool:
        config = self.config
        return config.use_relative_position_bias or config.use_shared_relative_position_bias

    def prepare(self, x: Tensor, tokens: Tokens) -> _Context:
        # Skips `LayerLayout`, which has rotary positions.
        mask = super(LayerLayout, self).prepare(x, tokens)
        positions = positions_of(tokens).flatten(1, -2) if self.reads_positions else None
        return _Context(mask, positions)

    def run(
        self,
        block: nn.Module,
        x: Tensor,
        tokens: Tokens,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        def forward(x: Tensor) -> Tensor:
            mask, others = self.weighed(block, tokens, attention_mask, kwargs)
            attended, _ = block.attention(block.layernorm_before(x), attention_mask=mask, **others)
            x = self.added(block, x, attended, 0)
            return self.added(block, x, block.mlp(block.layernorm_after(x)), 1)

        return checkpointed(block, forward, x)

    def added(self, block: nn.Module, x: Tensor, change: Tensor, index: int) -> Tensor:
        scale = (block.lambda_1, block.lambda_2)[index]
        return block.drop_path(scale * block.dropout(change)) + x

    def weighed(
        self, block: nn.Module, tokens: Tokens, mask: Tensor | None, kwargs: dict[str, Any]
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """The mask of the model is the shared position bias."""
        others = dict(kwargs)
        interpolate = others.pop("interpolate_pos_encoding", False)
        others.pop("resolution", None)
        own = block.relative_position_bias
        if own is not None:
            whole = 1 + tokens.size[0] * tokens.size[1]
            own = own(tokens.size, interpolate, dim_size=whole)
            mask = own if mask is None else own + mask
        context = tokens.context
        _, others = super().weighed(block, replace(tokens, context=None), None, others)
        if context is None:
            return mask, others
        if mask is None:
            return context.mask, others
        bias = _reduced(mask[0], tokens.size, context.positions).to(mask.dtype)
        return bias if context.mask is None else bias + context.mask, others


def _reduced(bias: Tensor, size: tuple[int, int], positions: Tensor) -> Tensor:
    """The bias for the class token and for tokens at any positions of a map.

    Args:
        bias: (heads, 1 + H * W, 1 + H * W) of the class token and the whole map. It depends only on
            offsets, so a part of it is a table of all offsets.
        size: (H, W) of the map.
        positions: (B or 1, M, 2) in the map.

    Returns:
        (B or 1, heads, 1 + M, 1 + M).
    """
    (height, width), device = size, bias.device
    rows = torch.arange(1 - height, height, device=device)[:, None]
    cols = torch.arange(1 - width, width, device=device)
    query = rows.clamp_min(0) * width + cols.clamp_min(0)
    key = (-rows).clamp_min(0) * width + (-cols).clamp_min(0)
    body = position_bias(bias[:, 1:, 1:][:, query, key], positions)
    # Class to class, class to token, token to class: a scalar per head each.
    corner, above, beside = (bias[None, :, i, j, None, None] for i, j in ((0, 0), (0, 1), (1, 0)))
    batch, _, count, _ = shape_of(body)
    beside = beside.expand(batch, -1, count, 1)
    top = torch.cat([corner, above.expand(-1, -1, 1, count)], dim=-1).expand(batch, -1, -1, -1)
    return torch.cat([top, torch.cat([beside, body.to(bias.dtype)], dim=-1)], dim=2)
