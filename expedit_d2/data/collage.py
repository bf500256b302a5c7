"""The embedded labelled data set "collage": small scenes with exact labels, made by this package.

A scene is a ground plane (grass or gravel) under a backdrop (a brick wall or the sky), with three
to eight silhouettes (disk, square, triangle, star, ring, cross) standing on the ground or hanging
in the air. All texture is photographic. Every label is exact because the scene is rendered from
it: visible instance masks, panoptic ids, semantic classes and metric depth.

The photographs are those that the scikit-image wheel itself carries; nothing is downloaded. Only
pictures that scikit-image documents as CC0, public domain or without known restrictions are used:

=====================  =======================================  =====================
file                   what, by whom                            licence
=====================  =======================================  =====================
astronaut.png          Eileen Collins, NASA                     public domain
brick.png              brick wall, CC0Textures "Bricks25"       CC0
camera.png             cameraman, Lav Varshney                  CC0
chelsea.png            a cat, Stefan van der Walt               CC0
clock_motion.png       a wall clock, Stefan van der Walt        public domain
coffee.png             a cup, Rachel Michetti                   CC0
coins.png              Greek coins, Brooklyn Museum             no known restrictions
grass.png              grass, DeviantArt "Grass 01" linolafett  CC0
gravel.png             gravel, CC0Textures "Gravel04"           CC0
hubble_deep_field.jpg  eXtreme Deep Field, NASA                 public domain
ihc.png                stained tissue, CMMI                     no known restrictions
retina.jpg             fundus, Mikael Häggström                 CC0
rocket.jpg             launch of DSCOVR, SpaceX                 public domain
=====================  =======================================  =====================

The two splits never show the same piece of a photograph: training scenes take their texture from
the left 65 % of every picture, validation scenes from the rest.

Shapes: H, W are the image height and width in pixels; lengths are metres unless named pixels.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

#: Raise whenever a scene of the same (split, index) would look different: it names the folder.
VERSION = 2

THING_CLASSES = ("disk", "square", "triangle", "star", "ring", "cross")
STUFF_CLASSES = ("grass", "gravel", "brick", "sky")
CLASSES = THING_CLASSES + STUFF_CLASSES  # position = contiguous id; COCO category id = position + 1
COLORS = (
    (220, 20, 60),
    (0, 110, 230),
    (250, 170, 30),
    (170, 60, 220),
    (0, 190, 190),
    (255, 105, 180),
    (90, 150, 50),
    (150, 140, 120),
    (165, 80, 50),
    (120, 180, 240),
)

SPLITS = ("train", "val")
COUNTS = {"train": 2000, "val": 200}
SIZE = (256, 256)
IGNORE_LABEL = 255
LABEL_DIVISOR = 1000  # panoptic id = COCO category id * LABEL_DIVISOR + number in the image
DEPTH_SCALE = 1000  # depth PNG values per metre

CAMERA_HEIGHT = 1.3
FOCAL = 0.8  # focal length over the shorter image side
SKY_DEPTH = 40.0  # also where the ground ends under a sky
MIN_SIDE = 64
MIN_VISIBLE_PIXELS = 40
MIN_VISIBLE_FRACTION = 0.15

_SEED = 1
_DIAMETERS = (20 / 256, 120 / 256)  # apparent diameters over the shorter image side
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
_TEXELS_PER_METRE = 90.0  # of ground texture: about one texel a pixel where a 256² image begins
_TINTS = {  # each material's colour is drawn between these two
    "grass": ((0.20, 0.40, 0.14), (0.48, 0.48, 0.20)),
    "gravel": ((0.38, 0.40, 0.46), (0.58, 0.50, 0.42)),
    "brick": ((0.50, 0.24, 0.18), (0.66, 0.52, 0.44)),
    "sky": ((0.28, 0.50, 0.88), (0.62, 0.72, 0.90)),
}


@dataclass(frozen=True)
class Scene:
    """One rendered scene and its labels.

    Attributes:
        image: uint8 RGB [H, W, 3].
        panoptic: int32 [H, W], a segment's id at each pixel; never 0.
        semantic: uint8 [H, W], contiguous class ids, positions in ``CLASSES``.
        depth: float32 [H, W] in metres along the optical axis.
        segments: one dict a segment with ``id``, ``category_id`` (contiguous) and ``isthing``;
            things first, nearest first.
    """

    image: np.ndarray
    panoptic: np.ndarray
    semantic: np.ndarray
    depth: np.ndarray
    segments: list[dict]

    def instances(self) -> list[tuple[int, np.ndarray]]:
        """Returns (contiguous class id, visible bool mask [H, W]) for every thing."""
        return [
            (segment["category_id"], self.panoptic == segment["id"])
            for segment in self.segments
            if segment["isthing"]
        ]


# ------------------------------------------------------------------------------- photographs


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
    """Averages 2 x 2 texels; by hand so that no library version can change the bytes."""
    h, w = texture.shape[0] // 2 * 2, texture.shape[1] // 2 * 2
    t = texture[:h, :w]
    return (t[::2, ::2] + t[1::2, ::2] + t[::2, 1::2] + t[1::2, 1::2]) / np.float32(4)


def _pyramid(texture: np.ndarray, levels: int) -> list[np.ndarray]:
    result = [texture]
    for _ in range(levels - 1):
        result.append(_halve(result[-1]))
    return result


@lru_cache(maxsize=len(SPLITS))
def _load_photos(split: str) -> list[list[np.ndarray]]:
    """Pyramids of float32 [h, w, 3] in 0..1, one a photograph."""
    pyramids = []
    for name in _PHOTOS:
        with Image.open(_photo_path(name)) as photo:
            pixels = np.asarray(photo.convert("RGB"), dtype=np.float32) / np.float32(255)
        part = _split_part(pixels, split)
        if max(pixels.shape) > 1024:  # a crop of a huge photograph would show no structure
            part = _halve(part)
        pyramids.append(_pyramid(part, 4))
    return pyramids


@lru_cache(maxsize=len(SPLITS))
def _load_materials(split: str) -> dict[str, list[np.ndarray]]:
    """Pyramids of grey float32 [h, w] with mean 0 and deviation 1 at the finest level."""
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
    """Folds any integer index into 0..length-1, reflecting at both ends."""
    index = index % (2 * length)
    return np.minimum(index, 2 * length - 1 - index)


def _sample(texture: np.ndarray, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
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


def _sample_pyramid(
    pyramid: list[np.ndarray], rows: np.ndarray, cols: np.ndarray, stride: float
) -> np.ndarray:
    """Samples the level whose texels are about as far apart as the samples (stride texels)."""
    level = int(np.clip(round(np.log2(max(stride, 1e-6))), 0, len(pyramid) - 1))
    return _sample(pyramid[level], rows / 2**level, cols / 2**level)


# --------------------------------------------------------------------------------- silhouettes


def _distance_to_star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """A pentagram is where at most one of its five edge lines has the point outside."""
    angles = np.arange(5) * (2 * np.pi / 5) - np.pi / 2  # each line cuts off one tip
    lines = [np.cos(a) * u + np.sin(a) * v for a in angles]
    return np.partition(np.stack(lines), 3, axis=0)[3] - 1.15 * np.cos(np.pi * 0.4)


def _distance(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Approximate signed distance (negative inside) in units of the radius; u right, v down."""
    if shape == "disk":
        return np.hypot(u, v) - 1
    if shape == "ring":
        return np.abs(np.hypot(u, v) - 0.76) - 0.24
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.8
    if shape == "cross":
        a, b = np.abs(u), np.abs(v)
        return np.minimum(np.maximum(a - 1, b - 0.32), np.maximum(a - 0.32, b - 1))
    if shape == "triangle":
        slanted = np.abs(u) * (np.sqrt(3) / 2) - v / 2
        return np.maximum(slanted, v) - 0.575
    return _distance_to_star(u, v)


