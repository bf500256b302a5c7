"""Detectron2 backbones that can be named in YAML (``MODEL.BACKBONE.NAME``)."""

from .d2_vit import D2ViT
from .swin import D2SwinTransformer
from .timm_vit import TimmViT, build_timm_vit_backbone

__all__ = ["D2SwinTransformer", "D2ViT", "TimmViT", "build_timm_vit_backbone"]
