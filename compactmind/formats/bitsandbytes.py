"""Blocks of NF4 or LLM.int8() linears as bitsandbytes packs them (methods/quantization/packed_model.py), the rest as it is.

A packed weight is a row of bytes under the name of the weight, with what decodes it beside it: `<name>.absmax` and others for NF4,
`SCB` (a scale per output row) for int8. Tables may be integers in groups (formats/grouped.py).
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from compactmind import kernels
from compactmind.files import WEIGHTS
from compactmind.formats.grouped import take_grouped
from compactmind.formats.loading import require_every_tensor, uninitialized_model
from compactmind.methods.quantization.packed_model import linears_to_quantize, replace_by_half_tables, replace_linears


def load(
    directory: Path,
    model_class: type[PreTrainedModel],
    quantization: dict[str, Any],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
) -> PreTrainedModel:
    """Rebuild a packed model from the description `quantize_model` returned; the packed weights are on `device`, the rest in float32.

    Raises ValueError or KeyError if a tensor is missing or left over.
    """
    config = model_class.config_class.from_pretrained(directory)
    model = uninitialized_model(model_class, config)
    state = load_file(directory / WEIGHTS)
    replace_linears(model, quantization, device)
    replace_by_half_tables(model, quantization)
    take_grouped(model, state, quantization.get("tables", {}))
    for name, linear in linears_to_quantize(model):
        packed = state.pop(f"{name}.weight")
        if quantization["method"] == "nf4":
            prefix = f"{name}.weight."
            statistics = {key.removeprefix(f"{name}."): state.pop(key) for key in list(state) if key.startswith(prefix)}
            linear.load_packed(packed, statistics, device)
        else:
            state.pop(f"{name}.weight_format")
            linear.load_packed(packed, state.pop(f"{name}.SCB"))
    missing, unexpected = model.load_state_dict(state, strict=False)
    packed_weights = {f"{name}.weight" for name, _ in linears_to_quantize(model)}
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()  # a head that is the embedding table
    require_every_tensor(model_class, [name for name in missing if name not in packed_weights | tied], unexpected)
    return model


def nf4_config(model: PreTrainedModel, quantization: dict[str, Any]) -> dict[str, Any] | None:
    """Return the entry with which transformers reads an NF4 file too (half-precision tables first need `.embeddings.float()`).

    None where rows are filled up to whole blocks or tables are integers, which it does not know of.
    """
    if quantization.get("tables") or any(linear.padding for _, linear in linears_to_quantize(model)):
        return None
    from compactmind.methods.quantization.packed_linear import compute_dtype_for  # takes seconds to import

    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": quantization["double_quantization"],
        "bnb_4bit_compute_dtype": str(compute_dtype_for(model.device)).removeprefix("torch."),
        "llm_int8_skip_modules": quantization["skipped_modules"],
    }


def weights(module: nn.Module) -> list[tuple[torch.Tensor, int]]:
    """Return the packed weight of a 4-bit linear, of this project or of transformers, and how many weights are in it."""
    if hasattr(module, "in_features") and getattr(getattr(module, "weight", None), "quant_state", None) is not None:
        return [(module.weight, module.in_features * module.out_features)]
    return []


def kernel(model: PreTrainedModel) -> str:
    """Return what multiplies the blocks: few rows of NF4 our own kernel, where it can be had."""
    ours = any(getattr(module, "levels", None) is not None for module in model.modules())
    return f"{kernels.few_rows_instructions()}, bitsandbytes" if ours else "bitsandbytes"


def int8_caveat(quantization: dict[str, Any]) -> str:
    """Return what a card warns of."""
    return "transformers alone takes the int8 numbers of this file for weights: its logits are wrong."
