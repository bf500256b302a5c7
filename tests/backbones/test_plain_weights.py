"""Weights of a plain ViT in Detectron2's: what they compute there."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from detectron2.modeling import ViT
from torch import nn

from expedit_d2.backbones.plain_weights import load_plain_weights

DIM, DEPTH, SIDE, PATCH = 12, 2, 3, 14


@pytest.fixture
def plain(tmp_path) -> nn.Module:
    """A DINOv2 without class token, which Detectron2's ViT has no place for, and its file."""
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_small_patch14_dinov2",
        img_size=SIDE * PATCH,
        embed_dim=DIM,
        depth=DEPTH,
        num_heads=2,
        num_classes=0,
        class_token=False,
        global_pool="avg",
        final_norm=False,
        fc_norm=False,
    ).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.normal_(std=0.3)
    weights = vit.state_dict()
    weights["pos_embed"] = F.pad(weights["pos_embed"], (0, 0, 1, 0))
    weights["cls_token"] = torch.zeros(1, 1, DIM)
    torch.save(weights, tmp_path / "plain.pth")
    return vit


def detectron2_vit(patch: int, file: str) -> nn.Module:
    vit = ViT(
        img_size=SIDE * patch,
        patch_size=patch,
        embed_dim=DIM,
        depth=DEPTH,
        num_heads=2,
        norm_layer=lambda dim: nn.LayerNorm(dim, eps=1e-6),
        pretrain_img_size=SIDE * patch,
    ).eval()
    load_plain_weights(vit, file)
    return vit


@pytest.mark.parametrize("patch", [PATCH, 16])
@torch.no_grad()
def test_it_is_the_same_function(plain, tmp_path, patch):
    """LayerScale is folded, and enlarged patches look to their kernel as the others did."""
    images = torch.randn(2, 3, SIDE * PATCH, SIDE * PATCH)
    wanted = plain.forward_features(images).transpose(1, 2).unflatten(2, (SIDE, SIDE))
    patches = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # (B, 3, h, w, p, p)
    enlarged = F.interpolate(patches.flatten(0, 3)[:, None], (patch, patch), mode="bilinear")
    enlarged = enlarged.view(2, 3, SIDE, SIDE, patch, patch)
    images = enlarged.transpose(3, 4).flatten(4, 5).flatten(2, 3)
    vit = detectron2_vit(patch, str(tmp_path / "plain.pth"))
    found = vit(images)["last_feat"]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
