"""Every figure of the report, drawn from the report's dict alone: FIGURES, name -> caption and drawing."""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.colors import ListedColormap  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import Patch  # noqa: E402

from compactmind.formats.grouped import by_bits  # noqa: E402
from compactmind.methods.llama import LINEARS  # noqa: E402
from compactmind.methods.quantization.grid import BITS  # noqa: E402
from compactmind.report import search_figures  # noqa: E402
from compactmind.report.as_shipped import KIND  # noqa: E402
from compactmind.report.sentences import bits_per_weight, largest_batch, measured, speedup, tokens_per_second  # noqa: E402

COLOURS = ("#4d4d4d", "#9a6fb0", "#1f5fa8", "#b03a2e", "#5aa1d8", "#e08e79", "#2e7d32", "#c79a00", "#00838f", "#6d4c41")
"""One colour per row of a track, the same in every figure."""
BAR = {"lw": 1, "capsize": 3, "ecolor": "#333333"}


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure whole or not at all, and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    figure.savefig(temporary, dpi=150)
    temporary.replace(path)
    plt.close(figure)


def colours_of(rows: dict[str, Any]) -> dict[str, str]:
    """Return the colour of each row of a track."""
    return {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(rows)}


# ------------------------------------------------------------------------------------------------------------ encoders
def families(rows: dict[str, Any]) -> list[list[str]]:
    """Return the names of the members of every family of pruned classifiers that was made by one run, from the largest to the smallest."""
    found: dict[str, list[str]] = {}
    for name, row in rows.items():
        goal = ((row.get("stage") or {}).get("config") or {}).get("goal")
        if goal and name.endswith(f"_{goal['name']}"):
            kind = "times" if goal["measured"] else "operations"
            found.setdefault(f"{kind} {name.removesuffix('_' + goal['name'])}", []).append(name)
    return [sorted(names, key=lambda name: -rows[name]["gflops"]) for names in found.values()]


def accuracy_against_gflops(report: dict[str, Any]) -> Figure | None:
    """One point per classifier: GFLOPs (equal ones side by side), accuracy with its interval, area proportional to bytes."""
    everyone = measured(report, "encoder")
    rows = {name: row for name, row in everyone.items() if row["gflops"] is not None}
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(9, 5.5), constrained_layout=True)
    width, alike = (
        0.012 * max(row["gflops"] for row in rows.values()),
        Counter(round(row["gflops"], 2) for row in rows.values()),
    )
    beside = Counter()
    for names in families(rows):
        axes.plot(
            [rows[name]["gflops"] for name in names], [100 * rows[name]["accuracy"] for name in names], color="#999999", lw=1, zorder=1
        )
    for name, row in rows.items():
        colour = colours_of(everyone)[name]
        same = round(row["gflops"], 2)
        place = row["gflops"] + width * (beside[same] - (alike[same] - 1) / 2)  # equal GFLOPs: side by side
        beside[same] += 1
        accuracy, (low, high) = 100 * row["accuracy"], (100 * bound for bound in row["accuracy_interval"])
        errors = [[accuracy - low], [high - accuracy]]
        axes.errorbar(place, accuracy, yerr=errors, color=colour, capsize=3, lw=1, alpha=0.6)
        axes.scatter(
            place, accuracy, s=8 * row["size_mb"], color=colour, alpha=0.55, edgecolor="white", zorder=3,
            label=f"{name}: {accuracy:.1f}%, {row['gflops']:.2f} GFLOPs, {row['size_mb']:.1f} MB",
        )  # fmt: skip
    axes.set(
        xlabel=f"GFLOPs per sentence of {report['settings']['cost_length']} tokens",
        ylabel="test accuracy (%), 95% interval",
        xlim=(0, None),
    )
    axes.set_title("Accuracy against operations; area of a point = size of its weight file")
    axes.grid(alpha=0.3)
    legend = axes.legend(loc="upper left", bbox_to_anchor=(0, -0.12), ncol=2, frameon=False, fontsize=9)
    for handle in legend.legend_handles:
        handle.set_sizes([60])
    return figure


