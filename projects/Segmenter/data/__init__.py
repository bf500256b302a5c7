"""Training mapper, and registration of data sets that Detectron2 lacks."""

from .datasets import register_semantic_datasets
from .mapper import SemanticMapper, build_test_mapper, build_train_mapper

__all__ = [
    "SemanticMapper",
    "build_test_mapper",
    "build_train_mapper",
    "register_semantic_datasets",
]
