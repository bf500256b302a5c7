"""Losses of depth: scale-invariant logarithmic for metres, affine-invariant for inverse depth."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gradient_loss", "normalized", "silog_loss", "trimmed_loss"]

_TINY = 1e-6


def silog_loss(prediction: Tensor, target: Tensor, valid: Tensor, variance: float = 0.5) -> Tensor:
    """Root of the scale-invariant logarithmic error (Eigen et al., arXiv 1406.2283, section 3.2).

    sqrt(mean(d^2) - variance * mean(d)^2), with d = log(prediction) - log(target).

    Args:
        prediction, target: (H, W) depth.
        valid: (H, W) bool, pixels that have a target.
        variance: 0 gives the RMS of d, 1 ignores a common scale.
    """
    if not valid.any():
        return prediction.sum() * 0.0
    d = prediction[valid].clamp_min(_TINY).log() - target[valid].log()
    # The root has no gradient at 0.
    return (d.square().mean() - variance * d.mean().square()).clamp_min(_TINY**2).sqrt()


def normalized(x: Tensor, valid: Tensor) -> Tensor:
    """Remove shift and scale: subtract the median, divide by the mean absolute deviation from it.

    Ranftl et al., arXiv 1907.01341, equation 5.

    Args:
        x: (H, W).
        valid: (H, W) bool, at least one; the pixels whose median and deviation count.
    """
    values = x[valid]
    shift = values.median()
    return (x - shift) / (values - shift).abs().mean().clamp_min(_TINY)


def trimmed_loss(residual: Tensor, valid: Tensor, keep: float = 0.8) -> Tensor:
    """Half the mean absolute residual without the largest ones (arXiv 1907.01341, equation 7).

    Args:
        residual: (H, W), of two normalised maps.
        valid: (H, W) bool.
        keep: share of the pixels to keep.
    """
    errors = residual[valid].abs().sort().values
    return errors[: max(1, int(keep * len(errors)))].sum() / (2 * len(errors))


def gradient_loss(residual: Tensor, valid: Tensor, scales: int = 4) -> Tensor:
    """Mean absolute gradient of the residual at several scales (arXiv 1907.01341, equation 11).

    Args:
        residual: (H, W), of two normalised maps.
        valid: (H, W) bool; a gradient counts between two valid pixels.
        scales: each takes every second pixel of the one before.
    """
    total = residual.new_zeros(())
    for scale in range(scales):
        r, v = residual[:: 2**scale, :: 2**scale], valid[:: 2**scale, :: 2**scale]
        for axis in range(2):
            size = r.shape[axis] - 1
            both = v.narrow(axis, 0, size) & v.narrow(axis, 1, size)
            steps = torch.where(both, r.diff(dim=axis).abs(), 0.0)
            total = total + steps.sum() / v.sum().clamp_min(1)
    return total
