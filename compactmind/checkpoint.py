"""Save and load every kind of model as a directory that describes itself.

A checkpoint is a Hugging Face directory (config.json, model.safetensors, tokenizer) plus the manifest (manifest.py); how its tensors are
read and written is asked of its kind in FORMATS (formats/table.py). Nothing is pickled, and every tensor of the file must fit the model
exactly. What is read is what was saved: files are checked against their recorded SHA-256, and weights that are no numbers are neither
saved nor taken.
"""

import copy
import datetime
import logging
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
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
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from compactmind.attention import with_attention_kernel
from compactmind.errors import CompactMindError
from compactmind.files import WEIGHTS, replace_directory, sha256_of, write_json_atomically, write_text_atomically
from compactmind.formats.table import FORMATS, Format, format_named, is_quantized, parameters_of
from compactmind.guards import check_nothing_missing, check_own_code, check_released, check_tokenizer, dtype_of_weights
from compactmind.manifest import (
    CARD,
    MANIFEST,
    MANIFEST_VERSION,
    READ_AGAIN,
    how_to_make,
    manifest_text,
    read_manifest,
    versions,
)
from compactmind.methods.llama import is_llama, llama_blocks, llama_shapes
from compactmind.methods.pruning import modeling_pruned_encoder
from compactmind.methods.pruning.encoder import layer_shapes
from compactmind.methods.pruning.llama_structure import FAMILIES
from compactmind.methods.pruning.two_of_four import with_sparse_kernels
from compactmind.model_card import model_card
from compactmind.origin import origin_of
from compactmind.precision import dtype_to_hold, is_small, prepare_for_inference

GENERATION = "generation_config.json"
TRAVELLING = (GENERATION, "*.jinja", "special_tokens_map.json", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "*_POLICY*")
"""What a model's folder holds beside weights, configuration and tokenizer and what is made of the model keeps."""

UNEQUAL_LLAMAS = {family.unequal.__name__: family.unequal for family in FAMILIES.values()}
"""Architectures of our own, as pruned encoders are; the file that defines one lies beside the weights of each such checkpoint."""

FOREIGN = {"ForSequenceClassification": AutoModelForSequenceClassification, "ForCausalLM": AutoModelForCausalLM}
"""How the architectures end that are read from folders which are not of this project -> what reads them."""


@dataclass
class Checkpoint:
    """A loaded model in evaluation mode, its tokenizer, and its manifest."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    manifest: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """The `weights_fingerprint` of the file that was loaded."""
        return self.manifest["files"][WEIGHTS]["sha256"]


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
    form, directory = format_named(kind), Path(directory)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in without_tied_copies(model.state_dict()).items()}
    if bad := first_not_finite(state.items()):
        raise CompactMindError(
            f"{directory} was not written: {bad} holds NaN or infinite numbers, so the model is of no use; what stood there before is "
            "unchanged. After training: a lower learning rate; else look at what the model was made from"
        )
    with replace_directory(directory, needed_bytes=bytes_to_save(model) + 5_000_000) as temporary:
        write_model(temporary, model, state, form, quantization, dtype)
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
            "parameters": parameters_of(model),
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
        card = model_card(directory.name, manifest, origin=origin_of(directory.parent, manifest))
        write_text_atomically(temporary / CARD, card)  # no part of `files`: a report adds to it
        if check:
            check(temporary)


def write_model(
    directory: Path, model: PreTrainedModel, state: dict[str, torch.Tensor], form: Format, quantization: dict[str, Any] | None, dtype: str
) -> None:
    """Write configuration and tensors alone: `state` is what of the model's state dict the file shall hold."""
    module = Path(sys.modules[type(model).__module__].__file__) if own_class_named(type(model).__name__) else None
    _config_to_save(model, form, quantization, dtype, module).save_pretrained(directory)
    if module:
        shutil.copyfile(module, directory / module.name)
    save_file(state, directory / WEIGHTS, metadata={"format": "pt"})


