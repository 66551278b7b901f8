"""Blocks of int8 linears, weights and activations: a Llama (methods/quantization/w8a8_model.py), an encoder (w8a8_encoder.py).

The files follow the compressed-tensors layout `int-quantized` (int8 `weight`, `weight_scale` per output channel, `input_scale`
if static), which vLLM and transformers with compressed-tensors read; a rotation of an input is a `transform_config`, which
vLLM and compressed-tensors know and transformers 5.23 leaves out. Tables in groups (formats/grouped.py) are read by this project alone.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from compactmind import kernels
from compactmind.files import WEIGHTS
from compactmind.formats import compressed_tensors
from compactmind.formats.grouped import take_grouped
from compactmind.formats.loading import meta_model, require_every_tensor, tie_table, uninitialized_model
from compactmind.methods.llama import LINEARS, is_llama, llama_blocks
from compactmind.methods.quantization.calibration import SITES
from compactmind.methods.quantization.packed_model import linears_to_quantize, replace_by_half_tables
from compactmind.methods.quantization.rotation import FOLDED_SITE, InputRotation
from compactmind.methods.quantization.w8a8_block import fuse_blocks
from compactmind.methods.quantization.w8a8_encoder import fuse_encoder
from compactmind.methods.quantization.w8a8_linear import W8A8Linear
from compactmind.methods.quantization.w8a8_model import Int8Embedding, dynamic, running_rotation

TRANSFORM = "hadamard"
"""Name of the rotation in the files: compressed-tensors expects its matrix as <linear>.<name>_input.weight."""


# ------------------------------------------------------------------------------------------------------------------ reading
def load(
    directory: Path,
    model_class: type[PreTrainedModel],
    quantization: dict[str, Any],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
) -> PreTrainedModel:
    """Rebuild a model from the description `quantize_llama` or `quantize_encoder` returned; what is left of a Llama is of `dtype`.

    Raises ValueError if a tensor is missing or left over.
    """
    config, state = model_class.config_class.from_pretrained(directory), load_file(directory / WEIGHTS)
    if "CausalLM" in model_class.__name__:
        model = _llama(model_class, config, quantization, state, dtype)
    else:
        model = _encoder(model_class, config, quantization, state)
    for module in model.modules():
        if isinstance(module, W8A8Linear):
            module.prepare()
    fuse_blocks(model) if is_llama(model) else fuse_encoder(model)
    return model


def _llama(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    quantization: dict[str, Any],
    state: dict[str, torch.Tensor],
    dtype: torch.dtype | None,
) -> PreTrainedModel:
    activations = quantization["granularity"]["activations"]
    model = meta_model(model_class, config)
    for block in llama_blocks(model):
        for field, path in LINEARS.items():
            linear, rotation = getattr(block, field), running_rotation(quantization["rotations"], field)
            empty = W8A8Linear(
                linear.in_features, linear.out_features, linear.bias is not None, activations, rotation, device="meta"
            )
            model.set_submodule(f"{block.name}.{path}", empty)
    if quantization["embeddings"] == "int8":
        table = model.get_input_embeddings()
        model.set_input_embeddings(Int8Embedding(table.num_embeddings, table.embedding_dim))
        head = W8A8Linear(table.embedding_dim, table.num_embeddings, False, dynamic(activations), device="meta")
        model.set_output_embeddings(head)
    take_grouped(model, state, quantization.get("tables", {}))
    packed = {name for name, module in model.named_modules() if isinstance(module, (W8A8Linear, InputRotation, Int8Embedding))}
    for name, tensor in state.items():
        if tensor.is_floating_point() and name.rpartition(".")[0] not in packed:
            state[name] = tensor.to(dtype or tensor.dtype)
        if name.endswith(".input_scale"):
            state[name] = tensor.reshape(1)  # (1, 1) in files written before
    if config.tie_word_embeddings:
        for name in [name for name in model.state_dict() if name.startswith("lm_head.") and name not in state]:
            state[name] = state[name.replace("lm_head.", "model.embed_tokens.")]
    require_every_tensor(model_class, *model.load_state_dict(state, strict=False, assign=True))
    tie_table(model)
    return model


def _encoder(
    model_class: type[PreTrainedModel], config: PretrainedConfig, quantization: dict[str, Any], state: dict[str, torch.Tensor]
) -> PreTrainedModel:
    model = uninitialized_model(model_class, config)
    for name, linear in linears_to_quantize(model):
        model.set_submodule(name, W8A8Linear(linear.in_features, linear.out_features, linear.bias is not None))
    replace_by_half_tables(model, quantization)
    take_grouped(model, state, quantization.get("tables", {}))
    require_every_tensor(model_class, *model.load_state_dict(state, strict=False))
    return model


# ------------------------------------------------------------------------------------------------------------------ writing
def quantization_config(model: PreTrainedModel, quantization: dict[str, Any]) -> dict[str, Any] | None:
    """Return the entry with which compressed-tensors reads the file, None where tables are integers in groups, which it does not know."""
    if quantization.get("tables"):
        return None
    activations = quantization["granularity"]["activations"]
    groups: dict[str, tuple[str, str | None]] = {"group_0": ("Linear", activations)}
    if not is_llama(model):
        heads = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        return compressed_tensors.quantization_config(groups, ignore=heads)
    small_tables = quantization["embeddings"] == "int8"
    if small_tables:
        groups |= {"head": ("re:.*lm_head$", dynamic(activations)), "embeddings": ("Embedding", None)}
    config = compressed_tensors.quantization_config(groups, ignore=[] if small_tables else ["lm_head"])
    running = _running(quantization)
    if running:
        where = {"targets": [f"re:.*{LINEARS[field]}$" for site in running for field in SITES[site]], "ignore": []}
        applied = [{**where, "location": "input", "inverse": False}, {**where, "location": "weight_input", "inverse": True}]
        (size,) = set(running.values())
        transform = {"type": "hadamard", "head_dim": size, "precision": "torch.float32", "apply": applied}
        config["transform_config"] = {"config_groups": {TRANSFORM: transform}}
    return config


def _running(quantization: dict[str, Any]) -> dict[str, int]:
    """Return the sites that are rotated while the model runs, with the size of the rotation; o's is folded into the weights."""
    return {site: size for site, size in quantization.get("rotations", {}).items() if site != FOLDED_SITE}


