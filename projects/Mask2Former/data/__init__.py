"""Training data: mappers by their official names, and data sets of official configs."""

from .datasets import register_panoptic_datasets
from .mappers import MAPPERS, MaskFormerMapper, build_mapper, build_train_loader

__all__ = [
    "MAPPERS",
    "MaskFormerMapper",
    "build_mapper",
    "build_train_loader",
    "register_panoptic_datasets",
]
