"""Compare a plain model with expedited ones: metrics, agreement, FLOPs, speed and memory.

A `Workload` is a model with its data; `compare` measures it with several settings and returns a
`Comparison`; `tables` formats that.
"""

from ..settings import describe, parse_setting
from .candidates import candidates
from .options import Options
from .rows import PLAIN, Comparison, Conditions, Row, check_finished, pareto
from .run import compare
from .session import Session, expedited_copy, share_weights
from .store import Store
from .tables import save_tables, table_stem, to_csv, to_markdown, to_terminal
from .tuning import Target, Tuning, tune
from .workload import Workload, register_images

__all__ = [
    "PLAIN",
    "Comparison",
    "Conditions",
    "Options",
    "Row",
    "Session",
    "Store",
    "Workload",
    "Target",
    "Tuning",
    "candidates",
    "check_finished",
    "compare",
    "describe",
    "expedited_copy",
    "pareto",
    "parse_setting",
    "register_images",
    "save_tables",
    "share_weights",
    "table_stem",
    "to_csv",
    "to_markdown",
    "to_terminal",
    "tune",
]
