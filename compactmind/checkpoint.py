"""Save and load every kind of model; each directory describes itself in `manifest.json`.

A checkpoint is a Hugging Face directory (config.json, model.safetensors, tokenizer) plus the manifest, which says what the
model is (`kind`, `architecture`, per-layer shapes, quantization), where it came from (`parent`, `stage`) and what it scored.
Nothing is guessed from a name, nothing is pickled, and every tensor of the file must fit the model exactly. What is read is what was
saved: files are checked against their recorded SHA-256, and weights that are no numbers are neither saved nor taken.
"""

import datetime
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
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
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from compactmind import __version__
from compactmind.errors import CompactMindError
from compactmind.files import (
    place_of,
    replace_directory,
    sha256_of,
    weight_files,
    write_json_atomically,
    write_text_atomically,
)
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
from compactmind.methods.quantization.w8a8_model import Int8Embedding, load_w8a8
from compactmind.model_card import model_card

MANIFEST = "manifest.json"
MANIFEST_VERSION = 3
"""2: what travels with a model (TRAVELLING) lies beside it, too. 3: what was made from a GGUF file says so (`published_as`)."""
WEIGHTS = "model.safetensors"
CARD = "README.md"
GENERATION = "generation_config.json"
ADDED_LATER = (MANIFEST, CARD, "model.onnx")
"""Files of a checkpoint that its manifest does not vouch for."""
TRAVELLING = (GENERATION, "*.jinja", "special_tokens_map.json", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "*_POLICY*")
"""What a model's folder holds beside weights, configuration and tokenizer and what is made of the model keeps."""

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


READ_AGAIN = 5
"""How often a checkpoint is read that another process replaces at the same time."""

FOREIGN = {"ForSequenceClassification": AutoModelForSequenceClassification, "ForCausalLM": AutoModelForCausalLM}
"""How the architectures end that are read from folders which are not of this project -> what reads them."""