def _lowest_point(shape: str, angle: float) -> float:
    """How far the turned silhouette reaches below its centre, in units of the radius."""
    if shape in ("disk", "ring"):
        return 1.0
    if shape == "square":
        reach, directions = 0.8 * np.sqrt(2), np.arange(4) * 90 + 45
    elif shape == "cross":
        tip = np.degrees(np.arctan(0.32))
        sides = np.arange(4) * 90
        reach, directions = np.hypot(1, 0.32), np.concatenate([sides - tip, sides + tip])
    elif shape == "triangle":
        reach, directions = 1.15, np.array([30, 150, 270])
    else:
        reach, directions = 1.15, np.arange(5) * 72 + 270
    return float(reach * np.sin(np.radians(directions) + angle).max())


@dataclass
class _Thing:
    """One silhouette to be painted; x, y and radius in pixels, depth in metres."""

    category: int
    x: float
    y: float
    radius: float
    angle: float
    depth: float
    base: float | None  # row where it touches the ground; None when it hangs
    frame: tuple[int, int]  # H, W
    window: tuple[slice, slice] = field(init=False)  # the part of its patch inside the frame
    u: np.ndarray = field(init=False)  # its own coordinates over the window, in radii
    v: np.ndarray = field(init=False)
    coverage: np.ndarray = field(init=False)  # 0..1 over the window, soft at the edge
    pixels: int = field(init=False)  # of the whole silhouette, also outside the frame

    def __post_init__(self) -> None:
        half = 1.2 * self.radius + 1
        rows = np.arange(int(self.y - half) - 1, int(self.y + half) + 2)
        cols = np.arange(int(self.x - half) - 1, int(self.x + half) + 2)
        dy = ((rows + 0.5 - self.y) / self.radius)[:, None]
        dx = ((cols + 0.5 - self.x) / self.radius)[None, :]
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        u, v = cos * dx + sin * dy, cos * dy - sin * dx
        distance = _distance(THING_CLASSES[self.category], u, v) * self.radius
        coverage = np.clip(0.5 - distance, 0, 1)
        self.pixels = int((coverage > 0.5).sum())
        inside = np.ix_((rows >= 0) & (rows < self.frame[0]), (cols >= 0) & (cols < self.frame[1]))
        self.window = (
            slice(max(rows[0], 0), min(rows[-1] + 1, self.frame[0])),
            slice(max(cols[0], 0), min(cols[-1] + 1, self.frame[1])),
        )
        self.u, self.v = u[inside].astype(np.float32), v[inside].astype(np.float32)
        self.coverage = coverage[inside].astype(np.float32)

    @property
    def mask(self) -> np.ndarray:
        """Bool mask of the silhouette over the window."""
        return self.coverage > 0.5


