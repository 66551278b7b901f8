"""What a token costs: reading a prompt and generating behind it, with and without what generation.py and kernels/ do; the first token.

Run:   python benchmarks/generation.py                                  (after ./run.sh)
       python benchmarks/generation.py --models models/llama models/llama_w8a8 --prompt_tokens 128 --cold_starts 0
Reads: language models under models/
Writes: results/benchmark_generation.json, and prints it

All ways of all models take turns, batch 1: a prompt of random tokens, then 8 tokens one by one; medians of --repeats rounds after one to
warm up. The first model is also run as transformers does it (`by transformers`: its DynamicCache and blocks, torch's attention): what every
ratio is against.

cold start   generate.py as a process of its own, from its start to its end with one token: imports, loading, a short prompt, a token
"""

import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import StageConfig, parse_command_line, run_stage  # noqa: E402
from compactmind.checkpoint import load_any  # noqa: E402
from compactmind.devices import default_device  # noqa: E402
from compactmind.evaluation.cost import measure_interleaved, random_tokens, synchronize  # noqa: E402
from compactmind.files import write_json_atomically  # noqa: E402
from compactmind.formats.table import kernel_of  # noqa: E402
from compactmind.generation import cache_for  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
NEW_TOKENS = 8


@dataclass(frozen=True)
class GenerationConfig(StageConfig):
    models: tuple[str, ...] = ("llama", "llama_w8a8", "llama_searched", "llama_gptq_3.5x")
    """Folders, or names under models_dir."""
    prompt_tokens: int = 512
    """Of the prompt."""
    repeats: int = 7
    """Rounds in which all take turns."""
    cold_starts: int = 3
    """Runs of generate.py, for the second and the third model each; 0: none."""


def folder(config: GenerationConfig, name: str) -> Path:
    return Path(name) if (Path(name) / "config.json").is_file() else config.models_dir / name


@torch.inference_mode()
def measure(config: GenerationConfig) -> dict[str, dict]:
    """Return the medians in ms of a prompt and of a token of every way."""
    loaded = {name: load_any(folder(config, name), default_device()) for name in config.models}
    models = {name: each.model for name, each in loaded.items()}
    first = config.models[0]
    ways = {f"{first}, by transformers": (models[first], lambda _: None, "sdpa")} | {
        name: (model, cache_for, model.config._attn_implementation) for name, model in models.items()
    }
    prompt = random_tokens(models, 1, config.prompt_tokens)

    def once(way) -> tuple[float, float]:
        model, cache, attention = way
        model.set_attn_implementation(attention)
        ids = prompt.to(model.device)
        synchronize(model.device)
        started = time.perf_counter()
        output = model(input_ids=ids, use_cache=True, logits_to_keep=1, past_key_values=cache(model))
        synchronize(model.device)
        read = time.perf_counter()
        for _ in range(NEW_TOKENS):
            output = model(input_ids=output.logits[:, -1].argmax(-1, keepdim=True), past_key_values=output.past_key_values)
        synchronize(model.device)
        return read - started, (time.perf_counter() - read) / NEW_TOKENS

    rounds, measured = measure_interleaved(ways, once, config.repeats, 1, None), {}
    reference = rounds[f"{first}, by transformers"]
    for name, times in rounds.items():
        measured[name] = {"kernel": kernel_of(ways[name][0], loaded.get(name, loaded[first]).manifest["kind"])}
        for number, phase in enumerate(("prefill", "decode")):
            ratios = [theirs[number] / own[number] for theirs, own in zip(reference, times, strict=True)]
            own = [each[number] for each in times]
            measured[name][phase] = {"median_ms": 1e3 * statistics.median(own), "times_as_fast": statistics.median(ratios)}
    return measured


def cold_start(directory: Path, runs: int) -> float:
    """Return the median seconds of a process that generates one token."""
    command = [
        sys.executable,
        str(ROOT / "generate.py"),
        "--model",
        str(directory),
        "--max_new_tokens",
        "1",
        "Once upon a time",
    ]
    taken = []
    for _ in range(runs):
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def main(config: GenerationConfig) -> None:
    measured = measure(config)
    print(
        f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, a prompt of {config.prompt_tokens} tokens, batch 1"
    )
    for name, each in measured.items():
        times = "".join(
            f"{each[phase]['median_ms']:>10.1f} ms {each[phase]['times_as_fast']:.2f}x" for phase in ("prefill", "decode")
        )
        print(f"{name:<28}{times}   {1e3 / each['decode']['median_ms']:.0f} tokens/s   {each['kernel']}")
    if config.cold_starts:
        for name in config.models[1:3]:
            measured[name]["cold_start_s"] = cold_start(folder(config, name), config.cold_starts)
            print(f"{name}: a process that generates one token takes {measured[name]['cold_start_s']:.1f} s")
    path = config.results_dir / "benchmark_generation.json"
    write_json_atomically(path, {"threads": torch.get_num_threads(), "models": measured})
    print(f"written to {path}")


if __name__ == "__main__":
    run_stage(main, parse_command_line(GenerationConfig.for_profile()))
