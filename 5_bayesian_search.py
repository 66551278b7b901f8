"""Search for the best compression of a Llama: over methods, their order and their parameters; or run one pipeline.

Papers: compactmind/search/engine.py, compactmind/methods/pruning/llama_importance.py, .../llama_pruning.py, .../retraining/causal_lm.py.
Run:   python 5_bayesian_search.py              (after python download_model.py; every setting: --help)
       python 5_bayesian_search.py --model_path models/llama --strategy bayesian --n_trials 30 --retrain True --target_compression 2.5
       python 5_bayesian_search.py --replay 12                       (make the model of trial 12 again, into models/llama_trial_12)
       python 5_bayesian_search.py --strategy fixed --output models/llama_small --pipeline \\
           '[{"method": "prune", "params": {"sparsity": 0.3}}, {"method": "retrain"}, {"method": "w8a8"}]'
Reads: models/llama, wikitext_data/{train,validation,test}.jsonl     (test: only for the perplexity of what is saved)
Writes: models/llama_searched      the best pipeline that reaches the target (--output), with perplexity after every step
        results/search/            study.db, trials.csv, best_pipeline.json, summary.json and the plots
        models/llama_pruned, results/pipeline_llama_pruned.json      with --strategy fixed
Time:  on 2 CPU cores, embedded profile: fixed about 10 minutes, more than half of it retraining; a trial of a
       search from seconds to a few minutes, depending on what it shares with earlier ones and whether it retrains.

Killed at any time, the same command goes on: finished trials are kept, the one that was interrupted is run once more. Several processes
or machines share one study (--storage). Perplexities of trials are of validation text and cannot be compared with the report's.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from common import PROFILE, SearchConfig, parse_command_line, run_stage
from compactmind.checkpoint import identity_of, is_up_to_date, load_as_released, save_checkpoint
from compactmind.data import data_fingerprint, read_dataset_description
from compactmind.errors import CompactMindError
from compactmind.evaluation.cost import weight_bytes
from compactmind.evaluation.perplexity import paired_ratio, perplexity
from compactmind.files import write_json_atomically
from compactmind.methods.registry import METHODS, Resources
from compactmind.search.cache import PrefixCache
from compactmind.search.compressor import (
    Measure,
    Step,
    interaction,
    layer_errors,
    pipeline_name,
    read_pipeline,
    run_pipeline,
    store_as_released,
)
from compactmind.search.engine import counted_trials, open_study, search
from compactmind.search.findings import SearchProgress, best_trials, trials_table, write_findings
from compactmind.search.space import make_space
from compactmind.search.trials import TrialRunner, brief
from compactmind.text import load_documents, token_windows
from compactmind.training import TrainingState

# ------------------------------------------------------------------------------------------------------------ constants
# Every field, its reason and its range: common.SearchConfig. For example: for_profile(PROFILE, n_trials=50)
CONFIG = SearchConfig.for_profile(PROFILE)

ERROR_WINDOWS = 2
"""Windows of validation text on which the error of every layer is measured."""


# -------------------------------------------------------------------------------------------------------- model and text
@dataclass
class Material:
    """What every pipeline works on, and what identifies it."""

    source: Path
    tokenizer: object
    resources: Resources
    choose: torch.Tensor
    test: torch.Tensor
    text: str
    fingerprint: str

    @property
    def on_test(self) -> Measure:
        """Perplexity on test text: of what is saved, and of nothing that is chosen between."""

        def measure(model) -> dict:
            found = perplexity(model, self.test, f"{self.text}, test")
            return {name: found[name] for name in ("perplexity", "loss", "losses", "protocol")}

        return Measure(f"test, {len(self.test)} windows", measure)


def source_of(config: SearchConfig) -> Path:
    return Path(config.model_path) if config.model_path else config.models_dir / "llama"


def read_material(config: SearchConfig) -> Material:
    """Load the tokenizer and the text; the model is loaded whenever a fresh one is wanted."""
    source, device = source_of(config), "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_as_released(source)
    released = model.dtype
    del model
    text = read_dataset_description(config.text_dir)["source"]["source"]

    def windows(split: str, count: int) -> torch.Tensor:
        return token_windows(tokenizer, load_documents(config.text_dir, split), config.seq_len, count)

    train = windows("train", config.train_windows)
    validation = windows("validation", config.held_out_windows + config.confirm_windows)
    if len(validation) < 2:
        raise CompactMindError(
            f"the validation text has {len(validation)} window(s) of {config.seq_len} tokens: retraining and choosing need one each; use "
            "more text or a smaller --seq_len"
        )
    held_out = min(config.held_out_windows, len(validation) // 2)  # a short text is shared
    resources = Resources(
        calibration=train[: config.calibration_windows], train=train, held_out=validation[:held_out],
        dense=lambda: load_as_released(source)[0].to(device).float(), released=released, device=device,
    )  # fmt: skip
    print(f"{len(train)} windows of {config.seq_len} tokens to train on, {len(resources.calibration)} of them to calibrate on")
    fingerprint = data_fingerprint(config.text_dir)
    return Material(
        source, tokenizer, resources, validation[held_out:], windows("test", config.eval_windows), text, fingerprint
    )


def context_of(config: SearchConfig) -> dict:
    """Return what a pipeline's result depends on beside the pipeline."""
    return {
        **config.relevant("seed", "calibration_windows", "train_windows", "held_out_windows", "confirm_windows", "seq_len"),
        "text": data_fingerprint(config.text_dir),
        "model": identity_of(source_of(config)),
    }


