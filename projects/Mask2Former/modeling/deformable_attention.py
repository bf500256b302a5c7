"""Multi-scale deformable attention (Zhu et al., arXiv 2010.04159) in plain PyTorch.

Every query looks at a few points of every level, placed by learnt offsets around its own position.
Where the CUDA operator of the official repository is installed, it is used for CUDA tensors.

Shorthand: B images, Q queries, M heads with D = C / M channels, L levels, P points a level and
S = sum of H * W over the levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

try:
    import MultiScaleDeformableAttention as compiled_op
except ImportError:
    compiled_op = None

__all__ = ["MSDeformAttn", "sample_levels"]

# Images per call of the CUDA operator.
_IMAGES_AT_A_TIME = 64

Sizes = Sequence[tuple[int, int]]


def sample_levels(values: Tensor, sizes: Sizes, locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of bilinear samples, zero outside of the maps.

    Args:
        values: (B, S, M, D), concatenated levels in row-major order.
        sizes: (H, W) of each of the L levels.
        locations: (B, Q, M, L, P, 2), x and y in [0, 1] from edge to edge of the level.
        weights: (B, Q, M, L, P).

    Returns:
        (B, Q, M * D).
    """
    batch, _, heads, channels = values.shape
    total: Tensor | float = 0.0
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # (B * M, Q, L, P, 2)
    weights = weights.transpose(1, 2).flatten(0, 1)[:, None]  # (B * M, 1, Q, L, P)
    levels = values.split([height * width for height, width in sizes], dim=1)
    for level, (value, (height, width)) in enumerate(zip(levels, sizes, strict=True)):
        maps = value.permute(0, 2, 3, 1).reshape(batch * heads, channels, height, width)
        samples = F.grid_sample(maps, grids[:, :, level], align_corners=False)  # (B * M, D, Q, P)
        total = total + (samples * weights[:, :, :, level]).sum(-1)
    return total.reshape(batch, heads * channels, -1).transpose(1, 2)


class _CompiledSampling(torch.autograd.Function):
    """`sample_levels` by the official CUDA operator; sizes and starts are integer tensors."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, sizes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor
    ) -> Tensor:
        arguments = (values, sizes, starts, locations, weights)
        ctx.save_for_backward(*arguments)
        return compiled_op.ms_deform_attn_forward(*arguments, _IMAGES_AT_A_TIME)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, locations, weights = compiled_op.ms_deform_attn_backward(
            *ctx.saved_tensors, grad.contiguous(), _IMAGES_AT_A_TIME
        )
        return values, None, None, locations, weights


def _sample_compiled(values: Tensor, sizes: Sizes, locations: Tensor, weights: Tensor) -> Tensor:
    shapes = torch.tensor(sizes, dtype=torch.long, device=values.device)
    areas = shapes.prod(1)
    starts = areas.cumsum(0) - areas
    return _CompiledSampling.apply(
        values.contiguous(), shapes, starts, locations.contiguous(), weights.contiguous()
    )


class MSDeformAttn(nn.Module):
    """Deformable attention over several levels, with the official parameter names."""

    def __init__(self, dim: int, levels: int, heads: int, points: int) -> None:
        """
        Args:
            dim: C.
            levels: L.
            heads: M.
            points: P.

        Raises:
            ValueError: if C is not a multiple of M.
        """
        super().__init__()
        if dim % heads:
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.CONVS_DIM {dim} must be a multiple of "
                f"DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS {heads}"
            )
        self.shape = (heads, levels, points)
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Equal weights; head m looks in direction m, its point p is p + 1 cells away."""
        heads, levels, points = self.shape
        angle = torch.arange(heads) * (2 * math.pi / heads)
        direction = torch.stack((angle.cos(), angle.sin()), dim=-1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, points + 1)[:, None] * direction[:, None, None]  # (M, 1, P, 2)
        nn.init.zeros_(self.sampling_offsets.weight)
        self.sampling_offsets.bias.copy_(steps.expand(-1, levels, -1, -1).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, query: Tensor, reference: Tensor, values: Tensor, sizes: Sizes) -> Tensor:
        """
        Args:
            query: (B, Q, C).
            reference: (Q, 2), x and y in [0, 1] of each query, the same in every level.
            values: (B, S, C).
            sizes: (H, W) of each level.

        Returns:
            (B, Q, C).
        """
        heads, levels, points = self.shape
        batch, queries, _ = query.shape
        offsets = self.sampling_offsets(query).view(batch, queries, heads, levels, points, 2)
        # Offsets are in cells of the level.
        cells = offsets.new_tensor([(width, height) for height, width in sizes])
        locations = reference[None, :, None, None, None] + offsets / cells[:, None]
        weights = self.attention_weights(query).view(batch, queries, heads, levels * points)
        weights = weights.softmax(-1).view(batch, queries, heads, levels, points)
        values = self.value_proj(values).unflatten(2, (heads, -1))
        sample = _sample_compiled if compiled_op and values.is_cuda else sample_levels
        return self.output_proj(sample(values, sizes, locations, weights))