def as_released(name: str, parameter: torch.Tensor) -> bool:
    """Tell whether a weight is stored in the dtype of the release: those outside the blocks are (smoothed norms stay exact)."""
    return parameter.is_floating_point() and not name.startswith("model.layers.")


def caveat(quantization: dict[str, Any]) -> str:
    """Return what a card warns of, empty if compressed-tensors reads the file without more ado."""
    if quantization.get("tables"):
        return "Its embedding tables are integers in groups, a layout of this project: no other library reads the file."
    rotated = ", ".join(_running(quantization))
    if not rotated:
        return ""
    return (
        f"The layout is that of compressed-tensors, and the inputs of {rotated} are rotated while the model runs "
        "(`transform_config` in config.json). **transformers 5.23 leaves that out, and its logits are wrong then**; docs/methods.md of "
        "the project says how to apply the rotation. A file made with `--rotations o` needs none."
    )


# ------------------------------------------------------------------------------------------------------------------ counting
def weights(module: nn.Module) -> list[tuple[torch.Tensor, int]]:
    """Return the int8 weight of a linear or a table, a buffer, and how many weights are in it."""
    if isinstance(module, (W8A8Linear, Int8Embedding)):
        return [(module.weight, module.weight.numel())]
    return []


def kernel(model: PreTrainedModel) -> str:
    """Return the int8 kernels by name, `avx2` as `avx_vnni` where it is that; `simulated` is the right numbers without one."""
    names = {module.kernel for module in model.modules() if isinstance(module, W8A8Linear)}
    return ", ".join(sorted(kernels.int8_instructions() if name == "avx2" else name for name in names))
