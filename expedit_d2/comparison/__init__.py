"""The plain model beside expedited ones: metrics, agreement, FLOPs and speed."""

from .compare import Row, compare, share_weights, to_table

__all__ = ["Row", "compare", "share_weights", "to_table"]