def own_class_named(architecture: str) -> type[PreTrainedModel] | None:
    """Return the pruned architecture of that name, which transformers has not; None if there is none."""
    if architecture.startswith("Pruned"):
        return UNEQUAL_LLAMAS.get(architecture) or getattr(modeling_pruned_encoder, architecture, None)
    return None


def model_class_named(architecture: str) -> type[PreTrainedModel] | None:
    """Return the class of that name, ours or that of transformers; None if there is none."""
    return own_class_named(architecture) or getattr(transformers, architecture, None)


def _config_to_save(
    model: PreTrainedModel, form: Format, quantization: dict[str, Any] | None, dtype: str, module: Path | None
) -> PretrainedConfig:
    """Return a copy of the model's configuration that says what the file holds; `module` defines an architecture of our own."""
    config = copy.deepcopy(model.config)
    if module:
        auto_class = "AutoModelForCausalLM" if is_llama(model) else "AutoModelForSequenceClassification"
        config.auto_map = {
            "AutoConfig": f"{module.stem}.{type(config).__name__}",
            auto_class: f"{module.stem}.{type(model).__name__}",
        }
    config.architectures = [type(model).__name__]
    config.dtype = dtype  # what is computed in; half-precision tables in the file may be storage only
    config.__dict__.pop("quantization_config", None)  # of the file it was loaded from
    if of_tensors := form.quantization_config(model, quantization):
        config.quantization_config = of_tensors
    return config


def _copy_what_travels(source: Path | None, target: Path, model: PreTrainedModel) -> None:
    """Copy the TRAVELLING files of a folder that `target` has not; a model that generates says how, also without such a folder."""
    for pattern in TRAVELLING if source else ():
        for path in sorted(source.glob(pattern)):
            if path.is_file() and not (target / path.name).exists():
                shutil.copyfile(path, target / path.name)
    if is_llama(model) and not (target / GENERATION).exists():
        write_json_atomically(target / GENERATION, model.generation_config.to_diff_dict())


def bytes_to_save(model: PreTrainedModel) -> int:
    """Return the bytes of the tensors `save_checkpoint` would write."""
    return sum(tensor.numel() * tensor.element_size() for tensor in without_tied_copies(model.state_dict()).values())


def without_tied_copies(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
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
    directory: Path | str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    verify: bool = True,
    sparse_kernels: bool = False,
) -> Checkpoint:
    """Load any checkpoint of this project, strictly: a missing, unexpected or misshapen tensor is an error.

    Returns the model on `device` in evaluation mode, its tokenizer and manifest; weights that are not packed are of `dtype`, by default
    float32, or of a large language model, or one on a GPU, what the file has (precision.py says what it computes in then). Without
    `verify` the files' SHA-256 and the numbers are not looked at. `sparse_kernels`: linears with two zeros in every four weights get
    the kernels of a GPU that has them, for inference (two_of_four.py); on any other device nothing changes. Raises CompactMindError.
    """
    directory = Path(directory)
    for _ in range(READ_AGAIN):
        before = manifest_text(directory)
        try:
            checkpoint = _load_once(directory, device, dtype, verify)
        except CompactMindError:
            if manifest_text(directory) == before:
                raise
            continue
        if manifest_text(directory) == before:
            if sparse_kernels:
                with_sparse_kernels(checkpoint.model)
            return checkpoint
    raise CompactMindError(f"{directory} is written again and again by other processes: wait until they end")


def _load_once(directory: Path, device: str | torch.device, dtype: torch.dtype | None, verify: bool) -> Checkpoint:
    manifest = read_manifest(directory, verify)
    architecture, script = manifest["architecture"], manifest["stage"].get("script", "the stage that wrote it")
    again = f"run `{how_to_make(directory) or f'python {script}'}` again with --force True"
    model_class = model_class_named(architecture)
    if model_class is None:
        raise CompactMindError(f"{directory / MANIFEST}: unknown architecture {architecture!r}: {again}")
    try:
        held = dtype or dtype_to_hold(architecture, manifest["parameters"], device)
        with without_progress_bars():
            model = FORMATS[manifest["kind"]].load(directory, model_class, manifest["quantization"], device, held)
        if (directory / GENERATION).is_file():
            model.generation_config = GenerationConfig.from_pretrained(directory)
        # With the config at hand, transformers need not ask whether to trust the modelling file beside the weights.
        tokenizer = AutoTokenizer.from_pretrained(directory, config=model.config)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise CompactMindError(f"{directory} could not be loaded ({error}): {again}") from error
    if verify and (bad := first_not_finite(model.state_dict().items())):
        raise CompactMindError(f"{directory}: {bad} holds NaN or infinite numbers, so the model is of no use: {again}")
    model = model.to(device).eval()
    if "CausalLM" in architecture:
        with_attention_kernel(model)
    return Checkpoint(model if held else prepare_for_inference(model, is_quantized(manifest["kind"])), tokenizer, manifest)


