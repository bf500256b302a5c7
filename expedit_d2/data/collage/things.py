"""The things of a scene: positions, shadows and textures."""

from __future__ import annotations

import numpy as np

from .definition import CLASSES, THING_CLASSES
from .photographs import load_photos, sample_pyramid
from .silhouettes import Thing, keep_visible, lowest_point
from .stage import CAMERA_HEIGHT, Stage

_DIAMETERS = (20 / 256, 120 / 256)  # apparent diameters relative to the shorter image side


def _draw_thing(rng: np.random.Generator, stage: Stage, frame: tuple[int, int]) -> Thing:
    h, w = frame
    low, high = np.array(_DIAMETERS) * min(frame)
    diameter = float(np.exp(rng.uniform(np.log(low), np.log(high))))
    radius = diameter / 2
    depth = stage.focal * rng.uniform(0.85, 1.2) / diameter  # its true size is about a metre
    category = int(rng.integers(len(THING_CLASSES)))
    angle = rng.uniform(-np.pi, np.pi)
    x = rng.uniform(0.03, 0.97) * w
    touch = stage.horizon[int(x)] + stage.focal * CAMERA_HEIGHT / depth
    stands = rng.random() < 0.6
    if stands:
        y = touch - lowest_point(THING_CLASSES[category], angle) * radius
    else:  # above the row where it would stand, so not below the ground
        lowest = min(touch - 1.15 * radius, h - radius / 2)
        y = rng.uniform(min(radius, lowest), lowest)
    return Thing(category, x, y, radius, angle, depth, touch if stands else None, frame)


def draw_things(rng: np.random.Generator, stage: Stage, frame: tuple[int, int]) -> list[Thing]:
    """Three to eight things, nearest first, each visible as defined by ``keep_visible``."""
    wanted = int(rng.integers(3, 9))
    things: list[Thing] = []
    for _ in range(8 * wanted):
        things = keep_visible([*things, _draw_thing(rng, stage, frame)], frame)
        if len(things) == wanted:
            break
    return things


def cast_shadow(stage: Stage, thing: Thing) -> None:
    """Darken the ground where a standing thing touches it, in place."""
    h, w = thing.frame
    r = thing.radius
    rows = np.arange(max(int(thing.base - r), 0), min(int(thing.base + r), h))
    cols = np.arange(max(int(thing.x - 2 * r), 0), min(int(thing.x + 2 * r), w))
    if not (rows.size and cols.size):
        return
    spot = np.ix_(rows, cols)
    dy = ((rows + 0.5 - thing.base) / (0.22 * r))[:, None]
    dx = ((cols + 0.5 - thing.x) / (0.8 * r))[None, :]
    is_ground = stage.semantic[spot] <= CLASSES.index("gravel")
    shade = 1 - 0.5 * np.exp(-(dx**2) - dy**2) * is_ground
    stage.color[spot] *= shade[..., None].astype(np.float32)


def fill_thing(rng: np.random.Generator, split: str, thing: Thing, light: float) -> np.ndarray:
    """Colours [h, w, 3] over a thing's window: a jittered crop of a photograph, shaded by light."""
    photos = load_photos(split)
    pyramid = photos[rng.integers(len(photos))]
    stride = float(2 ** rng.uniform(-0.5, 1.5))
    start = (rng.uniform(0, 1, 2) * pyramid[0].shape[:2]).astype(np.float32)
    flip = 1 if rng.random() < 0.5 else -1
    rows = start[0] + thing.v * (thing.radius * stride)
    cols = start[1] + thing.u * (thing.radius * stride * flip)
    crop = sample_pyramid(pyramid, rows, cols, stride)
    mean = crop.mean(axis=(0, 1))
    target = (0.4 * mean + 0.6 * rng.uniform(0.1, 0.95, 3)).astype(np.float32)
    fill = (crop - mean) * np.float32(rng.uniform(0.7, 1.3)) + target
    # Python floats keep float32 arrays float32. The light's direction does not rotate with the
    # thing.
    turn = thing.angle + light
    across = float(np.cos(turn)) * thing.u - float(np.sin(turn)) * thing.v
    return fill * (1 + 0.22 * across + 0.06 * (1 - thing.u**2 - thing.v**2))[..., None]
