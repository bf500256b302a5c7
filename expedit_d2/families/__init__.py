"""One real model of each family that can be expedited, with random weights, and its measurements.

Random weights are enough for GFLOPs, speed, and how exact a model stays where nothing is lost.
"""

from .budgets import BudgetRow, budget_table, measure_budgets
from .measuring import Row, measure, table
from .models import FAMILIES, LARGE, Family

__all__ = [
    "FAMILIES",
    "LARGE",
    "BudgetRow",
    "Family",
    "Row",
    "budget_table",
    "measure",
    "measure_budgets",
    "table",
]
