"""Swin: windows in every block, every other block's shifted; several stages of blocks.

The tokens of each window are clustered before block alpha and rebuilt at the end of its stage. In
between, windows, their shift and its mask are those of the smaller grid. Relative positions are
looked up in the model's own table, between its entries, at the clusters' mean positions or on the
regular grid.

Supports the ``D2SwinTransformer`` of this package and the official code, which is also in
Detectron2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import attend, key_bias
from ..operators import grid_positions, on_device
from ..tokens import Layout, Tokens
from ..tracing import shape_of
from ..windows import from_slots, partition, shifted_mask, slot_rows, to_slots, unpartition
from .spec import (
    WINDOWED_MERGES,
    BlockCosts,
    GridRule,
    TransformerSpec,
    block_costs,
    is_class,
    mean_of_heads,
)

FAMILY = "Swin (Mask2Former's, Detectron2's)"

_OURS = "expedit_d2.backbones.swin"
# The same class, whose blocks take tokens (B, H * W, C).
_OFFICIAL = (
    "mask2former.modeling.backbone.swin",
    "maskdino.modeling.backbone.swin",
    "detectron2.modeling.backbone.swin",
)

_GRID_RULE = GridRule(latest=1.0, least_latest=0.6)


def matches(module: nn.Module) -> bool:
    official = any(is_class(module, "SwinTransformer", name) for name in _OFFICIAL)
    return official or is_class(module, "D2SwinTransformer", _OURS)


def adapt(swin: nn.Module) -> TransformerSpec:
    flat = not is_class(swin, "D2SwinTransformer", _OURS)
    layout = partial(SwinLayout, flat=flat)
    packages = ("expedit_d2", *(name.partition(".")[0] for name in _OFFICIAL))
    return spec_of(swin, swin.layers[0].window_size, layout, _costs, packages, "attn", fused=_fused)


def spec_of(
    owner: nn.Module,
    window: int,
    layout: Callable[..., SwinLayout],
    costs: Callable[..., BlockCosts],
    packages: tuple[str, ...],
    attention: str,
    fused: Callable[..., Tensor] | None = None,
    **attributes: Any,
) -> TransformerSpec:
    """`TransformerSpec` of a Swin whose ``layers`` are stages with ``blocks``.

    Args:
        owner: the module with these layers.
        window: side of the windows.
        layout: of the family; takes ``size_aware`` and ``window``.
        costs: of a block; takes it and ``window``.
        packages, fused: see `TransformerSpec`.
        attention: attribute of a block.
        **attributes: others of the `TransformerSpec`.
    """
    common = {
        "layout": partial(layout, window=window),
        "costs": partial(costs, window=window),
        "unstructured": True,
        "taken_apart": lambda block: (block, getattr(block, attention)),
        "packages": packages,
        "fused": fused,
    }

    def stage(index: int, layer: nn.Module) -> TransformerSpec:
        return TransformerSpec(
            owner=layer,
            attribute="blocks",
            merges=WINDOWED_MERGES,
            grid_rule=_GRID_RULE,
            window=window,
            outputs=(len(layer.blocks) - 1,),
            size=(256 >> index, 256 >> index),
            **common,
        )

    return TransformerSpec(
        owner=owner,
        attribute="layers",
        scopes=("window",),
        stages=tuple(stage(index, layer) for index, layer in enumerate(owner.layers)),
        **common,
        **attributes,
    )


def _costs(block: nn.Module, window: int) -> BlockCosts:
    return block_costs(block, block.attn, block.attn.proj.in_features, window)


@dataclass(frozen=True)
class SwinLayout(Layout):
    """``window``: side; ``flat``: blocks take (B, H * W, C) of a map of ``size``."""

    size_aware: bool
    window: int = 0
    flat: bool = False
    size: tuple[int, int] | None = None

    def begin(
        self, x: Tensor, block: nn.Module, size: tuple[int, int] | None, *args: Any, **kwargs: Any
    ) -> SwinLayout:
        if not self.flat:
            return self
        # The official layer sets the size of its map on each block before it calls that.
        return replace(self, size=size or (block.H, block.W))

    def split(self, x: Tensor, tokens: Tokens | None = None) -> Tokens:
        if tokens is not None:
            return replace(tokens, features=x.unflatten(1, tokens.shape) if self.flat else x)
        if self.flat:
            x = x.unflatten(1, self.size)
        size = shape_of(x)[1:3]
        return Tokens(x, size=size, span=size)

    def join(self, x: Tensor, features: Tensor) -> Tensor:
        return features.flatten(1, -2) if self.flat else features

    def keys(self, block: nn.Module, features: Tensor) -> Tensor:
        parts = self.parts(block)
        return mean_of_heads(*parts.key, parts.heads, self.normed(block, features, 0))

    def prepare(self, x: Tensor, tokens: Tokens) -> dict[bool, _Windows]:
        """What regular and shifted windows need to know, by whether they are shifted."""
        cut = self._slots if tokens.places is not None else self._grid_windows
        return {shifted: cut(tokens, shifted) for shifted in (False, True)}

    def run(
        self, block: nn.Module, x: Tensor, tokens: Tokens, mask: Tensor | None = None
    ) -> Tensor:
        # The mask that the model passes is for the windows of all tokens.
        shape = shape_of(x)
        if self.flat:
            x = x.unflatten(1, tokens.shape)
        x = self.attended(block, x, self._windowed(block, self.normed(block, x, 0), tokens))
        x = self.transformed(block, x, self.normed(block, x, 1))
        return x.view(shape) if self.flat else x

    def parts(self, block: nn.Module) -> Parts:
        """Of a block's attention layer."""
        return _parts(block.attn)

    def normed(self, block: nn.Module, x: Tensor, index: int) -> Tensor:
        """Tokens after the norm before a block's attention (0) or its MLP (1)."""
        return (block.norm1, block.norm2)[index](x)

    def attended(self, block: nn.Module, x: Tensor, change: Tensor) -> Tensor:
        """Tokens with what a block's attention adds to them."""
        return x + block.drop_path(change)

    def transformed(self, block: nn.Module, x: Tensor, normed: Tensor) -> Tensor:
        """Tokens with what a block's MLP, on ``normed`` ones, adds to them."""
        return x + block.drop_path(block.mlp(normed))

    def _windowed(self, block: nn.Module, x: Tensor, tokens: Tokens) -> Tensor:
        windows, parts = tokens.context[block.shift_size > 0], self.parts(block)
        if windows.rows is not None:
            return _attend_slots(parts, x, windows)
        if tokens.valid is not None:
            x = x * tokens.valid[..., None]
        size = shape_of(x)[1:3]
        bias = position_bias(parts.table, windows.positions)
        out = _attend(parts, windows.cut(x), bias, windows.mask, windows.bias)
        return windows.join(out, size)

    def _grid_windows(self, tokens: Tokens, shifted: bool) -> _Windows:
        """Windows, and their shift, that shrink with the grid."""
        size, side = shape_of(tokens.features)[1:3], self.window
        # Each window of the model keeps its cells, those of padding included: none are missing.
        window = tuple(side * n // span for n, span in zip(size, tokens.span, strict=True))
        shift = tuple(round(side // 2 * cells / side) for cells in window) if shifted else (0, 0)
        sizes = tokens.sizes if self.size_aware else None
        if tokens.valid is not None:
            # The stock model pads with zeros after the norm, and these take part in its windows.
            # A cell stands for as many zeros as it does for tokens.
            per_cell = side * side / (window[0] * window[1]) if self.size_aware else 1.0
            sizes = tokens.valid.float() if sizes is None else sizes
            sizes = torch.where(tokens.valid, sizes, per_cell)
        device = tokens.features.device
        windows = _Windows(window, shift)
        if tokens.positions is None:  # those of a regular grid, the same in every window
            places = grid_positions(*window, device).flatten(1, 2)
            positions = places * on_device(tuple(side / cells for cells in window), places)
        else:
            positions = windows.cut(tokens.positions)
        return replace(
            windows,
            positions=positions,
            mask=shifted_mask(size, window, shift, device) if any(shift) else None,
            bias=None if sizes is None else key_bias(windows.cut(sizes[..., None])[..., 0]),
        )

    def _slots(self, tokens: Tokens, shifted: bool) -> _Windows:
        """Windows of the whole map, in which the tokens that are left keep a place."""
        window, device = (self.window,) * 2, tokens.features.device
        shift = (self.window // 2,) * 2 if shifted else (0, 0)
        sizes = tokens.sizes if self.size_aware else None
        rows, bias = slot_rows(tokens.places, sizes, tokens.size, window, shift)
        padded = tuple(-(-side // self.window) * self.window for side in tokens.size)
        mask = shifted_mask(padded, window, shift, device) if shifted else None
        return _Windows(window, shift, mask=mask, bias=bias, rows=rows)


@dataclass(frozen=True)
class _Windows:
    """Attention windows of reduced tokens, regular or shifted ones.

    Attributes:
        window, shift: height and width, in cells.
        positions: (W or 1, N, 2), of each cell; None: those of the model's own windows.
        mask: (windows, N, N) of shifted ones.
        bias: (B * windows, N), added to the logits of each key.
        rows: (B * M,) for unstructured tokens: the row of each one in the windows of all images.
    """

    window: tuple[int, int]
    shift: tuple[int, int]
    positions: Tensor | None = None
    mask: Tensor | None = None
    bias: Tensor | None = None
    rows: Tensor | None = None

    def cut(self, x: Tensor) -> Tensor:
        """(B, h, w, D) to (B * windows, cells, D)."""
        if any(self.shift):
            x = x.roll((-self.shift[0], -self.shift[1]), dims=(1, 2))
        return partition(x, self.window).flatten(1, 2)

    def join(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """The opposite, for a map of that size."""
        x = unpartition(x.unflatten(1, self.window), size)
        return x.roll(self.shift, dims=(1, 2)) if any(self.shift) else x


class Parts(NamedTuple):
    """An attention layer in windows, with uniform names for its parts.

    Attributes:
        heads: their number.
        scale: of the products.
        dropout: share of the attention weights that is dropped.
        qkv: tokens (..., C) to queries, keys and values (..., 3 C), each head by head.
        blank: (3 C,) the output of ``qkv`` for zeros; None: zeros.
        key: weight and bias of the keys in ``qkv``.
        proj: the layer after the products, (..., C) to (..., C).
        table: (heads, 2 h - 1, 2 w - 1) of relative positions in windows of h x w.
        bias: builds what the table gives in such windows, (1, heads, h * w, h * w).
    """

    heads: int
    scale: float
    dropout: float
    qkv: Callable[[Tensor], Tensor]
    blank: Tensor | None
    key: tuple[Tensor, Tensor | None]
    proj: Callable[[Tensor], Tensor]
    table: Tensor
    bias: Callable[[], Tensor]


def _parts(attn: nn.Module) -> Parts:
    weight, bias = attn.qkv.weight, attn.qkv.bias
    return Parts(
        heads=attn.num_heads,
        scale=attn.scale,
        dropout=attn.attn_drop.p if attn.training else 0.0,
        qkv=attn.qkv,
        blank=bias,
        key=(weight.chunk(3)[1], None if bias is None else bias.chunk(3)[1]),
        proj=lambda x: attn.proj_drop(attn.proj(x)),
        table=laid_out(attn.relative_position_bias_table, attn.window_size),
        bias=lambda: looked_up(attn.relative_position_bias_table, attn.relative_position_index),
    )


def laid_out(table: Tensor, window: tuple[int, int]) -> Tensor:
    """A table ((2 h - 1) * (2 w - 1), heads) of windows h x w as ``table`` of `Parts`."""
    return table.t().unflatten(1, [2 * side - 1 for side in window])


def looked_up(table: Tensor, index: Tensor) -> Tensor:
    """Its rows at an index (N, N) of pairs, as ``bias`` of `Parts`."""
    return table[index.flatten()].t().contiguous().unflatten(1, shape_of(index))[None]


def position_bias(table: Tensor, positions: Tensor) -> Tensor:
    """Relative-position bias (W, heads, N, N) of tokens at any positions (W, N, 2), in fp32.

    Bilinear between the entries of a table (heads, 2 h - 1, 2 w - 1); offsets beyond it take its
    border.
    """
    table = table.float()
    reach = on_device(tuple(max(side // 2, 1) for side in shape_of(table)[1:]), positions)
    offsets = (positions[:, :, None] - positions[:, None]) / reach
    with torch.autocast(positions.device.type, enabled=False):
        return F.grid_sample(
            table.expand(offsets.shape[0], -1, -1, -1),
            offsets.flip(-1),  # it wants the column first
            mode="bilinear",
            padding_mode="border",
            align_corners=True,
        )


def _attend(
    parts: Parts,
    x: Tensor,
    bias: Tensor,
    mask: Tensor | None = None,
    sizes: Tensor | None = None,
) -> Tensor:
    """The attention layer on the windows (B * W, N, C) of B images.

    Args:
        bias: (B * W or 1, heads, N, N), by relative position.
        mask: (W, N, N) of shifted windows.
        sizes: (B * W, N), added to the logits of each key.
    """
    return parts.proj(_products(parts, parts.qkv(x), bias, mask, sizes))


def _attend_slots(parts: Parts, x: Tensor, windows: _Windows) -> Tensor:
    """The attention layer on tokens (B, M, C) at their places in windows."""
    bias = windows.bias
    qkv = to_slots(parts.qkv(x), parts.blank, windows.rows, shape_of(bias))
    out = _products(parts, qkv, parts.bias(), windows.mask, bias)
    return parts.proj(from_slots(out, windows.rows, shape_of(x)[0]))


def _products(
    parts: Parts, qkv: Tensor, bias: Tensor, mask: Tensor | None, sizes: Tensor | None
) -> Tensor:
    """The products of the layer, (B * W, N, 3 C) to (B * W, N, C); see `_attend`."""
    q, k, v = qkv.unflatten(-1, (3, parts.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    bias = bias.to(q.dtype)
    total = shape_of(q)[0]
    # The mask is the same in every image: one image at a time needs no copies of it.
    windows = total if mask is None else shape_of(mask)[0]
    shifted = [] if mask is None else [mask[:, None].to(q.dtype)]
    images = [
        attend(
            *(t[start : start + windows] for t in (q, k, v)),
            parts.scale,
            [bias if shape_of(bias)[0] == 1 else bias[start : start + windows], *shifted],
            None if sizes is None else sizes[start : start + windows],
            parts.dropout,
        )
        for start in range(0, total, windows)
    ]
    out = images[0] if len(images) == 1 else torch.cat(images)
    return out.transpose(1, 2).flatten(2)


def _fused(attn: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The layer as it is, on windows (B * W, N, C); the mask (W, N, N) is that of shifted ones."""
    parts = _parts(attn)
    return _attend(parts, x, parts.bias(), mask)
