"""Tracing on PyTorch's meta device: shapes without weights or arithmetic, for counting FLOPs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["traceable"]


def _as_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """A convolution as a product with the same multiply-adds, without the bias (not counted).

    Raises:
        ValueError: for dilation or groups.
    """
    if tuple(dilation) != (1, 1) or groups != 1:
        raise ValueError(f"cannot count a convolution with dilation {dilation}, {groups} groups")
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    for axis, side, step in zip((2, 3), weight.shape[2:], stride, strict=True):
        x = x.unfold(axis, side, step)
    patches = x.permute(0, 2, 3, 1, 4, 5).flatten(3)  # (B, h, w, C * side * side)
    return (patches @ weight.flatten(1).t()).permute(0, 3, 1, 2)


class _ConvolutionsAsProducts(TorchFunctionMode):
    """Replaces convolutions, which do not take the tensor sizes of torch.jit's tracing.

    See PyTorch 2.14's ``_meta_registrations.meta_conv``; products and views do take them.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        function = _as_product if function is torch.conv2d else function
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def traceable() -> Iterator[None]:
    """Let torch.jit trace models on the meta device; only the shapes of the results are right.

    Autocast is replaced because it does not support that device, even when disabled.
    """
    no_autocast = mock.patch.object(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    with no_autocast, _ConvolutionsAsProducts():
        yield