def _keep_visible(things: list[_Thing], frame: tuple[int, int]) -> list[_Thing]:
    """The things to paint, nearest first: one too well hidden is left out of the picture.

    Going front to back, a thing that is left out hides nothing, so what is kept is seen by exactly
    the rule when only the kept ones are painted.
    """
    taken = np.zeros(frame, dtype=bool)
    kept = []
    for thing in sorted(things, key=lambda t: t.depth):
        mask = thing.mask
        visible = int((mask & ~taken[thing.window]).sum())
        if visible >= max(MIN_VISIBLE_PIXELS, MIN_VISIBLE_FRACTION * thing.pixels):
            taken[thing.window] |= mask
            kept.append(thing)
    return kept


# --------------------------------------------------------------------------------------- stage


@dataclass
class _Stage:
    """Everything behind the things: depth, classes and colours."""

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
    pyramid = _load_materials(split)[material]
    scale = _TEXELS_PER_METRE * rng.uniform(0.7, 1.3)
    start = rng.uniform(0, 1024, 2)
    rows, cols = start[0] + depth * scale, start[1] + lateral * scale
    levels = np.clip(np.log2(depth / 2.0).round(), 0, len(pyramid) - 1)
    grey = np.zeros(depth.shape, dtype=np.float32)
    for level in range(int(levels.min()), int(levels.max()) + 1):
        here = levels == level
        grey[here] = _sample(pyramid[level], rows[here] / 2**level, cols[here] / 2**level)
    contrast = rng.uniform(0.2, 0.35)
    return _tint(rng, material) * (1 + contrast * grey)[:, None]


def _paint_wall(
    rng: np.random.Generator, split: str, rows: np.ndarray, cols: np.ndarray, scale: float
) -> np.ndarray:
    """Colours [N, 3] of a brick wall at pixels rows [N], cols [N]; scale is pixels over 256."""
    stride = rng.uniform(0.8, 2.0) / scale
    start = rng.uniform(0, 1024, 2)
    rows, cols = start[0] + rows * stride, start[1] + cols * stride
    # The photograph shows the wall turned by 90 degrees.
    grey = _sample_pyramid(_load_materials(split)["brick"], cols, rows, stride)
    return _tint(rng, "brick") * (1 + rng.uniform(0.15, 0.3) * grey)[:, None]


