"""Scatter plots as inline SVG, legible on light and dark pages."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from textwrap import fill

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter
from matplotlib.transforms import Bbox

__all__ = ["Point", "draw_tradeoff"]

#: Stands for the colour of the page's text, which is black or white.
_TEXT = "#010203"
#: Method -> colour of middle lightness, and marker; both, for those who do not tell the colours.
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
_FONT = 9.5  # points, in a figure that is as wide as a phone
_TICKS = (0, 20, 40, 60, 70, 80, 90, 95, 98, 99, 99.5, 100, 100.5, 101, 102, 105, 110, 120)

#: Letters in a line of a name.
_LINE = 22
#: More points than these are named on the front only.
_ALL_NAMED = 8
#: Where a name may stand: its offset in points, and how it is aligned there.
_AROUND = (
    (6, 6, "left", "bottom"),
    (0, 7, "center", "bottom"),
    (-6, 6, "right", "bottom"),
    (-6, -6, "right", "top"),
    (0, -7, "center", "top"),
    (6, -6, "left", "top"),
)


@dataclass(frozen=True)
class Point:
    """One setting in a plot.

    Attributes:
        name: of the setting.
        method: whose colour and marker it gets; "plain" for the model as it is.
        x: what is gained.
        y: what is kept, in percent.
        front: whether no other setting is better in one and at least as good in the other.
    """

    name: str
    method: str
    x: float
    y: float
    front: bool


def draw_tradeoff(points: Sequence[Point], x_label: str, y_label: str, key: str) -> str:
    """What is kept against what is gained: an ``<svg>`` element, to be put into a page.

    The vertical axis is stretched towards 100 %, where the settings of interest lie.

    Args:
        points: at least one.
        x_label: of the horizontal axis.
        y_label: of the vertical axis.
        key: begins the ids in the element, which must not be twice in a page.
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
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.margins(x=0.08)
        _limit(axes, [p.y for p in points])
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside upper center", ncols=3, frameon=False, handletextpad=0.2)
        _name_points(figure, axes, points)
        out = io.StringIO()
        # Without a date and a creator: the same numbers make the same file.
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    return _inline(out.getvalue(), f"{y_label} against {x_label}", key)


_LOOK = {
    "svg.fonttype": "none",  # text stays text: it can be searched, and scales with the figure
    "svg.hashsalt": "",
    "font.family": "sans-serif",
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


def _name_points(figure: Figure, axes: Axes, points: Sequence[Point]) -> None:
    """Write names next to points, if they are many next to the front's, as far as there is room."""
    figure.draw_without_rendering()  # places are known after this
    radius = 5 * figure.dpi / 72
    front = sorted((p for p in points if p.front), key=lambda p: p.x)
    line = [
        (1 - share) * np.array(start) + share * np.array(end)
        for start, end in pairwise(axes.transData.transform([(p.x, p.y) for p in front]))
        for share in np.linspace(0, 1, 24)
    ]
    markers = axes.transData.transform([(p.x, p.y) for p in points])
    taken = [Bbox([place - radius, place + radius]) for place in markers]
    taken += [Bbox([place - 1, place + 1]) for place in line]
    frame = Bbox([(figure.bbox.x0, axes.bbox.y0), (figure.bbox.x1, figure.bbox.y1)])
    for point in front if len(points) > _ALL_NAMED else points:
        text = axes.annotate(
            fill(point.name, _LINE),
            (point.x, point.y),
            (0, 0),
            textcoords="offset points",
            fontsize=_FONT - 1,
            parse_math=False,
        )
        # In a layout that makes room for names, the places above would no longer be true.
        text.set_in_layout(False)
        for x, y, side, level in _AROUND:
            text.xyann = (x, y)
            text.set(ha=side, va=level)
            box = text.get_window_extent()
            within = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0
            if within and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
        else:
            text.remove()


def _inline(svg: str, description: str, key: str) -> str:
    """An SVG file as an element of a page: of its width, in its font and colour, with own ids."""
    box = re.search(r'viewBox="[^"]*"', svg).group()
    body = svg[svg.index(">", svg.index("<svg")) + 1 :].replace(_TEXT, "currentColor")
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{key}-", body)
    return f'<svg {box} role="img" aria-label="{escape(description)}">{body.strip()}'
