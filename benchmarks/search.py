"""How good and how fast the search is: strategies against each other and a whole grid, trials per minute against running all from scratch.

Run:   python download_model.py
       python 5_bayesian_search.py --n_trials 30       (the search that `speed` looks at)
       python benchmarks/search.py                     (about an hour on 2 CPU cores, the grid resumes if killed)
       python benchmarks/search.py --parts strategies  (strategies, quality, speed or flat alone)
Reads: models/llama, wikitext_data/{train,validation}.jsonl, results/search/study.db
Writes: results/benchmark_search.json, results/benchmark_search_grid.json (a point per line of the grid), and prints both tables

quality   every point of a coarse space is run once. Every strategy then searches the same space for `budget` trials, with several seeds;
          what a pipeline gives is looked up, so that all see the same numbers. Gap: lowest KL / that of the grid - 1, target reached
speed     pipelines drawn at random from those the search of the script has run are run from scratch, nothing remembered, on all
          validation windows: measured after every step, as the search and `--strategy fixed` do, and counted as if measured at the
          end alone. Pipelines that the search estimated to be too large and did not run are drawn and shown apart
strategies   strategies.py: Bayesian search, evolution and chance, 10 seeds each, in a table of quantizations of the first blocks of the
          model, measured once (results/benchmark_search_table.json) and looked up; for one size and for a front
flat      100 trials of one search by TPE on so little text that each takes seconds: memory of the process after them, and the time
          that a trial takes beside its methods, for early and late ones
"""

import json
import math
import random
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import optuna
import torch
from transformers import PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from strategies import strategies  # noqa: E402

from common import SearchConfig, StageConfig, parse_command_line, run_stage  # noqa: E402
from compactmind.checkpoint import load_as_released  # noqa: E402
from compactmind.devices import default_device  # noqa: E402
from compactmind.errors import CompactMindError  # noqa: E402
from compactmind.evaluation.cost import weight_bytes  # noqa: E402
from compactmind.evaluation.perplexity import perplexity  # noqa: E402
from compactmind.files import write_json_atomically  # noqa: E402
from compactmind.search.cache import PrefixCache  # noqa: E402
from compactmind.search.compressor import Measure, pipeline_name, read_pipeline, run_pipeline  # noqa: E402
from compactmind.search.engine import counted_trials, open_study, search  # noqa: E402
from compactmind.search.inputs import read_inputs, windows_of_folder  # noqa: E402
from compactmind.search.space import Space, make_space  # noqa: E402
from compactmind.search.strategies import key_of  # noqa: E402
from compactmind.search.trials import MARGIN, TrialRunner  # noqa: E402

METHODS = ("prune", "retrain", "w8a8", "nf4")
GRID = {
    "prune.sparsity": [0.1, 0.2, 0.3, 0.4], "prune.criterion": ["taylor", "activation"], "prune.scope": ["uniform"],
    "prune.structures": [["channels"]], "prune.blocks": [0], "w8a8.rotations": [["o"]],
    "retrain.tokens": [4096], "retrain.lr": [1e-4], "retrain.alpha": [0.0],
    "w8a8.alpha": [0.5, 0.8], "w8a8.activations": ["per_token"], "w8a8.embeddings": ["int8"], "nf4.double_quantization": [True],
    "nf4.compensation": [False], "nf4.embeddings": ["as_released"],
}  # fmt: skip
"""The coarse space: 8 ways to prune, with and without retraining, 3 to quantize, alone and together: 67 points."""


