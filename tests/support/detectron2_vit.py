"""A tiny ViT of Detectron2 whose relative positions matter."""

from __future__ import annotations

import torch
from detectron2.modeling import ViT
from torch import Tensor, nn

from expedit_d2.tokens import Tokens
from support.vits import PATCH


def tiny_vit(side: int = 12, positions: bool = True, **changes) -> ViT:
    """A random ViT with tables for a map of side x side; nothing in it is zero."""
    settings = {
        "img_size": side * PATCH,
        "patch_size": PATCH,
        "embed_dim": 32,
        "depth": 4,
        "num_heads": 4,
        "mlp_ratio": 2.0,
        "use_abs_pos": positions,
        "use_rel_pos": True,
        "window_size": 7,
        "window_block_indexes": (0, 2),
        "pretrain_img_size": 8 * PATCH,
    }
    vit = ViT(**(settings | changes)).eval()
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            if "rel_pos" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif positions:
                parameter.normal_(std=0.5)
    return vit


def features(vit: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return vit(x)["last_feat"]


def mean_position(tokens: Tokens) -> Tensor:
    """(B, 2), of all the tokens that the clusters stand for."""
    sizes = tokens.sizes if tokens.valid is None else tokens.sizes * tokens.valid
    sizes = sizes[..., None]
    return (tokens.positions * sizes).sum((1, 2)) / sizes.sum((1, 2))