def _paint_sky(
    rng: np.random.Generator, split: str, height: np.ndarray, cols: np.ndarray, haze: np.ndarray
) -> np.ndarray:
    """Colours [N, 3] of a sky; height [N] and cols [N] over the shorter image side.

    Clouds are a strongly magnified piece of a photograph.
    """
    photos = _load_photos(split)
    photo = photos[rng.integers(len(photos))][-1].mean(axis=-1)
    stretch = rng.uniform(12, 24)
    start = rng.uniform(0, 256, 2)
    clouds = _sample(photo, start[0] + height * stretch * 2, start[1] + cols * stretch)
    clouds = np.clip((clouds - photo.mean()) / (photo.std() + 1e-3), -1, 2)
    clear = np.clip(height / rng.uniform(0.3, 0.6), 0, 1).astype(np.float32)[:, None]
    color = haze * (1 - clear) + _tint(rng, "sky") * clear
    return color + rng.uniform(0.02, 0.09) * clouds[:, None]


def _build_stage(rng: np.random.Generator, split: str, frame: tuple[int, int]) -> _Stage:
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
    return _Stage(horizon, focal, depth, semantic, color, haze)


# -------------------------------------------------------------------------------------- things


def _draw_thing(rng: np.random.Generator, stage: _Stage, frame: tuple[int, int]) -> _Thing:
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
        y = touch - _lowest_point(THING_CLASSES[category], angle) * radius
    else:  # above the row where it would stand, or it would be under the ground
        lowest = min(touch - 1.15 * radius, h - radius / 2)
        y = rng.uniform(min(radius, lowest), lowest)
    return _Thing(category, x, y, radius, angle, depth, touch if stands else None, frame)


def _draw_things(rng: np.random.Generator, stage: _Stage, frame: tuple[int, int]) -> list[_Thing]:
    """Three to eight things, nearest first, each visible by the rule of ``_keep_visible``."""
    wanted = int(rng.integers(3, 9))
    things: list[_Thing] = []
    for _ in range(8 * wanted):
        things = _keep_visible([*things, _draw_thing(rng, stage, frame)], frame)
        if len(things) == wanted:
            break
    return things


def _cast_shadow(stage: _Stage, thing: _Thing) -> None:
    """Darkens the ground where a standing thing touches it, in place."""
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


def _fill_thing(rng: np.random.Generator, split: str, thing: _Thing, light: float) -> np.ndarray:
    """Colours [h, w, 3] over a thing's window: a jittered photo crop, shaded towards the light."""
    photos = _load_photos(split)
    pyramid = photos[rng.integers(len(photos))]
    stride = float(2 ** rng.uniform(-0.5, 1.5))
    start = (rng.uniform(0, 1, 2) * pyramid[0].shape[:2]).astype(np.float32)
    flip = 1 if rng.random() < 0.5 else -1
    rows = start[0] + thing.v * (thing.radius * stride)
    cols = start[1] + thing.u * (thing.radius * stride * flip)
    crop = _sample_pyramid(pyramid, rows, cols, stride)
    mean = crop.mean(axis=(0, 1))
    target = (0.4 * mean + 0.6 * rng.uniform(0.1, 0.95, 3)).astype(np.float32)
    fill = (crop - mean) * np.float32(rng.uniform(0.7, 1.3)) + target
    # Plain floats leave float32 arrays float32; the gradient keeps its side when the thing turns.
    turn = thing.angle + light
    across = float(np.cos(turn)) * thing.u - float(np.sin(turn)) * thing.v
    return fill * (1 + 0.22 * across + 0.06 * (1 - thing.u**2 - thing.v**2))[..., None]


def _expose(
    rng: np.random.Generator, color: np.ndarray, stage: _Stage, depth: np.ndarray, clear: np.ndarray
) -> np.ndarray:
    """Adds haze (except where clear [H, W]), exposure and sensor noise; returns uint8 RGB."""
    thinness = np.exp(depth / np.float32(-rng.uniform(14, 22)))
    thinness[clear] = 1
    color = stage.haze + (color - stage.haze) * thinness[..., None]
    color *= np.float32(rng.uniform(0.85, 1.12))
    color += rng.standard_normal(color.shape, dtype=np.float32) * np.float32(
        rng.uniform(0.008, 0.025)
    )
    return (np.clip(color, 0, 1) * 255 + 0.5).astype(np.uint8)


def _check_arguments(split: str, index: int, size: tuple[int, int]) -> None:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}.")
    if index < 0:
        raise ValueError(f"index must not be negative, got {index}.")
    if min(size) < MIN_SIDE:
        raise ValueError(f"size must be at least {MIN_SIDE} pixels each way, got {tuple(size)}.")


