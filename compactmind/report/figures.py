"""Every figure of the report, drawn from the report's dict alone: FIGURES, name -> caption and drawing."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import Patch  # noqa: E402

from compactmind.report import search_figures  # noqa: E402
from compactmind.report.encoder_figures import accuracy_against_gflops, model_comparison, training_curves  # noqa: E402
from compactmind.report.language_figures import (  # noqa: E402
    alpha_curve,
    divergence_against_size,
    divergence_against_speed,
    perplexity_against_size,
    tensor_bits,
)
from compactmind.report.opening import opening  # noqa: E402
from compactmind.report.sentences import measured, speedup  # noqa: E402
from compactmind.report.style import colours_of  # noqa: E402


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure whole or not at all, and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    figure.savefig(temporary, dpi=150)
    temporary.replace(path)
    plt.close(figure)


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
            panels.append((f"against {report['references'][track]}", bars, colours_of(report, track)))
    if not panels:
        return None
    most = max(len(next(iter(bars.values()))) for _, bars, _ in panels)
    figure, grid = plt.subplots(1, len(panels), figsize=(6.5 * len(panels), 1.4 + 0.42 * most), constrained_layout=True, squeeze=False)
    for axes, (title, bars, colours) in zip(grid[0], panels, strict=True):
        height, patches = 0.8 / len(bars), []
        for index, (label, values) in enumerate(bars.items()):
            places = [position + (index - (len(bars) - 1) / 2) * height for position in range(len(values))]
            look = {"alpha": 1 - 0.45 * index / max(1, len(bars) - 1), "hatch": ("", "///", "...", "xxx")[index % 4], "edgecolor": "white"}
            axes.barh(places, values.values(), height=0.9 * height, color=[colours[name] for name in values], lw=0, **look)
            patches.append(Patch(facecolor="#555555", label=label, **look))
            for place, value in zip(places, values.values(), strict=True):
                if math.isnan(value):
                    continue
                axes.annotate(
                    f"{value:.2f}", (value, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
                )  # fmt: skip
        axes.set_yticks(range(len(values)), list(values))
        axes.set_ylim(len(values) - 0.4, -0.6)
        axes.axvline(1, color="#333333", lw=0.8, ls=":", zorder=0)
        axes.margins(x=0.1)
        axes.set(xlabel=f"times as fast, {title}")
        axes.legend(handles=patches, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=len(bars))
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def of_search(draw: Callable, needs: Callable[[dict[str, Any]], Any] = bool) -> Callable[[dict[str, Any]], Figure | None]:
    """Return a figure of a report from one of a search's summary, if there is one with what the figure needs."""
    return lambda report: draw(report["search"]) if report.get("search") and needs(report["search"]) else None


FIGURES: dict[str, tuple[str, Callable[[dict[str, Any]], Figure | None]]] = {
    "opening": ("Quality against size: full and named are models that no smaller one is as good as; bars are 95% intervals.", opening),
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
