"""The reproducible tables of arXiv 2210.01035: published numbers next to ours.

- ``tables``: the published rows with their configs; the numbers are in ``tables.json``.
- ``rules``: how the published GFLOPs were counted.
- ``counting``: GFLOPs of a row by that rule and by fvcore, on PyTorch's meta device.
- ``speed``: measured speed-ups.
- ``report``: results as text and JSON.
"""

from .counting import count_row
from .report import Result, to_text, write_json
from .rules import RULES, Rule, count_published
from .speed import time_table
from .tables import Row, Table, load_tables, select_tables

__all__ = [
    "RULES",
    "Result",
    "Row",
    "Rule",
    "Table",
    "count_published",
    "count_row",
    "load_tables",
    "select_tables",
    "time_table",
    "to_text",
    "write_json",
]
