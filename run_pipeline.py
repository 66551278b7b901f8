"""Run every stage in order, on any operating system, and go on where an earlier run stopped.

Run:   python run_pipeline.py                   (--profile paper, --only 1_distill.py 6_evaluate_report.py, --help)
       python run_pipeline.py --dry_run True                what would run, why, for how long, and what would not fit
       python run_pipeline.py --dump_config my.yaml         every setting of every stage, to edit; `-` prints it
       python run_pipeline.py --config my.yaml
Every stage decides for itself whether its output is up to date; a finished one costs seconds. Settings of single stages are
edited at the top of the scripts, or in that file, which goes before these. Stops at the first stage that fails.
"""

import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from common import (
    PROFILE,
    DistillConfig,
    DownloadConfig,
    PruneConfig,
    QuantizeConfig,
    ReportConfig,
    SearchConfig,
    SmoothQuantConfig,
    StageConfig,
    parse_command_line,
)
from compactmind.errors import CompactMindError
from compactmind.seeds import runs_of
from compactmind.settings import setting_problem, without_password
from compactmind.settings_file import nearest, read_settings, settings_text
from profiles import PROFILES

MODELS = "<models_dir>"
"""Stands for --models_dir in the options of a script."""
INTEGERS = '[{"method": "gptq", "params": {"target_compression": 3.5}}]'

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "download_model": ("download_model.py", {}),
    "1_distill": ("1_distill.py", {}),
    "2_prune_finetune": ("2_prune_finetune.py", {}),
    "3_quantize": ("3_quantize.py", {}),
    "4_smoothquant_llama": ("4_smoothquant_llama.py", {}),
    "llama_pruned": ("5_bayesian_search.py", {"strategy": "fixed", "calibration_windows": 32}),
    "llama_gptq_3.5x": ("5_bayesian_search.py", {"strategy": "fixed", "output": f"{MODELS}/llama_gptq_3.5x", "pipeline": INTEGERS}),
    "5_bayesian_search": (
        "5_bayesian_search.py",
        {"objectives": ("kl", "bytes"), "save_front": (2.5, 3, 4), "target_compression": 2.5, "final_tokens": 12_000},
    ),
    "6_evaluate_report": ("6_evaluate_report.py", {}),
}  # fmt: skip
"""What a run is called, in a file of settings too -> its script, and its options beside the settings all share; in the order in which
they read each other's output. The last search is for the best model of every size."""

STAGES = tuple(dict.fromkeys(script for script, _ in RUNS.values()))
"""The scripts, each once."""

LLAMA_STAGES = ("4_smoothquant_llama.py", "5_bayesian_search.py")
"""Left out where download_model.py fetched no language model (--llama_name "")."""


CONFIGS: dict[str, type[StageConfig]] = {
    "download_model.py": DownloadConfig, "1_distill.py": DistillConfig, "2_prune_finetune.py": PruneConfig,
    "3_quantize.py": QuantizeConfig, "4_smoothquant_llama.py": SmoothQuantConfig, "5_bayesian_search.py": SearchConfig,
    "6_evaluate_report.py": ReportConfig,
}  # fmt: skip
"""Script -> its settings."""


@dataclass(frozen=True)
class PipelineConfig(StageConfig):
    """Settings of run_pipeline.py."""

    only: tuple[str, ...] = STAGES
    """Scripts to run, in pipeline order; default: all."""
    config: str = ""
    """YAML file of settings, a section per stage; what stands on the command line goes before it."""
    dump_config: str = ""
    """Write every setting of every stage to this file, `-`: to the screen, and do nothing else."""
    dry_run: bool = False
    """Say what would run and why, how long it took the last time, memory and disk, and do nothing else."""


CONFIG = PipelineConfig.for_profile(PROFILE)
OWN = "pipeline"
"""Section of what all stages share."""
SHARED = ("models_dir", "data_dir", "results_dir", "seed", "force", "verify")
SECTIONS: dict[str, type[StageConfig]] = {OWN: PipelineConfig} | {
    name: CONFIGS[script] for name, (script, _) in RUNS.items()
}


