"""Save and load every kind of model; each directory describes itself in `manifest.json`.

A checkpoint is a Hugging Face directory (config.json, model.safetensors, tokenizer) plus the manifest, which says what the
model is (`kind`, `architecture`, per-layer shapes, quantization), where it came from (`parent`, `stage`) and what it scored.
Nothing is guessed from a name, nothing is pickled, and every tensor of the file must fit the model exactly.
"""

import datetime
import importlib.metadata
import json
import logging
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from compactmind import __version__
from compactmind.errors import CompactMindError
from compactmind.files import recover_directory, replace_directory, sha256_of, write_json_atomically, write_text_atomically
from compactmind.methods.llama import is_llama, llama_blocks, llama_shapes
from compactmind.methods.pruning.encoder import layer_shapes
from compactmind.methods.pruning.modeling_pruned_encoder import (
    PrunedBertForSequenceClassification,
    PrunedDistilBertForSequenceClassification,
)
from compactmind.methods.pruning.modeling_pruned_llama import PrunedLlamaForCausalLM
from compactmind.methods.quantization.packed_model import QUANTIZED_KINDS, load_quantized
from compactmind.methods.quantization.w8a8_encoder import load_w8a8_encoder
from compactmind.methods.quantization.w8a8_linear import W8A8Linear
from compactmind.methods.quantization.w8a8_model import load_w8a8
from compactmind.model_card import model_card

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
WEIGHTS = "model.safetensors"
CARD = "README.md"

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
    "llama": "python download_model.py",
    "llama_w8a8": "python 4_smoothquant_llama.py",
    "llama_w8a8_naive": "python 4_smoothquant_llama.py",
    "llama_nf4": "python 4_smoothquant_llama.py",
    "llama_pruned": "python 5_bayesian_search.py --strategy fixed",
    "llama_searched": "python 5_bayesian_search.py",
    "llama_smoothed": "python 4_smoothquant_llama.py --save_smoothed True",
}
"""Checkpoint name -> the command that makes it: for error messages and for the rows of a report that have not run."""

PRUNED_CLASSES = {
    each.__name__: each
    for each in (PrunedBertForSequenceClassification, PrunedDistilBertForSequenceClassification, PrunedLlamaForCausalLM)
}
"""Architectures of our own; the file that defines one lies beside the weights of each such checkpoint."""

KINDS = ("dense", "pruned", *QUANTIZED_KINDS, "w8a8")
"""What a loader has to know about the weights: of one width, of per-layer widths, packed, or int8 in and out."""


FOREIGN = {"ForSequenceClassification": AutoModelForSequenceClassification, "ForCausalLM": AutoModelForCausalLM}
"""How the architectures end that are read from folders which are not of this project -> what reads them."""


@dataclass
class Checkpoint:
    """A loaded model in evaluation mode, its tokenizer, and its manifest."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    manifest: dict[str, Any]


def how_to_make(directory: Path) -> str:
    """Return the command that makes a checkpoint directory, or a general hint for names of the user's own."""
    return MADE_BY.get(directory.name, "the stage that writes it (python run_pipeline.py runs them all)")


