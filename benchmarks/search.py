"""How good and how fast the search is: TPE and random against a whole grid, and trials per minute against running every pipeline from scratch.

Run:   python benchmarks/search.py                     (after python download_model.py; about two hours on 2 CPU cores, resumes if killed)
       python benchmarks/search.py --parts speed       (20 minutes)
Reads: models/llama, wikitext_data/{train,validation}.jsonl
Writes: results/benchmark_search.json, results/benchmark_search_grid.json (a point per line of the grid), and prints both tables

quality   every point of a coarse space is run once. TPE and random then search the same space for `budget` trials, with several seeds; what
          a pipeline gives is looked up, so that all see the same numbers. Gap: best found / best of the grid - 1, target reached
speed     one sequence of random pipelines, as the search runs them (scores remembered, shared beginnings, hopeless ones stopped, few
          windows) and from scratch (each alone, all windows), in this process, one after the other
"""

import json
import math
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import optuna
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import SearchConfig, StageConfig, parse_command_line, run_stage  # noqa: E402
from compactmind.checkpoint import load_as_released  # noqa: E402
from compactmind.evaluation.cost import weight_megabytes  # noqa: E402
from compactmind.files import write_json_atomically  # noqa: E402
from compactmind.methods.registry import Resources  # noqa: E402
from compactmind.search.cache import PrefixCache  # noqa: E402
from compactmind.search.compressor import pipeline_name, read_pipeline  # noqa: E402
from compactmind.search.engine import Stopped, counted_trials, open_study, search, shuffled_points  # noqa: E402
from compactmind.search.space import Space, make_space  # noqa: E402
from compactmind.search.trials import TrialRunner  # noqa: E402
from compactmind.text import load_documents, token_windows  # noqa: E402

GRID = {
    "prune.sparsity": [0.1, 0.2, 0.3, 0.4], "prune.criterion": ["taylor", "activation"], "prune.scope": ["uniform", "global"],
    "w8a8.alpha": [0.5, 0.7], "w8a8.activations": ["per_token"], "w8a8.embeddings": ["as_released", "int8"],
    "nf4.double_quantization": [True],
}  # fmt: skip
"""The coarse space of `quality`, without retraining: 16 ways to prune, 5 to quantize, alone and together: 101 points."""


@dataclass(frozen=True)
class BenchmarkConfig(StageConfig):
    parts: tuple[str, ...] = ("quality", "speed")
    """quality, speed, or both."""
    target_compression: float = 2.0
    """Target of both."""
    budget: int = 15
    """Trials of TPE and random in `quality`."""
    seeds: int = 5
    """Searches of each kind."""
    pipelines: int = 10
    """Pipelines of `speed`."""
    calibration_windows: int = 8
    """Windows to score, re-fit and calibrate on."""


