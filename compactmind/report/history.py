"""The plot of one pruned classifier: validation accuracy and sparsity over its epochs."""

import json
from pathlib import Path

import matplotlib.pyplot as plt

from compactmind.manifest import read_manifest
from compactmind.report.figures import save_figure

COLOURS = {"warmup": "#fff3d6", "pruning": "#fbdcd5", "recovery": "#dcefe0"}
"""Phase -> colour behind it."""


def plot_history(directory: Path, path: Path) -> None:
    """Draw validation accuracy and sparsity of a checkpoint over its epochs, phases shaded."""
    manifest = read_manifest(directory)
    history = json.loads((directory / "training_history.json").read_text(encoding="utf-8"))
    pattern, sparsity = manifest.get("sparsity_pattern"), manifest["metrics"]["sparsity"]
    what = "weights of the blocks" if pattern else "heads + FFN"
    how = f"{pattern} by magnitude" if pattern else manifest["stage"]["config"]["criterion"]
    title = f"{manifest['experiment_name']}: {how}, {sparsity:.0%} of {what} {'zero' if pattern else 'removed'}"
    epochs = [row["epoch"] for row in history]
    figure, left = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    for row in history:
        left.axvspan(row["epoch"] - 0.5, row["epoch"] + 0.5, color=COLOURS[row["phase"]], lw=0)
    for phase in COLOURS:
        mine = [row["epoch"] for row in history if row["phase"] == phase]
        if mine:
            left.text((min(mine) + max(mine)) / 2, 1.01, phase, ha="center", va="bottom", transform=left.get_xaxis_transform())
    left.plot(epochs, [100 * row["accuracy"] for row in history], "o-", color="#1f5fa8", label="validation accuracy")
    left.set(xlabel="epoch", ylabel="validation accuracy (%)", xlim=(min(epochs) - 0.5, max(epochs) + 0.5), xticks=epochs)
    right = left.twinx()
    right.plot(epochs, [100 * row["sparsity"] for row in history], "s--", color="#b03a2e", label="sparsity")
    right.set(ylabel=f"sparsity: {'zero' if pattern else 'removed'} share of {what} (%)", ylim=(0, 100))
    figure.legend(handles=[*left.lines, *right.lines], loc="outside lower center", ncol=2, frameon=False)
    figure.suptitle(title)
    save_figure(figure, path)
