"""Average pooling and bilinear upsampling: what there is without looking at the tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..operators import Clusters, adaptive_pool, shape_of
from ..settings import Settings
from .grid import GridMethod, Record

__all__ = ["Pool"]


class Pool(GridMethod):
    """Cells of a regular grid, whatever is in them."""

    @staticmethod
    def cluster(
        settings: Settings,
        features: Tensor,
        grid: tuple[int, int],
        weights: Tensor | None,
        positions: Tensor | None,
    ) -> Clusters:
        height, width = shape_of(features)[1:3]
        if weights is None:
            weights = features.new_ones(shape_of(features)[:3], dtype=torch.float32)
        cells = adaptive_pool(weights[..., None].float(), grid)
        shares = cells.clamp_min(torch.finfo(torch.float32).tiny)

        def mean(x: Tensor) -> Tensor:
            return adaptive_pool(x.float() * weights[..., None], grid) / shares

        return Clusters(
            mean(features).to(features.dtype),
            cells[..., 0] * (height * width / (grid[0] * grid[1])),
            None if positions is None else mean(positions),
        )

    @staticmethod
    def restore(settings: Settings, features: Tensor, record: Record) -> Tensor:
        size = shape_of(record.tokens)[1:3]
        channels_first = features.permute(0, 3, 1, 2).float()
        out = F.interpolate(channels_first, size, mode="bilinear", align_corners=False)
        return out.permute(0, 2, 3, 1).to(features.dtype)
