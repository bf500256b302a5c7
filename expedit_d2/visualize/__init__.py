"""Pictures: where the clusters lie, predictions, and predictions side by side."""

from .clusters import cluster_labels, draw_clusters
from .panels import save_panels, side_by_side
from .predictions import draw_difference, draw_instances, draw_panoptic, draw_semantic

__all__ = [
    "cluster_labels",
    "draw_clusters",
    "draw_difference",
    "draw_instances",
    "draw_panoptic",
    "draw_semantic",
    "save_panels",
    "side_by_side",
]
