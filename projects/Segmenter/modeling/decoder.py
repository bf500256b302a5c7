"""Decoders (arXiv 2105.05633, section 3.2): tokens to class scores of each token.

Neither depends on where a token lies, so both also run on clusters.

Shorthand: B images, N tokens (or clusters), C channels, K classes. Parameters have their official
names.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

__all__ = ["DECODERS", "LinearDecoder", "MaskTransformer"]


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


class LinearDecoder(nn.Module):
    """A linear layer on each token."""

    def __init__(self, num_classes: int, dim: int, **_: Any) -> None:
        """
        Args:
            num_classes: K.
            dim: C.
        """
        super().__init__()
        self.head = nn.Linear(dim, num_classes)
        self.apply(_init)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, C) to class scores (B, N, K)."""
        return self.head(tokens)


class MaskTransformer(nn.Module):
    """Transformer blocks on class embeddings and tokens; their products are the scores."""

    def __init__(
        self,
        num_classes: int,
        dim: int,
        num_heads: int,
        layers: int = 2,
        dropout: float = 0.1,
        width: int | None = None,
        scale: float = 1.0,
    ) -> None:
        """
        Args:
            num_classes: K.
            dim: C, the channels of the tokens.
            num_heads: of the blocks, if no width is given.
            layers: number of blocks.
            dropout: in the blocks.
            width: of the blocks, with a head for every 64 channels; None: C.
            scale: initial scale of the normalised scores.

        Raises:
            ValueError: for a width that is not a multiple of 64.
        """
        super().__init__()
        self.num_classes = num_classes
        encoder_dim = dim
        if width is not None:
            if width < 1 or width % 64:
                raise ValueError(
                    "MODEL.SEGMENTER.DECODER_DIM must be a multiple of 64, the channels of a head, "
                    f"or None, got {width}"
                )
            dim, num_heads = width, width // 64
        self.proj_dec = nn.Linear(encoder_dim, dim)
        self.cls_emb = nn.Parameter(torch.empty(1, num_classes, dim))
        self.blocks = nn.ModuleList(
            Block(
                dim,
                num_heads,
                qkv_bias=True,
                proj_drop=dropout,
                attn_drop=dropout,
                norm_layer=nn.LayerNorm,
            )
            for _ in range(layers)
        )
        self.decoder_norm = nn.LayerNorm(dim)
        self.proj_patch = nn.Parameter(torch.empty(dim, dim))
        self.proj_classes = nn.Parameter(torch.empty(dim, dim))
        self.mask_norm = nn.LayerNorm(num_classes)
        nn.init.constant_(self.mask_norm.weight, scale)
        self.apply(_init)
        nn.init.trunc_normal_(self.cls_emb, std=0.02)
        for projection in (self.proj_patch, self.proj_classes):
            nn.init.normal_(projection, std=dim**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, C) to class scores (B, N, K), normalised over classes (equation 5)."""
        classes = self.cls_emb.expand(tokens.shape[0], -1, -1)
        x = torch.cat([self.proj_dec(tokens), classes], dim=1)  # (B, N + K, C)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_norm(x)
        tokens = F.normalize(x[:, : -self.num_classes] @ self.proj_patch, dim=-1)
        classes = F.normalize(x[:, -self.num_classes :] @ self.proj_classes, dim=-1)
        return self.mask_norm(tokens @ classes.transpose(1, 2))


#: ``MODEL.SEGMENTER.DECODER`` -> class.
DECODERS = {"linear": LinearDecoder, "mask_transformer": MaskTransformer}