# --------------------------------------------------------------------------------------------------------------- settings
def settings_of_file(path: str) -> dict[str, dict[str, Any]]:
    """Return the settings of a file by section, checked; none without a file. Raises CompactMindError."""
    if not path:
        return {}
    sections = read_settings(Path(path), SECTIONS, {"profile": OWN})
    if unknown := sorted({"config", "dump_config", "dry_run"} & set(sections.get(OWN, {}))):
        raise CompactMindError(f"{path}: {unknown[0]} is for the command line")
    profile = sections.get(OWN, {}).pop("profile", PROFILE)
    if profile not in PROFILES:
        raise CompactMindError(f"{path}: unknown profile {profile!r}: {nearest(str(profile), PROFILES)}")
    for section, settings in sections.items():
        if problem := setting_problem(SECTIONS[section].for_profile(profile, **settings)):
            raise CompactMindError(f"{path}, section {section}: {problem.partition(': for example')[0]}")
    sections.setdefault(OWN, {})["profile"] = profile
    return sections


def with_file(config: PipelineConfig, arguments: Sequence[str]) -> PipelineConfig:
    """Return the defaults of a command line that names a file of settings: what stands in the file. Raises CompactMindError."""
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == "--config":
            path = value if equals else "".join(arguments[position + 1 : position + 2])
            own = settings_of_file(path).get(OWN, {})
            return PipelineConfig.for_profile(own.get("profile", config.profile), **{k: v for k, v in own.items() if k != "profile"})
    return config


def options_for(name: str, config: PipelineConfig, given: dict[str, Any]) -> dict[str, Any]:
    """Return the options of the script of a run beside the profile: what all share, what the run is for, what the file says of it."""
    shared = {each: getattr(config, each) for each in SHARED}
    own = RUNS[name][1]
    placed = {each: value.replace(MODELS, str(config.models_dir)) for each, value in own.items() if isinstance(value, str)}
    return shared | own | placed | given


def as_arguments(settings: dict[str, Any]) -> list[str]:
    """Return settings as a command line."""
    arguments = []
    for name, value in settings.items():
        arguments += [f"--{name}", *map(str, value)] if isinstance(value, tuple) else [f"--{name}={value}"]
    return arguments


def resolved(name: str, config: PipelineConfig, given: dict[str, Any]) -> StageConfig:
    """Return the settings a run has, all of them."""
    return SECTIONS[name].for_profile(config.profile, **options_for(name, config, given))