def cache_of(config: SearchConfig) -> PrefixCache:
    """Return the models half way through pipelines that this and earlier runs have made."""
    return PrefixCache(config.results_dir / "search" / "cache", context_of(config), int(config.cache_gb * 1e9))


# ----------------------------------------------------------------------------------------------------------- one pipeline
def make_and_save(config: SearchConfig, steps: list[Step], output: Path, strategy: str, extra: dict | None = None) -> None:
    """Run a pipeline, save its model with the error of every step, and print them; nothing to do if that model is there.

    What another pipeline has begun with is taken from the cache, unless --force True.
    """
    context = context_of(config)
    stage = {
        "script": "5_bayesian_search.py",
        "config": {"strategy": strategy, **context, "pipeline": [step.described() for step in steps]},
        "inputs": {"model": context["model"]},
    }
    if not config.force and is_up_to_date(output, stage):
        print(f"{output} is up to date: skipped (--force True makes it again)")
        return
    material = read_material(config)
    resources = material.resources
    if sum(step.method.kind == "retrain" for step in steps) == 1:  # two could not tell their states apart
        resources.resume = TrainingState(output, stage)
    found = run_pipeline(steps, resources, material.on_test, cache=None if config.force else cache_of(config))
    together = interaction(steps, resources, material.on_test, found.steps)
    errors = layer_errors(resources.teacher(), found.model, resources.held_out[:ERROR_WINDOWS])
    dense_losses = found.steps[0]["losses"]
    for row in found.steps:
        row["against_dense"] = paired_ratio(row.pop("losses"), dense_losses)
    record = {"pipeline": found.steps, "interaction": together, "layer_errors": errors, **(extra or {})}
    store_as_released(found, resources.released)
    save_checkpoint(
        output, found.model, material.tokenizer, kind=found.kind, parent=material.source.name, stage=stage,
        quantization=found.quantization, data_fingerprint=material.fingerprint, extra=record,
        dtype=str(resources.released).removeprefix("torch."),
    )  # fmt: skip
    if resources.resume:
        resources.resume.clear()
    path = config.results_dir / f"pipeline_{output.name}.json"
    write_json_atomically(path, record)
    print(f"\n{'step':<12}{'perplexity':>12}{'against dense [95%, paired]':>32}{'seconds':>10}")
    for row in found.steps:
        low, high = (bound - 1 for bound in row["against_dense"]["interval"])
        against = f"{row['against_dense']['ratio'] - 1:+.2%} [{low:+.2%}, {high:+.2%}]"
        print(f"{row['method']:<12}{row['perplexity']:>12.3f}{against:>32}{row['seconds']:>10.0f}")
    if together is not None:
        print(f"interaction of quantization with the rest: {together:+.4f} nats")
    print(f"{json.dumps(found.steps[0]['protocol'])}\nsaved to {output}, steps in {path}")


