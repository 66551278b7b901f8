"""What a search found, as figures, drawn from its summary alone (compactmind/search/findings.py writes it)."""

import math
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

BLUE, RED, GREY = "#1f5fa8", "#b03a2e", "#8a8a8a"
SHORTEST_RATIOS = 0.5
"""Compression ratios that a figure shows at least, from end to end."""


def _axes(**labels: str) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    axes.set(**labels)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _quality(summary: dict[str, Any]) -> tuple[str, str]:
    """Return the key of what pipelines are compared by and its words."""
    quality = summary.get("quality", "perplexity")  # an earlier version compared by nothing else
    return quality, {"kl": "KL to the dense model, nats", "perplexity": "perplexity"}[quality]


def _log_scale(axes: Axes) -> None:
    """Make the axis of KL or perplexity logarithmic, with plain numbers beside it, as many as there is room for."""
    axes.set_yscale("log")

    def between(value: float, _: int) -> str:
        low, high = axes.get_ylim()
        decades = math.log10(high / low)
        shown = "23456789" if decades < 1 else "25" if decades < 3 else ""
        return f"{value:g}" if f"{value:e}"[0] in shown else ""

    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(between)


def _empty(axes: Axes, why: str) -> None:
    axes.text(0.5, 0.5, why, ha="center", va="center", transform=axes.transAxes, color=GREY)
    axes.set(xticks=[], yticks=[])


def convergence(summary: dict[str, Any]) -> Figure:
    """Best KL, or perplexity, so far, of pipelines that reach the target."""
    (key, words), target, points = _quality(summary), summary["target_compression"], summary["points"]
    figure, axes = _axes(
        title=f"Best so far, of pipelines at least {target:g} times smaller", xlabel="trials that count", ylabel=f"{words}, validation text"
    )
    best, best_so_far = None, []
    for point in points:
        if point[key] is not None and point["reached"]:
            best = point[key] if best is None else min(best, point[key])
        best_so_far.append(float("nan") if best is None else best)
    if best is None:
        _empty(axes, "no pipeline reached the target")
        return figure
    for reached, colour, marker, label in ((True, BLUE, "o", "reaches the target"), (False, GREY, "s", "too large")):
        mine = [(n, point[key]) for n, point in enumerate(points, 1) if point["reached"] == reached and point[key] is not None]
        if mine:
            axes.scatter(*zip(*mine, strict=True), color=colour, marker=marker, s=22, label=label, zorder=3)
    stopped = [n for n, point in enumerate(points, 1) if point[key] is None]
    if stopped:  # below all others: they have no value
        edge = axes.get_xaxis_transform()
        axes.scatter(stopped, [0.02] * len(stopped), color=GREY, s=30, marker="x", transform=edge, label="stopped or failed")
    axes.step(range(1, len(points) + 1), best_so_far, where="post", color=RED, label="best so far")
    axes.margins(y=0.1)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _log_scale(axes)
    axes.legend(frameon=False)
    return figure


def importance(summary: dict[str, Any]) -> Figure:
    """What explains the differences between pipelines."""
    figure, axes = _axes(
        title="What explains the differences between finished trials",
        xlabel=f"share of the variance of log {_quality(summary)[0]} (fANOVA); stopped trials are not in it",
    )
    shares = summary["importances"]
    if not shares:
        _empty(axes, "too few finished trials")
        return figure
    names = sorted(shares, key=shares.get)
    axes.barh(names, [shares[name] for name in names], color=BLUE)
    return figure


