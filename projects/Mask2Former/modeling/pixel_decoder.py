"""Pixel decoder: a deformable transformer on the coarse levels, and an FPN.

Shorthand: B images, C = ``MODEL.SEM_SEG_HEAD.CONVS_DIM`` channels, L transformer levels and
S = sum of H * W over them. Levels run from coarse to fine throughout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from fvcore.nn import weight_init
from torch import Tensor, nn

from .deformable_attention import MSDeformAttn, Sizes
from .position import sine_embedding

__all__ = ["MSDeformAttnPixelDecoder", "build_pixel_decoder"]

# Hidden size of the encoder's MLPs, which is not a config key of the official code.
_HIDDEN = 1024
# Number of levels for the transformer decoder.
_LEVELS_OUT = 3


class _EncoderLayer(nn.Module):
    def __init__(self, dim: int, levels: int, heads: int, points: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = MSDeformAttn(dim, levels, heads, points)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, _HIDDEN)
        self.linear2 = nn.Linear(_HIDDEN, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, x: Tensor, position: Tensor, reference: Tensor, sizes: Sizes) -> Tensor:
        """Tokens (B, S, C), positions (S, C) and reference points (S, 2) to tokens (B, S, C)."""
        x = self.norm1(x + self.dropout(self.self_attn(x + position, reference, x, sizes)))
        hidden = self.dropout(self.linear1(x).relu())
        return self.norm2(x + self.dropout(self.linear2(hidden)))


def _centers(size: tuple[int, int], device: torch.device) -> Tensor:
    """x and y in [0, 1] of the centre of every cell, (H * W, 2)."""
    y, x = ((torch.arange(n, device=device, dtype=torch.float32) + 0.5) / n for n in size)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1)


class _Encoder(nn.Module):
    """Encoder layers, with a learnt embedding per level."""

    def __init__(
        self, dim: int, levels: int, depth: int, heads: int, points: int, dropout: float
    ) -> None:
        super().__init__()
        self.level_embed = nn.Parameter(torch.empty(levels, dim).normal_())
        layers = [_EncoderLayer(dim, levels, heads, points, dropout) for _ in range(depth)]
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, C, H, W), one per level, to maps of the same shapes."""
        sizes = [tuple(x.shape[-2:]) for x in maps]
        dim, device = maps[0].shape[1], maps[0].device
        position = torch.cat(
            [
                sine_embedding(size, dim, device) + embed
                for size, embed in zip(sizes, self.level_embed, strict=True)
            ]
        )
        reference = torch.cat([_centers(size, device) for size in sizes])
        x = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1)
        for layer in self.encoder["layers"]:
            x = layer(x, position, reference, sizes)
        levels = x.split([height * width for height, width in sizes], dim=1)
        return [y.transpose(1, 2).unflatten(2, s) for y, s in zip(levels, sizes, strict=True)]


