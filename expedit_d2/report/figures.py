"""Scatter plots as inline SVG, legible on light and dark pages."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise, product
from textwrap import fill

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FixedLocator, FuncFormatter
from matplotlib.transforms import Bbox

__all__ = ["Point", "draw_tradeoff"]

#: Placeholder for the text colour of the page, which is black or white.
_TEXT = "#010203"
#: Method -> colour of medium lightness, and marker, for readers who cannot distinguish the colours.
_STYLES = {
    "plain": (_TEXT, "*"),
    "expedit": ("#3b82d6", "o"),
    "merge": ("#e0761a", "s"),
    "tome": ("#1fa187", "^"),
    "pool": ("#a35fd0", "D"),
    "hard": ("#e0475b", "v"),
    "density": ("#b08d2e", "P"),
}
_OTHERS = ("#8a8f98", "X")
_FONT = 9.5  # points, in a figure of the width of a phone
_TICKS = (0, 20, 40, 60, 70, 80, 90, 95, 98, 99, 99.5, 100, 100.5, 101, 102, 105, 110, 120)

#: Characters per line of a name.
_LINE = 18
#: With more points, only those on the front have names.
_ALL_NAMED = 8
#: Candidate positions of a name around its point: distance in points (of the sides of a square) and
#: direction in degrees, nearest first. From the second distance on, a line connects them.
_DISTANCES = (7, 16, 27, 40, 55, 72)
_DIRECTIONS = (45, 90, 0, 135, -45, 180, -90, -135, 67, 112, 22, 157, -22, -67)
#: Points of free space around a name, and radius of a marker.
_GAP, _RADIUS = 1.5, 5
#: Smallest distance between tick labels in points.
_BETWEEN = 12


@dataclass(frozen=True)
class Point:
    """One setting in a plot.

    Attributes:
        name: of the setting.
        method: determines colour and marker; "plain" for the plain model.
        x: gain.
        y: retained quality, in percent.
        front: whether it is on the Pareto front.
        spread: quartiles of x if they are far apart.
    """

    name: str
    method: str
    x: float
    y: float
    front: bool
    spread: tuple[float, float] | None = None


def draw_tradeoff(points: Sequence[Point], x_label: str, y_label: str, key: str) -> str:
    """Plot retained quality against gain, as an ``<svg>`` element.

    The vertical axis is stretched around 100 %, where the settings of interest are.

    Args:
        points: at least one.
        x_label: of the horizontal axis.
        y_label: of the vertical axis.
        key: prefix of the ids in the element, which must be unique in a page.
    """
    with matplotlib.rc_context(_LOOK):
        figure = Figure(figsize=(4.6, 3.9), layout="constrained")
        axes = figure.subplots()
        axes.set_yscale("function", functions=(_stretch, _unstretch))
        front = sorted((p for p in points if p.front), key=lambda p: p.x)
        if len(front) > 1:
            axes.plot([p.x for p in front], [p.y for p in front], color=_TEXT, lw=1, alpha=0.5)
        for method in dict.fromkeys(p.method for p in points):
            color, marker = _STYLES.get(method, _OTHERS)
            mine = [p for p in points if p.method == method]
            size = 110 if method == "plain" else 42
            x, y = [p.x for p in mine], [p.y for p in mine]
            axes.scatter(x, y, s=size, color=color, marker=marker, label=method, zorder=3)
        for p in points:
            if p.spread is not None:
                axes.plot(p.spread, [p.y, p.y], color=_TEXT, lw=1, ls=":", zorder=2)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.margins(x=0.08)
        _limit(axes, [p.y for p in points])
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside upper center", ncols=3, frameon=False, handletextpad=0.2)
        figure.draw_without_rendering()  # computes positions
        _thin_ticks(axes)
        figure.draw_without_rendering()
        _name_points(figure, axes, points)
        out = io.StringIO()
        # Without date and creator, the output is deterministic.
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    return _inline(out.getvalue(), f"{y_label} against {x_label}", key)


_LOOK = {
    "svg.fonttype": "none",  # keeps text searchable
    "svg.hashsalt": "",
    "font.family": "sans-serif",
    # Names are measured with the first font; the others are as wide or narrower.
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "Helvetica"],
    "font.size": _FONT,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _TEXT
    ),
    "grid.color": _TEXT,
}


def _stretch(percent: np.ndarray) -> np.ndarray:
    return np.arcsinh(np.asarray(percent) - 100)


def _unstretch(place: np.ndarray) -> np.ndarray:
    return 100 + np.sinh(place)


def _limit(axes: Axes, values: Sequence[float]) -> None:
    """Set limits and ticks of the vertical axis."""
    low, high = _stretch(min(values)), _stretch(max(values))
    margin = max(0.08 * (high - low), 0.1)
    low, high = _unstretch(np.array([low - margin, high + margin]))
    axes.set_ylim(low, high)
    ticks = [tick for tick in _TICKS if low <= tick <= high]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _thin_ticks(axes: Axes) -> None:
    """Remove ticks of the stretched axis whose labels would overlap, but not 100 %."""
    kept: list[float] = []
    pixels = _BETWEEN * axes.figure.dpi / 72
    places = {tick: axes.transData.transform((0, tick))[1] for tick in axes.get_yticks()}
    for tick in sorted(places, key=lambda tick: abs(tick - 100)):
        if all(abs(places[tick] - places[other]) >= pixels for other in kept):
            kept.append(tick)
    axes.yaxis.set_major_locator(FixedLocator(sorted(kept)))


def _name_points(figure: Figure, axes: Axes, points: Sequence[Point]) -> None:
    """Write names next to points (of many, only those on the front) where there is room.

    Names are inside the plot and do not cover markers, other names or the line of the front.
    """
    pixel = figure.dpi / 72
    front = sorted((p for p in points if p.front), key=lambda p: p.x)
    line = [
        (1 - share) * np.array(start) + share * np.array(end)
        for start, end in pairwise(axes.transData.transform([(p.x, p.y) for p in front]))
        for share in np.linspace(0, 1, 48)
    ]
    markers = axes.transData.transform([(p.x, p.y) for p in points])
    taken = [Bbox([at - _RADIUS * pixel, at + _RADIUS * pixel]) for at in markers]
    taken += [Bbox([at - pixel, at + pixel]) for at in line]
    for p in points:
        if p.spread is not None:
            ends = axes.transData.transform([(x, p.y) for x in p.spread])
            taken.append(Bbox([ends[0] - pixel, ends[1] + pixel]))
    # Names may extend beyond the axes on the right.
    frame = Bbox([(axes.bbox.x0, axes.bbox.y0), (figure.bbox.x1, axes.bbox.y1)])
    room = _Room(frame, taken, gap=_GAP * pixel)
    for point in front if len(points) > _ALL_NAMED else [*front, *set(points).difference(front)]:
        text = axes.annotate(
            fill(point.name, _LINE),
            (point.x, point.y),
            (0, 0),
            textcoords="offset points",
            fontsize=_FONT - 1,
            parse_math=False,
        )
        # The layout must not change, or the positions above become wrong.
        text.set_in_layout(False)
        lead = room.place(text, axes.transData.transform((point.x, point.y)))
        if lead is None:
            text.remove()
        elif len(lead):
            ends = axes.transData.inverted().transform(lead[[0, -1]])
            axes.plot(*ends.T, color=_TEXT, lw=0.6, alpha=0.5, zorder=1, scalex=False, scaley=False)


class _Room:
    """Free space for names, in pixels."""

    def __init__(self, frame: Bbox, taken: list[Bbox], gap: float) -> None:
        self.frame, self.taken, self.gap = frame, taken, gap
        self.names: list[Bbox] = []

    def place(self, text: Annotation, marker: np.ndarray) -> np.ndarray | None:
        """Move a name to the nearest free position around its marker.

        Returns:
            Points (N, 2) of the connecting line, empty right next to the marker; None if no
            position is free.
        """
        for distance, direction in product(_DISTANCES, _DIRECTIONS):
            right, up = np.cos(np.radians(direction)), np.sin(np.radians(direction))
            reach = distance / max(abs(right), abs(up))
            text.xyann = (reach * right, reach * up)
            text.set(ha=_ALIGNED[round(right)][0], va=_ALIGNED[round(up)][1])
            box = text.get_window_extent().padded(self.gap)
            lead = np.empty((0, 2))
            if distance > _DISTANCES[0]:
                end = np.clip(marker, box.min, box.max)
                lead = marker + np.linspace(0, 1, 24)[:, None] * (end - marker)
            if self._is_free(box, lead):
                self.names.append(box)
                self.taken += [box, *(Bbox([at, at + 1]) for at in lead)]
                return lead
        return None

    def _is_free(self, box: Bbox, lead: np.ndarray) -> bool:
        inside = (box.min >= self.frame.min).all() and (box.max <= self.frame.max).all()
        return (
            inside
            and not any(box.overlaps(other) for other in self.taken)
            and not any(name.contains(*at) for name in self.names for at in lead)
        )


#: Direction -1, 0 or 1 -> horizontal and vertical alignment of a name.
_ALIGNED = {-1: ("right", "top"), 0: ("center", "center"), 1: ("left", "bottom")}


def _inline(svg: str, description: str, key: str) -> str:
    """An SVG file as an element with the page's width and text colour, and prefixed ids."""
    box = re.search(r'viewBox="[^"]*"', svg).group()
    body = svg[svg.index(">", svg.index("<svg")) + 1 :].replace(_TEXT, "currentColor")
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{key}-", body)
    return f'<svg {box} role="img" aria-label="{escape(description)}">{body.strip()}'
