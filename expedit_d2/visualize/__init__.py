"""Visualisation of clusters and predictions, and predictions side by side."""

from ..predictions.depth import colorize_depth, draw_depth
from ..predictions.drawing import draw_difference
from ..predictions.instances import draw_instances
from ..predictions.panoptic import draw_panoptic
from ..predictions.semantic import draw_semantic
from .clusters import cluster_labels, draw_clusters, record_reductions
from .panels import save_panels, side_by_side

__all__ = [
    "cluster_labels",
    "colorize_depth",
    "draw_clusters",
    "draw_depth",
    "draw_difference",
    "draw_instances",
    "draw_panoptic",
    "draw_semantic",
    "record_reductions",
    "save_panels",
    "side_by_side",
]
