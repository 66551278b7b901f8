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
    PROFILES,
    DistillConfig,
    DownloadConfig,
    PruneConfig,
    QuantizeConfig,
    ReportConfig,
    SearchConfig,
    SmoothQuantConfig,
    StageConfig,
    parse_command_line,
    setting_problem,
)
from compactmind.errors import CompactMindError
from compactmind.settings_file import nearest, read_settings, settings_text

MODELS = "<models_dir>"
"""Stands for --models_dir in what a script is told."""
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
        "5_bayesian_search.py", {"objectives": ("kl", "bytes"), "save_front": (2.5, 3, 4), "target_compression": 2.5},
    ),
    "6_evaluate_report": ("6_evaluate_report.py", {}),
}  # fmt: skip
"""What a run is called, in a file of settings too -> its script, and what that is told beside the settings all share; in the order in which
they read each other's output. The last search is for the best model of every size."""

STAGES = tuple(dict.fromkeys(script for script, _ in RUNS.values()))
"""The scripts, each once."""

LLAMA_STAGES = ("4_smoothquant_llama.py", "5_bayesian_search.py")
"""Left out where download_model.py was told to fetch no language model (--llama_name "")."""


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
def given_by(path: str) -> dict[str, dict[str, Any]]:
    """Return the settings of a file by section, checked; none without a file. Raises CompactMindError."""
    if not path:
        return {}
    found = read_settings(Path(path), SECTIONS, {"profile": OWN})
    if unknown := sorted({"config", "dump_config", "dry_run"} & set(found.get(OWN, {}))):
        raise CompactMindError(f"{path}: {unknown[0]} is for the command line")
    profile = found.get(OWN, {}).pop("profile", PROFILE)
    if profile not in PROFILES:
        raise CompactMindError(f"{path}: unknown profile {profile!r}: {nearest(str(profile), PROFILES)}")
    for section, settings in found.items():
        if problem := setting_problem(SECTIONS[section].for_profile(profile, **settings)):
            raise CompactMindError(f"{path}, section {section}: {problem.partition(': for example')[0]}")
    found.setdefault(OWN, {})["profile"] = profile
    return found


def with_file(config: PipelineConfig, arguments: Sequence[str]) -> PipelineConfig:
    """Return the defaults of a command line that names a file of settings: what stands in the file. Raises CompactMindError."""
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == "--config":
            path = value if equals else "".join(arguments[position + 1 : position + 2])
            own = given_by(path).get(OWN, {})
            return PipelineConfig.for_profile(own.get("profile", config.profile), **{k: v for k, v in own.items() if k != "profile"})
    return config


def told(name: str, config: PipelineConfig, given: dict[str, Any]) -> dict[str, Any]:
    """Return what the script of a run is told beside the profile: what all share, what the run is for, what the file says of it."""
    shared = {each: getattr(config, each) for each in SHARED}
    own = RUNS[name][1]
    placed = {each: value.replace(MODELS, str(config.models_dir)) for each, value in own.items() if isinstance(value, str)}
    return shared | own | placed | given


def options(settings: dict[str, Any]) -> list[str]:
    """Return settings as a command line."""
    found = []
    for name, value in settings.items():
        found += [f"--{name}", *map(str, value)] if isinstance(value, tuple) else [f"--{name}={value}"]
    return found