def pareto(summary: dict[str, Any]) -> Figure:
    """KL, or perplexity, against compression ratio of everything that was run, the front of what nothing beats in both, and its knee."""
    key, words = _quality(summary)
    figure, axes = _axes(title="Everything that was run", xlabel="compression ratio", ylabel=f"{words}, validation text")
    rows = [point for point in summary["points"] if point[key] is not None]
    if not rows:
        _empty(axes, "no trial ran to its end")
        return figure
    for hybrid, colour, marker, label in ((True, BLUE, "s", "hybrid"), (False, GREY, "o", "one method")):
        each = [(row["compression_ratio"], row[key]) for row in rows if row["hybrid"] == hybrid]
        if each:
            axes.scatter(*zip(*each, strict=True), color=colour, marker=marker, s=26, label=label, zorder=3)
    front = front_line(rows, key)
    if len(front) > 1:
        axes.plot(*zip(*front, strict=True), color=RED, label="nothing is better in both")
    for point in summary.get("front", {}).get("points", ()):
        if point["trial"] == summary["front"]["knee"]:
            axes.annotate(
                f"knee: trial {point['trial']}", (point["compression_ratio"], point[key]), xytext=(18, 24), textcoords="offset points",
                arrowprops={"arrowstyle": "->", "color": RED}, color=RED,
            )  # fmt: skip
    axes.axvline(summary["target_compression"], color=GREY, ls=":", label=f"target {summary['target_compression']:g}")
    low, high = axes.get_xlim()
    if high - low < SHORTEST_RATIOS:  # a few models of one size should look like it
        axes.set_xlim((low + high - SHORTEST_RATIOS) / 2, (low + high + SHORTEST_RATIOS) / 2)
    _log_scale(axes)
    axes.legend(frameon=False)
    return figure


def front_line(rows: list[dict[str, Any]], key: str = "perplexity") -> list[tuple[float, float]]:
    """Return the corners (compression ratio, KL or perplexity) of the front, from the smallest model on.

    Its height at a ratio is the lowest value of anything at least that small. Ratios that agree to three decimals count as one: files
    of one shape differ by a few bytes of description.
    """
    corners = []
    points = [(round(row["compression_ratio"], 3), row[key]) for row in rows]
    for ratio, value in sorted(points, key=lambda point: (-point[0], point[1])):
        if not corners:
            corners.append((ratio, value))
        elif value < corners[-1][1]:
            corners += [(ratio, corners[-1][1]), (ratio, value)]
    return corners


def with_interaction(summary: dict[str, Any]) -> dict[Any, dict[str, Any]]:
    """Return the confirmed trials, number -> what was measured, whose losses can be compared with those of their parts."""
    return {number: trial for number, trial in summary["confirmed"].items() if trial.get("interaction") is not None}


def error_accumulation(summary: dict[str, Any]) -> Figure:
    """Loss of the best hybrids: the sum of their parts' losses against the one measured together."""
    figure, axes = _axes(title="Do the errors of the parts add up? Best hybrids, first windows", xlabel="nats above dense")
    rows = with_interaction(summary)
    if not rows:
        _empty(axes, "no hybrid with a quantization among the best")
        return figure
    for position, trial in enumerate(rows.values()):
        losses = [row["loss"] for row in trial["steps"]]
        whole, before = losses[-1] - losses[0], losses[-2] - losses[0]
        axes.barh(position + 0.2, before, height=0.36, color=GREY, label="before quantization" if not position else None)
        axes.barh(position + 0.2, whole - trial["interaction"] - before, left=before, height=0.36, color=BLUE,
                  label="quantization alone" if not position else None)  # fmt: skip
        axes.barh(position - 0.2, whole, height=0.36, color=RED, label="measured together" if not position else None)
    axes.set_yticks(
        range(len(rows)),
        [f"trial {number}\n{' > '.join(row['method'] for row in trial['steps'][1:])}" for number, trial in rows.items()],
    )
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=3)
    return figure


def retraining_gain(summary: dict[str, Any]) -> Figure:
    """Nats per token won by retraining against its seconds."""
    figure, axes = _axes(
        title="What retraining won and what it cost", xlabel="seconds of retraining", ylabel="nats per token won"
    )
    gains = summary["retraining"]
    if not gains:
        _empty(axes, "nothing was retrained")
        return figure
    axes.scatter([gain["seconds"] for gain in gains], [gain["nats"] for gain in gains], color=BLUE)
    axes.axhline(0, color=GREY, lw=0.8)
    axes.set_xlim(left=0)
    return figure


SEARCH_FIGURES = {
    "convergence": convergence, "importance": importance, "pareto": pareto, "error_accumulation": error_accumulation,
    "retraining_gain": retraining_gain,
}  # fmt: skip
"""File name in results/search/ -> drawing."""
