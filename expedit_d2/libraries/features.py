"""Feature maps of a transformer of any library, with Detectron2's model interface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..data.images import load_image

__all__ = ["IMAGENET", "FeatureModel", "Source", "drop_prefix"]

#: Mean and standard deviation of ImageNet's pixels, RGB from 0 to 1.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Source:
    """A model of a library, and the preprocessing that the library defines for it.

    Attributes:
        model: the library's module.
        features: maps the model and normalised images (B, 3, H, W) to its last feature map
            (B, C, h, w).
        size: default (height, width) of the images, in pixels.
        patch: side of a patch, in pixels.
        mean, std: of each channel, RGB from 0 to 1.
        resampling: filter to resize images with.
    """

    model: nn.Module
    features: Callable[[nn.Module, Tensor], Tensor]
    size: tuple[int, int]
    patch: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resampling: Image.Resampling = Image.Resampling.BICUBIC


class FeatureModel(nn.Module):
    """Detectron2's list of inputs to feature maps (C, h, w), under both keys of such outputs."""

    def __init__(self, source: Source, size: tuple[int, int]) -> None:
        """
        Args:
            source: the model and its preprocessing.
            size: (height, width) in pixels that `prepare` resizes images to.
        """
        super().__init__()
        self.model = source.model
        self.features = source.features
        self.size, self.resampling = size, source.resampling
        # For pixels from 0 to 255, as in Detectron2's models.
        for name, values in (("pixel_mean", source.mean), ("pixel_std", source.std)):
            pixels = 255 * torch.tensor(values).view(3, 1, 1)
            self.register_buffer(name, pixels, persistent=False)

    def prepare(self, record: dict[str, Any]) -> dict[str, Any]:
        """Model input for a record with ``file_name``: the whole image, resized to `size`."""
        height, width = self.size
        image = load_image(record["file_name"]).convert("RGB")
        pixels = np.array(image.resize((width, height), self.resampling))
        image = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
        return {**record, "image": image, "height": height, "width": width}

    def predict(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) to their maps (B, C, h, w)."""
        return self.features(self.model, images)

    def forward(self, inputs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """
        Args:
            inputs: each with an ``image`` (3, H, W), RGB, 0 to 255; all of the same size.
        """
        images = torch.stack([item["image"] for item in inputs]).to(self.pixel_mean.device)
        maps = self.predict((images - self.pixel_mean) / self.pixel_std)
        return [{"features": features, "feature_directions": features} for features in maps]


def drop_prefix(tokens: Tensor, images: Tensor, patch: int) -> Tensor:
    """Tokens (B, N, C) as a map (B, C, h, w), without the prefix tokens."""
    height, width = (side // patch for side in images.shape[-2:])
    return tokens[:, -height * width :].transpose(1, 2).unflatten(2, (height, width))
