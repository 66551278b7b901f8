"""What a model costs: operations, bytes, time and memory. Each metric is defined here and nowhere else.

GFLOPs        2 x multiply-accumulates / 1e9 of one forward pass at batch 1, attention matmuls included, counted by
              PyTorch's FlopCounterMode on a twin of the same shapes (eager attention, unpacked weights: fused attention and
              packed 4-bit products count as 0 otherwise). Quantization does not change it; removing structures does.
gmacs_thop    what the `thop` tool says about the same twin: multiply-accumulates, attention matmuls never included.
MB            1e6 bytes of weight files.
latency       wall time of one forward pass; all models take turns within each round, so that drift of the machine hits
              them alike, and speed-ups are medians of ratios within a round.
peak memory   what loading and running the model adds to a fresh process, see `peak_memory`.
"""

import ctypes
import multiprocessing
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from compactmind.devices import default_device
from compactmind.errors import CompactMindError
from compactmind.files import weight_files
from compactmind.generation import cache_for
from compactmind.limits import vocabulary_of

NEW_TOKENS = 8
"""Tokens whose mean time is that of decoding one."""


def _shape_twin(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model of the same class and widths with plain linears, eager attention and no storage (meta device)."""
    with torch.device("meta"):
        twin = type(model)(type(model.config).from_dict(model.config.to_dict()))
    twin.set_attn_implementation("eager")
    return twin.eval()


def gflops(model: PreTrainedModel, sequence_length: int) -> float:
    """Return the GFLOPs (2 x MACs / 1e9) of one sequence of `sequence_length` tokens, attention included."""
    twin = _shape_twin(model)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        twin(input_ids=torch.zeros(1, sequence_length, dtype=torch.long, device="meta"))
    return counter.get_total_flops() / 1e9


def gmacs_thop(model: PreTrainedModel, sequence_length: int) -> float:
    """Return thop's count of multiply-accumulates / 1e9: linears and norms, no attention matmuls."""
    from thop import profile

    twin = _shape_twin(model)  # thop leaves buffers behind, so it never sees the model itself
    macs, _ = profile(twin, inputs=(torch.zeros(1, sequence_length, dtype=torch.long, device="meta"),), verbose=False)
    return float(macs) / 1e9


def weight_bytes(directory: Path) -> int:
    """Return the bytes of the files that hold a folder's weights. Raises CompactMindError, see `weight_files`."""
    return sum(path.stat().st_size for path in weight_files(directory))


def synchronize(device: torch.device) -> None:
    """Wait for the device to finish, so that a wall clock reads what was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_interleaved(
    models: Mapping[str, PreTrainedModel], once: Callable[[PreTrainedModel], Any], repeats: int, warmup: int,
    errors: dict[str, Exception] | None,
) -> dict[str, list[Any]]:  # fmt: skip
    """Return what `once(model)` found of every model in each of `repeats` rounds, after `warmup` more; all take turns in each round.

    With `errors`, which then holds them by name, a model that fails drops out and the others go on; without, the error is raised.
    """
    results: dict[str, list[Any]] = {name: [] for name in models}
    for round_index in range(-warmup, repeats):
        for name in list(results):
            try:
                result = once(models[name])
            except Exception as error:  # noqa: BLE001  any model may stand beside others that must not lose their rounds
                if errors is None:
                    raise
                errors[name] = error
                del results[name]
                continue
            if round_index >= 0:
                results[name].append(result)
    return results


def random_tokens(models: Mapping[str, PreTrainedModel], rows: int, tokens: int) -> torch.Tensor:
    """Return the same random token ids, which every model knows, each time: int64 (rows, tokens)."""
    known = [
        vocabulary_of(model) if isinstance(model, torch.nn.Module) else model.config.vocab_size for model in models.values()
    ]
    vocabulary = min(known, default=1)
    return torch.randint(min(5, vocabulary - 1), vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def measure_latency(
    models: Mapping[str, PreTrainedModel], batch_size: int, sequence_length: int, repeats: int, reference: str, warmup: int = 2,
    errors: dict[str, Exception] | None = None,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Time one forward pass of every model on the same random tokens, taking turns for `repeats` rounds.

    Returns per model `median_ms`, `low_ms` and `high_ms` (10th and 90th percentile) and `speedup`: the median over rounds of
    time of `reference` / time of this model (None if the reference is not among them). `errors`: see `measure_interleaved`.
    """
    input_ids = random_tokens(models, batch_size, sequence_length)

    def once(model: PreTrainedModel) -> float:
        ids = input_ids.to(model.device)
        mask = torch.ones_like(ids)
        synchronize(model.device)
        started = time.perf_counter()
        model(input_ids=ids, attention_mask=mask)
        synchronize(model.device)
        return time.perf_counter() - started

    return summaries(measure_interleaved(models, once, repeats, warmup, errors), dict.fromkeys(models, reference))


@torch.inference_mode()
def measure_generation(
    models: Mapping[str, PreTrainedModel], prompt_tokens: int, repeats: int, reference: str | Mapping[str, str],
    new_tokens: int = NEW_TOKENS, warmup: int = 2, errors: dict[str, Exception] | None = None,
) -> dict[str, dict[str, dict[str, float]]]:  # fmt: skip
    """Time what generating text at batch 1 is made of, all causal language models taking turns for `repeats` rounds.

    `prefill`: reading `prompt_tokens` random tokens as `generate` does, logits of the last one only, keys and values kept.
    `decode`: one further token with that cache (generation.py), the mean of `new_tokens`. Returns per model both, each as
    `measure_latency`; `reference` may say for each model by name which one its speed-up is against.
    """
    prompt = random_tokens(models, 1, prompt_tokens)

    def once(model: PreTrainedModel) -> dict[str, float]:
        ids = prompt.to(model.device)
        synchronize(model.device)
        started = time.perf_counter()
        output = model(input_ids=ids, use_cache=True, logits_to_keep=1, past_key_values=cache_for(model))
        synchronize(model.device)
        prefilled = time.perf_counter()
        for _ in range(new_tokens):
            output = model(input_ids=output.logits[:, -1].argmax(-1, keepdim=True), past_key_values=output.past_key_values)
        synchronize(model.device)
        return {"prefill": prefilled - started, "decode": (time.perf_counter() - prefilled) / new_tokens}

    rounds = measure_interleaved(models, once, repeats, warmup, errors)
    compared = dict.fromkeys(models, reference) if isinstance(reference, str) else reference
    phases = {
        phase: summaries({name: [taken[phase] for taken in times] for name, times in rounds.items()}, compared)
        for phase in ("prefill", "decode")
    }
    return {name: {phase: summary[name] for phase, summary in phases.items()} for name in rounds}


def summaries(seconds: Mapping[str, Sequence[float]], compared: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Return, per model, median, 10th and 90th percentile (between ranks) of its rounds in ms, and its speed-up.

    `compared`: name -> the model a speed-up is against; None where that is not given or was not timed.
    """
    result = {}
    for name, times in seconds.items():
        other = seconds.get(compared.get(name), ())
        ratios = [theirs / own for theirs, own in zip(other, times, strict=True)] if other else []
        low, median, high = (1e3 * value for value in numpy.percentile(times, [10, 50, 90]).tolist())
        speedup = statistics.median(ratios) if ratios else None
        result[name] = {"median_ms": median, "low_ms": low, "high_ms": high, "speedup": speedup}
    return result


def measure_load_time(load: Callable[[], Any], repeats: int = 3) -> float:
    """Return the median wall time in seconds of `load()`; the file is in the page cache after the first."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        load()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


# ---------------------------------------------------------------------------------------------------------- peak memory
def peak_memory(directory: Path, batch_size: int, sequence_length: int) -> float:
    """Return the MB (1e6 bytes) that loading a checkpoint and running one batch adds to a fresh process at its peak.

    On a CPU: high-water mark of resident memory minus what was resident after the imports. With CUDA: peak of allocated
    device memory. Raises CompactMindError with the process's last words if it fails.
    """
    # A server that has imported what a model needs forks a process seconds sooner than one imports it. Not where a GPU may be in use:
    # nothing forked from there can use it.
    forked = sys.platform == "linux" and default_device() != "cuda"
    context = multiprocessing.get_context("forkserver" if forked else "spawn")
    if forked:
        _start_server(context)
    with ProcessPoolExecutor(1, mp_context=context, initializer=_silence) as pool:
        try:
            return pool.submit(_peak_of_this_process, directory, batch_size, sequence_length).result()
        except BrokenProcessPool:
            what = "its process was killed: most likely the memory was not enough"
        except Exception as error:  # noqa: BLE001  any folder may be measured, and each library has its own way to say what it lacks
            what = str(error) or repr(error)
    raise CompactMindError(f"measuring the memory of {directory} failed: {what}")


_STARTING = threading.Lock()
"""Held while the environment is another one: rows are measured by several threads."""


def _start_server(context: multiprocessing.context.ForkServerContext) -> None:
    """Start the server, unless it runs, with all of this package that is imported here: each process imports the script again."""
    own = __name__.partition(".")[0]
    context.set_forkserver_preload([*(name for name in sys.modules if name.startswith(f"{own}.")), f"{own}.checkpoint"])
    folder = Path(__file__).resolve().parents[2]
    with _STARTING:
        before = os.environ.get("PYTHONPATH")
        # Up to Python 3.12 a server looks for modules in the current directory only, and goes without those it does not find.
        os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *([before] if before else [])])
        try:
            forkserver.ensure_running()
        finally:
            if before is None:
                del os.environ["PYTHONPATH"]
            else:
                os.environ["PYTHONPATH"] = before


