"""How much memory it takes to quantize a Llama, against the bytes of its weights as released, how long, and how fast the result is.

Run:   python benchmarks/quantizing_memory.py                      (after python download_model.py)
       python benchmarks/quantizing_memory.py --method gptq --target_compression 3.5        (0: --bits in groups of 128 for all)
       python benchmarks/quantizing_memory.py --shape llama-2-7b   (random weights of that shape; wants 20 GB of device memory)
Reads: models/llama (a shape of its own needs nothing)
Writes: results/benchmark_memory.json, and prints it

In a process of its own; what was there after the imports is taken off. The weights are loaded once, in the dtype they were
released in; blocks are calibrated and quantized in turn.

resident   high-water mark of resident memory (on a GPU: of allocated memory). On a CPU the weight file is mapped: its pages
           count as resident although the system drops them when it needs the room
needed     Linux: the largest anonymous memory seen, once per 2 ms: what cannot be dropped
speed      (--speed True) batch 1: a prompt of 512 random tokens, and a token after it; the model as released, then the result, each the
           median of 5 after 2 to warm up. Not in turns, as two models of 7B may not fit: for large differences. On a CPU `resident` is then
           that of reading the prompt too
"""

import json
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import SmoothQuantConfig, StageConfig, parse_command_line, run_stage  # noqa: E402
from compactmind.devices import default_device  # noqa: E402
from compactmind.errors import CompactMindError  # noqa: E402
from compactmind.evaluation.cost import measure_generation, resident_bytes, synchronize  # noqa: E402
from compactmind.files import write_json_atomically  # noqa: E402
from compactmind.methods.quantization.gptq_model import GPTQRecipe, quantize_gptq  # noqa: E402
from compactmind.methods.quantization.nf4_model import NF4Recipe, quantize_nf4  # noqa: E402
from compactmind.methods.quantization.w8a8_model import W8A8Recipe, calibrate_llama, quantize_llama  # noqa: E402


@dataclass(frozen=True)
class MemoryConfig(StageConfig):
    shape: Literal["models/llama", "llama-2-7b"] = "models/llama"
    """The model: the profile's own, or random weights."""
    method: Literal["w8a8", "nf4", "gptq"] = "w8a8"
    """What it is quantized by."""
    target_compression: float = 3.5
    """gptq: bytes as released / bytes of the result; 0: no target."""
    bits: int = 4
    """gptq without a target: of every weight of the blocks, in groups of 128."""
    speed: bool = False
    """Measure prefill and decode before and after."""
    in_this_process: bool = False
    """Measure here and print one line of JSON (what the script starts for itself)."""


SHAPES = {"llama-2-7b": LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)}


def load(config: MemoryConfig, device: str):
    """Return the model on `device` in the dtype of its release."""
    if config.shape in SHAPES:
        with torch.device(device):
            torch.set_default_dtype(torch.float16)
            model = LlamaForCausalLM(SHAPES[config.shape]).eval()
            torch.set_default_dtype(torch.float32)
        return model
    return (
        AutoModelForCausalLM.from_pretrained(config.models_dir / "llama", dtype="auto", use_safetensors=True).eval().to(device)
    )


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
    found = measure_generation({"model": model}, prompt_tokens=512, repeats=5, reference="model")["model"]
    return {phase: each["median_ms"] for phase, each in found.items()}


def measure(config: MemoryConfig) -> dict:
    stage = SmoothQuantConfig.for_profile(config.profile)
    device = default_device()
    torch.nn.Linear(64, 64).to(device)(torch.ones(64, 64, device=device))  # the runtime's own buffers come before the mark
    before = resident_bytes()[0]
    anonymous = AnonymousMemory()
    anonymous.start()
    model = load(config, device)
    windows = torch.randint(0, model.config.vocab_size, (stage.calibration_windows, stage.seq_len))  # memory knows no words
    released = sum(p.numel() * p.element_size() for p in model.parameters())
    dense = speed_of(model) if config.speed else None
    anonymous.peak, started = 0, time.perf_counter()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if config.method == "gptq":
        quantize_gptq(model, windows, GPTQRecipe(config.bits, 128, target_compression=config.target_compression))
    elif config.method == "nf4":
        quantize_nf4(model, windows, NF4Recipe())
    else:
        quantize_llama(model, calibrate_llama(model, windows), W8A8Recipe(grid=stage.alpha_grid))
    synchronize(model.device)
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident_bytes()[1] - before
    needed = None if device == "cuda" or anonymous.first is None else anonymous.peak
    return {
        "shape": config.shape, "method": config.method, "device": device, "seconds": seconds, "dense_ms": dense,
        "result_ms": speed_of(model) if config.speed else None,
        "released_mb": released / 1e6,
        "resident_mb": peak / 1e6, "resident_ratio": peak / released,
        "needed_mb": needed and needed / 1e6, "needed_ratio": needed and needed / released,
    }  # fmt: skip


def main(config: MemoryConfig) -> None:
    if config.in_this_process:
        print(json.dumps(measure(config)))
        return
    command = [sys.executable, __file__, *sys.argv[1:], "--in_this_process", "True"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CompactMindError(f"measuring {config.shape} failed: {done.stderr.strip()[-400:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    path = config.results_dir / "benchmark_memory.json"
    write_json_atomically(path, result)
    print(f"{result['shape']} on {result['device']}: {result['released_mb']:.0f} MB as released; the peak of making it {result['method']}:")
    for name in ("resident", "needed"):
        if result[f"{name}_mb"]:
            print(f"  {name:<10}{result[f'{name}_mb']:>8.0f} MB  {result[f'{name}_ratio']:.2f} times")
    if config.speed:
        dense, made = result["dense_ms"], result["result_ms"]
        for phase in dense:
            print(f"  {phase:<10}{dense[phase]:>8.1f} ms as released, {made[phase]:.1f} ms then: {dense[phase] / made[phase]:.2f}x")
    print(f"making it took {result['seconds']:.0f} s; written to {path}")


if __name__ == "__main__":
    run_stage(main, parse_command_line(MemoryConfig.for_profile()))
