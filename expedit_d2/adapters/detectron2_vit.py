"""Detectron2's plain ViT (ViTDet): a map (B, H, W, C), windowed and global blocks.

After clustering, windows shrink with the grid, and relative positions follow the clusters: by
their mean positions, or on the regular grid by resampling the tables.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import attend, grid_terms, key_bias, position_term, relative_positions
from ..operators import grid_positions, on_device
from ..tokens import Layout, Tokens
from ..tracing import shape_of
from ..windows import from_slots, partition, slot_rows, to_slots, unpartition
from .spec import (
    MERGES,
    WINDOWED_MERGES,
    BlockCosts,
    GridRule,
    TransformerSpec,
    block_costs,
    is_class,
    mean_keys,
)

FAMILY = "Detectron2's ViT (ViTDet)"


def matches(module: nn.Module) -> bool:
    return is_class(module, "ViT", "detectron2.modeling.backbone.vit")


def adapt(vit: nn.Module) -> TransformerSpec:
    # A convolution between blocks needs a grid.
    unstructured = not any(block.use_residual_block for block in vit.blocks)
    return spec_of(vit, MapLayout, "detectron2", unstructured)


def spec_of(
    vit: nn.Module,
    layout: type[MapLayout],
    package: str,
    unstructured: bool,
    attribute: str = "blocks",
) -> TransformerSpec:
    """`TransformerSpec` of a transformer with Detectron2's attention.

    Args:
        layout: of its family.
        package: that defines its blocks.
        unstructured, attribute: see `TransformerSpec`.
    """
    blocks = getattr(vit, attribute)
    window = max((block.window_size for block in blocks), default=0)
    return TransformerSpec(
        owner=vit,
        attribute=attribute,
        layout=partial(
            layout,
            window=window,
            relative=any(block.attn.use_rel_pos for block in blocks),
        ),
        window=window or None,
        costs=_costs,
        outputs=(len(blocks) - 1,),
        fused=attend_layer,
        taken_apart=lambda block: (block, block.attn),
        packages=(package,),
        unstructured=unstructured,
        inside=True,
        merges=WINDOWED_MERGES if window else MERGES,
        grid_rule=GridRule(latest=0.75, least_latest=0.375),
        size=_size(vit, blocks),
    )


def _costs(block: nn.Module) -> BlockCosts:
    attn = block.attn
    heads = _heads(attn) if attn.use_rel_pos else 0
    return block_costs(block, attn, attn.proj.in_features, block.window_size, heads)


def _size(vit: nn.Module, blocks: nn.ModuleList) -> tuple[int, int]:
    """The map that the model was made for: that of its global relative positions, or of the images
    that it names (SAM's encoder and `D2ViT` do); otherwise that of ViTDet."""
    for block in blocks:
        if block.window_size == 0 and block.attn.use_rel_pos:
            rows, cols = shape_of(block.attn.rel_pos_h)[0], shape_of(block.attn.rel_pos_w)[0]
            return (rows + 1) // 2, (cols + 1) // 2
    if hasattr(vit, "img_size"):
        return (vit.img_size // vit.patch_embed.proj.kernel_size[0],) * 2
    return 64, 64


#: How far, in tokens, the clusters of a window may have moved out of it.
_MARGIN = 3


@dataclass(frozen=True)
class _Keys:
    """What the attention of a kind of block needs to know about reduced tokens.

    Attributes:
        bias: added to the logits of each key, (B, *shape), in windows (B * windows, ...).
        positions: (..., 2) in tokens, from the corner of the map or window; None: regular.
        window: height and width of the windows on the smaller grid.
        rows: (B * M,) for unstructured tokens: the row of each one in the windows of all images.
    """

    bias: Tensor | None
    positions: Tensor | None
    window: tuple[int, int] = (0, 0)
    rows: Tensor | None = None


class MapLayout(Layout):
    """Maps (B, H, W, C), or unstructured tokens (B, M, C)."""

    #: Names of a block's norms, before its attention and before its MLP.
    norms = ("norm1", "norm2")

    def __init__(self, size_aware: bool, window: int = 0, relative: bool = True) -> None:
        """``window``: side of the attention windows; ``relative``: positions are read."""
        self.size_aware = size_aware
        self.window = window
        self.relative = relative

    def split(self, x: Tensor, tokens: Tokens | None = None) -> Tokens:
        if tokens is not None:
            return replace(tokens, features=x)
        size = shape_of(x)[1:3]
        return Tokens(x, size=size, span=size, tracked=self.relative)

    def join(self, x: Tensor, features: Tensor) -> Tensor:
        return features

    def keys(self, block: nn.Module, features: Tensor) -> Tensor:
        return mean_keys(block.attn.qkv, _heads(block.attn), self.normed(block, features, 0))

    def prepare(self, x: Tensor, tokens: Tokens) -> dict[str, _Keys]:
        # Padding is not part of the stock model's global attention: its size is 0 here.
        sizes = self._sizes(tokens, padding=0.0)
        context = {"map": _Keys(None if sizes is None else key_bias(sizes), _places(tokens))}
        if self.window:
            cut = self._slots if tokens.places is not None else self._grid_windows
            context["window"] = cut(x, tokens)
        return context

    def run(self, block: nn.Module, x: Tensor, tokens: Tokens) -> Tensor:
        attend = self._windowed if block.window_size > 0 else self._global
        x = self.added(block, x, attend(block, self.normed(block, x, 0), tokens))
        x = self.added(block, x, block.mlp(self.normed(block, x, 1)))
        return self.finished(block, x, tokens)

    def run_reducing(
        self, block: nn.Module, x: Tensor, tokens: Tokens, reduce: nn.Module
    ) -> tuple[Tensor, Tokens, Any]:
        if tokens.context is None:
            tokens = replace(tokens, context=self.prepare(x, tokens))
        attend = self._windowed if block.window_size > 0 else self._global
        normed = self.normed(block, x, 0)
        x = self.added(block, x, attend(block, normed, tokens))
        keys = mean_keys(block.attn.qkv, _heads(block.attn), normed)

        def keys_of(features: Tensor) -> Tensor:
            return keys if keys.dim() == 3 else keys.flatten(1, 2)

        tokens, record = reduce(replace(tokens, features=x), keys_of)
        x = tokens.features
        tokens = replace(tokens, context=self.prepare(x, tokens))
        return self.added(block, x, block.mlp(self.normed(block, x, 1))), tokens, record

    def normed(self, block: nn.Module, x: Tensor, index: int) -> Tensor:
        """Tokens after one of a block's `norms`."""
        return getattr(block, self.norms[index])(x)

    def added(self, block: nn.Module, x: Tensor, change: Tensor) -> Tensor:
        """Tokens with what the attention or the MLP of a block adds to them."""
        return x + block.drop_path(change)

    def finished(self, block: nn.Module, x: Tensor, tokens: Tokens) -> Tensor:
        """The part of a block after its MLP."""
        if block.use_residual_block:
            x = x + _convolve(block.residual, x, tokens.valid)
        return x

    def _sizes(self, tokens: Tokens, padding: float) -> Tensor | None:
        """Size of each key (B, *shape), or None for one each; ``padding`` is that of padding."""
        sizes = tokens.sizes if self.size_aware else None
        if tokens.valid is None:
            return sizes
        sizes = tokens.valid.float() if sizes is None else sizes
        return torch.where(tokens.valid, sizes, padding)

    def _global(self, block: nn.Module, x: Tensor, tokens: Tokens) -> Tensor:
        keys = tokens.context["map"]
        return attend_layer(block.attn, x, keys.bias, keys.positions, tokens.span, tokens.size)

    def _windowed(self, block: nn.Module, x: Tensor, tokens: Tokens) -> Tensor:
        keys, side = tokens.context["window"], (block.window_size,) * 2
        if keys.rows is not None:
            return _attend_slots(block.attn, x, keys, side)
        size = shape_of(x)[1:3]
        if tokens.valid is not None:
            x = x * tokens.valid[..., None]
        x = partition(x, keys.window)
        return unpartition(
            attend_layer(block.attn, x, keys.bias, keys.positions, side, side, _MARGIN), size
        )

    def _grid_windows(self, x: Tensor, tokens: Tokens) -> _Keys:
        """Windows that shrink with the grid."""
        size, side = shape_of(x)[1:3], self.window
        window = tuple(
            max(1, round(side * cells / span))
            for cells, span in zip(size, tokens.span, strict=True)
        )
        # The stock model pads with zeros after the norm, and these take part in its windows.
        # One place on the smaller grid stands for as many zeros as it does for tokens.
        per_place = side * side / (window[0] * window[1]) if self.size_aware else 1.0
        sizes = self._sizes(tokens, padding=per_place)
        padded = size[0] % window[0] or size[1] % window[1]
        if sizes is None and padded and per_place != 1:
            sizes = x.new_ones(shape_of(x)[:3])
        if sizes is not None:
            sizes = partition(sizes[..., None], window, value=per_place)[..., 0]
        positions = tokens.positions
        if positions is not None:
            positions = _in_windows(positions, window, tokens.span)
        return _Keys(None if sizes is None else key_bias(sizes), positions, window)

    def _slots(self, x: Tensor, tokens: Tokens) -> _Keys:
        """Windows of the whole map, in which the tokens that are left keep a place."""
        side = (self.window,) * 2
        sizes = tokens.sizes if self.size_aware else None
        rows, bias = slot_rows(tokens.places, sizes, tokens.size, side)
        positions = tokens.positions
        if positions is not None:
            columns = tokens.size[1]
            place = torch.stack([tokens.places // columns, tokens.places % columns], dim=-1)
            positions = (positions - place // self.window * self.window).flatten(0, 1)
            regular = grid_positions(*side, x.device).flatten(1, 2)
            regular = regular.repeat(shape_of(bias)[0], 1, 1).flatten(0, 1)
            positions = regular.index_copy(0, rows, positions).unflatten(0, shape_of(bias))
        return _Keys(bias, positions, side, rows)


def _places(tokens: Tokens) -> Tensor | None:
    """Mean positions; where they are not tracked, the tokens' own places."""
    if tokens.positions is None and tokens.places is not None and tokens.tracked:
        columns = tokens.size[1]
        return torch.stack([tokens.places // columns, tokens.places % columns], dim=-1).float()
    return tokens.positions


def _convolve(residual: nn.Module, x: Tensor, valid: Tensor | None) -> Tensor:
    """The convolutional branch after some blocks, on a map (B, h, w, C)."""
    x = x.permute(0, 3, 1, 2)
    for name, layer in residual.named_children():
        if valid is not None and name == "conv2":
            x = x * valid[:, None]  # its 3 x 3 kernel reads zeros around the stock model's map
        x = layer(x)
    return x.permute(0, 2, 3, 1)


def _in_windows(positions: Tensor, window: tuple[int, int], span: tuple[int, int]) -> Tensor:
    """Positions (B, h, w, 2) by window, from the corner of each; padding continues the grid."""
    batch, height, width, _ = shape_of(positions)
    rows, cols = -(-height // window[0]), -(-width // window[1])
    pitch = on_device((span[0] / height, span[1] / width), positions)
    side = on_device(window, positions)
    whole = grid_positions(rows * window[0], cols * window[1], positions.device)
    regular = (whole + 0.5) * pitch - 0.5
    inside = (whole[..., 0] < height) & (whole[..., 1] < width)
    padding = (0, 0, 0, cols * window[1] - width, 0, rows * window[0] - height)
    positions = torch.where(inside[..., None], F.pad(positions, padding), regular)
    corner = (whole / side).floor() * side * pitch
    return partition(positions - corner, window)


def _heads(attn: nn.Module) -> int:
    return attn.num_heads if hasattr(attn, "num_heads") else attn.num_attention_heads


def attend_layer(
    attn: nn.Module,
    x: Tensor,
    bias: Tensor | None = None,
    positions: Tensor | None = None,
    span: tuple[int, int] | None = None,
    size: tuple[int, int] | None = None,
    margin: int = 0,
) -> Tensor:
    """The attention layer on tokens (B, *shape, C).

    Args:
        bias: (B, *shape), added to the logits of each key.
        positions: (B, *shape, 2) in tokens of the original attention; None: on a regular grid.
        span: tokens of the original map, or window, that a regular grid spreads over; None: the
            grid is that of the tokens.
        size: tokens along the sides of the original attention; None: those of the grid.
        margin: how far positions may lie outside of it.
    """
    shape = shape_of(x)[1:-1]
    out = _products(attn, attn.qkv(x).flatten(1, -2), shape, bias, positions, span, size, margin)
    return attn.proj(out.unflatten(1, shape))


def _attend_slots(attn: nn.Module, x: Tensor, keys: _Keys, window: tuple[int, int]) -> Tensor:
    """The attention layer on tokens (B, M, C) at their places in windows."""
    qkv = to_slots(attn.qkv(x), attn.qkv.bias, keys.rows, shape_of(keys.bias))
    out = _products(attn, qkv, window, keys.bias, keys.positions, window, window)
    return attn.proj(from_slots(out, keys.rows, shape_of(x)[0]))


def _products(
    attn: nn.Module,
    qkv: Tensor,
    shape: tuple[int, ...],
    bias: Tensor | None,
    positions: Tensor | None,
    span: tuple[int, int] | None,
    size: tuple[int, int] | None,
    margin: int = 0,
) -> Tensor:
    """The products of the layer, (B, N, 3 C) to (B, N, C); see `attend_layer`."""
    q, k, v = qkv.unflatten(-1, (3, _heads(attn), -1)).permute(2, 0, 3, 1, 4).unbind(0)
    span, size, terms = span or shape, size or shape, ()
    if attn.use_rel_pos and positions is not None:
        tables = (attn.rel_pos_h, attn.rel_pos_w)
        terms = (position_term(q, tables, positions.flatten(1, -2), size, margin),)
        bias = None if bias is None else bias.flatten(1)
    elif attn.use_rel_pos:
        row = relative_positions(attn.rel_pos_h, shape[0], span[0], size[0])
        col = relative_positions(attn.rel_pos_w, shape[1], span[1], size[1])
        terms = grid_terms(q, row, col)
        bias = None if bias is None else bias.unflatten(1, shape) if bias.dim() == 2 else bias
    elif bias is not None:
        bias = bias.flatten(1)
    dropout = getattr(attn, "dropout", 0.0) if attn.training else 0.0
    out = attend(q, k, v, attn.scale, terms, bias, dropout)
    return out.transpose(1, 2).flatten(2)