def model_comparison(report: dict[str, Any]) -> Figure | None:
    """Four panels of bars: accuracy, inference time, load time, size."""
    rows = measured(report, "encoder")
    if not rows:
        return None
    colours = colours_of(rows).values()
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
        (f"inference time at {batch.replace('_', ' ')} (ms), 10th to 90th percentile", [t["median_ms"] for t in latency],
         [[t["median_ms"] - t["low_ms"] for t in latency], [t["high_ms"] - t["median_ms"] for t in latency]]),
        ("load time (ms)", [1e3 * seconds for seconds in loads], None),
        ("size of the weight file (MB)", [row["size_mb"] for row in rows.values()], None),
    ]  # fmt: skip
    figure, grid = plt.subplots(2, 2, figsize=(13, 0.55 * len(rows) * 2 + 2.2), constrained_layout=True)
    for axes, (title, values, errors) in zip(grid.flat, panels, strict=True):
        if title.startswith("test accuracy"):  # points: bars that do not start at zero would mislead
            axes.errorbar(values, list(rows), xerr=errors, fmt="none", **BAR)
            axes.scatter(values, list(rows), color=list(colours), s=70, zorder=3)
            axes.grid(axis="x", alpha=0.3)
        else:
            axes.barh(list(rows), values, xerr=errors, color=list(colours), alpha=0.85, error_kw=BAR)
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


def latency(report: dict[str, Any]) -> Figure | None:
    """Speed-ups: classifiers against their reference at every batch size, language models made from the dense one against it."""
    dense = report["references"]["llm"]
    panels = []
    for track, phases, rows in (
        ("encoder", [f"batch_{size}" for size in report["settings"]["latency_batches"]], measured(report, "encoder")),
        ("llm", ["prefill", "decode"], {n: row for n, row in measured(report, "llm").items() if row["compared_with"] == dense}),
    ):
        timed = [name for name, row in rows.items() if any(speedup(row, phase) for phase in phases)]
        bars = {phase.replace("_", " "): {name: speedup(rows[name], phase) or math.nan for name in timed} for phase in phases}
        if timed:
            panels.append((f"against {report['references'][track]}", bars))
    if not panels:
        return None
    figure, grid = plt.subplots(1, len(panels), figsize=(6.5 * len(panels), 4.8), constrained_layout=True, squeeze=False)
    for axes, (title, bars) in zip(grid[0], panels, strict=True):
        height = 0.8 / len(bars)
        for index, (label, values) in enumerate(bars.items()):
            places = [position + (index - (len(bars) - 1) / 2) * height for position in range(len(values))]
            axes.barh(places, values.values(), height=0.9 * height, color=COLOURS[2 + 3 * index], alpha=0.85, label=label)
            for place, value in zip(places, values.values(), strict=True):
                if math.isnan(value):
                    continue
                axes.annotate(
                    f"{value:.2f}", (value, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8
                )
        axes.set_yticks(range(len(values)), list(values))
        axes.set_ylim(len(values) - 0.4, -0.6)
        axes.axvline(1, color="#333333", lw=0.8, ls=":")
        axes.margins(x=0.1)
        axes.set(xlabel=f"times as fast, {title}")
        axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=len(bars))
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def training_curves(report: dict[str, Any]) -> Figure | None:
    """Validation accuracy over epochs of every classifier that was trained; what is pruned at a time as dashes."""
    histories = {n: row["history"] for n, row in measured(report, "encoder").items() if row.get("history")}
    if not histories:
        return None
    figure, left = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    colours, right = colours_of(measured(report, "encoder")), None
    for name, history in histories.items():
        epochs = [row["epoch"] for row in history]
        left.plot(epochs, [100 * row["accuracy"] for row in history], "o-", color=colours[name], label=name)
        if any(row.get("sparsity") for row in history):
            right = right or left.twinx()
            right.plot(epochs, [100 * row["sparsity"] for row in history], "s--", color=colours[name], alpha=0.5, ms=4)
    left.set(xlabel="epoch", ylabel="validation accuracy (%)")
    left.xaxis.get_major_locator().set_params(integer=True)
    if right:
        right.set(ylabel="dashes: removed share of heads + FFN (%)", ylim=(0, 100))
    left.set_title("Training, pruning and recovery")
    left.grid(alpha=0.3)
    figure.legend(handles=left.lines, loc="outside lower center", ncol=min(4, len(histories)), frameon=False)
    return figure


