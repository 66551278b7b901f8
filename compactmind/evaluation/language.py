"""Causal language models side by side: perplexity on the same windows, bytes, time to read a prompt and per token, memory.

perplexity         compactmind/evaluation/perplexity.py, its protocol stamped on every row
compression ratio  bytes of the dense checkpoint's weight files, in the dtype they were released in / bytes of this one's
prefill, decode    compactmind/evaluation/cost.py, measure_generation
GSM8K              compactmind/evaluation/capability.py
kernel             what multiplies the matrices of the blocks; `simulated` is the right numbers without an int8 kernel
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from compactmind.checkpoint import Checkpoint, load_checkpoint
from compactmind.evaluation.capability import MATCHES, gsm8k
from compactmind.evaluation.cost import measure_generation, measure_load_time, peak_memory, weight_megabytes
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
    models_dir: Path,
    windows: torch.Tensor,
    text: str,
    *,
    reference: str,
    prompt_tokens: int,
    repeats: int,
) -> None:
    """Add, in place, every measurement to the rows with status `measured`.

    `windows` (windows, seq_len) are held-out tokens, `text` says of what; `reference` is the dense model's name: perplexity
    ratio, compression and speed-up are None without it.
    """
    measured = [row for row in rows if row["status"] == "measured"]
    losses, protocol = {}, None
    for row in measured:
        name = row["name"]
        print(f"{name:<24} perplexity on {len(windows)} windows of {windows.shape[1]} tokens, load time ...", flush=True)
        result = perplexity(checkpoints[name].model, windows, text)
        losses[name], protocol = result["losses"], result["protocol"]
        row["perplexity"], row["perplexity_interval"], row["protocol"] = result["perplexity"], result["interval"], protocol
        row["size_mb"] = weight_megabytes(models_dir / name)
        row["kernel"] = kernel_of(checkpoints[name].model, row["kind"])
        row["load_seconds"] = measure_load_time(partial(load_checkpoint, models_dir / name, checkpoints[name].model.device))
    dense = next((row for row in measured if row["name"] == reference), None)
    for row in measured:
        row["against_dense"] = paired_ratio(losses[row["name"]], losses[reference]) if dense else None
        row["compression_ratio"] = dense["size_mb"] / row["size_mb"] if dense else None
    if not measured:
        return
    print(f"prefill of {prompt_tokens} tokens and decoding, {repeats} rounds of all models ...", flush=True)
    models = {name: checkpoint.model for name, checkpoint in checkpoints.items()}
    times = measure_generation(models, prompt_tokens, repeats, reference)
    print("peak memory, each model in a process of its own ...", flush=True)
    with ThreadPoolExecutor(max_workers=1 if torch.cuda.is_available() else 2) as pool:
        peaks = pool.map(lambda row: peak_memory(models_dir / row["name"], 1, prompt_tokens), measured)
        for row, peak in zip(measured, peaks, strict=True):
            row["generation"], row["peak_memory_mb"] = times[row["name"]], peak


def measure_gsm8k(rows: list[dict[str, Any]], checkpoints: dict[str, Checkpoint], problems: int, file: Path | None) -> None:
    """Add, in place, `gsm8k` to the rows with status `measured`; see compactmind/evaluation/capability.py."""
    for row in rows:
        if row["status"] == "measured":
            print(f"{row['name']:<24} GSM8K, {problems} problems ...", flush=True)
            checkpoint = checkpoints[row["name"]]
            row["gsm8k"] = gsm8k(checkpoint.model, checkpoint.tokenizer, problems, file=file)


def gsm8k_table(rows: list[dict[str, Any]]) -> str:
    """Return the GSM8K results as aligned text, empty if there are none."""
    asked = [row for row in rows if "gsm8k" in row]
    if not asked:
        return ""
    found = asked[0]["gsm8k"]
    lines = [
        f"\n\n{found['task'] + ', ' + str(found['problems']) + ' problems':<24}" + "".join(f"{name:>28}" for name in MATCHES)
    ]
    for row in asked:
        cells = (row["gsm8k"][match] for match in MATCHES)
        shown = ("{:.1%} [{:.1%}, {:.1%}]".format(cell["accuracy"], *cell["interval"]) for cell in cells)
        lines.append(f"{row['name']:<24}" + "".join(f"{cell:>28}" for cell in shown))
    return "\n".join(lines)


def language_table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as aligned text, one line each."""
    lines = [
        f"{'model':<24}{'perplexity [95% interval]':>28}{'against dense [95%, paired]':>32}{'M param':>9}{'MB':>8}{'ratio':>7}"
        f"{'prefill ms':>12}{'':>7}{'decode ms':>11}{'':>7}{'load s':>8}{'peak MB':>9}  kernel"
    ]
    for row in rows:
        if row["status"] != "measured":
            lines.append(f"{row['name']:<24}{row['status']}: run `{row['command']}`")
            continue
        interval = "[{:.2f}, {:.2f}]".format(*row["perplexity_interval"])
        against = "-"
        if row["against_dense"]:
            against = "{:+.2%} [{:+.2%}, {:+.2%}]".format(
                row["against_dense"]["ratio"] - 1, *(bound - 1 for bound in row["against_dense"]["interval"])
            )
        ratio = "-" if row["compression_ratio"] is None else f"{row['compression_ratio']:.2f}x"
        times = "".join(
            f"{time['median_ms']:>{width}.1f}" + ("" if time["speedup"] is None else f"{time['speedup']:.2f}x").rjust(7)
            for time, width in ((row["generation"]["prefill"], 12), (row["generation"]["decode"], 11))
        )
        lines.append(
            f"{row['name']:<24}{row['perplexity']:>12.3f} {interval:>15}{against:>32}{row['parameters'] / 1e6:>9.1f}"
            f"{row['size_mb']:>8.1f}{ratio:>7}{times}{row['load_seconds']:>8.2f}{row['peak_memory_mb']:>9.1f}  {row['kernel']}"
        )
    return "\n".join(lines)


def draw_perplexity_against_size(axes, rows: list[dict[str, Any]], colours: list[str]) -> None:
    """Draw, on matplotlib axes, one point per measured row: MB of the weight file, perplexity against dense with its interval."""
    for colour, row in zip(colours * len(rows), rows, strict=False):
        if row["status"] != "measured":
            continue
        low, high = row["perplexity_interval"]
        if row["against_dense"]:  # the paired interval: what the windows have in common cancels
            dense = row["perplexity"] / row["against_dense"]["ratio"]
            low, high = (dense * bound for bound in row["against_dense"]["interval"])
        axes.errorbar(
            row["size_mb"], row["perplexity"], yerr=[[max(0, row["perplexity"] - low)], [max(0, high - row["perplexity"])]],
            fmt="o", ms=8, capsize=3, color=colour, label=f"{row['name']}: {row['perplexity']:.2f}, {row['size_mb']:.0f} MB",
        )  # fmt: skip
    axes.set(
        xlabel="size of the weight file (MB)", ylabel="perplexity; bars: 95% interval of the ratio to dense", xlim=(0, None)
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
