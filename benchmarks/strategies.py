"""Which strategy finds the best pipeline soonest? Searches in a table: every pipeline of a space, measured once. A part of search.py.

Every trial of every strategy is a look-up: it gives what was measured of that pipeline and is charged the seconds that took. Pipelines are
chosen by KL to the dense model on validation text and reported by KL on test text. A strategy's regret is the mean, over the trials or over
the seconds, of ln(KL of the best so far / lowest KL of the table at the target): 0 for one that begins with the best. Of a front it is the
hypervolume that counts, of ln KL and ln bytes, as a share of that of the whole table. Strategies are compared seed by seed (Wilcoxon's
signed-rank test, two-sided).
"""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import optuna
import torch
from scipy.stats import wilcoxon
from transformers import PreTrainedModel

from common import SearchConfig
from compactmind.checkpoint import load_as_released
from compactmind.devices import default_device
from compactmind.evaluation.cost import weight_bytes
from compactmind.evaluation.divergence import measure_windows
from compactmind.files import write_json_atomically
from compactmind.forward import LogitsOf
from compactmind.methods.registry import Resources
from compactmind.report.figures import save_figure
from compactmind.search.compressor import Measure, pipeline_name, read_pipeline, run_pipeline, stored_bytes
from compactmind.search.engine import counted_trials, search
from compactmind.search.front import hypervolume
from compactmind.search.space import Space, make_space
from compactmind.search.strategies import key_of
from compactmind.text import load_documents, token_windows

METHODS = ("smooth", "w8a8", "nf4", "gptq")
TABLE = {
    "smooth.alpha": [0.5, 0.8],
    "w8a8.alpha": [0.5], "w8a8.rotations": [["o"]], "w8a8.activations": ["per_token"], "w8a8.embeddings": ["int8"],
    "nf4.double_quantization": [True], "nf4.compensation": [True, False], "nf4.embeddings": ["int8", "int4"],
    "gptq.zero": ["symmetric"], "gptq.damping": [0.05],
    "gptq.bits": [3, 4, 5], "gptq.group_size": [32, 128], "gptq.compensation": [True, False], "gptq.embeddings": ["int8", "int4"],
}  # fmt: skip
"""A space of quantizations, each alone and after smoothing: 58 pipelines of seconds each with one alpha, 87 with both."""
SEQ_LEN, CALIBRATION, VALIDATION, TEST = 128, 4, 2, 6
"""Tokens of a window, and how many of them are calibrated on, chosen by and reported on."""


def measure_table(space: Space, config: Any, stage: SearchConfig, path: Path) -> dict[str, dict]:
    """Return what every point of the space gives, by `key_of`; points of an earlier run of the same kind are taken over.

    A row: its pipeline, CPU seconds of making it and of measuring it on validation text (whatever else the machine does), bytes and
    compression ratio, and on `validation` and `test` text its kl and perplexity.
    """
    source, device = config.models_dir / "llama", default_device()
    context = {"seq_len": SEQ_LEN, "windows": [CALIBRATION, VALIDATION, TEST], "bytes": weight_bytes(source), "blocks": config.blocks}
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    points = known.get("points", {}) if known.get("context") == context else {}
    pipelines = {key_of(steps): steps for steps in (read_pipeline(space.pipeline(point)) for point in space.points())}
    if not pipelines.keys() - points.keys():
        return {key: points[key] for key in pipelines}
    model, tokenizer = load_as_released(source)

    def windows(split: str, count: int) -> torch.Tensor:
        choice = "first" if split == "train" else stage.window_choice
        return token_windows(tokenizer, load_documents(stage.text_dir, split), SEQ_LEN, count, choice)

    texts = {"validation": windows("validation", VALIDATION), "test": windows("test", TEST)}
    size_of_dense = sum(weight.numel() * weight.element_size() for weight in first_blocks(model, config.blocks).parameters())
    resources = Resources(
        windows("train", CALIBRATION), windows("train", CALIBRATION), texts["validation"],
        dense=lambda: first_blocks(load_as_released(source)[0], config.blocks).to(device).float(), released=model.dtype,
        released_bytes=size_of_dense, device=device,
    )  # fmt: skip
    dense = {name: LogitsOf(resources.teacher(), text) for name, text in texts.items()}

    def measured(model, name: str) -> dict[str, float]:
        each = measure_windows({"": model}, texts[name], dense[name])[""]
        return {"kl": each["divergence"]["mean"], "perplexity": math.exp(each["losses"].mean().item())}

    nothing = Measure("nothing", lambda _: {})
    for number, (key, steps) in enumerate(pipelines.items(), start=1):
        if key in points:
            continue
        begun = time.process_time()
        made = run_pipeline(steps, resources, nothing, show=False)
        validation = measured(made.model, "validation")
        seconds, size = time.process_time() - begun, stored_bytes(made, resources.released)
        row = {
            "pipeline": [step.described() for step in steps], "seconds": seconds, "bytes": size,
            "compression_ratio": size_of_dense / size, "validation": validation, "test": measured(made.model, "test"),
        }  # fmt: skip
        points[key] = row
        write_json_atomically(path, {"context": context, "points": points})
        print(
            f"{number:>4}/{len(pipelines)} {pipeline_name(steps):<16} KL {validation['kl']:.4f} {row['compression_ratio']:.2f}x "
            f"{seconds:.1f} s",
            flush=True,
        )
    return points


