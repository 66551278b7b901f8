"""Search for the best compression of a Llama: over methods, their order and their parameters; or run one pipeline.

Papers: compactmind/search/engine.py, compactmind/methods/pruning/llama_importance.py, .../llama_compensation.py, .../retraining/loss.py.
Run:   python 5_bayesian_search.py              (after python download_model.py; every setting: --help)
       python 5_bayesian_search.py --model_path models/llama --strategy bayesian --n_trials 30 --retrain True --target_compression 2.5
       python 5_bayesian_search.py --strategy evolution              (or random, grid: each a study of its own)
       python 5_bayesian_search.py --objectives kl bytes --save_front 2.5 3 4 --n_trials 30      (a model of every size)
       python 5_bayesian_search.py --study_name narrow --target_compression 2     (a study of its own beside the first)
       python 5_bayesian_search.py --replay 12                       (make the model of trial 12 again, into models/llama_trial_12)
       python 5_bayesian_search.py --strategy fixed --output models/llama_small --pipeline \\
           '[{"method": "prune", "params": {"sparsity": 0.3}}, {"method": "retrain"}, {"method": "w8a8"}]'
       accelerate launch --mixed_precision bf16 5_bayesian_search.py --strategy fixed     (or --replay; several GPUs retrain)
       accelerate launch --config_file configs/fsdp.yaml 5_bayesian_search.py --strategy fixed     (one model divided between them)
Reads: models/llama, wikitext_data/{train,validation,test}.jsonl     (test: only for the perplexity of what is saved)
Writes: models/llama_searched      the best pipeline that reaches --target_compression, with perplexity and KL after every step,
                                   retrained on --final_tokens if it retrains
        models/llama_front_3x ...  with --save_front: the best pipeline of every other size
        results/search/            trials.csv, best_pipeline.json, summary.json and the plots; study.db, which may hold many studies
        models/llama_pruned, results/pipeline_llama_pruned.json      with --strategy fixed
        Another study than that of models/llama has places of its own, docs/search.md.
Time:  on 2 CPU cores, embedded profile: fixed about 10 minutes, half of it retraining; a trial of a
       search from seconds to a few minutes, depending on what it shares with earlier ones and whether it retrains.

Killed at any time, the same command goes on: finished trials are kept, the one that was interrupted is run once more. Several processes
(--workers 4) or machines (--storage) share one study. Trials are compared by KL to the dense model; theirs, and their perplexities, are of
validation text and cannot be compared with the report's.
"""

import json
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna

from common import PROFILE, SearchConfig, parse_command_line, run_stage
from compactmind.checkpoint import skeleton_of
from compactmind.code_version import code_version
from compactmind.data import data_fingerprint, read_dataset_description
from compactmind.devices import default_device, is_worker, number_of_processes
from compactmind.errors import CompactMindError
from compactmind.evaluation.cost import weight_bytes
from compactmind.files import lock_directory_patiently, write_json_atomically
from compactmind.gguf_source import folder_of
from compactmind.guards import check_outputs
from compactmind.manifest import identity_of
from compactmind.methods.memory import Sizes, of_pipelines
from compactmind.methods.registry import METHODS
from compactmind.methods.retraining.together import help_to_retrain, helped_by_the_others
from compactmind.room import require_room
from compactmind.search import findings
from compactmind.search.cache import Kept, PrefixCache
from compactmind.search.choosing import best_trials_at, choose_for_ratios
from compactmind.search.compressor import Step, check_steps, read_pipeline
from compactmind.search.contradictions import settings_problem
from compactmind.search.described import require_described
from compactmind.search.engine import PATIENCE_SECONDS, counted_trials, open_study, search
from compactmind.search.inputs import PipelineInputs, read_inputs, windows_of_folder
from compactmind.search.machine import machine_kind, recording_machine_kind, require_kind
from compactmind.search.making import known_record, make_pipeline
from compactmind.search.places import findings_folder, front_name, searched_name, study_name, trial_name
from compactmind.search.reach import check_reach
from compactmind.search.space import Space, check_space, make_space, read_choices
from compactmind.search.trials import TrialRunner
from compactmind.search.workers import begin_as_worker, run_workers, shares, together_on_one_device
from compactmind.settings import without_password
from compactmind.settings_file import changed_options
from compactmind.training import accelerator_record, make_accelerator, trains_sharded