# ----------------------------------------------------------------------------------------------------------------- search
def space_of(config: SearchConfig):
    """Return the space the constants describe. Raises CompactMindError if nothing is left in it."""
    methods = [
        name for name in config.methods if config.retrain or METHODS.get(name) is None or METHODS[name].kind != "retrain"
    ]
    try:
        choices = json.loads(config.choices)
    except json.JSONDecodeError as error:
        raise CompactMindError(f'choices are no JSON ({error}): for example {{"prune.sparsity": [0.1, 0.2]}}') from None
    if not isinstance(choices, dict):
        raise CompactMindError(f'choices {config.choices} are no object: for example {{"prune.sparsity": [0.1, 0.2]}}')
    if not config.retrain:
        choices = {name: values for name, values in choices.items() if not name.startswith("retrain.")}
    return make_space(methods, mode=config.mode, max_length=config.max_length, max_repeats=config.max_repeats, choices=choices)


def study_of(config: SearchConfig, space):
    """Return the study these constants belong to, new or with the trials it has."""
    folder = config.results_dir / "search"
    folder.mkdir(parents=True, exist_ok=True)
    described = json.loads(
        json.dumps(
            {
                **context_of(config), "space": space.described(), "objectives": list(config.objectives),
                "target_compression": config.target_compression, "few_windows": config.few_windows,
            }
        )
    )  # fmt: skip
    storage = config.storage or f"sqlite:///{folder / 'study.db'}"
    name = config.study_name or f"{source_of(config).name}-{config.strategy}"
    return open_study(name, storage, described, ["minimize"] * len(config.objectives)), storage


def run_search(config: SearchConfig, output: Path) -> None:
    space = space_of(config)
    study, storage = study_of(config, space)
    print(f"study {study.study_name} in {storage}; {len(space.orders)} orders of methods, {space.size()} pipelines; ", end="")
    print(f"{len(counted_trials(study))} of {config.n_trials} trials are there")
    summary = config.results_dir / "search" / "summary.json"
    if not config.force and len(counted_trials(study)) >= config.n_trials and summary.is_file():
        known = json.loads(summary.read_text(encoding="utf-8"))
        if known["trials"] == len(counted_trials(study)) and known["best"]:
            make_and_save(config, read_pipeline(known["best"]["pipeline"]), output, config.strategy, {"search": known["best"]})
            return
    material = read_material(config)
    cache = cache_of(config)
    runner = TrialRunner(
        material.resources, material.choose[: config.search_windows], config.few_windows,
        released_bytes=weight_bytes(source_of(config)), target=config.target_compression,
        objectives=config.objectives, cache=cache, tokenizer=material.tokenizer,
    )  # fmt: skip
    runner.learn(study)
    progress = SearchProgress(study, config.n_trials, config.target_compression)
    first = ()
    if config.strategy == "bayesian":
        first = space.first_guesses(lambda pipeline: runner.expected_ratio(read_pipeline(pipeline)), config.target_compression)
    search(
        study, space, config.n_trials, runner.evaluate, strategy=config.strategy, sampler=config.sampler, seed=config.seed,
        first=first, finished=progress.update,
    )  # fmt: skip

    # ---- the best few, on all windows
    best = best_trials(study, config.target_compression, config.top)
    if not best:
        highest = max((trial.user_attrs["measured"]["compression_ratio"] for trial in counted_trials(study)
                       if "measured" in trial.user_attrs), default=0.0)  # fmt: skip
        expected = max((trial.user_attrs.get("expected_ratio", 0.0) for trial in study.get_trials(deepcopy=False)), default=0.0)
        write_findings(study, config.results_dir / "search", config.target_compression, {})
        raise CompactMindError(
            f"none of {len(study.get_trials(deepcopy=False))} trials is {config.target_compression:g} times smaller: the highest ratio "
            f"measured is {highest:.2f}, the highest expected {expected:.2f}; choose a smaller --target_compression, more trials or "
            "other --methods"
        )
    runner.windows, runner.objectives = material.choose, ("perplexity",)
    confirmed = {int(number): found for number, found in study.user_attrs.get("confirmed", {}).items()}
    for trial in best:
        if trial.number in confirmed:
            continue
        steps = read_pipeline(trial.user_attrs["pipeline"])
        print(f"confirming trial {trial.number} on {len(material.choose)} windows: {pipeline_name(steps)} ...", flush=True)
        compressed = runner.run(steps)
        confirmed[trial.number] = {
            **runner.measure(compressed), "steps": brief(compressed.steps),
            "interaction": interaction(steps, material.resources, runner.first_look, compressed.steps),
        }  # fmt: skip
        del compressed
        study.set_user_attr("confirmed", confirmed)
    summary = write_findings(study, config.results_dir / "search", config.target_compression, confirmed)
    print(trials_table(study, config.target_compression, confirmed))
    chosen = summary["best"]["trial"]
    print(f"\nbest: trial {chosen}; any of them again: python 5_bayesian_search.py --replay {chosen}")
    print(f"to look into the study: optuna-dashboard {storage}")
    make_and_save(config, read_pipeline(summary["best"]["pipeline"]), output, config.strategy, {"search": summary["best"]})