@dataclass
class Checkpoint:
    """A loaded model in evaluation mode, its tokenizer, and its manifest."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    manifest: dict[str, Any]


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
        before = _manifest_text(directory)
        try:
            return _checked_manifest(directory, verify)
        except CompactMindError as error:
            problem = error
            if directory.with_name(f".{directory.name}.old").is_dir():  # between two renames
                time.sleep(0.1)
            elif _manifest_text(directory) == before:
                break
    raise problem


def _manifest_text(directory: Path) -> bytes | None:
    try:
        return (directory / MANIFEST).read_bytes()
    except OSError:
        return None


def _checked_manifest(directory: Path, verify: bool) -> dict[str, Any]:
    command = how_to_make(directory)
    if not directory.is_dir():
        others = sorted(path.parent.name for path in directory.parent.glob(f"[!.]*/{MANIFEST}"))
        way_out = f"run `{command}` first" if command else f"choose from {', '.join(others) or 'none, there is no checkpoint'}"
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
            found = "a Hugging Face folder" if (directory / "config.json").is_file() else "no checkpoint"
            raise CompactMindError(
                f"{directory} has no {MANIFEST}: it is {found}, not one this project has written; --model_path (language models) and "
                "--models name=folder of 6_evaluate_report.py take folders of others"
            ) from None
        raise CompactMindError(
            f"{directory} has no {MANIFEST}, so it is not a finished checkpoint: move it away and run `{command}`"
        ) from None
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
    wanted = json.loads(json.dumps(stage))
    if made_by == wanted:
        return True
    different = []
    for part in sorted(made_by.keys() | wanted.keys()):
        old, new = made_by.get(part), wanted.get(part)
        if isinstance(old, dict) and isinstance(new, dict):
            different += [f"{part}.{name}" for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
        elif old != new:
            different.append(part)
    _say(f"{directory} is made again: it was made with another {', '.join(different)}")
    return False


def _say(line: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # under `accelerate launch` one process speaks
        print(line, flush=True)


# ----------------------------------------------------------------------------------------------- what may be replaced, what is taken
def check_outputs(outputs: Sequence[Path], script: str, inputs: Iterable[Path] = (), models_dir: Path | None = None) -> None:
    """Raise CompactMindError, before any work, on a directory that this script must not replace by a checkpoint.

    It may write to an empty place, and replace an earlier checkpoint of its own; never one of its `inputs`, a folder that holds one of
    them or the working directory, another script's checkpoint or its name under `models_dir`, or files that this project has not written.
    """
    inputs, places = list(inputs), {}
    here, root = Path.cwd().resolve(), place_of(models_dir) if models_dir else None
    for directory in outputs:
        place = place_of(directory)
        refused, way_out = f"{directory} cannot be written to", "choose another directory"
        if place in places:
            raise CompactMindError(
                f"{places[place]} and {directory} are one place, but two models are written: {way_out} for one of them"
            )
        places[place] = directory
        for source in inputs:
            known = place_of(source)
            if place == known:
                raise CompactMindError(f"{refused}: it is the model that is read: {way_out}")
            if place in known.parents or known in place.parents:
                raise CompactMindError(f"{refused}: {source}, which is read, and it are one inside the other: {way_out}")
        if place in (here, root) or place in here.parents or (root and place in root.parents):
            raise CompactMindError(
                f"{refused}: the checkpoints lie in it, or this folder: {way_out}, for example {directory / 'new'}"
            )
        owner = MADE_BY.get(place.name, f"python {script}")
        if place.parent == root and script not in owner.split():
            raise CompactMindError(f"{refused}: that is the name of what `{owner}` makes: {way_out}")
        if place.is_dir() and any(place.iterdir()):
            _check_replaceable(directory, script, refused, way_out)
        elif place.exists() and not place.is_dir():
            raise CompactMindError(f"{refused}: it is a file: {way_out}")


def _check_replaceable(directory: Path, script: str, refused: str, way_out: str) -> None:
    """Raise CompactMindError unless everything in a directory was written by an earlier run of `script`."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        made_by, files = manifest["stage"].get("script"), set(manifest["files"])
    except FileNotFoundError:
        names = sorted(path.name for path in directory.iterdir())
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise CompactMindError(
            f"{refused}: it holds files that are no checkpoint of this project ({shown}): {way_out}, or empty it"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):  # a damaged checkpoint: to make it again is how to mend it
        return
    if made_by != script:
        raise CompactMindError(f"{refused}: it is a checkpoint made by {made_by}: {way_out}")
    own = sorted(
        name
        for path in directory.rglob("*")
        if path.is_file() and not path.name.startswith(".")
        if (name := path.relative_to(directory).as_posix()) not in files | set(ADDED_LATER)
    )
    if own:
        raise CompactMindError(
            f"{refused}: it holds files of your own ({', '.join(own[:3])}), which would be lost: move them, or {way_out}"
        )


TASKS = {"classifier": "ForSequenceClassification", "language model": "ForCausalLM"}
"""What a model is for -> how its architecture's name ends."""


def check_parent(directory: Path, option: str, task: str, kinds: Sequence[str]) -> dict[str, Any]:
    """Return the manifest of the checkpoint a stage is told to work on, before it is loaded.

    Raises CompactMindError naming `option`, which chose it, if it is not of one of the `kinds`, or not for that `task` (a key of TASKS).
    """
    manifest = read_manifest(directory)
    architecture, kind = manifest["architecture"], manifest["kind"]
    found = next((name for name, end in TASKS.items() if architecture.endswith(end)), None)
    if found != task:
        what = f"a {found} ({architecture})" if found else f"a {architecture}, a model without a head"
        raise CompactMindError(f"{directory} is {what}: {option} takes a {task}")
    if kind not in kinds:
        parent = f", for example {manifest['parent']}" if manifest.get("parent") else ""
        way = "is quantized already" if manifest["quantization"] else "is not what can be worked on here"
        raise CompactMindError(f"{directory} {way} ({kind}): {option} takes a model that is {' or '.join(kinds)}{parent}")
    return manifest


