"""How fast an int8 Llama reads and writes here, beside float32 and other tools' int8 and 4-bit, in one run.

Run:   python benchmarks/int8_llama.py           (after python download_model.py and python 4_smoothquant_llama.py)
       pip install torchao==0.18.0               (optional: its rows are left out without it)
Reads: models/llama, models/llama_w8a8, models/llama_w8a8_naive, models/llama_nf4
Writes: results/benchmark_int8.json, and prints the table

prefill: one forward pass over a prompt, logits of the last token, no cache (compiled models recompile for every layer of one);
decode: one token with a cache of the prompt's length. All rows take turns in every round; medians, 10th to 90th percentile, and
medians of the ratio to float32 within a round. Naive W8A8 has no rotations: what torchao's computes, like for like.
Warm-up is the first call: for compiled rows the time to compile.
"""

import copy
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import StageConfig, parse_command_line, run_stage  # noqa: E402
from compactmind.checkpoint import load_checkpoint  # noqa: E402
from compactmind.devices import default_device  # noqa: E402
from compactmind.evaluation.cost import summaries, synchronize  # noqa: E402
from compactmind.files import write_json_atomically  # noqa: E402
from compactmind.methods.quantization.packed_model import quantize_model  # noqa: E402
from compactmind.methods.quantization.w8a8_block import compile_blocks  # noqa: E402


@dataclass(frozen=True)
class BenchmarkConfig(StageConfig):
    prompt_tokens: int = 512
    """Length of the prompt."""
    new_tokens: int = 16
    """Tokens decoded per round."""
    rounds: int = 7
    """Rounds counted, after two that are not."""
    rows: tuple[str, ...] = ()
    """Only these rows; empty: all."""


FLOAT32 = "float32"


def make_rows(config: BenchmarkConfig, device: str) -> dict:
    """Return name -> function that makes the model of a row; a second entry tells whether decoding is measured."""
    load = lambda name: load_checkpoint(config.models_dir / name, device).model  # noqa: E731
    rows = {
        FLOAT32: (lambda: load("llama"), True),
        "float32, compiled": (lambda: torch.compile(load("llama")), False),
        "CompactMind W8A8": (lambda: load("llama_w8a8"), True),
        "CompactMind W8A8, compiled": (lambda: compile_blocks(load("llama_w8a8")), True),
        "CompactMind naive W8A8": (lambda: load("llama_w8a8_naive"), True),
        "CompactMind naive W8A8, compiled": (lambda: compile_blocks(load("llama_w8a8_naive")), True),
        "bitsandbytes int8": (lambda: bitsandbytes(load("llama"), "int8"), True),
        "bitsandbytes NF4": (lambda: load("llama_nf4"), True),
    }
    try:
        import torchao.quantization as torchao
    except ImportError:
        print("torchao is not installed: its rows are left out (pip install torchao==0.18.0)")
        return rows

    def dynamic_int8():
        model = load("llama")
        torchao.quantize_(
            model, torchao.Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda module, name: (
                isinstance(module, torch.nn.Linear) and "lm_head" not in name
            )
        )  # fmt: skip
        return model

    rows["torchao dynamic int8"] = (dynamic_int8, True)
    rows["torchao dynamic int8, compiled"] = (lambda: torch.compile(dynamic_int8()), False)
    return rows


def bitsandbytes(model, method: str):
    model = copy.deepcopy(model)
    quantize_model(model, method, embeddings="float32")
    return model


@torch.inference_mode()
def prefill(model, ids) -> float:
    synchronize(ids.device)
    started = time.perf_counter()
    model(input_ids=ids, use_cache=False, logits_to_keep=1)
    synchronize(ids.device)
    return time.perf_counter() - started


@torch.inference_mode()
def decode(model, ids, tokens: int) -> float:
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    times = []
    for _ in range(tokens):
        token = output.logits[:, -1].argmax(-1, keepdim=True)
        synchronize(ids.device)
        started = time.perf_counter()
        output = model(input_ids=token, past_key_values=output.past_key_values)
        synchronize(ids.device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def where_the_time_goes(model, ids) -> list[tuple[str, float]]:
    """Return the operators of one eager prefill with their own milliseconds, the largest first."""
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as recorded:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    events = sorted(recorded.key_averages(), key=lambda event: -event.self_cpu_time_total)
    return [(event.key, event.self_cpu_time_total / 1e3) for event in events[:8]]


def main(config: BenchmarkConfig) -> None:
    device = default_device()
    wanted = {name: row for name, row in make_rows(config, device).items() if not config.rows or name in config.rows}
    models, warmup = {}, {}
    for name, (make, _) in wanted.items():
        models[name] = make()
        vocabulary = models[name].config.vocab_size
        ids = torch.randint(0, vocabulary, (1, config.prompt_tokens), generator=torch.Generator().manual_seed(0)).to(device)
        started = time.perf_counter()
        prefill(models[name], ids)
        warmup[name] = time.perf_counter() - started
        print(f"{name:<32} first call {warmup[name]:6.1f} s", flush=True)
    seconds = {name: {"prefill": [], "decode": []} for name in models}
    for round_index in range(-2, config.rounds):
        for name, model in models.items():
            times = {"prefill": prefill(model, ids)}
            if wanted[name][1]:
                times["decode"] = decode(model, ids, config.new_tokens)
            if round_index >= 0:
                for phase, value in times.items():
                    seconds[name][phase].append(value)
    table = []
    measured = {
        phase: summaries({name: taken[phase] for name, taken in seconds.items() if taken[phase]}, dict.fromkeys(models, FLOAT32))
        for phase in ("prefill", "decode")
    }
    for name in models:
        row = {"name": name, "warmup_seconds": warmup[name]}
        for phase, summary in measured.items():
            if name in summary:
                row[phase] = {"against_float32": summary[name].pop("speedup"), **summary[name]}
        table.append(row)
    prompt = f"prompt of {config.prompt_tokens} tokens, batch 1"
    print(f"\n{prompt:<32}{'prefill ms':>28}{'':>8}{'decode ms':>26}{'':>8}{'first call s':>14}")
    for row in table:
        line = f"{row['name']:<32}"
        for phase, width in (("prefill", 28), ("decode", 26)):
            cell = row.get(phase)
            shown = f"{cell['median_ms']:.1f} [{cell['low_ms']:.1f}, {cell['high_ms']:.1f}]" if cell else "-"
            ratio = f"{cell['against_float32']:.2f}x" if cell and cell["against_float32"] else ""
            line += f"{shown:>{width}}{ratio:>8}"
        print(f"{line}{row['warmup_seconds']:>14.1f}")
    profiles = {}
    for name in (FLOAT32, "CompactMind W8A8"):
        if name in models:
            profiles[name] = where_the_time_goes(models[name], ids)
            print(
                f"\n{name}, own time of the operators of one prefill, ms: "
                + ", ".join(f"{op} {ms:.0f}" for op, ms in profiles[name])
            )
    path = config.results_dir / "benchmark_int8.json"
    report = {
        "prompt_tokens": config.prompt_tokens,
        "rounds": config.rounds,
        "threads": torch.get_num_threads(),
        "device": device,
    }
    write_json_atomically(path, {**report, "rows": table, "profiles": profiles})
    print(f"\n{json.dumps(report)}\nwritten to {path}")


if __name__ == "__main__":
    run_stage(main, parse_command_line(BenchmarkConfig.for_profile()))
