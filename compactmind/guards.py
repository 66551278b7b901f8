"""What a stage may replace and what it takes, checked before any work: its outputs, its parent, the tokenizer, a released model."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, PreTrainedModel, PreTrainedTokenizerBase

from compactmind.errors import CompactMindError
from compactmind.files import resolve_directory, weight_files
from compactmind.formats.table import is_quantized, unquantized_kinds
from compactmind.limits import vocabulary_of
from compactmind.manifest import ADDED_LATER, MADE_BY, MANIFEST, read_manifest

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Dtypes of dense weights, as safetensors and torch call them."""
COMPUTED = ".rotary_emb."
"""In the name of what a file may hold beside weights, in any dtype: frequencies, which transformers computes and does not read."""
TASKS = {"classifier": "ForSequenceClassification", "language model": "ForCausalLM"}
"""What a model is for -> how its architecture's name ends."""


def check_outputs(outputs: Sequence[Path], script: str, inputs: Iterable[Path] = (), models_dir: Path | None = None) -> None:
    """Raise CompactMindError, before any work, on a directory that this script must not replace by a checkpoint.

    It may write to an empty place, and replace an earlier checkpoint of its own; never one of its `inputs`, a folder that holds one of
    them or the working directory, another script's checkpoint or its name under `models_dir`, or files that this project has not written.
    """
    inputs, places = list(inputs), {}
    here, root = Path.cwd().resolve(), resolve_directory(models_dir) if models_dir else None
    for directory in outputs:
        place = resolve_directory(directory)
        refused, way_out = f"{directory} cannot be written to", "choose another directory"
        if place in places:
            raise CompactMindError(
                f"{places[place]} and {directory} are one place, but two models are written: {way_out} for one of them"
            )
        places[place] = directory
        for source in inputs:
            known = resolve_directory(source)
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


def check_parent(directory: Path, option: str, task: str) -> dict[str, Any]:
    """Return the manifest of the checkpoint a stage is told to work on, before it is loaded.

    Raises CompactMindError naming `option`, which chose it, if it is quantized, or not for that `task` (a key of TASKS).
    """
    manifest = read_manifest(directory)
    architecture, kind = manifest["architecture"], manifest["kind"]
    actual = next((name for name, end in TASKS.items() if architecture.endswith(end)), None)
    if actual != task:
        what = f"a {actual} ({architecture})" if actual else f"a {architecture}, a model without a head"
        raise CompactMindError(f"{directory} is {what}: {option} takes a {task}")
    if is_quantized(kind):
        parent = f", for example {manifest['parent']}" if manifest.get("parent") else ""
        raise CompactMindError(
            f"{directory} is quantized already ({kind}): {option} takes a model that is {' or '.join(unquantized_kinds())}{parent}"
        )
    return manifest


def check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path, padding: bool = False) -> None:
    """Raise CompactMindError if a tokenizer knows more tokens than the model, or with `padding` if it has no token to pad with."""
    rows = vocabulary_of(model)
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


def check_released(path: Path) -> torch.dtype | str:
    """Return the dtype of a folder's dense causal LM, see `check_dense`.

    Raises CompactMindError, before it is loaded, if the folder holds none: nothing, a classifier, a quantized model.
    """
    if not (path / "config.json").is_file():
        raise CompactMindError(f"{path} holds no model (no config.json): run `python download_model.py`, or give --model_path")
    if (path / MANIFEST).is_file():
        check_parent(path, "--model_path", "language model")
    return check_dense(path)


def check_dense(path: Path) -> torch.dtype | str:
    """Return the one dtype of a folder's weights, "auto" if they are pickles.

    Raises CompactMindError, before they are loaded, if they are quantized, of several dtypes or run by code of their own.
    """
    check_own_code(path)
    try:
        quantized = json.loads((path / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError) as error:
        raise CompactMindError(f"{path / 'config.json'} is damaged ({error}): download the model again") from None
    if quantized:
        method = quantized.get("quant_method", "unknown method") if isinstance(quantized, dict) else "unknown method"
        raise CompactMindError(f"{path} is quantized already ({method}): give the dense model it was made from")
    return check_one_dtype(path)


def check_own_code(path: Path) -> None:
    """Raise CompactMindError if a folder's model runs only with code beside its weights: transformers would ask, and wait, whether to."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        alone = "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING
    except (OSError, ValueError, AttributeError, TypeError):
        return  # whoever loads it says what is wrong
    if alone:
        raise CompactMindError(
            f"{path} runs with code that lies beside its weights alone, which is not run here: give a model whose class transformers has"
        )


def check_nothing_missing(path: Path, model: PreTrainedModel, missing: Iterable[str]) -> None:
    """Raise CompactMindError if a file lacks tensors of the model that was read from it: transformers makes them random numbers."""
    if names := sorted(missing):
        shown = ", ".join(names[:3]) + (f", ... ({len(names)})" if len(names) > 3 else "")
        raise CompactMindError(
            f"{path} holds no whole {type(model).__name__}: its weights lack {shown}: copy it again, or give a model that has them"
        )


def check_one_dtype(path: Path) -> torch.dtype | str:
    """Return `dtype_of_weights`; raise CompactMindError if a folder's weights are of several dtypes or a shard is missing.

    What is loaded would be of one of them, and what the others say more would be lost without a word.
    """
    of_dtype = _first_of_each_dtype(path)
    if len(of_dtype) > 1:
        dtypes = ", ".join(f"{kind} ({name})" for kind, name in sorted(of_dtype.items()))
        raise CompactMindError(
            f"{path} holds weights of several dtypes, {dtypes}: save it in one, for example AutoModelForCausalLM.from_pretrained(..., "
            "dtype=torch.bfloat16).save_pretrained(...)"
        )
    return dtype_of_weights(path)


def dtype_of_weights(path: Path) -> torch.dtype | str:
    """Return the dtype of a folder's weights by the heads of its files, "auto" for pickles and for several.

    transformers by itself takes the one that config.json says, and rounds float32 weights to it without a word.
    """
    of_dtype = _first_of_each_dtype(path)
    return FLOATS[next(iter(of_dtype))] if len(of_dtype) == 1 else "auto"


def _first_of_each_dtype(path: Path) -> dict[str, str]:
    """Return a dtype, as safetensors calls it -> the first weight of a folder that has it."""
    of_dtype: dict[str, str] = {}
    for file in weight_files(path):
        if file.suffix != ".safetensors":
            continue
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  no mapping
                    kind = tensors.get_slice(name).get_dtype()
                    if kind in FLOATS and COMPUTED not in name:
                        of_dtype.setdefault(kind, name)
        except SafetensorError as error:
            raise CompactMindError(f"{file} is damaged ({error}): copy or download it again") from None
    return of_dtype