def read_manifest(directory: Path | str) -> dict[str, Any]:
    """Return a checkpoint's manifest after checking that its files are all there and of the recorded size.

    Raises CompactMindError naming the directory, what is wrong with it and the command that makes it.
    """
    directory = Path(directory)
    recover_directory(directory)
    if not directory.is_dir():
        raise CompactMindError(f"{directory} not found: run `{how_to_make(directory)}` first")
    broken = f"run `{how_to_make(directory)}` again (add --force True if it says the output is up to date)"
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        files, kind = manifest["files"], manifest["kind"]
        for key in ("architecture", "stage", "quantization"):
            manifest[key]
        files[WEIGHTS]["bytes"], files[WEIGHTS]["sha256"]
    except FileNotFoundError:
        raise CompactMindError(f"{directory} has no {MANIFEST}, so it is not a finished checkpoint: {broken}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise CompactMindError(f"{directory / MANIFEST} is damaged ({error!r}): {broken}") from None
    if kind not in KINDS:
        raise CompactMindError(f"{directory / MANIFEST}: unknown kind {kind!r}, expected one of {', '.join(KINDS)}: {broken}")
    for name, recorded in files.items():
        path = directory / name
        size = path.stat().st_size if path.is_file() else None
        if size != recorded["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes instead of {recorded['bytes']}"
            raise CompactMindError(f"{path} {found}: the checkpoint is damaged, {broken}")
    return manifest


def weights_fingerprint(directory: Path | str) -> str:
    """Return the SHA-256 of a checkpoint's weight file as recorded when it was saved: its identity as an input."""
    return read_manifest(directory)["files"][WEIGHTS]["sha256"]


def identity_of(directory: Path) -> str:
    """Return what identifies the weights in a folder: `weights_fingerprint`, or a hash of the files of a foreign model."""
    if (directory / MANIFEST).is_file():
        return weights_fingerprint(directory)
    files = sorted(directory.glob("*.safetensors")) or sorted(directory.glob("*.bin"))
    return " ".join(sha256_of(file) for file in files)


def is_up_to_date(directory: Path | str, stage: dict[str, Any]) -> bool:
    """Tell whether `directory` holds a whole checkpoint made by this very `stage` (script, config and inputs)."""
    try:
        return read_manifest(directory)["stage"] == json.loads(json.dumps(stage))
    except CompactMindError:
        return False


def save_checkpoint(
    directory: Path | str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    kind: str,
    parent: str | None,
    stage: dict[str, Any],
    metrics: dict[str, Any] | None = None,
    history: list[dict[str, Any]] | None = None,
    quantization: dict[str, Any] | None = None,
    data_fingerprint: str | None = None,
    extra: dict[str, Any] | None = None,
    dtype: str = "float32",
) -> None:
    """Write a checkpoint, replacing an older one only when the new one is whole.

    `stage` records script, config and input fingerprints (`is_up_to_date` compares it); `history` becomes
    training_history.json; `extra` adds keys to the manifest; `dtype` is what the configuration says the model computes in.
    Raises CompactMindError when the disk is full.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}, expected one of {', '.join(KINDS)}")
    directory = Path(directory)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in _without_tied_copies(model.state_dict()).items()}
    config = model.config
    module = Path(sys.modules[type(model).__module__].__file__) if type(model).__name__ in PRUNED_CLASSES else None
    if module:
        auto_class = "AutoModelForCausalLM" if is_llama(model) else "AutoModelForSequenceClassification"
        config.auto_map = {
            "AutoConfig": f"{module.stem}.{type(config).__name__}",
            auto_class: f"{module.stem}.{type(model).__name__}",
        }
    config.architectures = [type(model).__name__]
    config.dtype = dtype  # what is computed in; half-precision tables in the file may be storage only
    with replace_directory(directory, needed_bytes=bytes_to_save(model) + 5_000_000) as temporary:
        config.save_pretrained(temporary)
        if module:
            shutil.copyfile(module, temporary / module.name)
        save_file(state, temporary / WEIGHTS, metadata={"format": "pt"})
        tokenizer.save_pretrained(temporary)
        if history is not None:
            write_json_atomically(temporary / "training_history.json", history)
        files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(temporary.iterdir())}
        manifest = {
            "manifest_version": MANIFEST_VERSION,
            "kind": kind,
            "architecture": type(model).__name__,
            "parent": parent,
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "parameters": parameters_before_packing(model),
            "layers": llama_shapes(model) if is_llama(model) else layer_shapes(model),
            "quantization": quantization,
            "stage": stage,
            "metrics": metrics or {},
            "data_fingerprint": data_fingerprint,
            "versions": versions(),
            **(extra or {}),
            "files": files,
        }
        write_json_atomically(temporary / MANIFEST, manifest)
        write_text_atomically(temporary / CARD, model_card(directory.name, manifest))  # no part of `files`: a report adds to it


def add_to_manifest(directory: Path | str, extra: dict[str, Any]) -> None:
    """Add keys, or other values of keys that `extra` of `save_checkpoint` had, to a finished checkpoint's manifest: all or none.

    For what can be said of a model only when it is safe. Raises CompactMindError if there is no whole checkpoint.
    """
    write_json_atomically(Path(directory) / MANIFEST, read_manifest(directory) | extra)


def bytes_to_save(model: PreTrainedModel) -> int:
    """Return the bytes of the tensors `save_checkpoint` would write."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _without_tied_copies(model.state_dict()).values())


def _without_tied_copies(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the state dict without tensors that are another one's memory (a head tied to the embeddings)."""
    seen: set[tuple[int, torch.Size]] = set()
    kept = {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() == 0 or place not in seen:
            kept[name] = tensor
        seen.add(place)
    return kept


def load_checkpoint(
    directory: Path | str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Checkpoint:
    """Load any checkpoint of this project, strictly: a missing, unexpected or misshapen tensor is an error.

    Returns the model on `device` in evaluation mode, its tokenizer and manifest; weights that are not packed are of `dtype`.
    Raises CompactMindError.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    architecture = manifest["architecture"]
    model_class = PRUNED_CLASSES.get(architecture) or getattr(transformers, architecture, None)
    if model_class is None:
        raise CompactMindError(
            f"{directory / MANIFEST}: unknown architecture {architecture!r}: run `{how_to_make(directory)}` again"
        )
    try:
        if manifest["kind"] in QUANTIZED_KINDS:
            model = load_quantized(directory / WEIGHTS, model_class, manifest["quantization"], device)
        elif manifest["kind"] == "w8a8" and "CausalLM" in architecture:
            model = load_w8a8(directory / WEIGHTS, model_class, manifest["quantization"], dtype)
        elif manifest["kind"] == "w8a8":
            model = load_w8a8_encoder(directory / WEIGHTS, model_class, manifest["quantization"])
        else:
            model, report = model_class.from_pretrained(directory, dtype=dtype, output_loading_info=True)
            problems = {key: sorted(map(str, names)) for key, names in report.items() if names}
            if problems:
                raise ValueError(f"the tensors of {WEIGHTS} do not fit {architecture}: {problems}")
        # With the config at hand, transformers need not ask whether to trust the modelling file beside the weights.
        tokenizer = AutoTokenizer.from_pretrained(directory, config=model.config)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise CompactMindError(
            f"{directory} could not be loaded ({error}): run `{how_to_make(directory)}` again with --force True"
        ) from error
    return Checkpoint(model.to(device).eval(), tokenizer, manifest)


def load_any(directory: Path, device: str | torch.device = "cpu") -> Checkpoint:
    """Load a checkpoint of this project, or any Hugging Face folder with a sequence classifier or a causal language model, in float32.

    A foreign folder gets a manifest with what can be read off it: kind, architecture, parameters. Raises CompactMindError.
    """
    if (directory / MANIFEST).is_file() or not (directory / "config.json").is_file():
        return load_checkpoint(directory, device)
    try:
        config = AutoConfig.from_pretrained(directory)
        architecture = (config.architectures or ["unknown"])[0]
        auto = next((each for task, each in FOREIGN.items() if architecture.endswith(task)), None)
        if auto is None:
            raise CompactMindError(f"{directory} holds a {architecture}: only {' and '.join(FOREIGN)} can be measured")
        # a quantized one keeps the types its file has
        dtype = "auto" if getattr(config, "quantization_config", None) else torch.float32
        model = auto.from_pretrained(directory, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        raise CompactMindError(f"{directory} could not be loaded ({str(error).strip()[:300]})") from error
    manifest = {
        "kind": "foreign", "architecture": architecture, "parent": None, "created": None, "layers": None, "quantization": None,
        "parameters": parameters_before_packing(model), "stage": {}, "metrics": {},
    }  # fmt: skip
    return Checkpoint(model.to(device).eval(), tokenizer, manifest)


def load_as_released(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a Llama-like causal LM from any Hugging Face folder in the dtype of its file, and its tokenizer.

    Raises CompactMindError saying what is wrong with it.
    """
    if not (path / "config.json").is_file():
        raise CompactMindError(f"{path} holds no model (no config.json): run `python download_model.py`, or give --model_path")
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", use_safetensors=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # noqa: BLE001  safetensors, json and transformers each have their own way to say "damaged"
        raise CompactMindError(f"{path} could not be loaded ({error}): it is damaged, or its tokenizer is missing") from None
    llama_blocks(model)
    return model, tokenizer


def parameters_before_packing(model: torch.nn.Module) -> int:
    """Count parameters as weights, not as storage: a 4-bit linear counts in_features x out_features (+ bias)."""
    count = sum(parameter.numel() for parameter in model.parameters())
    count += sum(module.weight.numel() for module in model.modules() if isinstance(module, W8A8Linear))
    for module in model.modules():
        if hasattr(module, "in_features") and getattr(module.weight, "quant_state", None) is not None:
            count += module.in_features * module.out_features - module.weight.numel()
    return count


def versions() -> dict[str, str]:
    """Return the versions that decide what a number means: Python and the packages that compute."""
    packages = ("torch", "transformers", "bitsandbytes", "accelerate")
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), "compactmind": __version__, **found}


def silence_libraries() -> None:
    """Keep progress bars and load-time advice of transformers and bitsandbytes out of the scripts' output."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
