"""Tiny transformers with random weights, and images for them."""

from __future__ import annotations

import torch
from detectron2.modeling import SwinTransformer, ViT
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from expedit_d2.backbones.swin import D2SwinTransformer
from support.tensors import perturbed

PATCH = 4
SIZE = (8, 12)  # tokens of the images here


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


def timm_eva(size: tuple[int, int] = SIZE, **changes) -> Eva:
    """A random Eva for a map of ``size``."""
    settings = {
        "img_size": (size[0] * PATCH, size[1] * PATCH),
        "patch_size": PATCH,
        "embed_dim": 32,
        "depth": 3,
        "num_heads": 2,
        "mlp_ratio": 2.0,
        "num_classes": 7,
    }
    return perturbed(Eva(**(settings | changes)))


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


def swin(kind: type[nn.Module] = D2SwinTransformer, **changes) -> nn.Module:
    """A random Swin of two stages, ours or Detectron2's."""
    settings = {"embed_dim": 16, "depths": (2, 4), "num_heads": (2, 4), "window_size": 4}
    two = {"out_indices": (0, 1)} if kind is SwinTransformer else {"out_features": ("res2", "res3")}
    return perturbed(kind(**(settings | {"drop_path_rate": 0.0} | two | changes)))


def images(size: tuple[int, int] = SIZE, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size[0] * PATCH, size[1] * PATCH)


def equal_in_pairs(batch: int = 2) -> Tensor:
    """Images whose tokens come in equal pairs, side by side."""
    half = torch.randn(batch, 3, SIZE[0] * PATCH, SIZE[1] // 2, PATCH)
    return half.repeat_interleave(2, dim=3).flatten(3)


def timm_vit_of_any_size() -> VisionTransformer:
    """For images of any size, with a class token and registers."""
    return timm_vit(dynamic_img_size=True, reg_tokens=2)


def run(vit: nn.Module, x: Tensor) -> Tensor:
    """The output of timm's or of Detectron2's."""
    with torch.no_grad():
        out = vit(x)
    return out["last_feat"] if isinstance(out, dict) else out


def run_timm(vit, x: Tensor) -> Tensor:
    with torch.no_grad():
        return vit.forward_features(x)


def embedded(vit: nn.Module, x: Tensor) -> Tensor:
    """What the model would give its first block."""
    if isinstance(vit, ViT):
        return vit.patch_embed(x)
    return vit.norm_pre(vit._pos_embed(vit.patch_embed(x)))