# ------------------------------------------------------------------------------------------------------------ constants
# Every field, its reason and its range: common.SearchConfig. For example: for_profile(PROFILE, n_trials=50)
CONFIG = SearchConfig.for_profile(PROFILE)

FRONT = (1.0, 1.2, 1.4, 1.6, 2.0)
"""Times the target, where no ratios are named: the sizes that a method which aims at one may aim at."""


# -------------------------------------------------------------------------------------------------------- model and text
def source_of(config: SearchConfig) -> Path:
    return Path(config.model_path) if config.model_path else config.models_dir / "llama"


def inputs_of(config: SearchConfig, check: Callable[[Any], None]) -> PipelineInputs:
    """Load the tokenizer and the text; the model is loaded whenever a fresh one is wanted.

    `check` looks at the dense model first: it raises CompactMindError if what is to be done to it cannot be done.
    """
    counts = config.relevant("train_windows", "held_out_windows", "confirm_windows", "eval_windows")
    return read_inputs(
        source_of(config), default_device(), check,
        lambda tokenizer: windows_of_folder(tokenizer, config.text_dir, config.seq_len, config.window_choice, **counts),
        config.calibration_windows, text=read_dataset_description(config.text_dir)["source"]["source"], window_choice=config.window_choice,
        fingerprint=data_fingerprint(config.text_dir), keep=costs_of(config),
    )  # fmt: skip


def require_room_for(config: SearchConfig, pipelines: Sequence[Sequence[Step]], output: Path, workers: int = 1) -> None:
    """Say what memory and disk the dearest of some pipelines takes, run by so many workers on one device at once.

    Raises CompactMindError if it is not there.
    """
    source, device = source_of(config), default_device()
    searched = config.strategy != "fixed" and config.eval_windows  # 0: all of the test text
    kept = max(config.eval_windows, config.confirm_windows) if searched else config.eval_windows
    windows = config.calibration_windows, kept, config.seq_len
    sizes = Sizes.of(skeleton_of(source), weight_bytes(source), *windows, device == "cuda")
    if trains_sharded():
        sizes = replace(sizes, processes=number_of_processes())
    needs, file, every = of_pipelines(pipelines, sizes)
    cached = min(config.cache_gb * 1e9, every)
    way_out = (
        "retraining with mode lora, base nf4 and gradient_checkpointing, or divided between GPUs (configs/fsdp.yaml), fewer "
        "--calibration_windows and a smaller --seq_len take less"
    )
    if workers > 1:
        needs = {f"{name} by each of {workers} workers": workers * size for name, size in needs.items()}
        way_out = f"fewer --workers take less; {way_out}"
    require_room(needs, int(file + cached), output, device, way_out)


def context_of(config: SearchConfig) -> dict:
    """Return what a pipeline's result depends on beside the pipeline."""
    return {
        **config.relevant("seed", "calibration_windows", "train_windows", "held_out_windows", "confirm_windows"),
        **config.relevant("seq_len", "window_choice"),
        "text": data_fingerprint(config.text_dir),
        "model": identity_of(source_of(config)),
    }


def costs_of(config: SearchConfig) -> Kept:
    """Return what keeps measurements of the dense model between runs: whatever the target, they are the same."""
    belongs_to = {
        "model": identity_of(source_of(config)), "text": data_fingerprint(config.text_dir), "seq_len": config.seq_len,
        "code": code_version(__file__),
    }  # fmt: skip
    return Kept(config.results_dir / "search" / "costs", belongs_to, config.force)


def cache_of(config: SearchConfig) -> PrefixCache:
    """Return the models half way through pipelines that this and earlier runs have made."""
    precision = make_accelerator(may_shard=True).mixed_precision
    trained = {"processes": number_of_processes(), "mixed_precision": precision, "sharded": trains_sharded()}
    context = {**context_of(config), **trained, "code": code_version(__file__)}
    return PrefixCache(config.results_dir / "search" / "cache", context, int(config.cache_gb * 1e9))


