"""Detectron2's plain ViT (ViTDet): a map (B, H, W, C), windowed and global blocks.

After clustering, windows shrink with the grid, and relative positions follow the clusters: by
their mean positions, or on the regular grid by resampling the tables.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import attend, grid_terms, position_term, relative_positions
from ..operators import grid_positions, on_device, shape_of
from ..tokens import Tokens
from ..windows import partition, unpartition
from .host import Host, is_class

FAMILY = "Detectron2's ViT (ViTDet)"


def matches(module: nn.Module) -> bool:
    return is_class(module, "ViT", "detectron2.modeling.backbone.vit")


def adapt(vit: nn.Module) -> Host:
    window = max((block.window_size for block in vit.blocks), default=0)
    return Host(
        owner=vit,
        attribute="blocks",
        layout=_Layout,
        window=window or None,
        outputs=(len(vit.blocks) - 1,),
        fused=_attend,
        size=_size(vit),
        latest=0.75,
        least=(0.375, 0.6),
    )


def _size(vit: nn.Module) -> tuple[int, int]:
    """The map that the model was made for: that of its global relative positions."""
    for block in vit.blocks:
        if block.window_size == 0 and block.attn.use_rel_pos:
            rows, cols = shape_of(block.attn.rel_pos_h)[0], shape_of(block.attn.rel_pos_w)[0]
            return (rows + 1) // 2, (cols + 1) // 2
    return 64, 64


#: How far, in tokens, the clusters of a window may have moved out of it.
_MARGIN = 3


class _Layout:
    def __init__(self, size_aware: bool) -> None:
        self.size_aware = size_aware

    def begin(self, x: Tensor, block: nn.Module, size: tuple[int, int] | None) -> _Layout:
        return self

    def split(self, x: Tensor) -> tuple[None, Tokens]:
        size = shape_of(x)[1:3]
        return None, Tokens(x, size=size, span=size)

    def join(self, prefix: None, features: Tensor) -> Tensor:
        return features

    def run(self, block: nn.Module, prefix: None, tokens: Tokens) -> tuple[None, Tokens]:
        x = tokens.features
        attend = self._windowed if block.window_size > 0 else self._global
        x = x + block.drop_path(attend(block, block.norm1(x), tokens))
        x = x + block.drop_path(block.mlp(block.norm2(x)))
        if block.use_residual_block:
            x = x + _convolve(block.residual, x, tokens.valid)
        return None, replace(tokens, features=x)

    def _votes(self, tokens: Tokens, padding: float) -> Tensor | None:
        """Votes of each key (B, h, w), or None for one each; padding has ``padding`` of them."""
        sizes = tokens.sizes if self.size_aware else None
        if tokens.valid is None:
            return sizes
        sizes = tokens.valid.float() if sizes is None else sizes
        return torch.where(tokens.valid, sizes, padding)

    def _global(self, block: nn.Module, x: Tensor, tokens: Tokens) -> Tensor:
        # Padding is not part of the stock model's global attention: it has no vote here.
        votes = self._votes(tokens, padding=0.0)
        return _attend(block.attn, x, votes, tokens.positions, tokens.span, tokens.size)

    def _windowed(self, block: nn.Module, x: Tensor, tokens: Tokens) -> Tensor:
        size = shape_of(x)[1:3]
        side = block.window_size
        window = tuple(
            max(1, round(side * cells / span))
            for cells, span in zip(size, tokens.span, strict=True)
        )
        # The stock model pads with zeros behind the norm, and these take part in its windows.
        # One place on the smaller grid stands for as many of them as it does for tokens.
        per_place = side * side / (window[0] * window[1]) if self.size_aware else 1.0
        votes = self._votes(tokens, padding=per_place)
        if tokens.valid is not None:
            x = x * tokens.valid[..., None]
        padded = size[0] % window[0] or size[1] % window[1]
        if votes is None and padded and per_place != 1:
            votes = x.new_ones(x.shape[:3])
        if votes is not None:
            votes = partition(votes[..., None], window, value=per_place)[..., 0]
        positions = tokens.positions
        if positions is not None:
            positions = _in_windows(positions, window, tokens.span)
        out = _attend(
            block.attn, partition(x, window), votes, positions, (side, side), (side, side), _MARGIN
        )
        return unpartition(out, size)


def _convolve(residual: nn.Module, x: Tensor, valid: Tensor | None) -> Tensor:
    """The convolutional branch behind some blocks, on a map (B, h, w, C)."""
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


def _attend(
    attn: nn.Module,
    x: Tensor,
    votes: Tensor | None = None,
    positions: Tensor | None = None,
    span: tuple[int, int] | None = None,
    size: tuple[int, int] | None = None,
    margin: int = 0,
) -> Tensor:
    """The attention layer on a grid (B, h, w, C).

    Args:
        votes: (B, h, w) of the keys; None: one each.
        positions: (B, h, w, 2) in tokens of the original attention; None: on a regular grid.
        span: tokens of the original map, or window, that a regular grid spreads over; None: the
            grid is that of the tokens.
        size: tokens along the sides of the original attention; None: those of the grid.
        margin: how far positions may lie outside of it.
    """
    batch, height, width, _ = shape_of(x)
    span, size = span or (height, width), size or (height, width)
    qkv = attn.qkv(x).reshape(batch, height * width, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)  # (B, heads, N, D)
    terms = ()
    if attn.use_rel_pos and positions is not None:
        tables = (attn.rel_pos_h, attn.rel_pos_w)
        terms = (position_term(q, tables, positions.flatten(1, 2), size, margin),)
        votes = None if votes is None else votes.flatten(1)
    elif attn.use_rel_pos:
        row = relative_positions(attn.rel_pos_h, height, span[0], size[0])
        col = relative_positions(attn.rel_pos_w, width, span[1], size[1])
        terms = grid_terms(q, row, col)
    out = attend(q, k, v, attn.scale, terms, votes)
    return attn.proj(out.transpose(1, 2).reshape(batch, height, width, -1))
