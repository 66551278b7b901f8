"""The figures of the language models, drawn from the report's dict alone."""

import itertools
import math
from collections.abc import Callable
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
from compactmind.report.as_shipped import KIND  # noqa: E402
from compactmind.report.sentences import bits_per_weight, measured, tokens_per_second  # noqa: E402
from compactmind.report.style import COLOURS, colours_of, join_families, legend_below, marker_of, name_points  # noqa: E402


def beside_dense(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the measured language models by name: beside a dense model only what was made from it."""
    everyone, dense_name = measured(report, "llm"), report["references"]["llm"]
    return {name: row for name, row in everyone.items() if dense_name not in everyone or row["compared_with"] == dense_name}


def paired_bounds(row: dict[str, Any]) -> tuple[float, float]:
    """Return the interval of a perplexity: of its ratio to dense where there is one, for what the windows have in common cancels."""
    if not row["against_dense"]:
        return tuple(row["perplexity_interval"])
    dense = row["perplexity"] / row["against_dense"]["ratio"]
    low, high = row["against_dense"]["interval"]
    return dense * low, dense * high


def perplexity_against_size(report: dict[str, Any]) -> Figure | None:
    """One point per language model: MB of the weight file, perplexity with the interval of its ratio to dense."""
    rows = beside_dense(report)
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(9, 6.5), constrained_layout=True)
    colours, places, bars = colours_of(report, "llm"), {}, []
    for name, row in rows.items():
        low, high = paired_bounds(row)
        file = row["kind"] == KIND
        axes.errorbar(
            row["size_mb"], row["perplexity"], yerr=[[max(0, row["perplexity"] - low)], [max(0, high - row["perplexity"])]],
            fmt=marker_of(row), ms=13 if file else 7, capsize=3, color=colours[name], zorder=2 if file else 3,
            label=f"{name}: {row['perplexity']:.2f}, {row['size_mb']:.0f} MB" + (", the point to beat" if file else ""),
        )  # fmt: skip
        places[name] = row["size_mb"], row["perplexity"]
        bars.append((row["size_mb"], low, high))
    join_families(axes, places, rows)
    axes.set(xlabel="size of the weight file (MB)", ylabel="perplexity, 95% interval of the ratio to dense", xlim=(0, None))
    axes.set_title(f"Language models on the same {next(iter(rows.values()))['protocol']['windows']} windows of held-out text")
    axes.grid(alpha=0.3)
    legend_below(figure, axes.get_legend_handles_labels()[0], 2, fontsize=9)
    name_points(axes, places, colours, bars)
    return figure


def divergence_against_size(report: dict[str, Any]) -> Figure | None:
    """One point per language model made from the dense one: MB of the weight file, KL with its interval (log); dense as a line."""
    return _divergence_against(report, lambda row: row["size_mb"], "{:.0f} MB", "size of the weight file (MB)", 0)


def divergence_against_speed(report: dict[str, Any]) -> Figure | None:
    """The same points over tokens generated per second at batch 1; models that were not timed are left out."""
    return _divergence_against(report, tokens_per_second, "{:.1f} tokens/s", "tokens generated per second, batch 1")


def _divergence_against(
    report: dict[str, Any], value: Callable[[dict[str, Any]], float | None], form: str, label: str, left: float | None = None
) -> Figure | None:
    rows = {name: row for name, row in beside_dense(report).items() if value(row) is not None}
    points = {name: row for name, row in rows.items() if row["divergence"] and row["divergence"]["mean"] > 0}
    if not points:
        return None
    figure, axes = plt.subplots(figsize=(9, 6.5), constrained_layout=True)
    colours, places, bars = colours_of(report, "llm"), {}, []
    floor = min(row["divergence"]["mean"] for row in points.values()) / 2
    for name, row in rows.items():
        kl, place = row["divergence"], value(row)
        if name == report["references"]["llm"]:  # at 0, which has no place on a log axis
            axes.axvline(place, color=colours[name], ls=":", label=f"{name}: 0, {form.format(place)}")
        if name not in points:
            continue
        low, high = max(floor, kl["interval"][0]), kl["interval"][1]
        axes.errorbar(
            place, kl["mean"], yerr=[[max(0, kl["mean"] - low)], [high - kl["mean"]]], fmt=marker_of(row), ms=7, capsize=3,
            color=colours[name], label=f"{name}: {kl['mean']:.3g}, same top token {kl['same_top']:.0%}, {form.format(place)}",
        )  # fmt: skip
        places[name] = place, kl["mean"]
        bars.append((place, low, high))
    join_families(axes, places, points)
    axes.set(xlabel=label, ylabel="KL to dense (nats a token), 95% interval", yscale="log")
    axes.set_xlim(left=left)
    axes.set_title(
        f"How far from the dense model, on {next(iter(points.values()))['protocol']['windows']} windows of held-out text"
    )
    axes.grid(alpha=0.3)
    legend_below(figure, axes.get_legend_handles_labels()[0], 2, fontsize=8)
    name_points(axes, places, colours, bars)
    return figure


def alpha_curve(report: dict[str, Any]) -> Figure | None:
    """KL of W8A8 to the dense model on validation text by SmoothQuant's alpha, with what was chosen and the naive one as lines."""
    table = (report.get("smoothquant") or {}).get("alpha_table") or []
    numbers = [row for row in table if not isinstance(row["alpha"], str)]
    if len(numbers) < 2:
        return None
    figure, axes = plt.subplots(figsize=(8, 4.8), constrained_layout=True)
    alphas, values = ([row[key] for row in numbers] for key in ("alpha", "divergence"))
    axes.plot(alphas, values, "o-", color=COLOURS[0], label="one alpha for all")
    colours = {"naive": "llama_w8a8_naive", "per_layer": "llama_w8a8"}  # as the model of it in the other figures
    models, others = colours_of(report, "llm"), iter((COLOURS[1], COLOURS[6], COLOURS[7]))
    lines = [row for row in table if isinstance(row["alpha"], str)]
    for row, style in zip(lines, itertools.cycle(("--", "-.", ":", (0, (5, 1, 1, 1, 1, 1))))):  # noqa: B905
        colour = models.get(colours.get(row["alpha"])) or next(others, COLOURS[8])
        axes.axhline(row["divergence"], color=colour, ls=style, label=f"{row['alpha'].replace('_', ' ')}: {row['divergence']:.3g}")
    axes.set(
        xlabel="alpha: share of the difficulty moved into the weights",
        ylabel="KL to dense (nats a token), validation",
    )
    axes.set_title("SmoothQuant: how much to smooth")
    axes.grid(alpha=0.3)
    legend_below(figure, axes.get_legend_handles_labels()[0], 2)
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
        title = f"{name}: {row['size_mb']:.1f} MB, {bits_per_weight(row):.2f} bits a weight"
        axes.set_title(title, fontsize=11, color=colours_of(report, "llm")[name])
    grid[-1, 0].set(xlabel="layer")
    used = sorted({bits for row in rows.values() for bits in by_bits(row["quantization"])})
    patches = [Patch(facecolor=WIDTHS[bits], edgecolor="#8a8a8a", label=f"{bits} bits") for bits in used]
    legend_below(figure, patches, len(patches))
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