# ----------------------------------------------------------------------------------------------------------- one pipeline
def make_and_save(
    config: SearchConfig, steps: list[Step], output: Path, strategy: str, study: dict | None = None, extra: dict | None = None,
    inputs: PipelineInputs | None = None,
) -> None:
    """Run a pipeline, save its model, then measure the error of every step, and print all; nothing to do if that model is there.

    `study` says which study and trial the pipeline is from, `inputs` is what has been read already. What another pipeline has begun
    with, or all of it, is taken from the cache, unless --force True.
    """
    context, accelerator = context_of(config), make_accelerator(may_shard=True)
    batches = [step.recipe.batch_size * step.recipe.accumulation for step in steps if step.method.kind == "retrain"]
    stage = {
        "script": "5_bayesian_search.py",
        "code": code_version(__file__),
        "config": {
            "strategy": strategy, "eval_windows": config.eval_windows, **context, "pipeline": [step.described() for step in steps],
            "study": study, "retraining": [accelerator_record(accelerator, batch) for batch in batches],
            "gradients": accelerator.mixed_precision if any(step.has_gradients for step in steps) else None,
        },
        "inputs": {"model": context["model"]},
    }  # fmt: skip
    check_outputs([output], "5_bayesian_search.py", [source_of(config)], config.models_dir)
    path = config.results_dir / f"pipeline_{output.name}.json"
    with lock_directory_patiently(output, PATIENCE_SECONDS):
        record = None if config.force else known_record(output, stage, tuple(extra or ()), config.verify)
        if record is None:
            require_room_for(config, [steps], output)
        elif "layer_errors" in record and path.is_file():
            print(f"{output} is up to date: skipped (--force True makes it again)")
            return
        if config.dry_run:
            return
        inputs, cache = inputs or inputs_of(config, lambda dense: check_steps(steps, dense)), None if config.force else cache_of(config)
        record = make_pipeline(output, steps, inputs, cache, stage, record, extra or {})
        write_json_atomically(path, record)
    print(findings.steps_table(record))
    print(f"{json.dumps(record['pipeline'][0]['protocol'])}\nsaved to {output}, steps in {path}")


# ----------------------------------------------------------------------------------------------------------------- search
def space_of(config: SearchConfig):
    """Return the space the constants describe. Raises CompactMindError if nothing is left in it."""
    methods = [
        name for name in config.methods if config.retrain or METHODS.get(name) is None or METHODS[name].kind != "retrain"
    ]
    choices = read_choices(config.choices)
    if not config.retrain:
        choices = {name: values for name, values in choices.items() if not name.startswith("retrain.")}
    if config.choices == SearchConfig.for_profile(config.profile).choices:  # nobody's own: for those of the methods that take part
        choices = {name: values for name, values in choices.items() if name.partition(".")[0] in methods}
    return make_space(
        methods, mode=config.mode, max_length=config.max_length, max_repeats=config.max_repeats, choices=choices,
        targets=targets_of(config), by_text="perplexity" in config.objectives,
    )  # fmt: skip


def targets_of(config: SearchConfig) -> tuple[float, ...]:
    """Return the compression ratios a method that aims at one may aim at: several where bytes are an objective."""
    if "bytes" not in config.objectives:
        return (config.target_compression,)
    lowest = floor_of(config)
    return tuple(sorted(set(config.save_front) or {round(lowest * share, 2) for share in FRONT}))


def floor_of(config: SearchConfig) -> float:
    """Return the compression ratio below which no model is of interest."""
    return min(config.save_front, default=config.target_compression)


def study_name_of(config: SearchConfig) -> str:
    """Return the name of the study; directories are named for it. Raises CompactMindError on one that cannot be a directory's."""
    usual = f"{Path(os.path.abspath(source_of(config))).name}-{config.strategy}" + ("-front" if len(config.objectives) > 1 else "")
    return study_name(config.study_name, usual, config.results_dir / "search")


def searched_output(config: SearchConfig) -> Path:
    """Return where the best model goes that reaches the target."""
    return Path(config.output or config.models_dir / searched_name(study_name_of(config)))


def study_file(config: SearchConfig) -> Path:
    """Return where studies are kept without --storage."""
    return config.results_dir / "search" / "study.db"


def study_of(config: SearchConfig, space: Space) -> tuple[optuna.Study, str, dict]:
    """Return the study these constants belong to, new or with the trials it has, where it is kept, and what its findings depend on."""
    (config.results_dir / "search").mkdir(parents=True, exist_ok=True)
    described = {
        **context_of(config), "space": space.described(), "objectives": list(config.objectives),
        "target_compression": floor_of(config), **config.relevant("few_windows", "search_windows"),
    }  # fmt: skip
    storage = config.storage or f"sqlite:///{study_file(config)}"
    study = open_study(study_name_of(config), storage, described, ["minimize"] * len(config.objectives), code_version(__file__))
    later = config.relevant("top", "save_front", "final_tokens")
    return study, storage, {**described, "storage": without_password(storage), **later}