def replay(config: SearchConfig, output: Path) -> None:
    study, storage = study_of(config, space_of(config))
    numbers = {trial.number: trial for trial in counted_trials(study) if "pipeline" in trial.user_attrs}
    if config.replay not in numbers:
        raise CompactMindError(
            f"the study {study.study_name} in {storage} has no trial {config.replay} with a pipeline: choose one of "
            f"{', '.join(map(str, numbers)) or 'none, it is empty'}"
        )
    make_and_save(config, read_pipeline(numbers[config.replay].user_attrs["pipeline"]), output, f"trial {config.replay}")


# ------------------------------------------------------------------------------------------------------------------- main
def check(config: SearchConfig) -> None:
    """Raise CompactMindError on a setting that makes no sense, before anything is loaded."""
    for name, least in (
        ("calibration_windows", 1), ("train_windows", 0), ("seq_len", 2), ("eval_windows", 0), ("held_out_windows", 1),
        ("confirm_windows", 1), ("search_windows", 1), ("few_windows", 1), ("n_trials", 1), ("top", 1), ("max_length", 1),
        ("max_repeats", 1),
    ):  # fmt: skip
        if getattr(config, name) < least:
            raise CompactMindError(f"{name} {getattr(config, name)} is not at least {least}: for example --{name} 16")
    if not 0 < config.target_compression < math.inf:
        raise CompactMindError(f"target_compression {config.target_compression} is not above 0: for example 2.5")
    if len(set(config.objectives)) < len(config.objectives) or not config.objectives:
        raise CompactMindError(f"objectives {config.objectives}: name each once, for example --objectives perplexity bytes")


def main(config: SearchConfig) -> None:
    check(config)
    if config.replay >= 0:
        output = Path(config.output) if config.output else config.models_dir / f"llama_trial_{config.replay}"
        replay(config, output)
    elif config.strategy == "fixed":
        output = Path(config.output) if config.output else config.models_dir / "llama_pruned"
        make_and_save(config, read_pipeline(config.pipeline), output, "fixed")
    else:
        run_search(config, Path(config.output) if config.output else config.models_dir / "llama_searched")


if __name__ == "__main__":
    run_stage(main, parse_command_line(CONFIG))