@SEM_SEG_HEADS_REGISTRY.register()
class MSDeformAttnPixelDecoder(nn.Module):
    """Features of the backbone to per-pixel embeddings and three levels for the decoder."""

    @configurable
    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        transformer_in_features: Sequence[str],
        transformer_dropout: float,
        transformer_nheads: int,
        transformer_points: int,
        transformer_enc_layers: int,
        conv_dim: int,
        mask_dim: int,
        norm: str,
        common_stride: int,
    ) -> None:
        """
        Args:
            input_shape: channels and stride of the backbone's features.
            transformer_in_features: the features that the transformer refines.
            transformer_dropout, transformer_nheads, transformer_points, transformer_enc_layers:
                of the transformer; points are those a head samples in each level.
            conv_dim: C.
            mask_dim: channels of the per-pixel embeddings.
            norm: normalisation in the FPN.
            common_stride: stride of the per-pixel embeddings.

        Raises:
            ValueError: if the features cannot give three levels and that stride.
        """
        super().__init__()
        by_stride = sorted(input_shape, key=lambda name: input_shape[name].stride)
        refined = [name for name in by_stride if name in transformer_in_features]
        if len(refined) < len(transformer_in_features) or len(refined) < _LEVELS_OUT:
            raise ValueError(
                "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES must name at least "
                f"{_LEVELS_OUT} of MODEL.SEM_SEG_HEAD.IN_FEATURES that the backbone has "
                f"({by_stride}), got {list(transformer_in_features)}"
            )
        finest = input_shape[refined[0]].stride
        laterals = [k for k in by_stride if common_stride <= input_shape[k].stride < finest]
        if min(input_shape[name].stride for name in laterals + refined) != common_stride:
            raise ValueError(
                "MODEL.SEM_SEG_HEAD.COMMON_STRIDE must be the stride of a feature, at most that of "
                f"{refined[0]}, got {common_stride} and strides "
                f"{[input_shape[name].stride for name in by_stride]}"
            )
        self.refined = refined[::-1]
        self.laterals = laterals[::-1]

        self.input_proj = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(input_shape[name].channels, conv_dim, kernel_size=1),
                nn.GroupNorm(32, conv_dim),
            )
            for name in self.refined
        )
        for projection in self.input_proj:
            nn.init.xavier_uniform_(projection[0].weight)
            nn.init.zeros_(projection[0].bias)
        self.transformer = _Encoder(
            conv_dim,
            len(refined),
            transformer_enc_layers,
            transformer_nheads,
            transformer_points,
            transformer_dropout,
        )
        bias = norm == ""
        for index, name in enumerate(laterals, start=1):
            adapter = Conv2d(
                input_shape[name].channels,
                conv_dim,
                kernel_size=1,
                bias=bias,
                norm=get_norm(norm, conv_dim),
            )
            layer = Conv2d(
                conv_dim,
                conv_dim,
                kernel_size=3,
                padding=1,
                bias=bias,
                norm=get_norm(norm, conv_dim),
                activation=F.relu,
            )
            weight_init.c2_xavier_fill(adapter)
            weight_init.c2_xavier_fill(layer)
            self.add_module(f"adapter_{index}", adapter)
            self.add_module(f"layer_{index}", layer)
        self.mask_features = Conv2d(conv_dim, mask_dim, kernel_size=1)
        weight_init.c2_xavier_fill(self.mask_features)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict:
        head = cfg.MODEL.SEM_SEG_HEAD
        return {
            "input_shape": {k: v for k, v in input_shape.items() if k in head.IN_FEATURES},
            "transformer_in_features": head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES,
            "transformer_dropout": cfg.MODEL.MASK_FORMER.DROPOUT,
            "transformer_nheads": head.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS,
            "transformer_points": head.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS,
            "transformer_enc_layers": head.TRANSFORMER_ENC_LAYERS,
            "conv_dim": head.CONVS_DIM,
            "mask_dim": head.MASK_DIM,
            "norm": head.NORM,
            "common_stride": head.COMMON_STRIDE,
        }

    def forward_features(
        self, features: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Decode in fp32, also under autocast: positions need the precision.

        Args:
            features: maps (B, channels, H / stride, W / stride) by name.

        Returns:
            Embeddings (B, mask_dim, H / common_stride, W / common_stride); the coarsest level
            (B, C, …); the three coarsest levels.
        """
        with torch.autocast(next(iter(features.values())).device.type, enabled=False):
            maps = [
                project(features[name].float())
                for project, name in zip(self.input_proj, self.refined, strict=True)
            ]
            levels = self.transformer(maps)
            x = levels[-1]
            for index, name in zip(range(len(self.laterals), 0, -1), self.laterals, strict=True):
                lateral = getattr(self, f"adapter_{index}")(features[name].float())
                x = F.interpolate(x, lateral.shape[-2:], mode="bilinear", align_corners=False)
                x = getattr(self, f"layer_{index}")(lateral + x)
            return self.mask_features(x), levels[0], levels[:_LEVELS_OUT]


def build_pixel_decoder(cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> nn.Module:
    """The pixel decoder that ``MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME`` names.

    Raises:
        ValueError: if there is none with that name, or it has no ``forward_features``.
    """
    name = cfg.MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME
    if name not in SEM_SEG_HEADS_REGISTRY:
        raise ValueError(
            f"MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME: {name!r} is not registered; this project has "
            "'MSDeformAttnPixelDecoder'"
        )
    decoder = SEM_SEG_HEADS_REGISTRY.get(name)
    if not hasattr(decoder, "forward_features"):
        raise ValueError(
            f"MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME: {name!r} is not a pixel decoder: it has no "
            "forward_features"
        )
    return decoder(cfg, input_shape)