def origin(config: SearchConfig, study: optuna.Study, storage: str, trial: int) -> dict:
    """Return what the record of a model says of the study its pipeline is from."""
    return {
        "name": study.study_name, "storage": without_password(storage), "trial": trial,
        **config.relevant("target_compression", "objectives"),
    }  # fmt: skip


def replay_command(config: SearchConfig, trial: int) -> str:
    """Return the command that makes a trial's model again: with every setting that is not the default, *** for a password."""
    profile = ["--profile", config.profile] if config.profile != PROFILE else []
    changed = changed_options(config, SearchConfig.for_profile(config.profile), NOT_THE_STUDYS)
    return shlex.join(["python", "5_bayesian_search.py", *profile, *changed, "--replay", str(trial)])


NOT_THE_STUDYS = (
    "profile", "force", "verify", "replay", "output", "pipeline", "n_trials", "workers", "top", "dry_run", "final_tokens", "track",
)  # fmt: skip
"""Settings that do not tell one study from another, nor decide what a trial's model is."""


def run_search(config: SearchConfig, output: Path) -> None:
    space, folder = space_of(config), findings_folder(config.results_dir / "search", study_name_of(config))
    places = [front_output(config, ratio) for ratio in config.save_front] or [output]
    check_outputs(places, "5_bayesian_search.py", [source_of(config)], config.models_dir)
    planned = shares(config.workers, default_device(), config.objectives) if config.workers > 1 and not is_worker() else []
    dearest = [[step] for step in space.single_steps()]
    if config.dry_run and not (config.storage or study_file(config).exists()):  # which nothing but a search makes
        require_room_for(config, dearest, output, together_on_one_device(planned))
        return
    study, storage, depends_on = study_of(config, space)
    kind = machine_kind(default_device(), threads="latency" in config.objectives)
    require_kind(study, config.objectives, kind)
    print(f"study {study.study_name} in {without_password(storage)}; findings go to {folder}, ", end="")
    print(f"the best model{'s' * (len(places) > 1)} to {', '.join(map(str, places))}")
    print(f"{len(space.orders)} order{'s' * (len(space.orders) > 1)} of methods, {space.size()} pipelines; ", end="")
    print(f"{len(counted_trials(study))} of {config.n_trials} trials are there")
    known = findings.known_findings(study, folder, depends_on)
    if not config.force and known and len(counted_trials(study)) >= config.n_trials and not is_worker():
        save_chosen(config, study, storage, known["chosen"], output)
        return
    if not is_worker():  # for all of them it is there
        require_room_for(config, dearest, output, together_on_one_device(planned))
    if config.dry_run:
        return
    if planned and len(counted_trials(study)) < config.n_trials and all(run_workers(planned)):
        raise CompactMindError(
            f"all {len(planned)} workers have failed, for the reasons above; {len(counted_trials(study))} of {config.n_trials} trials are "
            "there: the same command goes on"
        )
    inputs = inputs_of(config, lambda dense: check_space(space, dense))
    runner = TrialRunner(
        inputs.resources, inputs.choose[: config.search_windows], config.few_windows,
        released_bytes=weight_bytes(source_of(config)), target=floor_of(config), ratios=config.save_front,
        objectives=config.objectives, cache=cache_of(config), tokenizer=inputs.tokenizer, skeleton=lambda: skeleton_of(source_of(config)),
    )  # fmt: skip
    check_reach(space, runner)
    progress, targets = findings.SearchProgress(study, config.n_trials, floor_of(config)), targets_of(config)
    guesses = space.guesses_for(targets, lambda pipeline: runner.expected_ratio(read_pipeline(pipeline)), config.workers)
    require_described(study, depends_on, storage)  # another command may have begun meanwhile
    require_kind(study, config.objectives, kind)
    search(
        study, space, config.n_trials, recording_machine_kind(runner.evaluate, config.objectives, kind), strategy=config.strategy,
        sampler=config.sampler, seed=config.seed, first=guesses if config.first_guesses else (), finished=progress.update,
        excess=runner.excess, pruner=runner.pruner(), aim=f"a compression of {floor_of(config):g}",
    )  # fmt: skip
    if is_worker():
        return  # who started it goes on when all have ended

    # ---- the best few, on all windows
    ratios, floor = config.save_front or (config.target_compression,), floor_of(config)
    best = best_trials_at(study, ratios, config.top)
    if not best:
        with lock_directory_patiently(folder, PATIENCE_SECONDS):
            findings.write_findings(study, folder, floor, {}, depends_on)
        raise CompactMindError(findings.why_none_reached(study, floor, folder, config.save_front))
    runner.windows, runner.objectives = inputs.choose, (runner.quality,)
    with lock_directory_patiently(folder, PATIENCE_SECONDS):  # another worker at its end finds what this one has confirmed
        confirmed, chosen, worth = choose_for_ratios(study, best, runner, ratios, config.final_tokens)
        summary = findings.write_findings(study, folder, floor, confirmed, depends_on, {"chosen": chosen, "ablation": worth})
    print(findings.summary_table(study, floor, summary, runner.unit))
    print(f"\nbest: trial {summary['best']['trial']}; any of them again: {replay_command(config, summary['best']['trial'])}")
    print(f"to look into the study: optuna-dashboard {without_password(storage)}")
    runner.dense = None  # the dense model's logits of the test text come now
    save_chosen(config, study, storage, summary["chosen"], output, inputs)


