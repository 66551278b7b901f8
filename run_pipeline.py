"""Run every stage in order, on any operating system, and go on where an earlier run stopped.

Run:   python run_pipeline.py                   (--profile paper, --only 1_distill.py 6_evaluate_report.py, --help)
Every stage decides for itself whether its output is up to date; a finished one costs seconds. Settings of single stages are
edited at the top of the scripts. Stops at the first stage that fails.
"""

import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from common import PROFILE, PROFILES, StageConfig, parse_command_line, setting_problem

MODELS = "<models_dir>"
"""Stands for --models_dir in what a script is told."""
FIXED = ("5_bayesian_search.py", "--strategy=fixed")



INTEGERS = '[{"method": "gptq", "params": {"target_compression": 3.5}}]'
FRONT = ("5_bayesian_search.py", "--objectives", "kl", "bytes", "--save_front", "2.5", "3", "4", "--target_compression", "2.5")
"""The search for the best model of every size."""

RUNS = (
    ("download_model.py",),
    ("1_distill.py",),
    ("2_prune_finetune.py",),
    ("3_quantize.py",),
    ("4_smoothquant_llama.py",),
    (*FIXED, "--calibration_windows=32"),
    (*FIXED, f"--output={MODELS}/llama_gptq_3.5x", f"--pipeline={INTEGERS}"),
    FRONT,
    ("6_evaluate_report.py",),
)
"""Scripts and what they are told beside the settings all share, in the order in which they read each other's output."""

STAGES = tuple(dict.fromkeys(script for script, *_ in RUNS))
"""The scripts, each once."""

LLAMA_STAGES = ("4_smoothquant_llama.py", "5_bayesian_search.py")
"""Left out where download_model.py was told to fetch no language model (--llama_name "")."""


@dataclass(frozen=True)
class PipelineConfig(StageConfig):
    only: tuple[str, ...] = STAGES
    """Scripts to run, in pipeline order; default: all."""


CONFIG = PipelineConfig.for_profile(PROFILE)


def main(config: PipelineConfig) -> None:
    unknown = [name for name in config.only if name not in STAGES]
    if unknown:
        raise SystemExit(f"error: unknown stage {unknown[0]!r}: choose from {', '.join(STAGES)}")
    if config.profile not in PROFILES:
        raise SystemExit(f"error: unknown profile {config.profile!r}: choose one of {', '.join(PROFILES)}")
    if problem := setting_problem(config):
        raise SystemExit(f"error: {problem}")
    root, begun = Path(__file__).resolve().parent, time.perf_counter()
    shared = [f"--{name}={getattr(config, name)}" for name in ("models_dir", "data_dir", "results_dir", "seed", "force", "verify")]
    runs = [run for run in RUNS if run[0] in config.only]
    durations = {}
    for number, (stage, *arguments) in enumerate(runs, start=1):
        arguments = [argument.replace(MODELS, str(config.models_dir)) for argument in arguments]
        name = shlex.join((stage, *arguments))
        print(f"\n=== [{number}/{len(runs)}] {name}, {(time.perf_counter() - begun) / 60:.1f} min so far", flush=True)
        if stage in LLAMA_STAGES and not (config.models_dir / "llama").is_dir():
            print(f"skipped: there is no {config.models_dir / 'llama'} (`python download_model.py` makes it)")
            continue
        started = time.perf_counter()
        command = [sys.executable, root / stage, "--profile", config.profile, *shared, *arguments]
        try:
            code = subprocess.run(command).returncode
        except KeyboardInterrupt:
            raise SystemExit(f"\nstopped in {name}. `python run_pipeline.py` goes on there.") from None
        if code:
            raise SystemExit(
                f"error: {name} failed (exit code {code}); mend what it says, then `python run_pipeline.py` goes on there"
            )
        durations[name] = time.perf_counter() - started
    print("\n=== done: " + ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in durations.items()), end="")
    print(f"; {sum(durations.values()) / 60:.1f} min in all")
    if STAGES[-1] in config.only:
        print(f"report: {config.results_dir / 'final_report.html'}")


if __name__ == "__main__":
    main(parse_command_line(CONFIG))
