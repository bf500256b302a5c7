"""Comparisons as a self-contained HTML file: plots, tables, conditions and pictures."""

from .page import write_report
from .pictures import Picture, draw_pictures, read_pictures
from .summary import best_row, headline, headline_row

__all__ = [
    "Picture",
    "best_row",
    "draw_pictures",
    "headline",
    "headline_row",
    "read_pictures",
    "write_report",
]
