"""Causal language models side by side: perplexity on the same windows, bytes, time to read a prompt and per token, memory.

perplexity         compactmind/evaluation/perplexity.py, its protocol stamped on every row
compression ratio  bytes of the dense checkpoint's weight files, in the dtype they were released in / bytes of this one's
prefill, decode    compactmind/evaluation/cost.py, measure_generation
GSM8K              compactmind/evaluation/capability.py
kernel             what multiplies the matrices of the blocks; `simulated` is the right numbers without an int8 kernel
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compactmind.checkpoint import Checkpoint, load_any
from compactmind.evaluation.capability import gsm8k
from compactmind.evaluation.cost import measure_generation, measure_load_time, peak_memory, weight_bytes
from compactmind.evaluation.perplexity import paired_ratio, perplexity
from compactmind.methods.quantization.packed_model import QUANTIZED_KINDS
from compactmind.methods.quantization.w8a8_linear import W8A8Linear


def kernel_of(model: PreTrainedModel, kind: str) -> str:
    """Return what multiplies the matrices of a model's blocks: int8 kernels by name, bitsandbytes, or the float dtype."""
    kernels = {module.kernel for module in model.modules() if isinstance(module, W8A8Linear)}
    if kernels:
        return ", ".join(sorted(kernels))
    return "bitsandbytes" if kind in QUANTIZED_KINDS else str(next(model.parameters()).dtype).removeprefix("torch.")


def measure_language_models(
    rows: list[dict[str, Any]],
    checkpoints: dict[str, Checkpoint],
    windows_for: Callable[[PreTrainedTokenizerBase], torch.Tensor],
    text: str,
    *,
    reference: dict[str, Any] | None,
    prompt_tokens: int,
    repeats: int,
) -> None:
    """Add, in place, every measurement to the rows, whose models are all among the `checkpoints`, by name.

    `windows_for` gives the held-out text in windows (windows, seq_len) of a tokenizer, `text` says what it is. `reference` is the dense
    model's row: one of these, or one measured earlier, whose model then runs along where time is compared; perplexity ratio,
    compression and speed-up are None without it, the ratio also where the text becomes other tokens: a loss per token is another thing
    then.
    """
    wanted = windows_for(checkpoints[reference["name"]].tokenizer) if reference else None
    for row in rows:
        name, directory = row["name"], Path(row["directory"])
        windows = windows_for(checkpoints[name].tokenizer)
        print(f"{name:<24} perplexity on {len(windows)} windows of {windows.shape[1]} tokens, load time ...", flush=True)
        result = perplexity(checkpoints[name].model, windows, text)
        row["losses"], row["protocol"] = result["losses"], result["protocol"]
        if wanted is not None and not torch.equal(windows, wanted):
            row["protocol"] = {**row["protocol"], "tokenizer": "its own"}
        row["perplexity"], row["perplexity_interval"] = result["perplexity"], result["interval"]
        row["size_mb"] = weight_bytes(directory) / 1e6
        row["kernel"] = kernel_of(checkpoints[name].model, row["kind"])
        row["load_seconds"] = measure_load_time(partial(load_any, directory, checkpoints[name].model.device))
    for row in rows:
        comparable = reference and "tokenizer" not in row["protocol"]
        row["against_dense"] = paired_ratio(row["losses"], reference["losses"]) if comparable else None
        row["compression_ratio"] = reference["size_mb"] / row["size_mb"] if reference else None
    print(
        f"prefill of {prompt_tokens} tokens and decoding, {repeats} rounds of {len(checkpoints)} models in turn ...", flush=True
    )
    models = {name: checkpoint.model for name, checkpoint in checkpoints.items()}
    times = measure_generation(models, prompt_tokens, repeats, reference["name"] if reference else "")
    print("peak memory, each model in a process of its own ...", flush=True)
    with ThreadPoolExecutor(max_workers=1 if torch.cuda.is_available() else 2) as pool:
        peaks = pool.map(lambda row: peak_memory(Path(row["directory"]), 1, prompt_tokens), rows)
        for row, peak in zip(rows, peaks, strict=True):
            row["generation"], row["peak_memory_mb"] = times[row["name"]], peak


def measure_gsm8k(rows: list[dict[str, Any]], checkpoints: dict[str, Checkpoint], problems: int, file: Path | None) -> None:
    """Add, in place, `gsm8k` to the rows; see compactmind/evaluation/capability.py."""
    for row in rows:
        print(f"{row['name']:<24} GSM8K, {problems} problems ...", flush=True)
        checkpoint = checkpoints[row["name"]]
        row["gsm8k"] = gsm8k(checkpoint.model, checkpoint.tokenizer, problems, file=file)
