"""Tiny ViTs with random weights, images for them, and how far two results are apart."""

from __future__ import annotations

import torch
from detectron2.modeling import ViT
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

PATCH = 4
SIZE = (8, 12)  # tokens of the images here


def perturbed(vit: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return vit.eval()


def timm_vit(size: tuple[int, int] = SIZE, **changes) -> VisionTransformer:
    """A random ViT with its table for a map of ``size``; nothing in it is zero."""
    settings = {
        "img_size": (size[0] * PATCH, size[1] * PATCH),
        "patch_size": PATCH,
        "embed_dim": 32,
        "depth": 4,
        "num_heads": 4,
        "mlp_ratio": 2.0,
        "num_classes": 7,
    }
    return perturbed(VisionTransformer(**(settings | changes)))


def detectron2_vit(**changes) -> ViT:
    settings = {
        "img_size": 12 * PATCH,
        "patch_size": PATCH,
        "embed_dim": 32,
        "depth": 4,
        "num_heads": 4,
        "use_rel_pos": True,
        "window_size": 5,
        "window_block_indexes": (0, 2),
        "pretrain_img_size": 8 * PATCH,
    }
    return perturbed(ViT(**(settings | changes)))


def images(size: tuple[int, int] = SIZE, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size[0] * PATCH, size[1] * PATCH)


def equal_in_pairs(batch: int = 2) -> Tensor:
    """Images whose tokens come in equal pairs, side by side."""
    half = torch.randn(batch, 3, SIZE[0] * PATCH, SIZE[1] // 2, PATCH)
    return half.repeat_interleave(2, dim=3).flatten(3)


def run_timm(vit, x: Tensor) -> Tensor:
    with torch.no_grad():
        return vit.forward_features(x)


def embedded(vit: nn.Module, x: Tensor) -> Tensor:
    """What the model would give its first block."""
    if isinstance(vit, ViT):
        return vit.patch_embed(x)
    return vit.norm_pre(vit._pos_embed(vit.patch_embed(x)))


def error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    return ((actual - expected).abs().max() / expected.abs().max()).item()
