"""Comparisons as one HTML file that needs nothing else: plots, table, conditions, pictures."""

from .page import Picture, read_pictures, write_report
from .summary import best_row, headline

__all__ = ["Picture", "best_row", "headline", "read_pictures", "write_report"]
