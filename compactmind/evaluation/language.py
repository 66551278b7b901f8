"""Causal language models side by side: perplexity and KL on the same windows, bytes, time to read a prompt and per token, memory.

perplexity         compactmind/evaluation/perplexity.py, its protocol stamped on every row
KL                 compactmind/evaluation/divergence.py, to the model it was made from, in one pass with perplexity
compression ratio  bytes of the weight files of the model it was made from, in the dtype they were released in / bytes of its own
prefill, decode    compactmind/evaluation/cost.py, measure_generation
GSM8K              compactmind/evaluation/capability.py
llama.cpp          compactmind/evaluation/llama_cpp.py, on the same windows and the same prompt
kernel             what multiplies the matrices of the blocks; `simulated` is the right numbers without an int8 kernel
"""

import functools
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from transformers import PreTrainedTokenizerBase

from compactmind.checkpoint import Checkpoint, load_any
from compactmind.devices import default_device
from compactmind.errors import CompactMindError
from compactmind.evaluation.capability import gsm8k
from compactmind.evaluation.cost import NEW_TOKENS, measure_generation, measure_load_time, peak_memory, weight_bytes
from compactmind.evaluation.divergence import measure_logits, measure_windows
from compactmind.evaluation.failures import cell_fails_alone, collecting, leave_out, row_fails_alone
from compactmind.evaluation.llama_cpp import LlamaCpp
from compactmind.evaluation.loaded import Checkpoints
from compactmind.evaluation.perplexity import paired_ratio, perplexity_of
from compactmind.evaluation.recorded import recorded_quality
from compactmind.formats.table import kernel_of
from compactmind.forward import LogitsOf
from compactmind.gguf_export import export_gguf
from compactmind.limits import positions_of, require_known_ids, require_positions


def measure_language_models(
    rows: list[dict[str, Any]],
    checkpoints: Checkpoints,
    windows_for: Callable[[PreTrainedTokenizerBase], torch.Tensor],
    text: str,
    windows_from: str,
    *,
    reference: dict[str, Any] | None,
    bases: dict[str, dict[str, Any]],
    prompt_tokens: int,
    repeats: int,
    fresh: bool = False,
    states: Callable[[str, torch.Tensor], Path | None] = lambda base, windows: None,
) -> None:
    """Add, in place, every measurement to the rows, whose models are all among the `checkpoints`, by name.

    `windows_for` gives the held-out text in windows (windows, seq_len) of a tokenizer, `text` says what it is and `windows_from` which of
    its windows they are. `bases` has, by the name
    of a row, the row it is compared with: one of these, or one measured earlier, whose model then runs along where time is compared.
    Perplexity ratio, KL, compression and speed-up are None without one, ratio and KL also where the text becomes other tokens: a loss per
    token is another thing then, and the protocol of a row says so whose tokens are not those of the `reference`. A row fails alone,
    see compactmind/evaluation/failures.py; if others are compared with it, they are compared with nothing. What a manifest has recorded of
    perplexity and KL is taken from there if one window confirms it (compactmind/evaluation/recorded.py), unless `fresh`. `states` says of
    the identity of a base and of windows where a stage has left what its head reads of them, see LogitsOf.
    """

    tokenized: dict[str, torch.Tensor] = {}

    @functools.cache
    def windows_of(name: str) -> torch.Tensor:
        tokenizer = checkpoints.tokenizer(name)  # most models have the same one, and a whole text takes it a second or two
        same = f"{type(tokenizer).__name__} {tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else name}"
        if same not in tokenized:
            tokenized[same] = windows_for(tokenizer)
        return tokenized[same]

    _measure_quality(rows, checkpoints, windows_of, text, windows_from, bases, fresh, states)
    rows = [row for row in rows if row["status"] == "measured"]
    bases = {name: base for name, base in bases.items() if base["status"] == "measured"}
    for row in rows:
        name, base = row["name"], bases.get(row["name"])
        measured = reference is not None and reference["status"] == "measured"
        if measured and not torch.equal(windows_of(name), windows_of(reference["name"])):
            row["protocol"] = {**row["protocol"], "tokenizer": "its own"}
        comparable = base is not None and torch.equal(windows_of(name), windows_of(base["name"]))
        row["against_dense"] = paired_ratio(row["losses"], base["losses"]) if comparable else None
        row["divergence"] = row["divergence"] if comparable else None  # its base may have turned out to be damaged
        row["compression_ratio"] = base["size_mb"] / row["size_mb"] if base else None
        with cell_fails_alone(row, "load_seconds"):
            print(f"{name:<24} load time ...", flush=True)
            device = checkpoints[name].model.device
            checkpoints.release_large()
            row["load_seconds"] = measure_load_time(partial(load_any, Path(row["directory"]), device))
    _measure_speed(rows, checkpoints, bases, prompt_tokens, repeats)
    _measure_memory(rows, checkpoints, prompt_tokens)