def first_blocks(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """Leave a Llama, in place, its first `count` blocks, 0: all; return it. What it says then is no language, but how roundings change it
    is as rugged as in the whole model, and every pipeline takes a fraction of the time."""
    if count:
        model.model.layers = model.model.layers[:count]
        model.config.num_hidden_layers = count
    return model


def table_space(alphas: Sequence[float] = TABLE["smooth.alpha"]) -> Space:
    choices = {**TABLE, "smooth.alpha": list(alphas)}
    if not alphas:
        choices.pop("smooth.alpha")
    return make_space(METHODS if alphas else METHODS[1:], choices=choices)


# ------------------------------------------------------------------------------------------------------------------ searching
STRATEGIES = ("bayesian", "evolution", "random")
COLOURS = dict(zip(STRATEGIES, ("#1f5fa8", "#2e8b57", "#8a8a8a"), strict=True))


def look_up(points: dict[str, dict], space: Space, config: Any, strategy: str, seed: int, guesses: bool, objectives: int) -> list[dict]:
    """Return the rows of the table that a search looked up, in the order in which it did."""
    rows: list[dict] = []

    def ratio_of(pipeline: list[dict]) -> float:
        return points[key_of(read_pipeline(pipeline))]["compression_ratio"]

    def evaluate(_, steps) -> list[float]:
        rows.append(points[key_of(steps)])
        return [rows[-1]["validation"]["kl"], rows[-1]["bytes"]][:objectives]

    target = config.target_compression if objectives == 1 else 1.0
    study = optuna.create_study(directions=["minimize"] * objectives)
    search(
        study, space, config.budget, evaluate, strategy=strategy, seed=1000 * seed,
        first=space.first_guesses(ratio_of, target) if guesses else (),
        excess=lambda steps: target - points[key_of(steps)]["compression_ratio"],
    )  # fmt: skip
    assert len(counted_trials(study)) == len(rows)
    return rows


def best_so_far(rows: Sequence[dict], text: str) -> list[float]:
    """Return, after every row, the KL on `text` of the one that is best on validation text so far."""
    best, values = None, []
    for row in rows:
        best = row if best is None or row["validation"]["kl"] < best["validation"]["kl"] else best
        values.append(best[text]["kl"])
    return values


def volumes(rows: Sequence[dict], text: str, reference: tuple[float, float]) -> list[float]:
    """Return, after every row, the hypervolume on `text` of the front on validation text so far."""
    values = []
    for count in range(1, len(rows) + 1):
        seen = rows[:count]
        front = [
            row for row in seen
            if not any(
                other["validation"]["kl"] < row["validation"]["kl"] and other["bytes"] <= row["bytes"]
                or other["validation"]["kl"] <= row["validation"]["kl"] and other["bytes"] < row["bytes"] for other in seen
            )
        ]  # fmt: skip
        values.append(hypervolume([(math.log(row["bytes"]), math.log(row[text]["kl"])) for row in front], reference))
    return values


def over_seconds(rows: Sequence[dict], values: Sequence[float], moments: np.ndarray) -> np.ndarray:
    """Return the last value at every moment, the first one before it is there."""
    ends = np.cumsum([row["seconds"] for row in rows])
    return np.array([values[max(0, int(np.searchsorted(ends, moment, side="right")) - 1)] for moment in moments])


def compared(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Return on how many seeds we are lower, higher and equal, the median difference and the p of Wilcoxon's test."""
    differences = np.array(ours) - np.array(theirs)
    p = wilcoxon(differences, zero_method="zsplit").pvalue if differences.any() else 1.0
    return {
        "ahead": int((differences < 0).sum()), "behind": int((differences > 0).sum()), "equal": int((differences == 0).sum()),
        "median difference": float(np.median(differences)), "p": float(p),
    }  # fmt: skip


def strategies(config: Any, stage: SearchConfig) -> dict[str, Any]:
    """Measure the table if that is still to be done, search in it and print who was ahead."""
    space = table_space(config.alphas)
    points = measure_table(space, config, stage, config.results_dir / "benchmark_search_table.json")
    small = [row for row in points.values() if row["compression_ratio"] >= config.target_compression]
    best = {text: min(small, key=lambda row: row["validation"]["kl"])[text]["kl"] for text in ("validation", "test")}
    seconds = [row["seconds"] for row in points.values()]
    print(
        f"{len(points)} pipelines, {len(small)} of them at least {config.target_compression:g} times smaller, {sum(seconds):.0f} s in all; "
        f"the best of these: KL {best['validation']:.4f} on validation text, {best['test']:.4f} on test text"
    )
    reference = tuple(max(math.log(value) for value in values) + 0.01 for values in (
        [row["bytes"] for row in points.values()], [row[text]["kl"] for row in points.values() for text in ("validation", "test")],
    ))  # fmt: skip
    whole = {text: volumes(list(points.values()), text, reference)[-1] for text in ("validation", "test")}
    report: dict[str, Any] = {"pipelines": len(points), "best": best, "budget": config.budget, "seeds": config.seeds}
    for guesses in (True, False):
        runs = {s: [look_up(points, space, config, s, seed, guesses, 1) for seed in range(config.seeds)] for s in STRATEGIES}
        fronts = {s: [look_up(points, space, config, s, seed, guesses, 2) for seed in range(config.seeds)] for s in STRATEGIES}
        moments = np.linspace(0, min(sum(row["seconds"] for row in rows) for each in runs.values() for rows in each), 200)

        def regrets(rows: Sequence[dict], text: str) -> list[float]:
            return [math.log(value / best[text]) for value in best_so_far(rows, text)]  # noqa: B023  asked for at once

        curves = {
            "KL, validation, over trials": {s: [regrets(rows, "validation") for rows in each] for s, each in runs.items()},
            "KL, test, over trials": {s: [regrets(rows, "test") for rows in each] for s, each in runs.items()},
            "KL, test, over seconds": {
                s: [over_seconds(rows, regrets(rows, "test"), moments) for rows in each] for s, each in runs.items()
            },
            "front missing, test, over trials": {
                s: [[1 - value / whole["test"] for value in volumes(rows, "test", reference)] for rows in each]
                for s, each in fronts.items()
            },
        }  # fmt: skip
        name = "with first guesses" if guesses else "from nothing"
        report[name] = show(name, curves, config)
        draw(curves, moments, config.results_dir / f"benchmark_search_strategies{'' if guesses else '_from_nothing'}.png", name)
    return report


def show(name: str, curves: dict[str, dict[str, list]], config: Any) -> dict[str, Any]:
    """Print and return who was ahead of chance, by mean regret and at the end."""
    print(f"\n{name}: {config.budget} trials, {config.seeds} seeds; lower is better")
    print(f"{'':<34}{'strategy':<12}{'mean':>8}{'at the end':>12}{'ahead of random':>18}{'behind':>8}{'p':>8}")
    report: dict[str, Any] = {}
    for what, each in curves.items():
        means = {s: [float(np.mean(curve)) for curve in seeds] for s, seeds in each.items()}
        for strategy in STRATEGIES:
            against = compared(means[strategy], means["random"])
            ends = [float(curve[-1]) for curve in each[strategy]]
            report[f"{what}, {strategy}"] = {"means": means[strategy], "ends": ends, "against random": against}
            beside = f"{against['ahead']:>10} of {config.seeds:<4}{against['behind']:>8}{against['p']:>8.3f}"
            print(
                f"{what:<34}{strategy:<12}{np.median(means[strategy]):>8.3f}{np.median(ends):>12.3f}"
                f"{beside if strategy != 'random' else ''}"
            )
    return report


def draw(curves: dict[str, dict[str, list]], moments: np.ndarray, path: Path, name: str) -> None:
    """Draw every curve as the median of the seeds with the band of the middle half."""
    figure, places = plt.subplots(2, 2, figsize=(11, 7), constrained_layout=True)
    for axes, (what, each) in zip(places.flat, curves.items(), strict=True):
        for strategy, seeds in each.items():
            x = moments if what.endswith("seconds") else np.arange(1, min(map(len, seeds)) + 1)
            values = np.array([list(curve)[: len(x)] for curve in seeds])
            low, middle, high = np.quantile(values, [0.25, 0.5, 0.75], axis=0)
            axes.plot(x, middle, color=COLOURS[strategy], label=strategy)
            axes.fill_between(x, low, high, color=COLOURS[strategy], alpha=0.2, lw=0)
        front = what.startswith("front")
        axes.set(
            xlabel="CPU seconds charged" if what.endswith("seconds") else "trials", title=what,
            ylabel="missing share of hypervolume" if front else "ln(best KL so far / lowest KL)",
        )  # fmt: skip
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    places.flat[0].legend(frameon=False)
    figure.suptitle(f"Searches in a table, {name}: median of the seeds and the middle half")
    save_figure(figure, path)
    print(f"drawn in {path}")