@dataclass(frozen=True)
class BenchmarkConfig(StageConfig):
    parts: tuple[Literal["strategies", "quality", "speed", "flat"], ...] = ("strategies", "quality", "speed", "flat")
    """What to measure."""
    target_compression: float = 2.5
    """Target of strategies, quality and speed."""
    budget: int = 20
    """Trials of a search in `strategies` and `quality`."""
    seeds: int = 10
    """Searches of each kind."""
    blocks: int = 6
    """Blocks of the model that the table of `strategies` is of, the first ones; 0: all, five times the time."""
    alphas: tuple[float, ...] = (0.5,)
    """Smoothings in it: 29 pipelines with none, 58 with one, 87 with two."""
    study: str = "llama-bayesian"
    """Name of the study in results/search/study.db that `speed` looks at."""
    sample: int = 6
    """Pipelines of it that are run from scratch."""
    sample_not_run: int = 2
    """Pipelines that it did not run and that are run from scratch."""
    trials: int = 100
    """Trials of the search in `flat`."""
    calibration_windows: int = 8
    """Windows to score, re-fit and calibrate on."""
    few_windows: int = 1
    """Windows looked at after every step."""
    search_windows: int = 2
    """Windows on which pipelines are compared; from scratch all of SearchConfig's are read."""


