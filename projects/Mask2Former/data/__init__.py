"""Training data: mappers by their official names, and data sets of official configs."""

from .datasets import register_panoptic_datasets
from .mappers import MAPPERS, MaskFormerMapper, build_mapper

__all__ = [
    "MAPPERS",
    "MaskFormerMapper",
    "build_mapper",
    "register_panoptic_datasets",
]
