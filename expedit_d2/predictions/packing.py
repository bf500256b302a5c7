"""Maps as compressed records."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor

from .prediction import Record

__all__ = ["pack", "pack_labels", "unpack"]


def pack(values: np.ndarray) -> Record:
    """Compress a map in row-major order."""
    return {"data": np.frombuffer(zlib.compress(values.tobytes(), 1), np.uint8)}


def unpack(record: Record, dtype: type) -> np.ndarray:
    return np.frombuffer(zlib.decompress(record["data"].tobytes()), dtype)


def pack_labels(labels: Tensor) -> Record:
    return pack(labels.to("cpu", torch.int32).numpy())
