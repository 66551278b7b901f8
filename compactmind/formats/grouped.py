"""Weights as integers of 2 to 8 bits with a scale for every group (methods/quantization/grouped.py), each tensor on a grid of its own.

The layout of a weight is that of compressed-tensors `pack-quantized`, which stores widths of 4 and 8 bits like this; other widths and
float zeros are packed alike, and read by this project alone.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from compactmind.files import WEIGHTS
from compactmind.formats.loading import require_every_tensor
from compactmind.methods.quantization.grid import Grid
from compactmind.methods.quantization.grouped import TENSORS, GroupedEmbedding, GroupedLinear, GroupedWeight, tied_head


def load(
    directory: Path,
    model_class: type[PreTrainedModel],
    quantization: dict[str, Any],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Rebuild a model from the description `quantize_gptq` returned, whose `tensors` say the grid of each; the rest is of `dtype`.

    Raises ValueError or KeyError if a tensor is missing or left over.
    """
    config, state = model_class.config_class.from_pretrained(directory), load_file(directory / WEIGHTS)
    with torch.device("meta"):
        model = model_class(config)
    take_grouped(model, state, quantization["tensors"])
    if config.tie_word_embeddings and "model.embed_tokens.weight" in state:
        state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    require_every_tensor(model_class, *model.load_state_dict(state, strict=False, assign=True))
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)  # computed, not stored: the one on meta is empty
    return model


def by_bits(quantization: dict[str, Any] | None) -> dict[int, list[str]]:
    """Return the names of the tensors at each width, the narrowest first; empty for a model of another format."""
    found: dict[int, list[str]] = {}
    for name, grid in ((quantization or {}).get("tensors") or {}).items():
        found.setdefault(grid["bits"], []).append(name)
    return dict(sorted(found.items()))


def take_grouped(model: PreTrainedModel, state: dict[str, torch.Tensor], grids: dict[str, dict[str, Any]]) -> None:
    """Put, in place, integers where the linears and tables named in `grids` are, and take their tensors out of `state`.

    What is tied in the configuration is tied. Raises ValueError or KeyError if a tensor is missing or does not fit its grid.
    """
    for name, grid in grids.items():
        found = {each: state.pop(f"{name}.{each}") for each in TENSORS if f"{name}.{each}" in state}
        weight, module = GroupedWeight.from_tensors(found, Grid(**grid)), model.get_submodule(name)
        parts = weight.q, weight.scale, weight.zero, weight.grid
        if not isinstance(module, nn.Embedding):
            model.set_submodule(name, GroupedLinear(*parts, state.get(f"{name}.bias")))
            continue
        table = GroupedEmbedding(*parts, module.padding_idx)
        tied = module is model.get_input_embeddings() and model.config.tie_word_embeddings and model.get_output_embeddings()
        model.set_submodule(name, table)
        if tied:
            model.set_output_embeddings(tied_head(table))


def weights(module: nn.Module) -> list[tuple[torch.Tensor, int]]:
    """Return the integers of a layer, a buffer, and how many weights they are."""
    return [(module.q, module.q.numel())] if isinstance(module, GroupedWeight) else []


def kernel(model: PreTrainedModel) -> str:
    """Return what multiplies: integers made floating-point for every product."""
    return "dequantized"