def resolved(name: str, config: PipelineConfig, given: dict[str, Any]) -> StageConfig:
    """Return the settings a run has, all of them."""
    return SECTIONS[name].for_profile(config.profile, **told(name, config, given))


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
def places_of(script: str, config: Any) -> dict[Path, dict[str, Any]]:
    """Return the checkpoints and files a stage writes, with the settings that are another for one of them."""
    models = config.models_dir
    if script == "download_model.py":
        return {models / "teacher_base": {}, config.data_dir / "dataset.json": {}} | ({models / "llama": {}} if config.llama_name else {})
    if script == "1_distill.py":
        return {models / name: {} for name in ("teacher", *config.students)}
    if script == "2_prune_finetune.py":
        return {models / config.output_dir: {}}
    if script == "3_quantize.py":
        each = [(name, config.method) for name in config.parents] + [(name, "w8a8") for name in config.w8a8_parents]
        return {models / f"{name}_{method}": {"method": method} for name, method in each}
    if script == "4_smoothquant_llama.py":
        return {models / name: {} for name in (config.output_dir, f"{config.output_dir}_naive", config.nf4_dir)}
    if script == "5_bayesian_search.py":
        default = models / ("llama_pruned" if config.strategy == "fixed" else "llama_searched")
        sizes = [ratio for ratio in config.save_front if config.output or ratio != config.target_compression]
        others = [Path(f"{config.output or models / 'llama_front'}_{ratio:g}x") for ratio in sizes]
        return dict.fromkeys([*others] if config.output and others else [Path(config.output or default), *others], {})
    return {config.results_dir / "final_report.json": {}}


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
    """Print what every stage would do; tell whether all would fit. Stages 4 and 5 are asked themselves, by their --dry_run."""
    from compactmind.files import free_space
    from compactmind.plan import minutes, why_made

    print(f"plan, profile {config.profile}: nothing is run")
    root, fits, due = Path(__file__).resolve().parent, True, set()
    for name, (script, _) in RUNS.items():
        if script not in config.only:
            continue
        whole = resolved(name, config, given.get(name, {}))
        settings = {field.name: getattr(whole, field.name) for field in fields(whole)}
        places = places_of(script, whole)
        print(f"\n{name}: {script}\n  from {READS[script]}\n  to   {', '.join(map(str, places))}")
        if script in LLAMA_STAGES and whole.models_dir / "llama" not in due and not (whole.models_dir / "llama").is_dir():
            print("  left out: there is no models/llama")
            continue
        reasons = {}
        for place, own in places.items():
            if script == "6_evaluate_report.py" or place.suffix or script == "download_model.py":
                why = None if place.exists() else "not there"
            elif script in LLAMA_STAGES:  # what their manifests record is more than settings: they are asked below
                why = None if place.is_dir() else "not there"
            else:
                why = why_made(place, root / script, settings | own, whole.data_dir, whole.models_dir)
            if why is None and whole.force:
                why = "--force"
            if why:
                reasons[place] = why
        if due and not reasons and script != "6_evaluate_report.py":
            reasons = {place: "what it is made from is made first" for place in places if _from_due(script, whole, due)}
        for place, why in reasons.items():
            print(f"  runs: {place}: {why}")
        if not reasons:
            again = {"download_model.py": "looks whether its sources have changed", "6_evaluate_report.py": "measures what has changed"}
            print(f"  {again.get(script, 'up to date' if script not in LLAMA_STAGES else 'is there')}")
        if reasons or script == "6_evaluate_report.py":
            print(f"  {minutes(config.results_dir, name, config.profile)}")
        due |= set(reasons)
        if script in LLAMA_STAGES and (whole.models_dir / "llama").is_dir() and whole.models_dir / "llama" not in due:
            command = [sys.executable, root / script, "--profile", config.profile, *options(told(name, config, given.get(name, {})))]
            asked = subprocess.run([*command, "--dry_run=True"], capture_output=True, text=True)
            said = [line for line in asked.stdout.splitlines() if "GB" in line or "up to date" in line or "made again" in line]
            print("".join(f"  {line}\n" for line in said), end="")
            if asked.returncode:
                fits = False
                print(f"  would stop: {(asked.stderr.strip().splitlines() or ['without a word'])[-1]}")
        elif script in LLAMA_STAGES:
            print("  memory and disk: told once models/llama is there")
    print(f"\n{free_space(config.models_dir) / 1e9:.1f} GB of disk are free for {config.models_dir}")
    return fits


def _from_due(script: str, whole: Any, due: set[Path]) -> bool:
    """Tell whether a stage reads what an earlier one makes again."""
    models = whole.models_dir
    reads = {
        "1_distill.py": [models / "teacher_base", whole.data_dir / "dataset.json"],
        "2_prune_finetune.py": [models / getattr(whole, "parent", ""), models / "teacher"],
        "3_quantize.py": [models / name for name in (*getattr(whole, "parents", ()), *getattr(whole, "w8a8_parents", ()))],
    }
    return bool(due & set(reads.get(script, [models / "llama"])))


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
        given = given_by(config.config)
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
        settings = told(section, config, given.get(section, {}))
        name = shlex.join((stage, *options({key: value for key, value in settings.items() if key not in SHARED})))
        print(f"\n=== [{number}/{len(runs)}] {name}, {(time.perf_counter() - begun) / 60:.1f} min so far", flush=True)
        if stage in LLAMA_STAGES and not (config.models_dir / "llama").is_dir():
            print(f"skipped: there is no {config.models_dir / 'llama'} (`python download_model.py` makes it)")
            continue
        started, since = time.perf_counter(), time.time()
        command = [sys.executable, root / stage, "--profile", config.profile, *options(settings)]
        try:
            code = subprocess.run(command).returncode
        except KeyboardInterrupt:
            raise SystemExit(f"\nstopped in {name}. `python run_pipeline.py` goes on there.") from None
        if code:
            raise SystemExit(
                f"error: {name} failed (exit code {code}); mend what it says, then `python run_pipeline.py` goes on there"
            )
        durations[name] = time.perf_counter() - started
        if has_written(list(places_of(stage, resolved(section, config, given.get(section, {})))), since):
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