def _measure_memory(rows: list[dict[str, Any]], checkpoints: Checkpoints, prompt_tokens: int) -> None:
    """Add, in place, the peak memory of reading a prompt; no large model is in this process then."""
    print("peak memory, each model in a process of its own ...", flush=True)
    ready = []
    for row in rows:
        with cell_fails_alone(row, "peak_memory_mb"):
            require_positions(checkpoints[row["name"]].model, prompt_tokens, "prompt_tokens")
            ready.append(row)
    checkpoints.release_large()

    def measure(row: dict[str, Any]) -> None:
        with cell_fails_alone(row, "peak_memory_mb"):
            row["peak_memory_mb"] = peak_memory(Path(row["directory"]), 1, prompt_tokens)

    one = default_device() == "cuda" or any(checkpoints.is_large(row["name"]) for row in ready)
    with ThreadPoolExecutor(max_workers=1 if one else 2) as pool:
        list(pool.map(measure, ready))


def _measure_speed(
    rows: list[dict[str, Any]], checkpoints: Checkpoints, bases: dict[str, dict[str, Any]], prompt_tokens: int, repeats: int
) -> None:
    """Add, in place, the times of reading a prompt and of a token after it: of small models in turns, of large ones alone.

    What a large one is compared with is then the median of its base, measured a while before or after.
    """
    longest = prompt_tokens + NEW_TOKENS
    along = dict.fromkeys(base["name"] for base in bases.values() if not checkpoints.is_large(base["name"]))
    models = {name: checkpoints[name].model for name in along}
    models = {name: model for name, model in models.items() if (positions_of(model) or longest) >= longest}
    errors: dict[str, Exception] = {}
    compared = {name: base["name"] for name, base in bases.items()}
    alone = [row for row in rows if checkpoints.is_large(row["name"])]
    for row in rows:
        name = row["name"]
        with cell_fails_alone(row, "generation"):
            require_positions(checkpoints[name].model, longest, "prompt_tokens")
            if row not in alone:
                models[name] = checkpoints[name].model
                continue
            print(f"{name:<24} prefill of {prompt_tokens} tokens and decoding, {repeats} rounds ...", flush=True)
            row["generation"] = measure_generation({name: checkpoints[name].model}, prompt_tokens, repeats, {})[name]
    for row in alone:
        of_base = (bases.get(row["name"]) or {}).get("generation")
        for phase, times in (row.get("generation") or {}).items():
            times["speedup"] = of_base[phase]["median_ms"] / times["median_ms"] if of_base else None
    if not models:
        return
    print(f"prefill of {prompt_tokens} tokens and decoding, {repeats} rounds of {len(models)} models in turn ...", flush=True)
    times = measure_generation(models, prompt_tokens, repeats, compared, errors=errors)
    for row in rows:
        if row not in alone:
            row["generation"] = times.get(row["name"])
            if row["name"] in errors:
                leave_out(row, "generation", errors[row["name"]])


