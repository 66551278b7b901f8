"""The figures of the classifiers, drawn from the report's dict alone."""

import itertools
import math
from collections import Counter
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from compactmind.report.sentences import largest_batch, measured  # noqa: E402
from compactmind.report.style import LINES, colours_of, join_families, legend_below, marker_of, name_points  # noqa: E402

BAR = {"lw": 1, "capsize": 3, "ecolor": "#333333"}


def accuracy_against_gflops(report: dict[str, Any]) -> Figure | None:
    """One point per classifier: GFLOPs (equal ones side by side), accuracy with its interval, area proportional to bytes."""
    rows = {name: row for name, row in measured(report, "encoder").items() if row["gflops"] is not None}
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(9, 5.8), constrained_layout=True)
    width = 0.022 * max(row["gflops"] for row in rows.values())
    alike, beside = Counter(round(row["gflops"], 2) for row in rows.values()), Counter()
    largest, colours = max(row["size_mb"] for row in rows.values()), colours_of(report, "encoder")
    places, bars = {}, []
    for name, row in rows.items():
        same = round(row["gflops"], 2)
        place = row["gflops"] + width * (beside[same] - (alike[same] - 1) / 2)  # equal GFLOPs: side by side
        beside[same] += 1
        accuracy, (low, high) = 100 * row["accuracy"], (100 * bound for bound in row["accuracy_interval"])
        axes.errorbar(place, accuracy, yerr=[[accuracy - low], [high - accuracy]], color=colours[name], capsize=3, lw=1, alpha=0.6)
        axes.scatter(
            place, accuracy, s=30 + 300 * row["size_mb"] / largest, color=colours[name], alpha=0.7, edgecolor="white", zorder=3,
            marker=marker_of(row), label=f"{name}: {accuracy:.1f}%, {row['gflops']:.2f} GFLOPs, {row['size_mb']:.1f} MB",
        )  # fmt: skip
        places[name] = place, accuracy
        bars.append((place, low, high))
    join_families(axes, places, rows)
    axes.set(
        xlabel=f"GFLOPs per sentence of {report['settings']['cost_length']} tokens (equal ones side by side)",
        ylabel="test accuracy (%), 95% interval",
        xlim=(0, None),
    )
    axes.set_title("Accuracy against operations; a larger point is a larger weight file")
    axes.grid(alpha=0.3)
    legend = legend_below(figure, axes.get_legend_handles_labels()[0], 2, fontsize=9)
    for handle in legend.legend_handles:
        handle.set_sizes([60])
    name_points(axes, places, colours, bars)
    return figure


def model_comparison(report: dict[str, Any]) -> Figure | None:
    """Four panels of bars: accuracy, inference time, load time, size."""
    rows = measured(report, "encoder")
    if not rows:
        return None
    everyone = colours_of(report, "encoder")
    colours = [everyone[name] for name in rows]
    batch = largest_batch(report)
    untimed = {"median_ms": math.nan, "low_ms": math.nan, "high_ms": math.nan}
    latency = [row["latency"].get(batch, untimed) for row in rows.values()]
    loads = [row["load_seconds"] if row["load_seconds"] is not None else math.nan for row in rows.values()]
    accuracy = [100 * row["accuracy"] for row in rows.values()]
    bounds = [[100 * bound for bound in row["accuracy_interval"]] for row in rows.values()]
    sides = [[value - low for value, (low, _) in zip(accuracy, bounds, strict=True)],
             [high - value for value, (_, high) in zip(accuracy, bounds, strict=True)]]  # fmt: skip
    panels = [
        ("test accuracy (%), 95% interval", accuracy, sides),
        (f"inference time at {batch.replace('_', ' ')} (ms),\n10th to 90th percentile", [t["median_ms"] for t in latency],
         [[t["median_ms"] - t["low_ms"] for t in latency], [t["high_ms"] - t["median_ms"] for t in latency]]),
        ("load time (ms)", [1e3 * seconds for seconds in loads], None),
        ("size of the weight file (MB)", [row["size_mb"] for row in rows.values()], None),
    ]  # fmt: skip
    figure, grid = plt.subplots(2, 2, figsize=(13, 0.55 * len(rows) * 2 + 2.2), constrained_layout=True)
    for axes, (title, values, errors) in zip(grid.flat, panels, strict=True):
        if title.startswith("test accuracy"):  # points: bars that do not start at zero would mislead
            axes.errorbar(values, list(rows), xerr=errors, fmt="none", **BAR)
            axes.scatter(values, list(rows), color=colours, s=70, zorder=3)
            axes.grid(axis="x", alpha=0.3)
        else:
            axes.barh(list(rows), values, xerr=errors, color=colours, alpha=0.85, error_kw=BAR)
        axes.set_ylim(len(rows) - 0.4, -0.6)  # from top to bottom, with room for a row without a bar
        axes.set_title(title, fontsize=11)
        ends = [value + error for value, error in zip(values, errors[1] if errors else [0] * len(values), strict=True)]
        for position, (value, end) in enumerate(zip(values, ends, strict=True)):
            if math.isnan(value):  # what could not be measured has no bar
                continue
            axes.annotate(f"{value:.1f}", (end, position), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
        low, high = axes.get_xlim()
        axes.set_xlim(low, high + 0.08 * (high - low))
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def training_curves(report: dict[str, Any]) -> Figure | None:
    """Validation accuracy over epochs of every classifier that was trained; what is pruned at a time as crosses."""
    histories = {n: row["history"] for n, row in measured(report, "encoder").items() if row.get("history")}
    if not histories:
        return None
    figure, left = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    colours, right = colours_of(report, "encoder"), None
    rows = measured(report, "encoder")
    for (name, history), style in zip(histories.items(), itertools.cycle(LINES)):  # noqa: B905
        epochs = [row["epoch"] for row in history]
        accuracy = [100 * row["accuracy"] for row in history]
        left.plot(epochs, accuracy, color=colours[name], marker=marker_of(rows[name]), ls=style, label=name)
        if any(row.get("sparsity") for row in history):
            right = right or left.twinx()
            right.plot(epochs, [100 * row["sparsity"] for row in history], "x--", color=colours[name], alpha=0.5, ms=4)
    left.set(xlabel="epoch", ylabel="validation accuracy (%)")
    left.xaxis.get_major_locator().set_params(integer=True)
    if right:
        right.set(ylabel="crosses: removed share of heads + FFN (%)", ylim=(0, 100))
    left.set_title("Training, pruning and recovery")
    left.grid(alpha=0.3)
    legend_below(figure, left.lines)
    return figure