def windows_of(stage: SearchConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    """Return the windows that a search with these settings has, by what they are for."""
    counts = stage.relevant("train_windows", "held_out_windows", "confirm_windows", "eval_windows")
    return windows_of_folder(tokenizer, stage.text_dir, stage.seq_len, stage.window_choice, **counts)


def make_runner(config: BenchmarkConfig, stage: SearchConfig, cache: PrefixCache | None) -> TrialRunner:
    """Return what runs pipelines as the search does."""
    source = config.models_dir / "llama"
    inputs = read_inputs(
        source, default_device(), lambda _: None, lambda tokenizer: windows_of(stage, tokenizer), config.calibration_windows,
        text=str(stage.text_dir), window_choice=stage.window_choice, fingerprint="",
    )  # fmt: skip
    return TrialRunner(
        inputs.resources, inputs.choose[: config.search_windows], config.few_windows,
        released_bytes=weight_bytes(source), target=config.target_compression, cache=cache,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- quality
def run_grid(space: Space, runner: TrialRunner, path: Path, context: dict) -> dict[str, dict]:
    """Return what every point gives, by `key_of`; points of an earlier run with the same context are taken over."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    points = known.get("points", {}) if known.get("context") == context else {}
    asked, begun = list(space.points()), time.perf_counter()
    for number, point in enumerate(asked, start=1):
        steps = read_pipeline(space.pipeline(point))
        if key_of(steps) in points:
            continue
        expected = runner.expected_ratio(steps)
        row = {"pipeline": pipeline_name(steps), "point": point, "expected_ratio": expected}
        row |= runner.measure(runner.run(steps))
        points[key_of(steps)] = row
        write_json_atomically(path, {"context": context, "points": points})
        print(
            f"{number:>4}/{len(asked)} {row['pipeline']:<20}{row['kl']:>12.4f}{row['compression_ratio']:>7.2f}x"
            f"{(time.perf_counter() - begun) / 60:>8.1f} min",
            flush=True,
        )
    return points


def search_in_table(space: Space, points: dict[str, dict], config: BenchmarkConfig, strategy: str, seed: int) -> float:
    """Return the lowest KL that reaches the target after `budget` trials looked up in the table."""

    def look_up(trial, steps):
        row = points[key_of(steps)]
        trial.set_constraint("compression", config.target_compression - row["compression_ratio"])
        return [row["kl"]]

    def expected(steps) -> float:
        return points[key_of(steps)]["expected_ratio"]

    with TemporaryDirectory() as folder:
        study = open_study("table", f"sqlite:///{folder}/study.db", {})
        search(
            study, space, config.budget, look_up, strategy=strategy, seed=1000 * seed,
            first=space.first_guesses(lambda pipeline: expected(read_pipeline(pipeline)), config.target_compression),
            excess=lambda steps: config.target_compression * (1 - MARGIN) - expected(steps),
        )  # fmt: skip
        reached = [trial.value for trial in counted_trials(study) if trial.constraints["compression"] <= 0]
    return min(reached, default=math.inf)


def quality(config: BenchmarkConfig, stage: SearchConfig) -> dict:
    space = make_space(METHODS, choices=GRID)
    context = {
        "calibration_windows": config.calibration_windows, "space": space.described(), "seq_len": stage.seq_len, "measure": "kl",
    }  # fmt: skip
    cache = PrefixCache(config.results_dir / "search" / "cache", context | {"benchmark": True}, int(4e9))
    runner = make_runner(config, stage, cache)
    points = run_grid(space, runner, config.results_dir / "benchmark_search_grid.json", json.loads(json.dumps(context)))
    best = min(row["kl"] for row in points.values() if row["compression_ratio"] >= config.target_compression)
    gaps = {
        strategy: [search_in_table(space, points, config, strategy, seed) / best - 1 for seed in range(config.seeds)]
        for strategy in ("bayesian", "evolution", "random")
    }
    print(
        f"\n{len(points)} points, best at {config.target_compression:g} times smaller KL {best:.4f}; gap after {config.budget} trials"
    )
    for strategy, values in gaps.items():
        print(f"{strategy:<12} median {statistics.median(values):+.2%}   " + " ".join(f"{value:+.2%}" for value in values))
    return {"points": len(points), "best": best, "gaps": gaps, "budget": config.budget}


# ----------------------------------------------------------------------------------------------------------------- speed
def speed(config: BenchmarkConfig, stage: SearchConfig) -> dict:
    database = config.results_dir / "search" / "study.db"
    if not database.is_file():
        raise CompactMindError(f"{database} is not there: run `python 5_bayesian_search.py --n_trials 30` first")
    study = optuna.load_study(study_name=config.study, storage=f"sqlite:///{database}")
    run = [trial for trial in counted_trials(study) if trial.state.is_finished()]
    known = {trial.user_attrs["key"] for trial in run}
    not_run = {}
    for trial in study.get_trials(deepcopy=False):
        if trial.user_attrs.get("key") not in known and "pipeline" in trial.user_attrs:
            not_run[trial.user_attrs["key"]] = trial
    searched = sum(trial.duration.total_seconds() for trial in study.get_trials(deepcopy=False) if trial.duration)
    runner = make_runner(replace(config, calibration_windows=stage.calibration_windows), stage, None)
    windows, choose, looks = make_windows(config, stage), random.Random(config.seed), []

    def look(model) -> dict:
        begun, value = time.perf_counter(), perplexity(model, windows, "")
        looks.append(time.perf_counter() - begun)
        return value

    rows = []
    for what, trials, size in (("run", run, config.sample), ("not run", list(not_run.values()), config.sample_not_run)):
        for trial in choose.sample(trials, min(size, len(trials))):
            fresh, steps = replace(runner.resources, remembered={}, before=()), read_pipeline(trial.user_attrs["pipeline"])
            looks.clear()
            begun = time.perf_counter()
            run_pipeline(steps, fresh, Measure("validation, all", look), show=False)
            seconds = time.perf_counter() - begun
            row = {"trial": trial.number, "what": what, "pipeline": pipeline_name(steps), "search": trial.duration.total_seconds(),
                   "every step": seconds, "at the end": seconds - sum(looks[:-1])}  # fmt: skip
            rows.append(row)
            print(
                f"{what:<8} trial {trial.number:>3}: from scratch {seconds:>4.0f} s, "
                f"measured at the end alone {row['at the end']:>4.0f} s, in the search {row['search']:>4.0f} s: {row['pipeline']}",
                flush=True,
            )
    print(f"\n{len(run)} pipelines run by the search in {searched:.0f} s, {len(not_run)} more estimated to be too large and not run")
    report = {"run": len(run), "not_run": len(not_run), "search_seconds": searched, "rows": rows, "times": {}}
    for measured in ("every step", "at the end"):
        each, others = ([row[measured] for row in rows if row["what"] == what] for what in ("run", "not run"))
        of_all = statistics.mean(each) * len(run) + statistics.mean(others or [0.0]) * len(not_run)
        times = {
            "those it ran": statistics.mean(each) * len(run) / searched,
            "interval": ratio_interval(each, len(run) / searched, config.seed),
            "all it looked at": of_all / searched,
        }
        report["times"][measured] = times
        print(
            f"times as many as from scratch, all windows, measured {measured}: {times['those it ran']:.2f} "
            "[{:.2f}, {:.2f}]".format(*times["interval"])
            + f"; with those it need not run {times['all it looked at']:.2f}"
        )
    return report


def ratio_interval(seconds: list[float], per_second: float, seed: int, draws: int = 10_000) -> tuple[float, float]:
    """Return the 95% bootstrap interval, over the sample, of mean seconds x trials per second."""
    choose = random.Random(seed)
    means = sorted(statistics.mean(choose.choices(seconds, k=len(seconds))) for _ in range(draws))
    return means[int(0.025 * draws)] * per_second, means[int(0.975 * draws)] * per_second


# ------------------------------------------------------------------------------------------------------------------ flat
def flat(config: BenchmarkConfig, stage: SearchConfig) -> dict:
    stage, config = replace(stage, seq_len=64), replace(config, calibration_windows=1, search_windows=1)
    space = make_space(("prune", "w8a8", "nf4"), choices={"prune.compensate": [False], "w8a8.embeddings": ["int8"]})
    with TemporaryDirectory() as folder:
        runner = make_runner(config, stage, PrefixCache(Path(folder) / "cache", {}, int(2e9)))
        study = open_study("flat", f"sqlite:///{folder}/study.db", {})
        runner.target = 0.1  # nothing is skipped
        moments = [time.perf_counter()]

        def note(_) -> None:
            moments.append(time.perf_counter())
            if len(moments) % 10 == 0:
                print(f"{len(moments)} trials, {(moments[-1] - moments[0]) / 60:.1f} min", flush=True)

        search(study, space, config.trials, runner.evaluate, strategy="bayesian", seed=config.seed, finished=note)
        trials = counted_trials(study)
    rows = []
    for trial, before, after in zip(trials, moments, moments[1:], strict=False):
        methods = sum(row.get("seconds", 0.0) for row in trial.user_attrs.get("steps", []) if not row.get("cached"))
        rows.append({"seconds": trial.user_attrs["seconds"], "asking": after - before - trial.user_attrs["seconds"],
                     "methods": methods, "memory_mb": trial.user_attrs["memory_mb"]})  # fmt: skip
    print(f"\n{'trials':<10}{'memory, MB':>12}{'highest':>10}{'s a trial':>11}{'not its methods':>17}{'asking':>9}")
    for first in range(0, len(rows), 10):
        part = rows[first : first + 10]
        middle = {name: statistics.median(row[name] for row in part) for name in ("memory_mb", "seconds", "asking")}
        rest = statistics.median(row["seconds"] - row["methods"] for row in part)
        print(
            f"{first + 1:>3} - {first + len(part):<4}{middle['memory_mb']:>12.0f}{max(row['memory_mb'] for row in part):>10.0f}"
            f"{middle['seconds']:>11.2f}{rest:>17.2f}{middle['asking']:>9.2f}"
        )
    return {"trials": rows}


def make_windows(config: BenchmarkConfig, stage: SearchConfig) -> torch.Tensor:
    """Return all windows that the best trials of a search are confirmed on."""
    return windows_of(stage, load_as_released(config.models_dir / "llama")[1])["choose"]


def main(config: BenchmarkConfig) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    stage = SearchConfig.for_profile(config.profile)
    path = config.results_dir / "benchmark_search.json"
    report = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for part, measure in {"strategies": strategies, "quality": quality, "speed": speed, "flat": flat}.items():
        if part in config.parts:
            report[part] = measure(config, stage)
            write_json_atomically(path, report)
    print(f"written to {path}")


if __name__ == "__main__":
    run_stage(main, parse_command_line(BenchmarkConfig.for_profile()))
