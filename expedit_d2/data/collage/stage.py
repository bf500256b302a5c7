"""The stage of a scene: a ground plane in perspective, and a brick wall or the sky."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .definition import CLASSES
from .photographs import load_materials, load_photos, sample, sample_pyramid

CAMERA_HEIGHT = 1.3
FOCAL = 0.8  # focal length relative to the shorter image side
SKY_DEPTH = 40.0  # also of the far end of the ground under a sky

_TEXELS_PER_METRE = 90.0  # of ground textures: about one texel per pixel nearby, in 256² images
_TINTS = {  # each material's colour is sampled between these two
    "grass": ((0.20, 0.40, 0.14), (0.48, 0.48, 0.20)),
    "gravel": ((0.38, 0.40, 0.46), (0.58, 0.50, 0.42)),
    "brick": ((0.50, 0.24, 0.18), (0.66, 0.52, 0.44)),
    "sky": ((0.28, 0.50, 0.88), (0.62, 0.72, 0.90)),
}


@dataclass
class Stage:
    """The background of the things: depth, classes and colours."""

    horizon: np.ndarray  # [W] row of the horizon in each column
    focal: float  # pixels
    depth: np.ndarray  # [H, W]
    semantic: np.ndarray  # [H, W]
    color: np.ndarray  # [H, W, 3], 0..1
    haze: np.ndarray  # [3]


def _tint(rng: np.random.Generator, material: str) -> np.ndarray:
    low, high = np.array(_TINTS[material])
    return (low + (high - low) * rng.random() + rng.normal(0, 0.03, 3)).astype(np.float32)


def _paint_ground(
    rng: np.random.Generator, split: str, material: str, depth: np.ndarray, lateral: np.ndarray
) -> np.ndarray:
    """Colours [N, 3] of ground points at depth [N] and lateral [N] metres, in perspective."""
    pyramid = load_materials(split)[material]
    scale = _TEXELS_PER_METRE * rng.uniform(0.7, 1.3)
    start = rng.uniform(0, 1024, 2)
    rows, cols = start[0] + depth * scale, start[1] + lateral * scale
    levels = np.clip(np.log2(depth / 2.0).round(), 0, len(pyramid) - 1)
    grey = np.zeros(depth.shape, dtype=np.float32)
    for level in range(int(levels.min()), int(levels.max()) + 1):
        here = levels == level
        grey[here] = sample(pyramid[level], rows[here] / 2**level, cols[here] / 2**level)
    contrast = rng.uniform(0.2, 0.35)
    return _tint(rng, material) * (1 + contrast * grey)[:, None]


def _paint_wall(
    rng: np.random.Generator, split: str, rows: np.ndarray, cols: np.ndarray, scale: float
) -> np.ndarray:
    """Colours [N, 3] of a brick wall at pixels rows [N], cols [N]; scale is pixels over 256."""
    stride = rng.uniform(0.8, 2.0) / scale
    start = rng.uniform(0, 1024, 2)
    rows, cols = start[0] + rows * stride, start[1] + cols * stride
    # The photograph shows the wall rotated by 90 degrees.
    grey = sample_pyramid(load_materials(split)["brick"], cols, rows, stride)
    return _tint(rng, "brick") * (1 + rng.uniform(0.15, 0.3) * grey)[:, None]


def _paint_sky(
    rng: np.random.Generator, split: str, height: np.ndarray, cols: np.ndarray, haze: np.ndarray
) -> np.ndarray:
    """Colours [N, 3] of a sky; height [N] and cols [N] relative to the shorter image side.

    Clouds are a strongly magnified part of a photograph.
    """
    photos = load_photos(split)
    photo = photos[rng.integers(len(photos))][-1].mean(axis=-1)
    stretch = rng.uniform(12, 24)
    start = rng.uniform(0, 256, 2)
    clouds = sample(photo, start[0] + height * stretch * 2, start[1] + cols * stretch)
    clouds = np.clip((clouds - photo.mean()) / (photo.std() + 1e-3), -1, 2)
    clear = np.clip(height / rng.uniform(0.3, 0.6), 0, 1).astype(np.float32)[:, None]
    color = haze * (1 - clear) + _tint(rng, "sky") * clear
    return color + rng.uniform(0.02, 0.09) * clouds[:, None]


def build_stage(rng: np.random.Generator, split: str, frame: tuple[int, int]) -> Stage:
    h, w = frame
    side = min(frame)
    focal = FOCAL * side
    ground = ("grass", "gravel")[rng.integers(2)]
    backdrop = ("brick", "sky")[rng.integers(2)]
    far = rng.uniform(14, 26) if backdrop == "brick" else SKY_DEPTH
    cols = np.arange(w) + 0.5
    horizon = h * rng.uniform(0.3, 0.5) + np.tan(np.radians(rng.uniform(-3, 3))) * (cols - w / 2)
    wave = np.sin(cols / side * rng.uniform(4, 16) + rng.uniform(0, 6))
    border = horizon + focal * CAMERA_HEIGHT / far + rng.uniform(0, 0.01) * side * wave

    rows = (np.arange(h) + 0.5)[:, None]
    is_ground = rows > border
    below = np.maximum(rows - horizon, 1e-3)
    depth = np.where(is_ground, np.minimum(focal * CAMERA_HEIGHT / below, far), far)
    ids = (CLASSES.index(backdrop), CLASSES.index(ground))
    semantic = np.where(is_ground, ids[1], ids[0]).astype(np.uint8)

    haze = rng.uniform(0.62, 0.85) + rng.normal(0, 0.03, 3) + np.array([-0.02, 0, 0.03])
    haze = haze.astype(np.float32)
    color = np.empty((h, w, 3), dtype=np.float32)
    depth = depth.astype(np.float32)
    lateral = (cols - w / 2).astype(np.float32) * depth / np.float32(focal)
    color[is_ground] = _paint_ground(rng, split, ground, depth[is_ground], lateral[is_ground])
    r, c = np.nonzero(~is_ground)
    if backdrop == "brick":
        color[~is_ground] = _paint_wall(rng, split, r, c, side / 256)
    else:
        height = (horizon[c] - r) / side
        color[~is_ground] = _paint_sky(rng, split, height, c / side, haze)
    return Stage(horizon, focal, depth, semantic, color, haze)
