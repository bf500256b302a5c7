"""A transformer of any library behind Detectron2's interface: images in, maps of features out."""

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
    """A model of a library, and how the library itself prepares images for it.

    Attributes:
        model: of the library.
        features: from it and normalised images (B, 3, H, W) to its last map (B, C, h, w).
        size: (height, width) of its images, in pixels.
        patch: side of a patch, in pixels.
        mean, std: of each channel, RGB from 0 to 1.
        resampling: how images are resized.
    """

    model: nn.Module
    features: Callable[[nn.Module, Tensor], Tensor]
    size: tuple[int, int]
    patch: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resampling: Image.Resampling = Image.Resampling.BICUBIC


class FeatureModel(nn.Module):
    """From Detectron2's list of inputs to the map (C, h, w) of each, under both of its keys."""

    def __init__(self, source: Source, size: tuple[int, int]) -> None:
        """
        Args:
            source: what is run.
            size: (height, width) that `prepare` gives images, in pixels.
        """
        super().__init__()
        self.model = source.model
        self.features = source.features
        self.size, self.resampling = size, source.resampling
        # As Detectron2's models have them, of pixels from 0 to 255.
        for name, values in (("pixel_mean", source.mean), ("pixel_std", source.std)):
            pixels = 255 * torch.tensor(values).view(3, 1, 1)
            self.register_buffer(name, pixels, persistent=False)

    def prepare(self, record: dict[str, Any]) -> dict[str, Any]:
        """An input from a record with ``file_name``: all of the image, resized to `size`."""
        height, width = self.size
        image = load_image(record["file_name"]).convert("RGB")
        pixels = np.array(image.resize((width, height), self.resampling))
        image = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
        return {**record, "image": image, "height": height, "width": width}

    def forward(self, inputs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """
        Args:
            inputs: each with an ``image`` (3, H, W), RGB, 0 to 255; all of one size.
        """
        images = torch.stack([item["image"] for item in inputs]).to(self.pixel_mean.device)
        maps = self.features(self.model, (images - self.pixel_mean) / self.pixel_std)
        return [{"features": features, "feature_directions": features} for features in maps]


def drop_prefix(tokens: Tensor, images: Tensor, patch: int) -> Tensor:
    """The map (B, C, h, w) in tokens (B, N, C), which end with it; class and registers go first."""
    height, width = (side // patch for side in images.shape[-2:])
    return tokens[:, -height * width :].transpose(1, 2).unflatten(2, (height, width))
