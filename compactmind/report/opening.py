"""The picture a report opens with: quality against size, a panel per track, the best model at each size named."""

from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from compactmind.report.as_shipped import KIND  # noqa: E402
from compactmind.report.sentences import reference_of  # noqa: E402
from compactmind.report.style import colours_of, join_families, marker_of, name_points  # noqa: E402
from compactmind.report.summary import Rows, best_at_each_size, comparable_classifiers, comparable_languages  # noqa: E402

Points = dict[str, tuple[float, float, float]]
"""Name -> value, lower and upper bound."""


def opening(report: dict[str, Any]) -> Figure | None:
    """Return the picture: every model with its 95% interval, those named that no smaller one is as good as. None without any model."""
    tracks = {"encoder": comparable_classifiers(report), "llm": comparable_languages(report)}
    tracks = {track: rows for track, rows in tracks.items() if rows}
    if not tracks:
        return None
    width = 6.5 * len(tracks) if len(tracks) > 1 else 8
    figure, grid = plt.subplots(1, len(tracks), figsize=(width, 4.8), constrained_layout=True, squeeze=False)
    drawn = {track: _draw(axes, report, track, rows) for axes, (track, rows) in zip(grid[0], tracks.items(), strict=True)}
    for axes, (track, points) in zip(grid[0], drawn.items(), strict=True):  # only now is the layout what it will be
        rows = tracks[track]
        named = {*_best(track, rows), reference_of(report, track), *(name for name, row in rows.items() if row["kind"] == KIND)}
        places = {name: (rows[name]["size_mb"], value) for name, (value, _, _) in points.items()}
        bars = [(rows[name]["size_mb"], low, high) for name, (_, low, high) in points.items()]
        name_points(axes, places, colours_of(report, track), bars, only=named)
    return figure


def _draw(axes: Axes, report: dict[str, Any], track: str, rows: Rows) -> Points:
    """Draw a track's points, those that are the best at their size large and full; return them."""
    reference, best, colours = reference_of(report, track), _best(track, rows), colours_of(report, track)
    if track == "encoder":
        points = {name: _percent(row["accuracy"], row["accuracy_interval"]) for name, row in rows.items()}
        title, label = "Classifiers: higher is better", "test accuracy (%), 95% interval"
    elif reference in rows:
        points = {
            name: _percent(row["against_dense"]["ratio"] - 1, [bound - 1 for bound in row["against_dense"]["interval"]])
            if row["against_dense"] else (0.0, 0.0, 0.0)
            for name, row in rows.items()
        }  # fmt: skip
        title, label = "Language models: lower is better", f"perplexity above {reference} (%), 95% interval"
        axes.axhline(0, color="#333333", lw=0.8, ls=":", zorder=0)
    else:
        points = {name: (row["perplexity"], *row["perplexity_interval"]) for name, row in rows.items()}
        title, label = "Language models: lower is better", "perplexity, 95% interval"
    for name, (value, low, high) in points.items():
        full = name in best
        axes.errorbar(
            rows[name]["size_mb"], value, yerr=[[max(0, value - low)], [max(0, high - value)]], fmt=marker_of(rows[name]),
            ms=9 if full else 6, color=colours[name], mfc=colours[name] if full else "white", capsize=3, lw=1, zorder=3 if full else 2,
        )  # fmt: skip
    join_families(axes, {name: (rows[name]["size_mb"], value) for name, (value, _, _) in points.items()}, rows)
    axes.set(title=title, ylabel=label, xlabel="size of the weight file (MB)", xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return points


def _best(track: str, rows: Rows) -> list[str]:
    return best_at_each_size(rows, lambda row: row["accuracy"] if track == "encoder" else -row["perplexity"])


def _percent(value: float, bounds: list[float]) -> tuple[float, float, float]:
    return 100 * value, 100 * bounds[0], 100 * bounds[1]
