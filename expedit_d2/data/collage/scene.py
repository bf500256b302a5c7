"""Rendering of scenes with their labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .definition import CLASSES, LABEL_DIVISOR, MIN_SIDE, SIZE, SPLITS, THING_CLASSES
from .stage import Stage, build_stage
from .things import cast_shadow, draw_things, fill_thing

_SEED = 1


@dataclass(frozen=True)
class Scene:
    """One rendered scene and its labels.

    Attributes:
        image: uint8 RGB [H, W, 3].
        panoptic: int32 [H, W], segment ids; never 0.
        semantic: uint8 [H, W], contiguous class ids, positions in ``CLASSES``.
        depth: float32 [H, W] in metres along the optical axis.
        segments: one dict per segment with ``id``, ``category_id`` (contiguous) and ``isthing``;
            things first, nearest first.
    """

    image: np.ndarray
    panoptic: np.ndarray
    semantic: np.ndarray
    depth: np.ndarray
    segments: list[dict]

    def instances(self) -> list[tuple[int, np.ndarray]]:
        """(contiguous class id, visible bool mask [H, W]) of every thing."""
        return [
            (segment["category_id"], self.panoptic == segment["id"])
            for segment in self.segments
            if segment["isthing"]
        ]


def _expose(
    rng: np.random.Generator, color: np.ndarray, stage: Stage, depth: np.ndarray, clear: np.ndarray
) -> np.ndarray:
    """Add haze (except where clear [H, W]), exposure and sensor noise; return uint8 RGB."""
    thinness = np.exp(depth / np.float32(-rng.uniform(14, 22)))
    thinness[clear] = 1
    color = stage.haze + (color - stage.haze) * thinness[..., None]
    color *= np.float32(rng.uniform(0.85, 1.12))
    color += rng.standard_normal(color.shape, dtype=np.float32) * np.float32(
        rng.uniform(0.008, 0.025)
    )
    return (np.clip(color, 0, 1) * 255 + 0.5).astype(np.uint8)


def check_arguments(split: str, index: int, size: tuple[int, int]) -> None:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}.")
    if index < 0:
        raise ValueError(f"index must not be negative, got {index}.")
    if min(size) < MIN_SIDE:
        raise ValueError(f"size must be at least {MIN_SIDE} pixels per side, got {tuple(size)}.")


def make_scene(split: str, index: int, size: tuple[int, int] = SIZE) -> Scene:
    """Render one scene; the same arguments always give the same scene.

    Args:
        split: "train" or "val"; selects the part of the photographs to use.
        index: number of the scene in its split, from 0, without an upper limit.
        size: (height, width) in pixels.

    Raises:
        ValueError: for an unknown split, a negative index or a side below ``MIN_SIDE``.
    """
    check_arguments(split, index, size)
    rng = np.random.default_rng(np.random.SeedSequence([_SEED, SPLITS.index(split), index]))
    frame = (int(size[0]), int(size[1]))
    stage = build_stage(rng, split, frame)
    things = draw_things(rng, stage, frame)
    for thing in things:
        if thing.base is not None:
            cast_shadow(stage, thing)

    light = rng.uniform(0, 2 * np.pi)
    color, depth, semantic = stage.color, stage.depth, stage.semantic
    panoptic = (semantic.astype(np.int32) + 1) * LABEL_DIVISOR
    segments = []
    for number, thing in reversed(list(enumerate(things, start=1))):  # farthest first
        fill = fill_thing(rng, split, thing, light)
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