def _measure_quality(
    rows: list[dict[str, Any]],
    checkpoints: Checkpoints,
    windows_of: Callable[[str], torch.Tensor],
    text: str,
    windows_from: str,
    bases: dict[str, dict[str, Any]],
    fresh: bool = False,
    states: Callable[[str, torch.Tensor], Path | None] = lambda base, windows: None,
) -> None:
    """Add, in place, perplexity, KL to the base, the bytes of the weights and what multiplies them; a row without them fails.

    The base of rows computes its logits once for all of them; the models then read the windows one after the other.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        with row_fails_alone(row):
            name, base = row["name"], bases.get(row["name"])
            windows = windows_of(name)
            require_positions(checkpoints[name].model, windows.shape[1], "seq_len")
            require_known_ids(checkpoints[name].model, windows)
            comparable = base is not None and torch.equal(windows, windows_of(base["name"]))
            groups.setdefault(base["name"] if comparable else name, []).append(row)
    for base_name, group in groups.items():
        names, windows = [row["name"] for row in group], windows_of(base_name)
        what = f"perplexity and KL to {base_name} on {len(windows)} windows of {windows.shape[1]} tokens"
        print(f"{', '.join(names)}: {what} ...", flush=True)
        errors: dict[str, Exception] = {}
        by_model, dense, base, recorded = {}, None, bases.get(names[0], {}).get("identity"), []
        with collecting(errors, base_name):
            dense = LogitsOf(checkpoints[base_name].model, windows, states(base, windows) if base else None)
            by_model[base_name] = measure_logits(dense, windows)
        for name in names:
            if name == base_name:
                continue
            with collecting(errors, name):
                if not fresh and dense is not None:
                    by_model[name] = recorded_quality(checkpoints[name], windows, base, dense)
                recorded += [name] if by_model.get(name) else []
                by_model[name] = by_model.get(name) or measure_windows({name: checkpoints[name].model}, windows, dense)[name]
        if recorded:
            print(f"{', '.join(recorded)}: as when they were made; the first window, read again, is the same", flush=True)
        for row in group:
            with row_fails_alone(row):
                if row["name"] in errors:
                    raise errors[row["name"]]
                measured = by_model[row["name"]]
                result = perplexity_of(measured["losses"], windows.shape[1], text, windows_from)
                row["losses"], row["protocol"] = result["losses"], result["protocol"]
                row["perplexity"], row["perplexity_interval"] = result["perplexity"], result["interval"]
                row["divergence"] = measured["divergence"]
                row["size_mb"] = weight_bytes(Path(row["directory"])) / 1e6
                row["kernel"] = kernel_of(checkpoints[row["name"]].model, row["kind"])
                if base_name in errors:
                    leave_out(row, "divergence", errors[base_name])


def measure_gsm8k(rows: list[dict[str, Any]], checkpoints: Mapping[str, Checkpoint], problems: int, file: Path | None) -> None:
    """Add, in place, `gsm8k` to the measured ones of the rows; see compactmind/evaluation/capability.py. Each fails alone."""
    for row in rows:
        if row["status"] != "measured":
            continue
        print(f"{row['name']:<24} GSM8K, {problems} problems ...", flush=True)
        with cell_fails_alone(row, "gsm8k"):
            row["gsm8k"] = gsm8k(checkpoints[row["name"]].model, checkpoints[row["name"]].tokenizer, problems, file=file)


def measure_in_llama_cpp(
    rows: list[dict[str, Any]],
    dense: Checkpoint,
    base: dict[str, Any],
    windows: torch.Tensor,
    *,
    prompt_tokens: int,
    repeats: int,
) -> None:
    """Add, in place, to rows of a dense model that llama.cpp rounds and runs, by their `dtype`, what `measure_language_models` adds.

    `base` is the measured row of the dense model and `windows` (windows, seq_len) what its numbers are of. Memory is not measured: what
    llama.cpp maps from a file is not separated from what it needs. Each row fails alone; one of a model that GGUF cannot hold is left out.
    """
    models: dict[str, Any] = {base["name"]: dense.model}
    errors: dict[str, Exception] = {}
    try:
        for row in list(rows):
            with row_fails_alone(row), tempfile.TemporaryDirectory() as folder:
                print(f"{row['name']:<24} perplexity, KL and speed ...", flush=True)
                file = Path(folder, "model.gguf")
                try:
                    export_gguf(dense.model, dense.tokenizer, file, base["name"], row["dtype"])
                except CompactMindError as error:
                    print(f"{row['name']}: left out, {error}")
                    rows.remove(row)
                    continue
                row["size_mb"] = sum(int(tensor.n_bytes) for tensor in GGUFReader(file).tensors) / 1e6
                room = max(windows.shape[1], prompt_tokens + NEW_TOKENS)

                def load(file: Path = file, room: int = room) -> LlamaCpp:
                    return LlamaCpp(file, room, dense.model.config.vocab_size, torch.get_num_threads())

                models[row["name"]] = load()
                row["load_seconds"] = measure_load_time(lambda load=load: load().close())
        if len(models) == 1:
            return
        by_model = measure_windows(models, windows, base["name"], errors)
        running = {name: model for name, model in models.items() if name not in errors}
        speeds = measure_generation(running, prompt_tokens, repeats, base["name"], errors=errors)
    finally:
        for name, model in models.items():
            if name != base["name"]:
                model.close()
    for row in rows:
        if row["name"] not in models:
            continue
        with row_fails_alone(row):
            if row["name"] in errors:
                raise errors[row["name"]]
            protocol = base["protocol"]
            result = perplexity_of(by_model[row["name"]]["losses"], windows.shape[1], protocol["text"], protocol["windows_from"])
            row |= {"losses": result["losses"], "protocol": protocol, "perplexity": result["perplexity"]}
            row |= {"perplexity_interval": result["interval"], "divergence": by_model[row["name"]]["divergence"]}
            row["against_dense"] = paired_ratio(row["losses"], base["losses"])
            row |= {
                "compression_ratio": base["size_mb"] / row["size_mb"],
                "generation": speeds[row["name"]],
                "status": "measured",
            }
