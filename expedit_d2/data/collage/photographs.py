"""The photographs that textures come from, and bilinear sampling."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from .definition import SPLITS

_TRAIN_COLUMNS = 0.65
_PHOTOS = (
    "astronaut.png",
    "camera.png",
    "chelsea.png",
    "clock_motion.png",
    "coffee.png",
    "coins.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "retina.jpg",
    "rocket.jpg",
)
_MATERIALS = {"grass": "grass.png", "gravel": "gravel.png", "brick": "brick.png"}


def _photo_path(name: str) -> Path:
    spec = find_spec("skimage")
    if spec is None:
        raise ModuleNotFoundError(
            "The collage data set takes its photographs from scikit-image, which is not "
            "installed; run `pip install scikit-image`."
        )
    path = Path(spec.submodule_search_locations[0]) / "data" / name
    if not path.is_file():
        raise FileNotFoundError(
            f"The collage data set needs the photograph {name} that scikit-image's wheels carry, "
            f"but {path} does not exist; install scikit-image from its wheel."
        )
    return path


def _split_part(photo: np.ndarray, split: str) -> np.ndarray:
    """The columns [H, W', C] of a photograph that belong to a split."""
    border = round(photo.shape[1] * _TRAIN_COLUMNS)
    return np.ascontiguousarray(photo[:, :border] if split == "train" else photo[:, border:])


def _halve(texture: np.ndarray) -> np.ndarray:
    """Average 2 x 2 texels, in NumPy so that the result does not depend on library versions."""
    h, w = texture.shape[0] // 2 * 2, texture.shape[1] // 2 * 2
    t = texture[:h, :w]
    return (t[::2, ::2] + t[1::2, ::2] + t[::2, 1::2] + t[1::2, 1::2]) / np.float32(4)


def _pyramid(texture: np.ndarray, levels: int) -> list[np.ndarray]:
    result = [texture]
    for _ in range(levels - 1):
        result.append(_halve(result[-1]))
    return result


@lru_cache(maxsize=len(SPLITS))
def load_photos(split: str) -> list[list[np.ndarray]]:
    """Pyramids of float32 [h, w, 3] in 0..1, one per photograph."""
    pyramids = []
    for name in _PHOTOS:
        with Image.open(_photo_path(name)) as photo:
            pixels = np.asarray(photo.convert("RGB"), dtype=np.float32) / np.float32(255)
        part = _split_part(pixels, split)
        if max(pixels.shape) > 1024:  # crops of a large photograph would show little structure
            part = _halve(part)
        pyramids.append(_pyramid(part, 4))
    return pyramids


@lru_cache(maxsize=len(SPLITS))
def load_materials(split: str) -> dict[str, list[np.ndarray]]:
    """Pyramids of grey float32 [h, w] with mean 0 and standard deviation 1 at the finest level."""
    pyramids = {}
    for name, file in _MATERIALS.items():
        with Image.open(_photo_path(file)) as photo:
            pixels = np.asarray(photo.convert("L"), dtype=np.float32)
        part = _split_part(pixels, split)
        mean = part.mean(dtype=np.float64)
        deviation = part.std(dtype=np.float64)
        pyramids[name] = _pyramid(((part - mean) / deviation).astype(np.float32), 6)
    return pyramids


def _mirror(index: np.ndarray, length: int) -> np.ndarray:
    """Fold any integer index into 0..length-1 by reflection at both ends."""
    index = index % (2 * length)
    return np.minimum(index, 2 * length - 1 - index)


def sample(texture: np.ndarray, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """Bilinear samples of texture [h, w(, C)] at float texel positions of any shape [...]."""
    h, w = texture.shape[:2]
    texels = texture.reshape(h * w, *texture.shape[2:])
    top, left = np.floor(rows).astype(np.int32), np.floor(cols).astype(np.int32)
    down, right = (rows - top).astype(np.float32), (cols - left).astype(np.float32)
    if texture.ndim == 3:
        down, right = down[..., None], right[..., None]
    c0, c1 = _mirror(left, w), _mirror(left + 1, w)

    def along(row: np.ndarray) -> np.ndarray:
        start = _mirror(row, h) * w
        first, second = texels.take(start + c0, axis=0), texels.take(start + c1, axis=0)
        return first + (second - first) * right

    above = along(top)
    return above + (along(top + 1) - above) * down


def sample_pyramid(
    pyramid: list[np.ndarray], rows: np.ndarray, cols: np.ndarray, stride: float
) -> np.ndarray:
    """Sample the level whose texel spacing is closest to that of the samples (stride texels)."""
    level = int(np.clip(round(np.log2(max(stride, 1e-6))), 0, len(pyramid) - 1))
    return sample(pyramid[level], rows / 2**level, cols / 2**level)
