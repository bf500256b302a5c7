"""Precisions that models are run in."""

__all__ = ["DTYPES"]

#: Names of torch's; "float32" is without autocast.
DTYPES = ("float32", "bfloat16", "float16")
