"""What a checkpoint's directory says of itself in `manifest.json`: read, compared with what is wanted, added to.

It says what the model is (`kind`, `architecture`, per-layer shapes, quantization), where it came from (`parent`, `stage`) and what it
scored. Nothing is guessed from a name; size and SHA-256 of every file are recorded.
"""

import contextlib
import importlib.metadata
import json
import platform
import time
from pathlib import Path
from typing import Any

from compactmind import __version__
from compactmind.devices import is_main_process
from compactmind.errors import CompactMindError
from compactmind.files import MANIFEST, WEIGHTS, sha256_of, weight_files, write_json_atomically
from compactmind.formats.table import FORMATS

MANIFEST_VERSION = 3
"""2: what travels with a model (TRAVELLING) lies beside it, too. 3: what was made from a GGUF file says so (`published_as`)."""
CARD = "README.md"
ADDED_LATER = (MANIFEST, CARD, "model.onnx", "model.gguf")
"""Files of a checkpoint that its manifest does not vouch for."""

GPTQ = """python 5_bayesian_search.py --strategy fixed --output models/llama_gptq_3.5x \
--pipeline '[{"method": "gptq", "params": {"target_compression": 3.5}}]'"""
CUT = "python 3_quantize.py --vocabulary_coverage 0.999"
FRONT = "python 5_bayesian_search.py --objectives kl bytes --save_front 2.5 3 4 --target_compression 2.5 --final_tokens 12000"

MADE_BY = {
    "teacher_base": "python download_model.py",
    "student_base": "python download_model.py",
    "teacher": "python 1_distill.py",
    "student_finetuned": "python 1_distill.py",
    "student_distilled": "python 1_distill.py",
    "student_pruned": "python 2_prune_finetune.py",
    "student_distilled_nf4": "python 3_quantize.py",
    "student_pruned_nf4": "python 3_quantize.py",
    "student_pruned_w8a8": "python 3_quantize.py",
    "student_distilled_small": CUT,
    "student_distilled_small_nf4": CUT,
    "student_pruned_small": CUT,
    "student_pruned_small_nf4": CUT,
    "student_pruned_small_w8a8": CUT,
    "llama": "python download_model.py",
    "llama_w8a8": "python 4_smoothquant_llama.py",
    "llama_w8a8_naive": "python 4_smoothquant_llama.py",
    "llama_nf4": "python 4_smoothquant_llama.py",
    "llama_pruned": "python 5_bayesian_search.py --strategy fixed --calibration_windows 32",
    "llama_gptq_3.5x": GPTQ,
    "llama_searched": FRONT,
    "llama_front_3x": FRONT,
    "llama_front_4x": FRONT,
    "llama_smoothed": "python 4_smoothquant_llama.py --save_smoothed True",
}
"""Checkpoint name -> the command that makes it: for error messages and for the rows of a report that have not run."""

READ_AGAIN = 5
"""How often a checkpoint is read that another process replaces at the same time."""


def how_to_make(directory: Path) -> str | None:
    """Return the command that makes a checkpoint directory, None for names of the user's own."""
    return MADE_BY.get(directory.name)


def read_manifest(directory: Path | str, verify: bool = False) -> dict[str, Any]:
    """Return a checkpoint's manifest after checking that its files are all there and of the recorded size; `verify`: and SHA-256.

    A checkpoint that is replaced meanwhile is read again. Raises CompactMindError naming the directory, what is wrong with it and the
    command that makes it.
    """
    directory = Path(directory)
    for _ in range(READ_AGAIN):
        before = manifest_text(directory)
        try:
            return _checked_manifest(directory, verify)
        except CompactMindError as error:
            problem = error
            if directory.with_name(f".{directory.name}.old").is_dir():  # between two renames
                time.sleep(0.1)
            elif manifest_text(directory) == before:
                break
    raise problem


def manifest_text(directory: Path) -> bytes | None:
    """Return the manifest as it lies there at this moment, None without one: to tell whether it was replaced meanwhile."""
    try:
        return (directory / MANIFEST).read_bytes()
    except OSError:
        return None


