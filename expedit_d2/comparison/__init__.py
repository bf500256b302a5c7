"""The plain model beside expedited ones: metrics, agreement, FLOPs, speed and memory.

A `Subject` is a model with its data; `compare` measures it with a list of settings, which gives a
`Comparison`; `tables` writes that down.
"""

from .candidates import candidates
from .options import Options
from .rows import PLAIN, Comparison, Conditions, Row, check_finished, pareto
from .run import compare
from .session import Session, expedited_copy, share_weights
from .spelling import describe, parse_setting
from .store import Store
from .subject import Subject, register_images
from .tables import save_tables, table_stem, to_csv, to_markdown, to_terminal
from .tuning import Target, Tuning, tune

__all__ = [
    "PLAIN",
    "Comparison",
    "Conditions",
    "Options",
    "Row",
    "Session",
    "Store",
    "Subject",
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
