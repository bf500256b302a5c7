"""Base class of models that normalise their images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["NormalizingModel"]


class NormalizingModel(nn.Module):
    """A model with ``MODEL.PIXEL_MEAN`` and ``MODEL.PIXEL_STD``."""

    def __init__(self, pixel_mean: Sequence[float], pixel_std: Sequence[float]) -> None:
        """
        Args:
            pixel_mean, pixel_std: mean and standard deviation of each channel.
        """
        super().__init__()
        for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            values = torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)
            self.register_buffer(name, values, persistent=False)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def normalize(self, image: Tensor) -> Tensor:
        """Normalise an image (C, H, W), 0 to 255, any dtype, on the model's device."""
        return (image.to(self.device) - self.pixel_mean) / self.pixel_std
