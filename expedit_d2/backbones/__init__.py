"""Detectron2 backbones that can be named in YAML (``MODEL.BACKBONE.NAME``)."""

from .d2_vit import D2ViT

__all__ = ["D2ViT"]