def _checked_manifest(directory: Path, verify: bool) -> dict[str, Any]:
    command = how_to_make(directory)
    if not directory.is_dir():
        others = sorted(path.parent.name for path in directory.parent.glob(f"[!.]*/{MANIFEST}"))
        there = f"choose from {', '.join(others)}" if others else f"there is no checkpoint in {directory.absolute().parent}"
        way_out = f"run `{command}` first" if command else there
        raise CompactMindError(f"{directory} not found: {way_out}")
    broken = f"run `{command}` again (add --force True if it says the output is up to date)"
    if command is None:
        broken = "make it again with the stage that wrote it and --force True"
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        files, kind = manifest["files"], manifest["kind"]
        for key in ("architecture", "stage", "quantization"):
            manifest[key]
        files[WEIGHTS]["bytes"], files[WEIGHTS]["sha256"]
    except FileNotFoundError:
        if command is None:
            state = "a Hugging Face folder" if (directory / "config.json").is_file() else "no checkpoint"
            raise CompactMindError(
                f"{directory} has no {MANIFEST}: it is {state}, not one this project has written; --model_path (language models) and "
                "--models name=folder of 6_evaluate_report.py take folders of others"
            ) from None
        raise CompactMindError(
            f"{directory} has no {MANIFEST}, so it is not a finished checkpoint: move it away and run `{command}`"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise CompactMindError(f"{directory / MANIFEST} is damaged ({error!r}): {broken}") from None
    if kind not in FORMATS:
        raise CompactMindError(f"{directory / MANIFEST}: unknown kind {kind!r}, expected one of {', '.join(FORMATS)}: {broken}")
    for name, recorded in files.items():
        path = directory / name
        size = path.stat().st_size if path.is_file() else None
        if size != recorded["bytes"]:
            state = "is missing" if size is None else f"has {size} bytes instead of {recorded['bytes']}"
            raise CompactMindError(f"{path} {state}: the checkpoint is damaged, {broken}")
        if verify and sha256_of(path) != recorded["sha256"]:
            raise CompactMindError(
                f"{path} is not what was saved (its SHA-256 is another one): the checkpoint is damaged, {broken}"
            )
    return manifest


def weights_fingerprint(directory: Path | str) -> str:
    """Return the SHA-256 of a checkpoint's weight file as recorded when it was saved: its identity as an input."""
    return read_manifest(directory)["files"][WEIGHTS]["sha256"]


def identity_of(directory: Path) -> str:
    """Return what identifies the weights in a folder: `weights_fingerprint`, or a hash of the files of a foreign model."""
    if (directory / MANIFEST).is_file():
        return weights_fingerprint(directory)
    return " ".join(sha256_of(file) for file in weight_files(directory))


def is_up_to_date(directory: Path | str, stage: dict[str, Any], verify: bool = False) -> bool:
    """Tell whether `directory` holds a whole checkpoint made by this very `stage`: script, config, inputs and code.

    With `verify` its files are read and their SHA-256 compared. Says in a line why one that is there is made again.
    """
    directory = Path(directory)
    if not directory.is_dir():
        return False
    try:
        made_by = read_manifest(directory, verify)["stage"]
    except CompactMindError as error:
        _say(f"{directory} is made again: {error}")
        return False
    requested = json.loads(json.dumps(stage))
    if made_by == requested:
        return True
    different = []
    for part in sorted(made_by.keys() | requested.keys()):
        old, new = made_by.get(part), requested.get(part)
        if isinstance(old, dict) and isinstance(new, dict):
            different += [f"{part}.{name}" for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
        elif old != new:
            different.append(part)
    _say(f"{directory} is made again: it was made with another {', '.join(different)}")
    return False


def _say(line: str) -> None:
    if is_main_process():
        print(line, flush=True)


def add_to_manifest(directory: Path | str, extra: dict[str, Any]) -> None:
    """Add keys, or other values of keys that `extra` of `save_checkpoint` had, to a finished checkpoint's manifest: all or none.

    For what can be said of a model only when it is safe. Raises CompactMindError if there is no whole checkpoint.
    """
    write_json_atomically(Path(directory) / MANIFEST, read_manifest(directory) | extra)


def versions() -> dict[str, str]:
    """Return the versions that decide what a number means: Python and the packages that compute."""
    installed = {}
    for name in ("torch", "transformers", "bitsandbytes", "accelerate"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # who only loads models needs the first two
            installed[name] = importlib.metadata.version(name)
    return {"python": platform.python_version(), "compactmind": __version__, **installed}
