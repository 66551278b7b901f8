"""How a model looks in every figure of a report: a colour of its own, a marker for how it is stored, a line along its family, its name.

The colour goes by a model's place in the report, so it is the same in all figures and stays when another row fails. Markers and line
styles tell apart in grey what colours tell apart on a page.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation

COLOURS = ("#4d4d4d", "#9a6fb0", "#1f5fa8", "#b03a2e", "#5aa1d8", "#e08e79", "#2e7d32", "#c79a00", "#00838f", "#6d4c41")
"""Of the first ten rows of a track; the next ten have them darker, then lighter."""
SHADES = ((0.0, 0.0), (0.0, 0.45), (1.0, 0.5))
"""Grey that a round of COLOURS is mixed with, 0 black and 1 white, and its share."""
MARKERS = {
    "dense": "o", "pruned": "s", "nf4": "D", "int8": "d", "w8a8": "^", "grouped": "v", "published": "*", "llama.cpp": "X", "foreign": "h",
}  # fmt: skip
"""How a model is stored -> its marker; `P` for others."""
LINES = ("-", "--", "-.", ":")
"""Of the families of a figure, in turn."""
GREY = "#999999"
"""Of the line along a family."""
SIZE_AT_THE_END = re.compile(r"_\d+(\.\d+)?x(?=$|_)")
DIRECTIONS = [(math.cos(turn * math.pi / 4), math.sin(turn * math.pi / 4)) for turn in (0, 1, 7, 2, 6, 3, 5, 4)]
DISTANCES = (9, 16, 26, 38, 52, 70)
"""Where a name may stand: directions from its point, best first, at distances in points."""


def colours_of(report: dict[str, Any], track: str) -> dict[str, str]:
    """Return the colour of each row of a track, measured or not, by name."""
    names = [row["name"] for row in report["models"] if row["track"] == track]
    return {name: shade(COLOURS[index % len(COLOURS)], index // len(COLOURS)) for index, name in enumerate(names)}


def shade(colour: str, round_: int) -> str:
    """Return a colour as it is used in the first (0), second or third round of COLOURS; rounds repeat."""
    grey, share = SHADES[round_ % len(SHADES)]
    return "#" + "".join(f"{round(255 * ((1 - share) * part + share * grey)):02x}" for part in to_rgb(colour))


def marker_of(row: dict[str, Any]) -> str:
    """Return the marker of a row: how its model is stored."""
    return MARKERS.get(row.get("kind"), "P")


def families(rows: dict[str, dict[str, Any]], size: Callable[[dict[str, Any]], float | None]) -> list[list[str]]:
    """Return the names of the members of every family of two or more, from the largest to the smallest.

    A family is what one run made in several sizes: classifiers pruned to several goals, the front of one search, or one pipeline
    whose results are named by their size (llama_gptq_3x, llama_gptq_4x). Rows whose `size` is None are left out.
    """
    by_family: dict[str, list[str]] = {}
    for name, row in rows.items():
        config = (row.get("stage") or {}).get("config") or {}
        goal, study = config.get("goal"), config.get("study")
        if size(row) is None:
            continue
        if goal and name.endswith(f"_{goal['name']}"):
            kind = "times" if goal["measured"] else "operations"
            by_family.setdefault(f"{kind} {name.removesuffix('_' + goal['name'])}", []).append(name)
        elif study:
            by_family.setdefault(f"study {study['name']} {row.get('compared_with')}", []).append(name)
        elif SIZE_AT_THE_END.search(name):
            by_family.setdefault(f"sizes {SIZE_AT_THE_END.sub('', name)} {row.get('compared_with')}", []).append(name)
    return [sorted(names, key=lambda name: -size(rows[name])) for names in by_family.values() if len(names) > 1]


def join_families(axes: Axes, places: dict[str, tuple[float, float]], rows: dict[str, dict[str, Any]]) -> None:
    """Draw a line along each family of the points (x, y) by name."""
    members = families({name: rows[name] for name in places}, lambda row: row.get("gflops") or row["size_mb"])
    for names, style in zip(members, itertools.cycle(LINES), strict=False):
        axes.plot(*zip(*(places[name] for name in names), strict=True), color=GREY, lw=1.2, ls=style, zorder=1)


def name_points(axes: Axes, places: dict[str, tuple[float, float]], colours: dict[str, str], bars: Iterable[tuple] = (),
                only: Iterable[str] | None = None) -> None:  # fmt: skip
    """Write the name of every point beside it, so that names cover neither each other nor points; what finds no room has none.

    `places` is name -> (x, y) in data units, `bars` are the ends (x, low, high) of intervals, which names avoid where they can, as
    they do drawn lines; the names in `only` are written, by default all. Call it when all else is drawn: it fixes the axes' limits.
    """
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())
    figure = axes.figure
    figure.draw_without_rendering()  # the layout, and with it where a point lies, is known from here on
    renderer, frame = figure.canvas.get_renderer(), axes.get_window_extent()
    pixels, points = figure.dpi / 72, {name: axes.transData.transform(place) for name, place in places.items()}
    taken = [(x - 5 * pixels, y - 5 * pixels, x + 5 * pixels, y + 5 * pixels) for x, y in points.values()]
    thin = [_boxes_along(line) for line in axes.lines if line.get_linestyle() not in ("None", "none", "")]
    for x, low, high in bars:
        (left, bottom), (_, top) = axes.transData.transform([(x, low), (x, high)])
        thin.append([(left - pixels, min(bottom, top), left + pixels, max(bottom, top))])
    to_name = set(places if only is None else only)
    for name, (x, y) in sorted(points.items(), key=lambda item: (item[1][0], item[1][1], item[0])):
        if name not in to_name:
            continue
        text = axes.annotate(name, places[name], xytext=(0, 0), textcoords="offset points", fontsize=8, color=shade(colours[name], 1),
                             path_effects=[withStroke(linewidth=2, foreground="white")])  # fmt: skip
        text.set_in_layout(False)
        extent = text.get_window_extent(renderer)
        best = None
        for distance, (across, up) in itertools.product(DISTANCES, DIRECTIONS):
            left = x + across * distance * pixels - extent.width * (1 - across) / 2
            bottom = y + up * distance * pixels - extent.height * (1 - up) / 2
            box = (left, bottom, left + extent.width, bottom + extent.height)
            if not (frame.x0 <= box[0] and box[2] <= frame.x1 and frame.y0 <= box[1] and box[3] <= frame.y1):
                continue
            if any(overlap(box, other) for other in taken):
                continue
            crossed = sum(any(overlap(box, other) for other in line) for line in thin)
            if best is None or crossed < best[0]:
                best = crossed, box, distance
            if not crossed:
                break
        if best is None:
            text.remove()
            continue
        _, box, distance = best
        taken.append(box)
        _move(text, box, (x, y), pixels)
        if distance > DISTANCES[1]:
            _lead(axes, text, box, (x, y), colours[name])


def legend_below(figure: Figure, handles: Sequence[Artist], most: int = 4, fontsize: float | None = None) -> Legend:
    """Put a legend under a figure with a constrained layout, in as many columns, `most` at most, as its width has room for."""
    for columns in range(max(1, min(most, len(handles))), 0, -1):
        legend = figure.legend(handles=handles, loc="outside lower center", ncol=columns, frameon=False, fontsize=fontsize)
        figure.draw_without_rendering()
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            break
        legend.remove()
    return legend


def overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    """Tell whether two boxes (left, bottom, right, top) have a point inside both."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _boxes_along(line: Line2D) -> list[tuple[float, float, float, float]]:
    """Return small boxes in pixels along a drawn line."""
    corners, boxes = line.get_transform().transform(line.get_xydata()), []
    for (x0, y0), (x1, y1) in itertools.pairwise(corners):
        steps = 1 + int(max(abs(x1 - x0), abs(y1 - y0)) / 6)
        ways = [step / steps for step in range(steps + 1)]
        boxes += [(x - 1, y - 1, x + 1, y + 1) for x, y in ((x0 + way * (x1 - x0), y0 + way * (y1 - y0)) for way in ways)]
    return boxes


def _move(text: Annotation, box: tuple[float, float, float, float], point: tuple[float, float], pixels: float) -> None:
    """Put a name, in place, where its box begins; offsets are in points, 1/72 inch."""
    text.set(ha="left", va="bottom")
    text.xyann = ((box[0] - point[0]) / pixels, (box[1] - point[1]) / pixels)


def _lead(axes: Axes, text: Annotation, box: tuple[float, float, float, float], point: tuple[float, float], colour: str) -> None:
    """Draw a thin line from a point to its name that stands far away."""
    end = (min(max(point[0], box[0]), box[2]), min(max(point[1], box[1]), box[3]))  # the nearest corner or side
    (x0, y0), (x1, y1) = axes.transData.inverted().transform([point, end])
    axes.plot([x0, x1], [y0, y1], color=colour, lw=0.6, alpha=0.7, zorder=1).pop().set_in_layout(False)
