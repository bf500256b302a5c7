"""Colour augmentation of SSD (Liu et al., arXiv 1512.02325), without OpenCV."""

from __future__ import annotations

import numpy as np
from detectron2.data import transforms as T
from fvcore.transforms.transform import Transform
from PIL import Image

__all__ = ["ColorAugSSD"]

_BRIGHTNESS = 32.0  # of 255
_CONTRAST = (0.5, 1.5)
_SATURATION = (0.5, 1.5)
_HUE = 36.0  # degrees


def _to_uint8(values: np.ndarray) -> np.ndarray:
    return values.clip(0, 255).astype(np.uint8)


class _Distortion(Transform):
    """The colour distortion with sampled parameters."""

    def __init__(
        self,
        rgb: bool,
        shift: float,
        contrast: float,
        saturation: float,
        hue: float,
        contrast_first: bool,
    ) -> None:
        super().__init__()
        self._set_attributes(locals())

    def apply_image(self, image: np.ndarray, *args: object) -> np.ndarray:
        """uint8 (H, W, 3) to uint8 (H, W, 3)."""
        image = image if self.rgb else image[..., ::-1]
        image = _to_uint8(image + np.float32(self.shift))
        if self.contrast_first:
            image = self._change_hsv(self._change_contrast(image))
        else:
            image = self._change_contrast(self._change_hsv(image))
        return np.ascontiguousarray(image if self.rgb else image[..., ::-1])

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return coords

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return segmentation

    def _change_contrast(self, image: np.ndarray) -> np.ndarray:
        return _to_uint8(image * np.float32(self.contrast))

    def _change_hsv(self, image: np.ndarray) -> np.ndarray:
        hsv = np.array(Image.fromarray(np.ascontiguousarray(image)).convert("HSV"))
        hsv[..., 1] = _to_uint8(hsv[..., 1] * np.float32(self.saturation))
        # Pillow's hue has 256 steps.
        turn = round(self.hue * 256 / 360)
        hsv[..., 0] = ((hsv[..., 0].astype(np.int16) + turn) % 256).astype(np.uint8)
        return np.asarray(Image.fromarray(hsv, mode="HSV").convert("RGB"))


class ColorAugSSD(T.Augmentation):
    """Random brightness, contrast, saturation and hue, each with probability 1/2."""

    def __init__(self, image_format: str) -> None:
        """
        Args:
            image_format: "RGB" or "BGR".

        Raises:
            ValueError: for another format.
        """
        super().__init__()
        if image_format not in ("RGB", "BGR"):
            raise ValueError(
                "INPUT.COLOR_AUG_SSD needs INPUT.FORMAT 'RGB' or 'BGR', got " + repr(image_format)
            )
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> _Distortion:
        def maybe(low: float, high: float, otherwise: float) -> float:
            return np.random.uniform(low, high) if np.random.randint(2) else otherwise

        return _Distortion(
            rgb=self.image_format == "RGB",
            shift=maybe(-_BRIGHTNESS, _BRIGHTNESS, 0.0),
            contrast=maybe(*_CONTRAST, 1.0),
            saturation=maybe(*_SATURATION, 1.0),
            hue=maybe(-_HUE, _HUE, 0.0),
            contrast_first=bool(np.random.randint(2)),
        )
