"""Layers of Swin: window attention, blocks, stages and patch embedding, on maps (B, H, W, C)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..operators import grid_positions
from ..tracing import shape_of
from ..windows import partition, shifted_mask, unpartition

__all__ = ["PatchEmbed", "Stage"]


def _pad_to(x: Tensor, multiple: int) -> Tensor:
    """Zero-pad a map (B, H, W, C) at the bottom and right."""
    height, width = shape_of(x)[1:3]
    return F.pad(x, (0, 0, 0, -width % multiple, 0, -height % multiple))


class _Attention(nn.Module):
    """Window attention with relative position bias."""

    def __init__(
        self,
        dim: int,
        window_size: int,
        num_heads: int,
        qkv_bias: bool,
        qk_scale: float | None,
        attn_drop: float,
        drop: float,
    ) -> None:
        super().__init__()
        self.window_size = (window_size, window_size)
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        side = 2 * window_size - 1
        self.relative_position_bias_table = nn.Parameter(torch.zeros(side * side, num_heads))
        trunc_normal_(self.relative_position_bias_table, std=0.02)
        places = grid_positions(window_size, window_size).flatten(0, 2).long()
        offsets = places[:, None] - places[None] + window_size - 1
        self.register_buffer("relative_position_index", offsets[..., 0] * side + offsets[..., 1])
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Windows (B * windows, N, C); mask (windows, N, N)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.relative_position_index]  # (N, N, heads)
        bias = bias.permute(2, 0, 1)[None]
        if mask is not None:
            bias = (bias + mask[:, None]).repeat(x.shape[0] // mask.shape[0], 1, 1, 1)
        dropout = self.attn_drop.p if self.training else 0.0
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias.to(q.dtype), dropout_p=dropout, scale=self.scale
        )
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class _Block(nn.Module):
    """Window attention, shifted by ``shift_size``, and an MLP, on a map (B, H, W, C)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        shift_size: int,
        mlp_ratio: float,
        qkv_bias: bool,
        qk_scale: float | None,
        drop: float,
        attn_drop: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.shift_size = shift_size
        self.norm1 = nn.LayerNorm(dim)
        self.attn = _Attention(dim, window_size, num_heads, qkv_bias, qk_scale, attn_drop, drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.drop_path(self._windowed(self.norm1(x), mask))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _windowed(self, x: Tensor, mask: Tensor | None) -> Tensor:
        (height, width), window = shape_of(x)[1:3], (self.window_size, self.window_size)
        x, shift = _pad_to(x, self.window_size), self.shift_size
        size = shape_of(x)[1:3]
        if shift > 0:
            x = x.roll((-shift, -shift), dims=(1, 2))
        x = self.attn(partition(x, window).flatten(1, 2), mask if shift > 0 else None)
        x = unpartition(x.unflatten(1, window), size)
        if shift > 0:
            x = x.roll((shift, shift), dims=(1, 2))
        return x[:, :height, :width]


class _PatchMerging(nn.Module):
    """Patch merging: half the height and width, twice the channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = _pad_to(x, 2)
        corners = [x[:, row::2, col::2] for col in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(corners, dim=-1)))


class Stage(nn.Module):
    """Blocks at one resolution."""

    def __init__(
        self, dim: int, drop_paths: Sequence[float], window_size: int, last: bool, **block: Any
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.use_checkpoint = block.pop("use_checkpoint")
        self.blocks = nn.ModuleList(
            _Block(
                dim,
                window_size=window_size,
                shift_size=window_size // 2 * (index % 2),
                drop_path=rate,
                **block,
            )
            for index, rate in enumerate(drop_paths)
        )
        self.downsample = None if last else _PatchMerging(dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The map after the blocks, and the input of the next stage."""
        window, shift = self.window_size, self.window_size // 2
        size = tuple(-(-side // window) * window for side in shape_of(x)[1:3])
        mask = shifted_mask(size, (window, window), (shift, shift), x.device)
        for block in self.blocks:
            if self.use_checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, x, mask, use_reentrant=False)
            else:
                x = block(x, mask)
        return x, x if self.downsample is None else self.downsample(x)


class PatchEmbed(nn.Module):
    """Patch embedding: images (B, 3, H, W) to a map (B, H, W, C)."""

    def __init__(self, patch_size: int, channels: int, dim: int, norm: bool) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(channels, dim, patch_size, patch_size)
        self.norm = nn.LayerNorm(dim) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        (height, width), side = shape_of(x)[2:], self.patch_size
        x = self.proj(F.pad(x, (0, -width % side, 0, -height % side))).permute(0, 2, 3, 1)
        return x if self.norm is None else self.norm(x)