def check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path, padding: bool = False) -> None:
    """Raise CompactMindError if a tokenizer knows more tokens than the model, or with `padding` if it has no token to pad with."""
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= rows:
        raise CompactMindError(
            f"{directory}: the tokenizer has token ids up to {largest}, the model knows 0 to {rows - 1}: they do not belong together; "
            "use the model's own tokenizer, or resize_token_embeddings before saving it"
        )
    if padding and tokenizer.pad_token_id is None:
        raise CompactMindError(
            f"{directory}: its tokenizer has no pad token, which batches need: set one, for example tokenizer.pad_token = "
            "tokenizer.eos_token and model.config.pad_token_id, and save both again"
        )


def first_not_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """Return the name of the first floating-point tensor that holds NaN or infinity, None if all are finite."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel() and tensor.device.type != "meta":
            low, high = torch.aminmax(tensor.detach())
            if not (torch.isfinite(low) and torch.isfinite(high)):
                return name
    return None


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
    beside: Path | None = None,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write a checkpoint, replacing an older one only when the new one is whole and `check`, given its directory, raises nothing.

    `stage` records script, config, input fingerprints and code (`is_up_to_date` compares it); `history` becomes
    training_history.json; `extra` adds keys to the manifest; `dtype` is what the configuration says the model computes in; `beside` is the
    folder the model came from, whose TRAVELLING files are copied. Raises CompactMindError when the disk is full, and if a weight is NaN or
    infinite: such a model is not saved.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}, expected one of {', '.join(KINDS)}")
    directory = Path(directory)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in _without_tied_copies(model.state_dict()).items()}
    if bad := first_not_finite(state.items()):
        raise CompactMindError(
            f"{directory} was not written: {bad} holds NaN or infinite numbers, so the model is of no use; what stood there before is "
            "unchanged. After training: a lower learning rate; else look at what the model was made from"
        )
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
        _copy_what_travels(beside, temporary, model)
        if history is not None:
            write_json_atomically(temporary / "training_history.json", history)
        files = {
            path.relative_to(temporary).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
            for path in sorted(temporary.rglob("*"))
            if path.is_file()
        }
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
        if check:
            check(temporary)


def _copy_what_travels(source: Path | None, target: Path, model: PreTrainedModel) -> None:
    """Copy the TRAVELLING files of a folder that `target` has not; a model that generates says how, also without such a folder."""
    for pattern in TRAVELLING if source else ():
        for path in sorted(source.glob(pattern)):
            if path.is_file() and not (target / path.name).exists():
                shutil.copyfile(path, target / path.name)
    if is_llama(model) and not (target / GENERATION).exists():
        write_json_atomically(target / GENERATION, model.generation_config.to_diff_dict())


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
    directory: Path | str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, verify: bool = True
) -> Checkpoint:
    """Load any checkpoint of this project, strictly: a missing, unexpected or misshapen tensor is an error.

    Returns the model on `device` in evaluation mode, its tokenizer and manifest; weights that are not packed are of `dtype`. Without
    `verify` the files' SHA-256 and the numbers are not looked at. Raises CompactMindError.
    """
    directory = Path(directory)
    for _ in range(READ_AGAIN):
        before = _manifest_text(directory)
        try:
            checkpoint = _load_once(directory, device, dtype, verify)
        except CompactMindError:
            if _manifest_text(directory) == before:
                raise
            continue
        if _manifest_text(directory) == before:
            return checkpoint
    raise CompactMindError(f"{directory} is written again and again by other processes: wait until they end")


def _load_once(directory: Path, device: str | torch.device, dtype: torch.dtype, verify: bool) -> Checkpoint:
    manifest = read_manifest(directory, verify)
    architecture, script = manifest["architecture"], manifest["stage"].get("script", "the stage that wrote it")
    again = f"run `{how_to_make(directory) or f'python {script}'}` again with --force True"
    model_class = PRUNED_CLASSES.get(architecture) or getattr(transformers, architecture, None)
    if model_class is None:
        raise CompactMindError(f"{directory / MANIFEST}: unknown architecture {architecture!r}: {again}")
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
        if (directory / GENERATION).is_file():
            model.generation_config = GenerationConfig.from_pretrained(directory)
        # With the config at hand, transformers need not ask whether to trust the modelling file beside the weights.
        tokenizer = AutoTokenizer.from_pretrained(directory, config=model.config)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise CompactMindError(f"{directory} could not be loaded ({error}): {again}") from error
    if verify and (bad := first_not_finite(model.state_dict().items())):
        raise CompactMindError(f"{directory}: {bad} holds NaN or infinite numbers, so the model is of no use: {again}")
    return Checkpoint(model.to(device).eval(), tokenizer, manifest)


def load_any(directory: Path, device: str | torch.device = "cpu", verify: bool = True) -> Checkpoint:
    """Load a checkpoint of this project, or any Hugging Face folder with a sequence classifier or a causal language model, in float32.

    A foreign folder gets a manifest with what can be read off it: kind, architecture, parameters. Raises CompactMindError.
    """
    if (directory / MANIFEST).is_file() or not (directory / "config.json").is_file():
        return load_checkpoint(directory, device, verify=verify)
    try:
        config = AutoConfig.from_pretrained(directory)
        architecture = (config.architectures or ["unknown"])[0]
        auto = next((each for task, each in FOREIGN.items() if architecture.endswith(task)), None)
        if auto is None:
            raise CompactMindError(f"{directory} holds a {architecture}: only {' and '.join(FOREIGN)} can be measured")
        # a quantized one keeps the types its file has
        dtype = "auto" if getattr(config, "quantization_config", None) else torch.float32
        model, report = auto.from_pretrained(directory, dtype=dtype, output_loading_info=True)
        if report["missing_keys"] and dtype != "auto":  # transformers would fill them with random numbers
            raise CompactMindError(f"{directory} holds no {architecture}: its weights lack {', '.join(sorted(report['missing_keys'])[:3])}")
        tokenizer = AutoTokenizer.from_pretrained(directory)
        if verify and (bad := first_not_finite(model.state_dict().items())):
            raise ValueError(f"{bad} holds NaN or infinite numbers")
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
    check_released(path)
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", use_safetensors=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # noqa: BLE001  safetensors, json and transformers each have their own way to say "damaged"
        raise CompactMindError(f"{path} could not be loaded ({error}): it is damaged, or its tokenizer is missing") from None
    llama_blocks(model)
    check_tokenizer(model, tokenizer, path)
    return model, tokenizer


def check_released(path: Path) -> None:
    """Raise CompactMindError, before it is loaded, if a folder holds no dense causal LM: nothing, a classifier, a quantized model."""
    if not (path / "config.json").is_file():
        raise CompactMindError(f"{path} holds no model (no config.json): run `python download_model.py`, or give --model_path")
    if (path / MANIFEST).is_file():
        check_parent(path, "--model_path", "language model", ("dense", "pruned"))
    try:
        quantized = json.loads((path / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError) as error:
        raise CompactMindError(f"{path / 'config.json'} is damaged ({error}): download the model again") from None
    if quantized:
        method = quantized.get("quant_method", "unknown method") if isinstance(quantized, dict) else "unknown method"
        raise CompactMindError(f"{path} is quantized already ({method}): give the dense model it was made from")


def parameters_before_packing(model: torch.nn.Module) -> int:
    """Count parameters as weights, not as storage: a 4-bit linear counts in_features x out_features (+ bias), a tied table once."""
    int8 = (module.weight for module in model.modules() if isinstance(module, (W8A8Linear, Int8Embedding)))
    count = sum({(each.data_ptr(), each.shape): each.numel() for each in (*model.parameters(), *int8)}.values())
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
