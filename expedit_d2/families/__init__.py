"""One real model of each family that can be expedited, with random weights, and its measurements.

Random weights are enough for GFLOPs, speed, and how exact a model stays where nothing is lost.
"""

from .measuring import Row, measure, table
from .models import FAMILIES, Family

__all__ = ["FAMILIES", "Family", "Row", "measure", "table"]