def save_chosen(
    config: SearchConfig, study: optuna.Study, storage: str, chosen: list[dict], output: Path, inputs: PipelineInputs | None = None
) -> None:
    """Save the model of what was chosen, or of every size that was."""
    for each in chosen:
        if "trial" not in each:
            print(f"save_front {each['ratio']:g}: {findings.why_none_so_small(study, each['ratio'])}; no model is saved")
            continue
        place = front_output(config, each["ratio"]) if config.save_front else output
        found_by = origin(config, study, storage, each["trial"])
        make_and_save(config, read_pipeline(each["pipeline"]), place, config.strategy, found_by, {"search": each}, inputs)


def front_output(config: SearchConfig, ratio: float) -> Path:
    """Return where the model of a front goes that is so many times smaller."""
    if config.output:
        return Path(f"{config.output}_{ratio:g}x")
    if ratio == config.target_compression:
        return searched_output(config)
    return config.models_dir / front_name(study_name_of(config), ratio)


def replay(config: SearchConfig, output: Path) -> None:
    study, storage, _ = study_of(config, space_of(config))
    numbers = {trial.number: trial for trial in counted_trials(study) if "pipeline" in trial.user_attrs}
    if config.replay not in numbers:
        raise CompactMindError(
            f"the study {study.study_name} in {without_password(storage)} has no trial {config.replay} with a pipeline: choose one of "
            f"{', '.join(map(str, numbers)) or 'none, it is empty'}"
        )
    steps = read_pipeline(numbers[config.replay].user_attrs["pipeline"])
    make_and_save(config, steps, output, "replay", origin(config, study, storage, config.replay))


# ------------------------------------------------------------------------------------------------------------------- main
def main(config: SearchConfig) -> None:
    asked = config.relevant("strategy", "sampler", "objectives", "save_front", "target_compression", "workers", "replay")
    if problem := settings_problem(**asked, usual_target=SearchConfig.for_profile(config.profile).target_compression):
        raise CompactMindError(problem)
    if is_worker():
        begin_as_worker()
    if config.model_path:
        if not (folder := folder_of(Path(config.model_path), config.models_dir, dry_run=config.dry_run)):
            return
        config = replace(config, model_path=str(folder))
    given = Path(config.output) if config.output else None
    if config.replay < 0 and config.strategy != "fixed":
        if number_of_processes() > 1:
            raise CompactMindError(
                f"a search is run by workers of one process each and was started as {number_of_processes()} processes: start several "
                "workers instead, each by `python 5_bayesian_search.py` with the same settings and the same --storage"
            )
        run_search(config, searched_output(config))
        return
    with helped_by_the_others():
        if config.replay >= 0:
            replay(config, given or config.models_dir / trial_name(study_name_of(config), config.replay))
        else:
            make_and_save(config, read_pipeline(config.pipeline), given or config.models_dir / "llama_pruned", "fixed")


if __name__ == "__main__":
    run_stage(main, parse_command_line(CONFIG), others=lambda _: help_to_retrain())
