"""How much memory every step takes at the size of a model, against the bytes of its weights as released; how long; how fast the result is.

Run:   python benchmarks/scale.py                                   (models/llama, after python download_model.py)
       python benchmarks/scale.py --shape 1b                        (random weights of TinyLlama's shape, 2.2 GB on disk)
       python benchmarks/scale.py --shape 7b                        (of Llama-2-7B's, 13.5 GB; on a CPU 60 GB of disk and hours)
       python benchmarks/scale.py --shape 7b --steps nf4 --speed True
Reads: models/llama (a shape of its own needs nothing)
Writes: results/scale/<shape>/ (the model of a shape; --keep True leaves it there), results/benchmark_scale.json, and prints it

Each step is a process of its own, as a stage runs it: the dense model is measured first, then the step is done to it, then the result is
measured. What was there after the imports is taken off.

needed     what cannot be dropped. Linux: the largest anonymous memory seen, once per 2 ms; on a GPU: the largest allocated memory
resident   high-water mark of resident memory. On a CPU the weight file is mapped: its pages count as resident although the system drops
           them when it needs the room
speed      (--speed True) batch 1: a prompt of 512 random tokens, and a token after it; the model as released, then the result, each the
           median of 5 after 2 to warm up. Not in turns, as two models of 7B may not fit: for large differences. On a CPU the memory is then
           that of reading the prompt too
"""

import json
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import StageConfig, parse_command_line, run_stage  # noqa: E402
from compactmind.checkpoint import load_any, load_as_released, skeleton_of  # noqa: E402
from compactmind.devices import default_device  # noqa: E402
from compactmind.errors import CompactMindError  # noqa: E402
from compactmind.evaluation.cost import measure_generation, resident_bytes, synchronize, weight_bytes  # noqa: E402
from compactmind.evaluation.divergence import measure_logits, measure_windows  # noqa: E402
from compactmind.evaluation.language import measure_language_models  # noqa: E402
from compactmind.evaluation.loaded import Checkpoints  # noqa: E402
from compactmind.files import write_json_atomically  # noqa: E402
from compactmind.forward import LogitsOf  # noqa: E402
from compactmind.methods.memory import Sizes, of_pipeline, report  # noqa: E402
from compactmind.methods.registry import Resources  # noqa: E402
from compactmind.precision import work_in_float32  # noqa: E402
from compactmind.search.compressor import Measure, read_pipeline, run_pipeline  # noqa: E402

CUT = {"method": "prune", "params": {"sparsity": 0.2, "criterion": "l2", "compensate": False}}
ADAPTERS = {"mode": "lora", "gradient_checkpointing": True, "tokens": 2048, "evaluations": 1}
PIPELINES: dict[str, list[dict[str, Any]]] = {
    "w8a8": [{"method": "w8a8"}],
    "gptq": [{"method": "gptq", "params": {"bits": 4, "group_size": 128}}],
    "nf4": [{"method": "nf4"}],
    "prune": [{"method": "prune", "params": {"sparsity": 0.2}}],
    "retrain": [CUT, {"method": "retrain", "params": ADAPTERS}],
    "retrain_nf4": [CUT, {"method": "retrain", "params": {**ADAPTERS, "base": "nf4"}}],
}
"""Step -> what is run for it; `report` is not a pipeline."""
BEYOND = {"w8a8": 0.3, "gptq": 0.3, "nf4": 0.3, "prune": 0.6, "retrain": 1.0, "retrain_nf4": 1.0, "report": 0.3}
"""Step -> the goal: what it may need beyond the weights as released, as a share of these."""


@dataclass(frozen=True)
class ScaleConfig(StageConfig):
    shape: Literal["models/llama", "1b", "7b"] = "models/llama"
    """The model: the profile's own, or random weights of a shape."""
    steps: tuple[Literal["w8a8", "gptq", "nf4", "prune", "retrain", "retrain_nf4", "report"], ...] = tuple(BEYOND)
    """What is measured."""
    windows: int = 8
    """Windows of text to calibrate on and, 4 of them, to measure on."""
    seq_len: int = 512
    """Tokens of a window."""
    speed: bool = False
    """Measure prefill and decode before and after."""
    memory_share: float = 1.0
    """Share of the GPU's memory that may be used."""
    keep: bool = False
    """Leave the model of a shape on the disk."""
    in_this_process: bool = False
    """Measure one step here and print one line of JSON (what the script starts for itself)."""


SHAPES = {
    "1b": (
        torch.bfloat16,
        LlamaConfig(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4),
    ),
    "7b": (
        torch.float16,
        LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
    ),
}


def folder_of(config: ScaleConfig) -> Path:
    return config.results_dir / "scale" / config.shape if config.shape in SHAPES else config.models_dir / "llama"


def write_model(config: ScaleConfig) -> None:
    """Write a model of random weights, and a tokenizer that knows numbers."""
    dtype, shape = SHAPES[config.shape]
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    model = LlamaForCausalLM(shape)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder_of(config), max_shard_size="2GB")
    words = Tokenizer(models.WordLevel({str(number): number for number in range(shape.vocab_size)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="2").save_pretrained(folder_of(config))


class AnonymousMemory(threading.Thread):
    """The largest anonymous memory of this process since `start`, in bytes; None where the system does not tell."""

    def __init__(self):
        super().__init__(daemon=True)
        self.first, self.peak = self.now(), 0

    @staticmethod
    def now() -> int | None:
        try:
            status = Path("/proc/self/status").read_text()
        except OSError:
            return None
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))

    def run(self) -> None:
        while self.first is not None:
            self.peak = max(self.peak, self.now() - self.first)
            time.sleep(0.002)