def make_scene(split: str, index: int, size: tuple[int, int] = SIZE) -> Scene:
    """Renders one scene; the same arguments always give the same scene.

    Args:
        split: "train" or "val"; decides which part of the photographs is used.
        index: number of the scene in its split, from 0; there is no upper end.
        size: (height, width) in pixels.

    Returns:
        The scene with all its labels.

    Raises:
        ValueError: for an unknown split, a negative index or a side below ``MIN_SIDE``.
    """
    _check_arguments(split, index, size)
    rng = np.random.default_rng(np.random.SeedSequence([_SEED, SPLITS.index(split), index]))
    frame = (int(size[0]), int(size[1]))
    stage = _build_stage(rng, split, frame)
    things = _draw_things(rng, stage, frame)
    for thing in things:
        if thing.base is not None:
            _cast_shadow(stage, thing)

    light = rng.uniform(0, 2 * np.pi)
    color, depth, semantic = stage.color, stage.depth, stage.semantic
    panoptic = (semantic.astype(np.int32) + 1) * LABEL_DIVISOR
    segments = []
    for number, thing in reversed(list(enumerate(things, start=1))):  # farthest first
        fill = _fill_thing(rng, split, thing, light)
        cover = thing.coverage[..., None]
        color[thing.window] += (fill - color[thing.window]) * cover
        mask = thing.mask
        segment_id = (thing.category + 1) * LABEL_DIVISOR + number
        panoptic[thing.window][mask] = segment_id
        semantic[thing.window][mask] = thing.category
        depth[thing.window][mask] = thing.depth
        segments.insert(0, {"id": segment_id, "category_id": thing.category, "isthing": True})
    for category in range(len(THING_CLASSES), len(CLASSES)):
        if (semantic == category).any():
            segment_id = (category + 1) * LABEL_DIVISOR
            segments.append({"id": segment_id, "category_id": category, "isthing": False})
    image = _expose(rng, color, stage, depth, clear=semantic == CLASSES.index("sky"))
    return Scene(image, panoptic, semantic, depth, segments)


# ------------------------------------------------------------------------------------- on disk


def _encode_mask(mask: np.ndarray) -> dict:
    """COCO's uncompressed run lengths of a bool mask [H, W]: exact, and plain JSON."""
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate([[0], changes, [flat.size]]))
    counts = runs.tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


def _bounding_box(mask: np.ndarray) -> list[int]:
    """[x, y, width, height] in pixels."""
    rows, cols = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    x, y = int(cols[0]), int(rows[0])
    return [x, y, int(cols[-1]) + 1 - x, int(rows[-1]) + 1 - y]


def _describe_segment(scene: Scene, segment: dict) -> dict:
    """What the COCO formats say of a segment, instances and panoptic alike."""
    mask = scene.panoptic == segment["id"]
    return {
        "id": segment["id"],
        "category_id": segment["category_id"] + 1,
        "area": int(mask.sum()),
        "bbox": _bounding_box(mask),
        "iscrowd": 0,
    }


def _categories(things_only: bool) -> list[dict]:
    return [
        {"id": i + 1, "name": name, "isthing": int(i < len(THING_CLASSES)), "color": COLORS[i]}
        for i, name in enumerate(CLASSES[: len(THING_CLASSES)] if things_only else CLASSES)
    ]


def _id_to_rgb(panoptic: np.ndarray) -> np.ndarray:
    """COCO panoptic PNG colours, id = R + 256 G + 65536 B; uint8 [H, W, 3]."""
    return np.stack([panoptic >> shift & 255 for shift in (0, 8, 16)], axis=-1).astype(np.uint8)


