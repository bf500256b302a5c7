"""Sampling masks at points, and choosing points (PointRend, Kirillov et al., arXiv 1912.08193).

Points are x and y in [0, 1] from edge to edge of a mask, whatever its resolution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["sample_at", "uncertain_points"]


def sample_at(masks: Tensor, points: Tensor) -> Tensor:
    """Bilinear samples of masks.

    Args:
        masks: (N, H, W).
        points: (P, 2), the same for every mask, or (N, P, 2).

    Returns:
        (N, P).
    """
    grid = 2 * points - 1
    if points.dim() == 2:
        return F.grid_sample(masks[None], grid[None, :, None], align_corners=False)[0, :, :, 0]
    return F.grid_sample(masks[:, None], grid[:, :, None], align_corners=False)[:, 0, :, 0]


def uncertain_points(logits: Tensor, count: int, oversample: float, importance: float) -> Tensor:
    """Random points, most of them where a mask is most uncertain.

    Args:
        logits: (N, H, W), masks before the sigmoid.
        count: P.
        oversample: number of candidates for uncertain points, as a multiple of P.
        importance: share of uncertain points; the others are uniform.

    Returns:
        (N, P, 2).
    """
    masks = logits.shape[0]
    candidates = torch.rand(masks, int(count * oversample), 2, device=logits.device)
    certainty = sample_at(logits, candidates).abs()
    chosen = int(count * importance)
    index = certainty.topk(chosen, dim=1, largest=False).indices
    uncertain = candidates.gather(1, index[..., None].expand(-1, -1, 2))
    uniform = torch.rand(masks, count - chosen, 2, device=logits.device)
    return torch.cat((uncertain, uniform), dim=1)
