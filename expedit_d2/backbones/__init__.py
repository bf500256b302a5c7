"""Detectron2 backbones that can be named in YAML (``MODEL.BACKBONE.NAME``)."""

from .d2_vit import D2ViT
from .swin import D2SwinTransformer

__all__ = ["D2SwinTransformer", "D2ViT"]