def _silence() -> None:
    """Send what libraries print to nowhere: an error comes back as what it is."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)


def resident_bytes() -> tuple[int, int]:
    """Return (resident now, highest so far) of this process in bytes."""
    import psutil

    memory = psutil.Process().memory_info()
    if sys.platform == "linux":
        # Not getrusage: its maximum is inherited from the parent process, VmHWM belongs to this one.
        status = Path("/proc/self/status").read_text()
        peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
        return memory.rss, peak
    if hasattr(memory, "peak_wset"):  # Windows
        return memory.rss, memory.peak_wset
    import resource

    return memory.rss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes


def _map_libraries() -> None:
    """Make the pages of all shared libraries resident, which a forked process has not and would count with the model (Linux 5.14)."""
    populate, libc = 22, ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, rights, *_, name = line.split(maxsplit=5)
        if ".so" in name and rights.startswith("r"):
            start, end = (int(each, 16) for each in place.split("-"))
            libc.madvise(start, end - start, populate)


def _peak_of_this_process(directory: Path, batch_size: int, sequence_length: int) -> float:
    from compactmind.checkpoint import load_any

    device = default_device()
    if sys.platform == "linux" and device == "cpu":
        _map_libraries()
    torch.nn.Linear(64, 64).to(device)(torch.ones(64, 64, device=device))  # the runtime's own buffers come before the mark
    before, _ = resident_bytes()
    model = load_any(directory, device).model
    with torch.inference_mode():
        ids = torch.full((batch_size, sequence_length), min(7, model.config.vocab_size - 1), device=device)
        last_only = {"logits_to_keep": 1} if hasattr(model, "lm_head") else {}
        model(input_ids=ids, attention_mask=torch.ones_like(ids), **last_only)
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return (resident_bytes()[1] - before) / 1e6
