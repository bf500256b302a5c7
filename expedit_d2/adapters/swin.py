"""Swin: windows in every block, every other block's shifted; several stages of blocks.

The tokens of each window are clustered before block alpha and rebuilt at the end of its stage. In
between, windows, their shift and its mask are those of the smaller grid. Relative positions are
looked up in the model's own table, between its entries, at the clusters' mean positions or on the
regular grid.

Serves the ``D2SwinTransformer`` of this package and the official code, which Detectron2 has too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import attend
from ..operators import grid_positions, on_device, shape_of
from ..tokens import Tokens
from ..windows import partition, shifted_mask, unpartition
from .host import Host, is_class

FAMILY = "Swin (Mask2Former's, Detectron2's)"

_OURS = "expedit_d2.backbones.swin"
# The same class, whose blocks take tokens (B, H * W, C).
_OFFICIAL = (
    "mask2former.modeling.backbone.swin",
    "maskdino.modeling.backbone.swin",
    "detectron2.modeling.backbone.swin",
)


def matches(module: nn.Module) -> bool:
    official = any(is_class(module, "SwinTransformer", name) for name in _OFFICIAL)
    return official or is_class(module, "D2SwinTransformer", _OURS)


def adapt(swin: nn.Module) -> Host:
    flat = not is_class(swin, "D2SwinTransformer", _OURS)

    def stage(index: int, layer: nn.Module) -> Host:
        return Host(
            owner=layer,
            attribute="blocks",
            layout=partial(_Layout, flat=flat),
            window=layer.window_size,
            outputs=(len(layer.blocks) - 1,),
            size=(256 >> index, 256 >> index),
        )

    return Host(
        owner=swin,
        attribute="layers",
        layout=_Layout,
        scopes=("window",),
        fused=_fused,
        latest=1.0,
        least=(0.6, 0.6),
        stages=tuple(stage(index, layer) for index, layer in enumerate(swin.layers)),
    )


@dataclass(frozen=True)
class _Layout:
    """``flat``: blocks take tokens (B, H * W, C), of a map of ``size``; else (B, H, W, C)."""

    size_aware: bool
    flat: bool = False
    size: tuple[int, int] | None = None

    def begin(self, x: Tensor, block: nn.Module, size: tuple[int, int] | None) -> _Layout:
        if not self.flat:
            return self
        # The official layer sets the size of its map on each block before it calls that.
        return replace(self, size=size or (block.H, block.W))

    def split(self, x: Tensor) -> tuple[None, Tokens]:
        if self.flat:
            x = x.unflatten(1, self.size)
        size = shape_of(x)[1:3]
        return None, Tokens(x, size=size, span=size)

    def join(self, prefix: None, features: Tensor) -> Tensor:
        return features.flatten(1, 2) if self.flat else features

    def run(
        self, block: nn.Module, prefix: None, tokens: Tokens, mask: Tensor | None = None
    ) -> tuple[None, Tokens]:
        # The mask that the model passes is for the windows of all tokens.
        x = tokens.features
        x = x + block.drop_path(self._windowed(block, block.norm1(x), tokens))
        x = x + block.drop_path(block.mlp(block.norm2(x)))
        return None, replace(tokens, features=x)

    def _windowed(self, block: nn.Module, x: Tensor, tokens: Tokens) -> Tensor:
        size, side = shape_of(x)[1:3], block.window_size
        # Each window of the model keeps its cells, those of padding included: none are missing.
        window = tuple(side * n // span for n, span in zip(size, tokens.span, strict=True))
        shift = tuple(round(block.shift_size * cells / side) for cells in window)
        votes = tokens.sizes if self.size_aware else None
        if tokens.valid is not None:
            # The stock model pads with zeros behind the norm, and these take part in its windows.
            # A cell stands for as many of them as it does for tokens.
            per_cell = side * side / (window[0] * window[1]) if self.size_aware else 1.0
            votes = tokens.valid.float() if votes is None else votes
            votes = torch.where(tokens.valid, votes, per_cell)
            x = x * tokens.valid[..., None]

        def cut(t: Tensor) -> Tensor:
            """(B, h, w, D) to (B * windows, cells, D), shifted."""
            if any(shift):
                t = t.roll((-shift[0], -shift[1]), dims=(1, 2))
            return partition(t, window).flatten(1, 2)

        if tokens.positions is None:  # those of a regular grid, the same in every window
            places = grid_positions(*window, x.device).flatten(1, 2)
            positions = places * on_device(tuple(side / cells for cells in window), places)
        else:
            positions = cut(tokens.positions)
        bias = _position_bias(block.attn, positions)
        mask = shifted_mask(size, window, shift, x.device) if any(shift) else None
        votes = None if votes is None else cut(votes[..., None])[..., 0]
        out = _attend(block.attn, cut(x), bias, mask, votes)
        out = unpartition(out.unflatten(1, window), size)
        return out.roll(shift, dims=(1, 2)) if any(shift) else out


def _position_bias(attn: nn.Module, positions: Tensor) -> Tensor:
    """Relative-position bias (W, heads, N, N) of tokens at any positions (W, N, 2), in fp32.

    Bilinear between the entries of the model's table; offsets beyond it take its border.
    """
    sides = [2 * side - 1 for side in attn.window_size]
    table = attn.relative_position_bias_table.float().t().unflatten(1, sides)  # (heads, row, col)
    reach = on_device(tuple(max(side - 1, 1) for side in attn.window_size), positions)
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
    attn: nn.Module,
    x: Tensor,
    bias: Tensor,
    mask: Tensor | None = None,
    votes: Tensor | None = None,
) -> Tensor:
    """The attention layer on the windows (B * W, N, C) of B images.

    Args:
        bias: (B * W or 1, heads, N, N), by relative position.
        mask: (W, N, N) of shifted windows.
        votes: (B * W, N) of the keys.
    """
    qkv = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)  # (B * W, heads, N, D)
    bias = bias.to(q.dtype)
    dropout = attn.attn_drop.p if attn.training else 0.0
    total = shape_of(x)[0]
    # The mask is the same in every image: one image at a time needs no copies of it.
    windows = total if mask is None else shape_of(mask)[0]
    shifted = [] if mask is None else [mask[:, None].to(q.dtype)]
    images = [
        attend(
            *(t[start : start + windows] for t in (q, k, v)),
            attn.scale,
            [bias if shape_of(bias)[0] == 1 else bias[start : start + windows], *shifted],
            None if votes is None else votes[start : start + windows],
            dropout,
        )
        for start in range(0, total, windows)
    ]
    out = images[0] if len(images) == 1 else torch.cat(images)
    return attn.proj_drop(attn.proj(out.transpose(1, 2).flatten(2)))


def _fused(attn: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The layer as it is, on windows (B * W, N, C); the mask (W, N, N) is that of shifted ones."""
    sides = shape_of(attn.relative_position_index)
    bias = attn.relative_position_bias_table[attn.relative_position_index.flatten()]
    return _attend(attn, x, bias.t().contiguous().unflatten(1, sides)[None], mask)
