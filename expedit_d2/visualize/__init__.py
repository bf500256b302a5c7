"""Pictures: where the clusters lie, predictions, and predictions side by side."""

from .clusters import cluster_labels, draw_clusters, record_reductions
from .depth import colorize_depth
from .panels import save_panels, side_by_side
from .predictions import (
    draw_depth,
    draw_difference,
    draw_instances,
    draw_panoptic,
    draw_semantic,
)

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
