"""Average pooling and bilinear upsampling: the baseline that does not look at the tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..operators import Clusters, adaptive_pool
from ..settings import METHOD_REGISTRY, Settings
from ..tracing import shape_of
from .grid import GridMethod, Record

__all__ = ["Pool"]


@METHOD_REGISTRY.register("pool")
class Pool(GridMethod):
    """Cells of a regular grid, whatever their content."""

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

        if positions is not None:
            # A cell of padding alone keeps its place in the window.
            positions = torch.where(cells > 0, mean(positions), adaptive_pool(positions, grid))
        return Clusters(
            mean(features).to(features.dtype),
            cells[..., 0] * (height * width / (grid[0] * grid[1])),
            positions,
        )

    @staticmethod
    def restore(settings: Settings, features: Tensor, record: Record) -> Tensor:
        size = shape_of(record.tokens)[1:3]

        def upsample(x: Tensor) -> Tensor:
            x = F.interpolate(x.permute(0, 3, 1, 2), size, mode="bilinear", align_corners=False)
            return x.permute(0, 2, 3, 1)

        out = upsample(features.float())
        if record.valid is not None:
            # Interpolate between cells with tokens only; cells of padding have no value.
            filled = record.valid[..., None]
            shares = upsample(filled.float()).clamp_min(torch.finfo(torch.float32).tiny)
            out = upsample(features.float().masked_fill(~filled, 0)) / shares
        return out.to(features.dtype)