def _write_png(path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(path, compress_level=1)  # sensor noise hardly compresses anyway


def _write_split(folder: Path, split: str, count: int, size: tuple[int, int]) -> None:
    for kind in ("", "panoptic_", "semantic_", "depth_"):
        (folder / f"{kind}{split}").mkdir()
    images, instances, panoptics = [], [], []
    for index in tqdm(range(count), desc=f"collage: writing {split}", unit="scene"):
        scene = make_scene(split, index, size)
        name = f"{index:06d}.png"
        _write_png(folder / split / name, scene.image)
        _write_png(folder / f"panoptic_{split}" / name, _id_to_rgb(scene.panoptic))
        _write_png(folder / f"semantic_{split}" / name, scene.semantic)
        millimetres = np.rint(scene.depth * DEPTH_SCALE).astype(np.uint16)
        _write_png(folder / f"depth_{split}" / name, millimetres)

        described = [_describe_segment(scene, s) for s in scene.segments]
        images.append({"id": index, "file_name": name, "height": size[0], "width": size[1]})
        panoptics.append({"image_id": index, "file_name": name, "segments_info": described})
        for (_, mask), segment in zip(scene.instances(), described, strict=False):
            instance = {**segment, "image_id": index, "segmentation": _encode_mask(mask)}
            instances.append({**instance, "id": len(instances) + 1})  # COCOeval: 0 is no match
    _write_json(folder, f"instances_{split}", images, instances, things_only=True)
    _write_json(folder, f"panoptic_{split}", images, panoptics, things_only=False)


def _write_json(
    folder: Path, name: str, images: list, annotations: list, things_only: bool
) -> None:
    content = {
        "info": {"description": f"collage version {VERSION}, generated by expedit_d2"},
        "images": images,
        "annotations": annotations,
        "categories": _categories(things_only),
    }
    (folder / "annotations" / f"{name}.json").write_text(json.dumps(content))


def collage_folder(
    root: str | os.PathLike | None = None,
    counts: Mapping[str, int] | None = None,
    size: tuple[int, int] = SIZE,
) -> Path:
    """The folder of the data set, whether or not it exists yet.

    It is ``collage-v<VERSION>``; counts or a size other than the usual ones show in the name, so
    that no two different sets share a folder.

    Args:
        root: the folder of all data sets; default ``$DETECTRON2_DATASETS`` or ``datasets``.
        counts: number of scenes of "train" and "val"; default ``COUNTS``.
        size: (height, width) in pixels.
    """
    root = Path(root if root is not None else os.environ.get("DETECTRON2_DATASETS", "datasets"))
    counts = COUNTS if counts is None else counts
    _check_counts(counts)
    name = f"collage-v{VERSION}"
    if dict(counts) != COUNTS:
        name += f"-{counts['train']}+{counts['val']}"
    if tuple(size) != SIZE:
        name += f"-{size[0]}x{size[1]}"
    return root.expanduser() / name


def _check_counts(counts: Mapping[str, int]) -> None:
    if set(counts) != set(SPLITS) or min(counts.values()) < 1:
        raise ValueError(
            f"counts must give a positive number for each of {SPLITS}, got {dict(counts)}."
        )


def _is_complete(folder: Path) -> bool:
    return (folder / "info.json").is_file()


def write_collage(
    root: str | os.PathLike | None = None,
    counts: Mapping[str, int] | None = None,
    size: tuple[int, int] = SIZE,
) -> Path:
    """Writes the data set unless it is there already; about a minute for the usual 2200 scenes.

    The files are written to a temporary folder next to the final one, which appears by a single
    rename: a run that is broken off leaves no half set, and of two at once one wins.

    Layout, in the folder that is returned::

        info.json                            version, counts, size
        {train,val}/000000.png               images
        annotations/instances_{split}.json   COCO instances, run-length masks
        annotations/panoptic_{split}.json    COCO panoptic, with panoptic_{split}/000000.png
        semantic_{split}/000000.png          contiguous class ids, 255 = ignore (never occurs)
        depth_{split}/000000.png             16 bit, millimetres

    Args:
        root, counts, size: as in ``collage_folder``.

    Returns:
        The folder of the data set.

    Raises:
        FileExistsError: when the folder exists but was not written by this function.
        ValueError: for counts or a size that cannot be.
    """
    folder = collage_folder(root, counts, size)
    _check_arguments(SPLITS[0], 0, size)
    if _is_complete(folder):
        return folder
    if folder.exists():
        raise FileExistsError(
            f"{folder} exists but holds no complete collage data set (there is no info.json); "
            "remove it or set DETECTRON2_DATASETS to another folder."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write_and_publish(scratch / folder.name, folder, counts or COUNTS, size)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _write_and_publish(
    draft: Path, folder: Path, counts: Mapping[str, int], size: tuple[int, int]
) -> None:
    (draft / "annotations").mkdir(parents=True)
    for split in SPLITS:
        _write_split(draft, split, counts[split], size)
    info = {"name": "collage", "version": VERSION, "counts": dict(counts), "size": list(size)}
    (draft / "info.json").write_text(json.dumps(info, indent=2) + "\n")
    try:
        draft.rename(folder)
    except OSError:
        if not _is_complete(folder):  # otherwise another process was first: same content
            raise
