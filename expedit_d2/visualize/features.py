"""Feature maps as colours: what a backbone without a head says of an image."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["color_features", "differ_features"]


def color_features(plain: Tensor, *others: Tensor) -> list[np.ndarray]:
    """The three principal components of a feature map as red, green and blue.

    Args:
        plain: (C, H, W), whose components are taken and scaled.
        others: of the same shape, drawn by the same components, so that colours can be compared.

    Returns:
        (H, W, 3) uint8 for each map, the plain one first.
    """
    height, width = plain.shape[1:]
    rows = plain.flatten(1).T.float()
    mean = rows.mean(0)
    # Eigenvectors of the covariance: no random start, as torch.pca_lowrank has.
    components = torch.linalg.eigh((rows - mean).T @ (rows - mean)).eigenvectors[:, -3:].flip(1)
    # The sign of a component says nothing; this one makes it the same everywhere.
    components = components * components.sum(0).sign()
    projected = (rows - mean) @ components
    low, high = torch.quantile(projected, torch.tensor([0.02, 0.98]), dim=0)
    drawn = []
    for features in (plain, *others):
        projected = (features.flatten(1).T.float() - mean) @ components
        scaled = ((projected - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
        drawn.append((scaled * 255).round().byte().view(height, width, 3).numpy())
    return drawn


def differ_features(plain: Tensor, other: Tensor) -> np.ndarray:
    """How far two feature maps (C, H, W) are apart: (H, W) of 1 - cosine, 0 to 2."""
    cosine = torch.cosine_similarity(plain.float(), other.float(), dim=0)
    return (1 - cosine).numpy()
