"""Silhouettes of things: their shapes, the pixels they cover, and their visibility."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .definition import THING_CLASSES

MIN_VISIBLE_PIXELS = 40
MIN_VISIBLE_FRACTION = 0.15


def _distance_to_star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Inside a pentagram, a point is outside of at most one of the five edge lines."""
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


def lowest_point(shape: str, angle: float) -> float:
    """How far the rotated silhouette extends below its centre, in units of the radius."""
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
class Thing:
    """One silhouette to paint; x, y and radius in pixels, depth in metres."""

    category: int
    x: float
    y: float
    radius: float
    angle: float
    depth: float
    base: float | None  # row where it touches the ground; None if it hangs
    frame: tuple[int, int]  # H, W
    window: tuple[slice, slice] = field(init=False)  # part of its bounding box inside the frame
    u: np.ndarray = field(init=False)  # local coordinates over the window, in radii
    v: np.ndarray = field(init=False)
    coverage: np.ndarray = field(init=False)  # 0..1 over the window, soft at the edge
    pixels: int = field(init=False)  # of the whole silhouette, including outside of the frame

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


def keep_visible(things: list[Thing], frame: tuple[int, int]) -> list[Thing]:
    """The sufficiently visible things, nearest first.

    Going front to back, dropped things occlude nothing, so the visible areas are exact when only
    the kept things are painted.
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