def make_runner(config: BenchmarkConfig, stage: SearchConfig, cache: PrefixCache | None) -> TrialRunner:
    """Return what runs pipelines as the search does."""
    source = config.models_dir / "llama"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_as_released(source)

    def windows(split: str, count: int) -> torch.Tensor:
        return token_windows(tokenizer, load_documents(stage.text_dir, split), stage.seq_len, count)

    train, validation = windows("train", 0), windows("validation", stage.held_out_windows + stage.confirm_windows)
    resources = Resources(
        train[: config.calibration_windows], train, validation[: stage.held_out_windows],
        dense=lambda: load_as_released(source)[0].to(device).float(), released=model.dtype, device=device,
    )  # fmt: skip
    return TrialRunner(
        resources, validation[stage.held_out_windows :][: stage.search_windows], stage.few_windows,
        released_bytes=int(1e6 * weight_megabytes(source)), target=config.target_compression, cache=cache,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- quality
def point_key(steps) -> str:
    return " ".join(step.identity() for step in steps)


def run_grid(space: Space, runner: TrialRunner, path: Path, context: dict) -> dict[str, dict]:
    """Return what every point gives, by `point_key`; points of an earlier run with the same context are taken over."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found = known.get("points", {}) if known.get("context") == context else {}
    study, points, begun = optuna.create_study(), list(space.points()), time.perf_counter()
    for number, point in enumerate(points, start=1):
        study.enqueue_trial(point)
        steps = read_pipeline(space.suggest(study.ask()))
        if point_key(steps) in found:
            continue
        expected = runner.expected_ratio(steps)
        row = {"pipeline": pipeline_name(steps), "point": point, "expected_ratio": expected}
        row |= runner.measure(runner.run(steps))
        found[point_key(steps)] = row
        write_json_atomically(path, {"context": context, "points": found})
        print(
            f"{number:>4}/{len(points)} {row['pipeline']:<20}{row['perplexity']:>12.2f}{row['compression_ratio']:>7.2f}x"
            f"{(time.perf_counter() - begun) / 60:>8.1f} min",
            flush=True,
        )
    return found


def search_in_table(space: Space, found: dict[str, dict], config: BenchmarkConfig, strategy: str, seed: int) -> float:
    """Return the best perplexity that reaches the target after `budget` trials looked up in the table."""

    def look_up(trial, steps):
        row = found[point_key(steps)]
        trial.set_constraint("compression", config.target_compression - row["compression_ratio"])
        return [row["perplexity"]]

    with TemporaryDirectory() as folder:
        study = open_study("table", f"sqlite:///{folder}/study.db", {})
        search(study, space, config.budget, look_up, strategy=strategy, seed=1000 * seed)
        reached = [trial.value for trial in counted_trials(study) if trial.constraints["compression"] <= 0]
    return min(reached, default=math.inf)


def quality(config: BenchmarkConfig, stage: SearchConfig) -> dict:
    space = make_space(("prune", "w8a8", "nf4"), choices=GRID)
    context = {"calibration_windows": config.calibration_windows, "space": space.described(), "seq_len": stage.seq_len}
    cache = PrefixCache(config.results_dir / "search" / "cache", context | {"benchmark": True}, int(4e9))
    runner = make_runner(config, stage, cache)
    found = run_grid(space, runner, config.results_dir / "benchmark_search_grid.json", json.loads(json.dumps(context)))
    best = min(row["perplexity"] for row in found.values() if row["compression_ratio"] >= config.target_compression)
    gaps = {
        strategy: [search_in_table(space, found, config, strategy, seed) / best - 1 for seed in range(config.seeds)]
        for strategy in ("bayesian", "random")
    }
    print(
        f"\n{len(found)} points, best at {config.target_compression:g} times smaller {best:.3f}; gap after {config.budget} trials"
    )
    for strategy, values in gaps.items():
        print(f"{strategy:<12} median {statistics.median(values):+.2%}   " + " ".join(f"{value:+.2%}" for value in values))
    return {"points": len(found), "best": best, "gaps": gaps, "budget": config.budget}


# ----------------------------------------------------------------------------------------------------------------- speed
def speed(config: BenchmarkConfig, stage: SearchConfig) -> dict:
    choices = {"retrain.tokens": [8192], "prune.criterion": ["taylor", "activation"]}
    space = make_space(("prune", "retrain", "smooth", "w8a8", "nf4"), choices={**choices, "prune.sparsity": [0.1, 0.2, 0.3]})
    study, pipelines = optuna.create_study(), []
    for point in shuffled_points(space, config.seed):
        study.enqueue_trial(point)
        steps = read_pipeline(space.suggest(study.ask()))
        pipelines.append(steps)
        if len(pipelines) == config.pipelines:
            break
    seconds = {}
    with TemporaryDirectory() as folder:
        runner = make_runner(config, stage, PrefixCache(Path(folder), {}, int(4e9)))
        started, trials = time.perf_counter(), optuna.create_study()
        for steps in pipelines:
            trial = trials.ask()
            try:
                trials.tell(trial, runner.evaluate(trial, steps))
            except Stopped as stop:
                trials.tell(trial, state=optuna.trial.TrialState.PRUNED)
                print(f"{pipeline_name(steps)}: {stop}", flush=True)
        seconds["as the search runs them"] = time.perf_counter() - started
    started = time.perf_counter()
    for steps in pipelines:
        alone = make_runner(config, stage, None)
        alone = replace(alone, windows=make_windows(config, stage))
        alone.measure(alone.run(steps))
        print(f"{pipeline_name(steps)} from scratch, {time.perf_counter() - started:.0f} s so far", flush=True)
    seconds["from scratch"] = time.perf_counter() - started
    rates = {name: 60 * len(pipelines) / value for name, value in seconds.items()}
    print(f"\n{len(pipelines)} pipelines" + "".join(f"\n{name:<26}{rate:>6.2f} per minute" for name, rate in rates.items()))
    print(f"{rates['as the search runs them'] / rates['from scratch']:.2f} times as many")
    return {"pipelines": [pipeline_name(steps) for steps in pipelines], "seconds": seconds, "per_minute": rates}


def make_windows(config: BenchmarkConfig, stage: SearchConfig) -> torch.Tensor:
    """Return all validation windows: what the best trials are confirmed on."""
    _, tokenizer = load_as_released(config.models_dir / "llama")
    count = stage.held_out_windows + stage.confirm_windows
    return token_windows(tokenizer, load_documents(stage.text_dir, "validation"), stage.seq_len, count)[
        stage.held_out_windows :
    ]


def main(config: BenchmarkConfig) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    stage = SearchConfig.for_profile(config.profile)
    path = config.results_dir / "benchmark_search.json"
    report = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for part, measure in {"quality": quality, "speed": speed}.items():
        if part in config.parts:
            report[part] = measure(config, stage)
            write_json_atomically(path, report)
    print(f"written to {path}")


if __name__ == "__main__":
    run_stage(main, parse_command_line(BenchmarkConfig.for_profile()))