# ----------------------------------------------------------------------------------------------------- language models
def beside_dense(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the measured language models by name: beside a dense model only what was made from it."""
    everyone, dense_name = measured(report, "llm"), report["references"]["llm"]
    return {name: row for name, row in everyone.items() if dense_name not in everyone or row["compared_with"] == dense_name}


def perplexity_against_size(report: dict[str, Any]) -> Figure | None:
    """One point per language model: MB of the weight file, perplexity with the interval of its ratio to dense."""
    everyone, rows = measured(report, "llm"), beside_dense(report)
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(8, 6), constrained_layout=True)
    for name, row in rows.items():
        colour = colours_of(everyone)[name]
        low, high = row["perplexity_interval"]
        if row["against_dense"]:  # the paired interval: what the windows have in common cancels
            dense = row["perplexity"] / row["against_dense"]["ratio"]
            low, high = (dense * bound for bound in row["against_dense"]["interval"])
        axes.errorbar(
            row["size_mb"], row["perplexity"], yerr=[[max(0, row["perplexity"] - low)], [max(0, high - row["perplexity"])]],
            fmt="*" if row["kind"] == KIND else "o", ms=15 if row["kind"] == KIND else 8, capsize=3, color=colour,
            label=f"{name}: {row['perplexity']:.2f}, {row['size_mb']:.0f} MB" + (", the point to beat" if row["kind"] == KIND else ""),
        )  # fmt: skip
    axes.set(
        xlabel="size of the weight file (MB)", ylabel="perplexity; bars: 95% interval of the ratio to dense", xlim=(0, None)
    )
    axes.set_title(f"Language models on the same {next(iter(rows.values()))['protocol']['windows']} windows of held-out text")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, -0.14))
    return figure


def divergence_against_size(report: dict[str, Any]) -> Figure | None:
    """One point per language model made from the dense one: MB of the weight file, KL with its interval (log); dense as a line."""
    return _divergence_against(report, lambda row: row["size_mb"], "{:.0f} MB", "size of the weight file (MB)")


def divergence_against_speed(report: dict[str, Any]) -> Figure | None:
    """The same points over tokens generated per second at batch 1; models that were not timed are left out."""
    return _divergence_against(report, tokens_per_second, "{:.1f} tokens/s", "tokens generated per second, batch 1")


def _divergence_against(
    report: dict[str, Any], value: Callable[[dict[str, Any]], float | None], form: str, label: str
) -> Figure | None:
    everyone = measured(report, "llm")
    rows = {name: row for name, row in beside_dense(report).items() if value(row) is not None}
    points = {name: row for name, row in rows.items() if row["divergence"] and row["divergence"]["mean"] > 0}
    if not points:
        return None
    figure, axes = plt.subplots(figsize=(8, 6), constrained_layout=True)
    floor = min(row["divergence"]["mean"] for row in points.values()) / 2
    for name, row in rows.items():
        colour, kl, place = colours_of(everyone)[name], row["divergence"], value(row)
        if name == report["references"]["llm"]:  # at 0, which has no place on a log axis
            axes.axvline(place, color=colour, ls=":", label=f"{name}: 0, {form.format(place)}")
        if name not in points:
            continue
        low, high = max(floor, kl["interval"][0]), kl["interval"][1]
        axes.errorbar(
            place, kl["mean"], yerr=[[max(0, kl["mean"] - low)], [high - kl["mean"]]], fmt="o", ms=8, capsize=3, color=colour,
            label=f"{name}: {kl['mean']:.3g}, same top token {kl['same_top']:.0%}, {form.format(place)}",
        )  # fmt: skip
    axes.set(xlabel=label, ylabel="KL to dense (nats a token), 95% interval", xlim=(0, None), yscale="log")
    axes.set_title(
        f"How far from the dense model, on {next(iter(points.values()))['protocol']['windows']} windows of held-out text"
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, -0.14))
    return figure


def alpha_curve(report: dict[str, Any]) -> Figure | None:
    """KL of W8A8 to the dense model on validation text by SmoothQuant's alpha, with what was chosen and the naive one as lines."""
    table = (report.get("smoothquant") or {}).get("alpha_table") or []
    numbers = [row for row in table if not isinstance(row["alpha"], str)]
    if len(numbers) < 2:
        return None
    figure, axes = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    axes.plot(
        [row["alpha"] for row in numbers],
        [row["divergence"] for row in numbers],
        "o-",
        color=COLOURS[2],
        label="one alpha for all",
    )
    lines = [row for row in table if isinstance(row["alpha"], str)]
    for row, colour in zip(lines, (COLOURS[3], COLOURS[6], COLOURS[7], COLOURS[1]), strict=False):
        axes.axhline(
            row["divergence"], color=colour, ls="--", label=f"{row['alpha'].replace('_', ' ')}: {row['divergence']:.3g}"
        )
    axes.set(
        xlabel="alpha: share of the difficulty moved into the weights",
        ylabel="KL of W8A8 to dense (nats a token), validation text",
    )
    axes.set_title("SmoothQuant: how much to smooth")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, -0.14), ncols=2)
    return figure


