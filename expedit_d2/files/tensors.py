"""Tensors as bytes: digests of what they hold, and halves of their size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["bytes_of", "digest_tensors", "halved"]


def bytes_of(x: Tensor) -> memoryview:
    """The values of a tensor, row by row."""
    return memoryview(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def digest_tensors(digest: Any, tensors: Mapping[str, Tensor]) -> None:
    """Feed names, types, shapes and values of tensors to a digest of `hashlib`."""
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(bytes_of(tensor))


def halved(x: Tensor) -> Tensor:
    """A tensor in fp16, if it is floating-point and no value becomes an infinity; else itself."""
    half = x.half() if x.is_floating_point() else x
    return half if torch.isfinite(half).all() else x
