"""A timm ViT, plain or after a ResNet, as the encoder of DPT: four levels of features.

Shorthand: B images of H x W pixels, h x w tokens of C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from expedit_d2 import sized_blocks
from expedit_d2.tracing import shape_of

from .resnet import standardize

__all__ = ["POSITIONS", "Encoder", "Level"]

LEVELS = 4
POSITIONS = ("bilinear", "bicubic")


class Level(NamedTuple):
    """Features of one level for the head.

    Attributes:
        features: (B, C, h, w).
        class_token: (B, C); None for a stage of a ResNet.
    """

    features: Tensor
    class_token: Tensor | None


class Encoder(nn.Module):
    """Runs a ViT on images of any size and keeps the outputs of some of its blocks (section 3.1).

    A hybrid ViT's first two levels are the stages of its ResNet with strides 4 and 8 (DPT-Hybrid).
    """

    def __init__(
        self, vit: nn.Module, blocks: Sequence[int], norm: bool = False, positions: str = "bilinear"
    ) -> None:
        """
        Args:
            vit: timm's ``VisionTransformer``, whose position embedding includes the class token.
            blocks: indices of the blocks to use, ascending: four, or two for a hybrid.
            norm: apply the final norm to every level, as for DINOv2.
            positions: interpolation of the position embedding: "bilinear" (DPT), or "bicubic" with
                an offset of 0.1 (DINOv2).

        Raises:
            ValueError: for an unsupported ViT, or invalid blocks or positions.
        """
        super().__init__()
        fits = isinstance(vit, VisionTransformer) and vit.cls_token is not None
        if not fits or vit.num_prefix_tokens > 1 or vit.pos_embed is None or vit.no_embed_class:
            raise ValueError(
                "MODEL.TIMM.NAME: DPT needs a VisionTransformer of timm with one class token, no "
                "registers, and position embeddings for both class token and patches"
            )
        if positions not in POSITIONS:
            raise ValueError(f"MODEL.DPT.POSITIONS must be one of {POSITIONS}, got {positions!r}")
        resnet = getattr(vit.patch_embed, "backbone", None)
        if resnet is not None and not hasattr(resnet, "stages"):
            raise ValueError(
                "MODEL.TIMM.NAME: a hybrid must have the stages of a ResNetV2, as "
                f"vit_base_r50_s16_384 has, got {type(resnet).__name__}"
            )
        count, depth = LEVELS if resnet is None else 2, len(vit.blocks)
        blocks = tuple(blocks)
        if len(blocks) != count or list(blocks) != sorted({b for b in blocks if 0 <= b < depth}):
            raise ValueError(
                f"MODEL.DPT.BLOCKS must be {count} ascending indices from 0 to {depth - 1}, got "
                f"{list(blocks)}"
            )
        if resnet is not None:
            standardize(resnet)
        # Drop everything after the last block that is used.
        vit.blocks = vit.blocks[: blocks[-1] + 1]
        if not norm:
            vit.norm = nn.Identity()
        self.vit = vit
        self.blocks = blocks
        self.positions = positions
        #: Channels of the levels that come from a ResNet.
        self.stages = [] if resnet is None else [s["num_chs"] for s in resnet.feature_info[1:3]]
        #: Pixels along the side of a token.
        self.stride = vit.patch_embed.feat_ratio()
        # The blocks whose outputs `forward` uses, for Expedit's adapter.
        vit.expedit_outputs = blocks

    def forward(self, images: Tensor) -> list[Level]:
        """
        Args:
            images: (B, 3, H, W), normalised; H and W are multiples of the stride.

        Returns:
            The four levels, shallowest first. Those of blocks have h = H / stride, w = W / stride.
        """
        x, levels = images, []
        embed = self.vit.patch_embed
        if self.stages:
            x = embed.backbone.stem(x)
            for stage in embed.backbone.stages:
                x = stage(x)
                levels.append(Level(x, None))
            x = embed.backbone.norm(x)
            del levels[len(self.stages) :]
        x = embed.proj(x)
        size = shape_of(x)[2:]
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([self.vit.cls_token.expand(shape_of(x)[0], -1, -1), x], dim=1)
        x = self.vit.norm_pre(self.vit.pos_drop(x + self._positions(size)))
        for index, block in enumerate(sized_blocks(self.vit.blocks, size)):
            x = block(x)
            if index in self.blocks:
                level = self.vit.norm(x)
                features = level[:, 1:].transpose(1, 2).unflatten(2, size)
                levels.append(Level(features, level[:, 0]))
        return levels

    def _positions(self, size: tuple[int, int]) -> Tensor:
        """The position embedding (1, 1 + h * w, C) for h x w tokens, as it is at its own size."""
        table, own = self.vit.pos_embed, tuple(self.vit.patch_embed.grid_size)
        if size == own:
            return table
        tokens = table[:, 1:].transpose(1, 2).unflatten(2, own)
        if self.positions == "bilinear":
            tokens = F.interpolate(tokens, size, mode="bilinear")
        else:
            # The weights were trained with this offset of the sampling grid.
            scale = [(to + 0.1) / of for to, of in zip(size, own, strict=True)]
            tokens = F.interpolate(tokens, scale_factor=scale, mode="bicubic")
        return torch.cat([table[:, :1], tokens.flatten(2).transpose(1, 2)], dim=1)
