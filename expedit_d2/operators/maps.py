"""Token maps: pooling to a grid, and the positions of tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tracing import is_exporting, shape_of

__all__ = ["adaptive_pool", "grid_positions", "on_device"]


def adaptive_pool(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean of each cell of a grid, (B, H, W, D) to (B, h, w, D)."""
    if not is_exporting():
        return F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), grid).permute(0, 2, 3, 1)
    # The same in two products: ONNX has no such pooling, and torch's workaround fixes the size to
    # that of the example.
    height, width, channels = shape_of(x)[1:]
    rows, cols = (_means(n, cells, x) for n, cells in zip((height, width), grid, strict=True))
    x = (rows @ x.flatten(2)).unflatten(2, (width, channels))
    return cols @ x


def _means(size: int, cells: int, like: Tensor) -> Tensor:
    """(cells, size): weight of each token of an axis in the mean of each cell."""
    cell = torch.arange(cells, device=like.device)[:, None]
    token = torch.arange(size, device=like.device)
    first, last = cell * size // cells, ((cell + 1) * size + cells - 1) // cells
    inside = ((token >= first) & (token < last)).to(like.dtype)
    return inside / inside.sum(1, keepdim=True)


def grid_positions(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Row and column of every token, (1, H, W, 2) fp32."""
    rows = torch.arange(height, device=device, dtype=torch.float32)
    cols = torch.arange(width, device=device, dtype=torch.float32)
    return torch.stack(
        [rows[:, None].expand(-1, width), cols[None].expand(height, -1)], dim=-1
    ).unsqueeze(0)


def on_device(numbers: tuple[float, ...], like: Tensor) -> Tensor:
    """Numbers as a tensor (n,) of the type of ``like``, created on its device.

    A tensor made from a list would be copied there, and the host would wait for that.
    """
    return torch.stack([like.new_full((), number) for number in numbers])
