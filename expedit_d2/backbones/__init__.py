"""Detectron2 backbones that can be named in YAML (``MODEL.BACKBONE.NAME``), and their keys."""

from .d2_vit import D2ViT, add_vit_config
from .swin import D2SwinTransformer, add_swin_config
from .timm_vit import TimmViT, add_timm_config, build_timm_vit_backbone

__all__ = [
    "D2SwinTransformer",
    "D2ViT",
    "TimmViT",
    "add_swin_config",
    "add_timm_config",
    "add_vit_config",
    "build_timm_vit_backbone",
]