WIDTHS = dict(zip(BITS, ("#b03a2e", "#e08e79", "#f3dcc4", "#c9dded", "#5aa1d8", "#1f5fa8"), strict=True))
"""Bits -> colour: red is narrow, blue is wide."""
MOST_NUMBERS = 48
"""Layers up to which the width stands in every cell."""


def tensor_bits(report: dict[str, Any]) -> Figure | None:
    """One panel per language model whose tensors have widths of their own: layers across, linears and tables down, colour by bits."""
    rows = {name: row for name, row in measured(report, "llm").items() if by_bits(row.get("quantization"))}
    if not rows:
        return None
    figure, grid = plt.subplots(len(rows), 1, figsize=(12, 3.1 * len(rows) + 0.5), constrained_layout=True, squeeze=False)
    for axes, (name, row) in zip(grid[:, 0], rows.items(), strict=True):
        _draw_bits(axes, {tensor: at["bits"] for tensor, at in row["quantization"]["tensors"].items()})
        axes.set_title(f"{name}: {row['size_mb']:.1f} MB, {bits_per_weight(row):.2f} bits a weight", fontsize=11)
    grid[-1, 0].set(xlabel="layer")
    used = sorted({bits for row in rows.values() for bits in by_bits(row["quantization"])})
    patches = [Patch(facecolor=WIDTHS[bits], edgecolor="#8a8a8a", label=f"{bits} bits") for bits in used]
    figure.legend(handles=patches, loc="outside lower center", ncol=len(patches), frameon=False)
    return figure