def load_any(directory: Path, device: str | torch.device = "cpu", verify: bool = True) -> Checkpoint:
    """Load a checkpoint of this project, or any Hugging Face folder with a sequence classifier or a causal language model.

    What is not quantized computes in float32, on a GPU in the dtype of its file. A foreign folder gets a manifest with what can be read
    off it: kind, architecture, parameters. Raises CompactMindError.
    """
    if (directory / MANIFEST).is_file() or not (directory / "config.json").is_file():
        return load_checkpoint(directory, device, verify=verify)
    check_own_code(directory)
    try:
        config = AutoConfig.from_pretrained(directory)
        architecture = (config.architectures or ["unknown"])[0]
        auto = next((each for task, each in FOREIGN.items() if architecture.endswith(task)), None)
        if auto is None:
            raise CompactMindError(f"{directory} holds a {architecture}: only {' and '.join(FOREIGN)} can be measured")
        quantized = getattr(config, "quantization_config", None) is not None  # it keeps the types its file has
        generates = auto is AutoModelForCausalLM
        dtype = "auto" if quantized else dtype_of_weights(directory) if generates else torch.float32
        model, report = auto.from_pretrained(directory, dtype=dtype, output_loading_info=True)
        if not quantized:  # of packed weights it has other names
            check_nothing_missing(directory, model, report["missing_keys"])
        tokenizer = AutoTokenizer.from_pretrained(directory)
        if verify and (bad := first_not_finite(model.state_dict().items())):
            raise ValueError(f"{bad} holds NaN or infinite numbers")
        model = model.to(device).eval()
        if generates and not quantized:
            model = model.float() if model.device.type == "cpu" and is_small(model) else prepare_for_inference(model, quantized=False)
        if generates:
            with_attention_kernel(model)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        raise CompactMindError(f"{directory} could not be loaded ({str(error).strip()[:300]})") from error
    manifest = {
        "kind": "foreign", "architecture": architecture, "parent": None, "created": None, "layers": None, "quantization": None,
        "parameters": parameters_of(model), "stage": {}, "metrics": {},
    }  # fmt: skip
    return Checkpoint(model, tokenizer, manifest)


def skeleton_of(path: Path) -> PreTrainedModel:
    """Return the causal LM of a Hugging Face folder without its weights: what its configuration says, on the meta device.

    Raises CompactMindError, see `check_released`.
    """
    dtype = check_released(path)
    config = AutoConfig.from_pretrained(path)
    if dtype != "auto":
        config.dtype = dtype
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def load_as_released(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a Llama-like causal LM from any Hugging Face folder in the dtype of its file, and its tokenizer.

    Raises CompactMindError saying what is wrong with it.
    """
    dtype = check_released(path)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # noqa: BLE001  safetensors, json and transformers each have their own way to say "damaged"
        raise CompactMindError(f"{path} could not be loaded ({error}): it is damaged, or its tokenizer is missing") from None
    check_nothing_missing(path, model, report["missing_keys"])
    llama_blocks(model)
    check_tokenizer(model, tokenizer, path)
    return with_attention_kernel(model.eval()), tokenizer


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Inside the `with` block transformers draws no bars; then as the caller had it."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def silence_libraries() -> None:
    """Keep progress bars and load-time advice of transformers and bitsandbytes out of the scripts' output."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
