"""Outputs of models, one file per kind: how it is compared and drawn, and its metrics.

Agreement, tables, reports and pictures use all kinds in `PREDICTIONS`. A kind of your own is a
class in one file, decorated with `register_prediction`; the tools import it with ``--import``.
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
