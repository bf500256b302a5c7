"""Kinds of model outputs, one file each: how they are compared and drawn, and their metrics.

Agreement, tables, reports and pictures use all kinds in `PREDICTIONS`. To add one, write a class
decorated with `register_prediction`, and import its file with ``--import``.
"""

from .depth import DepthPrediction
from .features import CosinePrediction, NeighborPrediction
from .instances import InstancePrediction
from .panoptic import PanopticPrediction
from .prediction import (
    PREDICTIONS,
    Metric,
    Prediction,
    Record,
    lower_is_better,
    main_metrics,
    register_prediction,
)
from .semantic import SemanticPrediction

__all__ = [
    "PREDICTIONS",
    "Metric",
    "Prediction",
    "Record",
    "lower_is_better",
    "main_metrics",
    "register_prediction",
]

# In the order of tables.
for _kind in (
    InstancePrediction,
    PanopticPrediction,
    SemanticPrediction,
    DepthPrediction,
    NeighborPrediction,
    CosinePrediction,
):
    register_prediction(_kind)