def with_family(config: PipelineConfig, given: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the settings in which stage 3 rounds what stage 2 makes (a family, a pattern, another name), unless they say what else."""
    pruned = resolved("2_prune_finetune", config, given.get("2_prune_finetune", {}))
    own = given.get("3_quantize", {})
    made = [place.name for place, other in outputs_of("2_prune_finetune.py", pruned).items() if not other]
    usual, rounded = PruneConfig.for_profile(config.profile).output_dir, resolved("3_quantize", config, own)
    parents = {
        each: tuple(name for parent in getattr(rounded, each) for name in (made if parent == usual else [parent]))
        for each in ("parents", "w8a8_parents")
        if each not in own and usual in getattr(rounded, each) and made != [usual]
    }
    return given | {"3_quantize": own | parents} if parents else given


def dump(config: PipelineConfig, given: dict[str, dict[str, Any]]) -> str:
    """Return the file that has every setting of every stage as this command line and its file of settings make them."""
    left_out = {field.name for field in fields(StageConfig)}
    own = {name: getattr(config, name) for name in ("profile", *SHARED, "only")}
    values = {OWN: own}
    for name in RUNS:
        whole, own = resolved(name, config, given.get(name, {})), given.get(name, {})
        names = [field.name for field in fields(whole) if field.name not in left_out or field.name in own]
        values[name] = {each: getattr(whole, each) for each in names}
    head = "Settings for `python run_pipeline.py --config THIS_FILE`: a section per stage. A line that is left out keeps its default."
    return settings_text(values, SECTIONS, head)


# ------------------------------------------------------------------------------------------------------------------- plan
def outputs_of(script: str, config: Any) -> dict[Path, dict[str, Any]]:
    """Return the checkpoints and files a stage writes, with the settings that are another for one of them."""
    models = config.models_dir
    if script == "download_model.py":
        return {models / "teacher_base": {}, config.data_dir / "dataset.json": {}} | ({models / "llama": {}} if config.llama_name else {})
    if script == "1_distill.py":
        return _of_seeds(config, ["teacher", *config.students])
    if script == "2_prune_finetune.py":
        ends = [f"_{times:g}x" for times in config.target_speedups] + [f"_gflops{share:g}" for share in config.target_gflops]
        alone = "_2to4" if config.pattern == "2:4" else ""
        return _of_seeds(config, [f"{config.output_dir}{end}" for end in ends or [alone]])
    if script == "3_quantize.py":
        each = [(name, config.method) for name in config.parents] + [(name, "w8a8") for name in config.w8a8_parents]
        small = dict.fromkeys(f"{name}_small" for name, _ in each) if config.vocabulary_coverage else {}
        each += [(f"{name}_small", method) for name, method in each if small]
        return {models / name: {} for name in small} | {models / f"{name}_{method}": {"method": method} for name, method in each}
    if script == "4_smoothquant_llama.py":
        return {models / name: {} for name in (config.output_dir, f"{config.output_dir}_naive", config.nf4_dir)}
    if script == "5_bayesian_search.py":
        default = models / ("llama_pruned" if config.strategy == "fixed" else "llama_searched")
        sizes = [ratio for ratio in config.save_front if config.output or ratio != config.target_compression]
        others = [Path(f"{config.output or models / 'llama_front'}_{ratio:g}x") for ratio in sizes]
        return dict.fromkeys([*others] if config.output and others else [Path(config.output or default), *others], {})
    return {config.results_dir / "final_report.json": {}}


def _of_seeds(config: Any, names: Sequence[str]) -> dict[Path, dict[str, Any]]:
    runs = {run: seed for name in names for run, seed in runs_of(name, config.seed, config.seeds).items()}
    return {config.models_dir / run: {} if run in names else {"seed": seed} for run, seed in runs.items()}


READS = {
    "download_model.py": "a local folder, PyPI or the hub",
    "1_distill.py": "models/teacher_base, the sentences",
    "2_prune_finetune.py": "models/<parent>, models/teacher, the sentences",
    "3_quantize.py": "models/<parents>, the sentences",
    "4_smoothquant_llama.py": "models/llama, running text",
    "5_bayesian_search.py": "models/llama, running text",
    "6_evaluate_report.py": "models/*, test",
}
"""Script -> what it is made from, for the plan."""


def plan(config: PipelineConfig, given: dict[str, dict[str, Any]]) -> bool:
    """Print what every stage would do; return whether all would run. Stages 4 and 5 say it themselves, by their --dry_run."""
    from compactmind.classifier_room import ROOMS, describe_room
    from compactmind.files import free_space
    from compactmind.plan import minutes

    print(f"plan, profile {config.profile}: nothing is run")
    runs, due = True, set()
    for name, (script, _) in RUNS.items():
        if script not in config.only:
            continue
        whole = resolved(name, config, given.get(name, {}))
        places, llama = outputs_of(script, whole), whole.models_dir / "llama"
        print(f"\n{name}: {script}\n  from {READS[script]}\n  to   {', '.join(map(str, places))}")
        if script in LLAMA_STAGES and llama not in due and not llama.is_dir():
            print(f"  left out: there is no {llama}")
            continue
        lines, problem = [], None
        if script in LLAMA_STAGES and llama not in due:
            lines, problem = ask_stage(script, config.profile, options_for(name, config, given.get(name, {})))
        made = {place: why for place, own in places.items() if (why := why_run(script, whole, place, own, due))}
        for place, why in made.items():
            print(f"  runs: {place}: {why}")
        for line in lines:
            print(f"  {line}")
        if made or script == REPORT or any("made again" in line for line in lines):
            print(f"  {minutes(config.results_dir, name, config.profile)}")
        if not made and not lines:
            print(f"  {UP_TO_DATE.get(script, 'up to date')}")
        if script in LLAMA_STAGES and llama in due:
            print(f"  memory and disk: known once {llama} is there")
        if script in ROOMS and (made or script == REPORT):
            line, problem = describe_room(script, whole)
            print(f"  {line}")
        if problem:
            print(f"  would stop: {problem}")
            runs = False
        due |= set(made)
    print(f"\n{free_space(config.models_dir) / 1e9:.1f} GB of disk are free for {config.models_dir}")
    return runs


REPORT = STAGES[-1]
UP_TO_DATE = {"download_model.py": "there; looks whether its sources have changed", REPORT: "measures what has changed"}


def why_run(script: str, whole: Any, place: Path, own: dict[str, Any], due: set[Path]) -> str | None:
    """Return why a stage would write a place, None if it would not, as far as can be known without running it."""
    from compactmind.plan import why_made

    if not place.exists():
        return "not there"
    if whole.force:
        return "--force True"
    if script == REPORT:
        return None
    if sources := sorted(str(source) for source in due & set(inputs_of(script, whole, place))):
        return f"{sources[0]} is made first"
    if script == "download_model.py" or script in LLAMA_STAGES:
        return None
    settings = {field.name: getattr(whole, field.name) for field in fields(whole)}
    return why_made(place, Path(__file__).resolve().parent / script, settings | own, whole.data_dir, whole.models_dir)


def inputs_of(script: str, whole: Any, place: Path) -> list[Path]:
    """Return what a stage makes a checkpoint of, beside what is downloaded as text."""
    models, sentences = whole.models_dir, whole.data_dir / "dataset.json"
    if script == "1_distill.py":
        return [sentences, models / "teacher_base", *([] if place.name.partition("_seed")[0] == "teacher" else [models / "teacher"])]
    if script == "2_prune_finetune.py":
        return [sentences, models / whole.parent, models / "teacher"]
    if script == "3_quantize.py":
        return [sentences, models / place.name.rpartition("_")[0]]
    return [models / "llama"] if script in LLAMA_STAGES else []


def ask_stage(script: str, profile: str, settings: dict[str, Any]) -> tuple[list[str], str | None]:
    """Return what a stage prints of itself with --dry_run: what is up to date, memory and disk; and what would stop it."""
    command = [sys.executable, Path(__file__).resolve().parent / script, "--profile", profile, *as_arguments(settings), "--dry_run=True"]
    ended = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in ended.stdout.splitlines() if "GB" in line or "up to date" in line or "made again" in line]
    return lines, (ended.stderr.strip().splitlines() or ["without a word"])[-1] if ended.returncode else None


# ------------------------------------------------------------------------------------------------------------------- main
def main(config: PipelineConfig) -> None:
    unknown = [name for name in config.only if name not in STAGES]
    if unknown:
        raise SystemExit(f"error: unknown stage {unknown[0]!r}: choose from {', '.join(STAGES)}")
    if config.profile not in PROFILES:
        raise SystemExit(f"error: unknown profile {config.profile!r}: choose one of {', '.join(PROFILES)}")
    if problem := setting_problem(config):
        raise SystemExit(f"error: {problem}")
    try:
        given = with_family(config, settings_of_file(config.config))
        if config.dump_config:
            write_or_print(config.dump_config, dump(config, given))
            return
    except CompactMindError as error:
        raise SystemExit(f"error: {error}") from None
    if config.dry_run:
        if not plan(config, given):
            raise SystemExit("error: not every stage would run as it is set: see above")
        return
    run_all(config, given)


def write_or_print(place: str, text: str) -> None:
    """Print a text, or write it to a file that is not there yet."""
    if place == "-":
        print(text, end="")
        return
    if Path(place).exists():
        raise CompactMindError(f"{place} is there already: choose another name, or delete it")
    Path(place).write_text(text, encoding="utf-8")
    print(f"written to {place}: edit it, then `python run_pipeline.py --config {place}`")


def run_all(config: PipelineConfig, given: dict[str, dict[str, Any]]) -> None:
    """Run the stages, one process each."""
    from compactmind.plan import has_written, note_duration

    root, begun = Path(__file__).resolve().parent, time.perf_counter()
    runs = [(name, script) for name, (script, _) in RUNS.items() if script in config.only]
    durations = {}
    for number, (section, stage) in enumerate(runs, start=1):
        settings = options_for(section, config, given.get(section, {}))
        own = as_arguments({key: value for key, value in settings.items() if key not in SHARED})
        name = shlex.join((stage, *map(without_password, own)))
        print(f"\n=== [{number}/{len(runs)}] {name}, {(time.perf_counter() - begun) / 60:.1f} min so far", flush=True)
        if stage in LLAMA_STAGES and not (config.models_dir / "llama").is_dir():
            print(f"skipped: there is no {config.models_dir / 'llama'} (`python download_model.py` makes it)")
            continue
        started, since = time.perf_counter(), time.time()
        command = [sys.executable, root / stage, "--profile", config.profile, *as_arguments(settings)]
        try:
            code = subprocess.run(command).returncode
        except KeyboardInterrupt:
            raise SystemExit(f"\nstopped in {name}. `python run_pipeline.py` goes on there.") from None
        if code:
            raise SystemExit(
                f"error: {name} failed (exit code {code}); mend what it says, then `python run_pipeline.py` goes on there"
            )
        durations[name] = time.perf_counter() - started
        if has_written(list(outputs_of(stage, resolved(section, config, given.get(section, {})))), since):
            note_duration(config.results_dir, section, durations[name], config.profile)
    print("\n=== done: " + ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in durations.items()), end="")
    print(f"; {sum(durations.values()) / 60:.1f} min in all")
    if STAGES[-1] in config.only:
        print(f"report: {config.results_dir / 'final_report.html'}")


if __name__ == "__main__":
    try:
        with_settings = with_file(CONFIG, sys.argv[1:])
    except CompactMindError as error:
        raise SystemExit(f"error: {error}") from None
    main(parse_command_line(with_settings))
