"""Data sets with depth, and the mapper that reads them."""

from .datasets import (
    load_depth_list,
    read_depth,
    register_depth_datasets,
    register_depth_list,
    register_depth_lists,
)
from .mapper import DepthMapper

__all__ = [
    "DepthMapper",
    "load_depth_list",
    "read_depth",
    "register_depth_datasets",
    "register_depth_list",
    "register_depth_lists",
]