def speed_of(model) -> dict[str, float]:
    """Return the medians in ms of reading a prompt and of a token after it."""
    measured = measure_generation({"model": model}, prompt_tokens=512, repeats=5, reference="model")["model"]
    return {phase: each["median_ms"] for phase, each in measured.items()}


def run_step(config: ScaleConfig, step: str, device: str) -> dict[str, Any]:
    """Do what a stage does for one step; return the speeds, if they are wanted."""
    source = folder_of(config)
    model, _ = load_as_released(source)
    vocabulary, released, measured = model.config.vocab_size, model.dtype, {}
    if config.speed:
        measured["dense_ms"] = speed_of(model.to(device))
    del model
    windows = torch.randint(0, vocabulary, (config.windows, config.seq_len), generator=torch.Generator().manual_seed(0))
    if step == "report":
        rows = [{"name": name, "kind": "dense", "directory": str(source), "status": "measured"} for name in ("dense", "again")]
        measure_language_models(
            rows, Checkpoints({row["name"]: partial(load_any, source, device) for row in rows}), lambda _: windows[:4], "random", "first",
            reference=rows[0], bases=dict.fromkeys(("dense", "again"), rows[0]), prompt_tokens=512, repeats=3,
        )  # fmt: skip
        for row in rows:
            if row["status"] != "measured" or "not_measured" in row:
                raise CompactMindError(f"the report could not be measured: {row.get('error') or row['not_measured']}")
        return measured
    resources = Resources(
        windows, windows, windows[:2], lambda: work_in_float32(load_as_released(source)[0].to(device)), released,
        weight_bytes(source), device,
    )  # fmt: skip
    known: list[LogitsOf] = []

    def measure(model) -> dict:
        if resources.is_teacher(model):
            known.append(LogitsOf(model, windows[:4]))
            return {"loss": measure_logits(known[0], windows[:4])["losses"].mean().item()}
        return {"loss": measure_windows({"": model}, windows[:4], known[0])[""]["losses"].mean().item()}

    made = run_pipeline(read_pipeline(PIPELINES[step]), resources, Measure("loss", measure))
    if config.speed:
        measured["result_ms"] = speed_of(made.model)
    return measured


def predicted(config: ScaleConfig, step: str) -> int:
    """Return the bytes that `step` should need."""
    folder, cuda = folder_of(config), default_device() == "cuda"
    sizes = Sizes.of(skeleton_of(folder), weight_bytes(folder), config.windows, 4, config.seq_len, cuda)
    if step == "report":
        return report(sizes, sizes.held)
    needs, _ = of_pipeline(read_pipeline(PIPELINES[step]), sizes)
    return max(needs.values())


def measure(config: ScaleConfig) -> dict:
    device, (step,) = default_device(), config.steps
    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(config.memory_share)
    torch.nn.Linear(64, 64).to(device)(torch.ones(64, 64, device=device))  # the runtime's own buffers come before the mark
    before = resident_bytes()[0]
    anonymous = AnonymousMemory()
    anonymous.start()
    started = time.perf_counter()
    measured = run_step(config, step, device)
    synchronize(torch.device(device))
    return {
        "step": step, "device": device, "seconds": time.perf_counter() - started,
        "needed": torch.cuda.max_memory_allocated() if device == "cuda" else anonymous.peak or None,
        "resident": resident_bytes()[1] - before, **measured,
    }  # fmt: skip


def main(config: ScaleConfig) -> None:
    if config.in_this_process:
        print(json.dumps(measure(config)))
        return
    folder, path = folder_of(config), config.results_dir / "benchmark_scale.json"
    if config.shape in SHAPES and not (folder / "config.json").is_file():
        write_model(config)
    released = weight_bytes(folder)
    windows = f"{config.windows} windows of {config.seq_len} tokens"
    print(f"{config.shape}: {released / 1e6:.0f} MB as released; {windows}; MB, and times the weights")
    print(f"{'step':<12}{'needed':>9}{'':>7}{'predicted':>11}{'resident':>10}{'':>7}{'goal':>7}{'seconds':>9}", flush=True)
    results = []
    for step in config.steps:
        command = [sys.executable, __file__, *sys.argv[1:], "--steps", step, "--in_this_process", "True"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            results.append({"step": step, "error": done.stderr.strip()[-400:]})
            print(f"{step:<12} failed: {' '.join(done.stderr.split())[-200:]}", flush=True)
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        row["predicted"] = predicted(config, step)
        results.append(row)
        share = {name: (row[name] or 0) / released for name in ("needed", "resident")}
        print(
            f"{step:<12}{(row['needed'] or 0) / 1e6:>9.0f}{share['needed']:>6.2f}x{row['predicted'] / 1e6:>11.0f}"
            f"{row['resident'] / 1e6:>10.0f}"
            f"{share['resident']:>6.2f}x{1 + BEYOND[step]:>6.1f}x{row['seconds']:>9.0f}", flush=True,
        )  # fmt: skip
        if config.speed and "result_ms" in row:
            for phase, dense in row["dense_ms"].items():
                print(f"  {phase}: {dense:.1f} ms as released, then {row['result_ms'][phase]:.1f}: {dense / row['result_ms'][phase]:.2f}x")
    if config.shape in SHAPES and not config.keep:
        shutil.rmtree(folder)
    write_json_atomically(path, {"shape": config.shape, "released_bytes": released, "windows": windows, "steps": results})
    print(f"written to {path}")


if __name__ == "__main__":
    run_stage(main, parse_command_line(ScaleConfig.for_profile()))