def _draw_bits(axes: Axes, bits: dict[str, int]) -> None:
    """Draw the widths of one model's tensors, name -> bits, a table as a band below all layers."""
    inside = {name: name.removeprefix("model.layers.").partition(".") for name in bits if name.startswith("model.layers.")}
    layers = 1 + max((int(layer) for layer, _, _ in inside.values()), default=0)
    tables = [name for name in bits if name not in inside]
    lines, short = list(LINEARS), {path: field for field, path in LINEARS.items()}
    cells = [[math.nan] * layers for _ in (*lines, *tables)]
    for name, (layer, _, path) in inside.items():
        cells[lines.index(short[path])][int(layer)] = BITS.index(bits[name])
    for line, name in enumerate(tables, start=len(lines)):
        cells[line] = [BITS.index(bits[name])] * layers
    axes.imshow(cells, cmap=ListedColormap(list(WIDTHS.values())), vmin=-0.5, vmax=len(BITS) - 0.5, aspect="auto")
    for line, values in enumerate(cells):
        band = line >= len(lines)
        places = [(layers - 1) / 2] if band else range(layers) if layers <= MOST_NUMBERS else []
        for place in places:
            value = values[int(place)]
            if not math.isnan(value):
                colour = "white" if BITS[value] in (BITS[0], BITS[-1]) else "#333333"
                axes.text(place, line, BITS[value], ha="center", va="center", fontsize=8, color=colour)
        axes.axhline(line + 0.5, color="white", lw=3 if line == len(lines) - 1 else 0.8)
    for layer in range(1, layers):  # not through the bands
        axes.plot([layer - 0.5] * 2, [-0.5, len(lines) - 0.5], color="white", lw=0.8)
    words = {"model.embed_tokens": "table", "lm_head": "head"}
    axes.set_yticks(range(len(cells)), [*lines, *(words.get(name, name) for name in tables)])
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def of_search(draw: Callable, needs: Callable[[dict[str, Any]], Any] = bool) -> Callable[[dict[str, Any]], Figure | None]:
    """Return a figure of a report from one of a search's summary, if there is one with what the figure needs."""
    return lambda report: draw(report["search"]) if report.get("search") and needs(report["search"]) else None


FIGURES: dict[str, tuple[str, Callable[[dict[str, Any]], Figure | None]]] = {
    "final_report": ("Accuracy against operations.", accuracy_against_gflops),
    "model_comparison": ("Classifiers: accuracy, time, load time, size.", model_comparison),
    "perplexity_against_size": ("Language models: perplexity against size.", perplexity_against_size),
    "divergence_against_size": ("Language models: KL to the dense model against size.", divergence_against_size),
    "divergence_against_speed": ("Language models: KL to the dense model against speed.", divergence_against_speed),
    "tensor_bits": ("Language models: bits of every tensor.", tensor_bits),
    "latency": ("Measured speed-ups.", latency),
    "training_curves": ("Training curves of the encoder track.", training_curves),
    "alpha_curve": ("KL of W8A8 to the dense model against alpha.", alpha_curve),
    "search_convergence": ("Search: the best so far.", of_search(search_figures.convergence)),
    "search_pareto": ("Search: KL to the dense model, or perplexity, against compression ratio.", of_search(search_figures.pareto)),
    "search_importance": (
        "Search: what explains the differences between pipelines.",
        of_search(search_figures.importance, lambda summary: summary["importances"]),
    ),
    "search_error_accumulation": (
        "Search: do the errors of combined methods add up?",
        of_search(search_figures.error_accumulation, search_figures.with_interaction),
    ),
    "search_retraining_gain": (
        "Search: what retraining won, and what it cost.",
        of_search(search_figures.retraining_gain, lambda summary: summary["retraining"]),
    ),
}
"""File name -> caption, and what draws it from a report; a drawing of what was not measured is None."""


def draw_all(report: dict[str, Any], folder: Path) -> dict[str, str]:
    """Write every figure there is something for as <name>.png; return name -> caption of those."""
    drawn = {}
    for name, (caption, draw) in FIGURES.items():
        figure = draw(report)
        if figure is None:
            (folder / f"{name}.png").unlink(missing_ok=True)  # one of an earlier report
            continue
        save_figure(figure, folder / f"{name}.png")
        drawn[name] = caption
    return drawn
