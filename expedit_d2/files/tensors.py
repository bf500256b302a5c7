"""Digests of tensors, and conversion to fp16."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["bytes_of", "digest_tensors", "halved"]


def bytes_of(x: Tensor) -> memoryview:
    """The values of a tensor in row-major order."""
    return memoryview(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def digest_tensors(digest: Any, tensors: Mapping[str, Tensor]) -> None:
    """Update a `hashlib` digest with names, dtypes, shapes and values of tensors."""
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(bytes_of(tensor))


def halved(x: Tensor) -> Tensor:
    """A floating-point tensor in fp16 unless a value overflows; other tensors unchanged."""
    half = x.half() if x.is_floating_point() else x
    return half if torch.isfinite(half).all() else x
