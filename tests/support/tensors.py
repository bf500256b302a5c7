"""How far two results are apart, models in which nothing is zero, images of equal tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

#: Every token its own cluster: nothing is lost.
IDENTITY = {"temperature": 1e6, "neighbors": 1}


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value expected."""
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def maps_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest `error` of several maps."""
    return max(error(a, e) for a, e in zip(actual, expected, strict=True))


def distance(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference, relative to the norm of what is expected; of any types."""
    assert torch.isfinite(actual).all()
    return ((actual.float() - expected).norm() / expected.norm()).item()


@torch.no_grad()
def perturbed(model: nn.Module, std: float = 0.1, relative: float | None = None) -> nn.Module:
    """The model with noise on all parameters, of ``relative`` on those of relative positions.

    Nothing in it is zero or one then, so that every parameter matters.
    """
    for name, parameter in model.named_parameters():
        scale = std if relative is None or "rel" not in name else relative
        parameter.add_(torch.randn_like(parameter) * scale)
    return model.eval()


def constant_cells(
    size: tuple[int, int], grid: tuple[int, int], patch: int = 4, batch: int = 2
) -> Tensor:
    """Images whose tokens are equal within each cell of the grid: a random patch for each cell.

    ``size`` and ``grid`` count tokens and cells; the images are (B, 3, H * patch, W * patch).
    """
    rows, cols = (torch.arange(s) * g // s for s, g in zip(size, grid, strict=True))
    patches = torch.randn(batch, 3, *grid, patch, patch)[:, :, rows][:, :, :, cols]
    return patches.transpose(3, 4).flatten(4, 5).flatten(2, 3)
