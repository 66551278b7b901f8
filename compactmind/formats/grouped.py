"""Weights as integers of 2 to 8 bits with a scale for every group (methods/quantization/grouped.py), each tensor on a grid of its own.

The layout is that of compressed-tensors `pack-quantized`. transformers 5.23 with compressed-tensors 0.20.0 reads it in every width, if
groups are whole and tables stay as released: it knows no float zeros, and loads no packed table. Zero points it reads with
`dequantize=True` alone, which takes the first grid for all.
"""

import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from compactmind import kernels
from compactmind.files import WEIGHTS
from compactmind.formats import compressed_tensors
from compactmind.formats.loading import meta_model, require_every_tensor, tie_table
from compactmind.methods.quantization.grid import Grid
from compactmind.methods.quantization.grouped import TENSORS, GroupedEmbedding, GroupedLinear, GroupedWeight, TiedHead

BLOCKS = "model.layers."
"""How the names of all linears begin that are in a block."""


def load(
    directory: Path,
    model_class: type[PreTrainedModel],
    quantization: dict[str, Any],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
) -> PreTrainedModel:
    """Rebuild a model from the description `quantize_gptq` returned, whose `tensors` say the grid of each; the rest is of `dtype`.

    Raises ValueError or KeyError if a tensor is missing or left over.
    """
    config, state = model_class.config_class.from_pretrained(directory), load_file(directory / WEIGHTS)
    model = meta_model(model_class, config)
    take_grouped(model, state, quantization["tensors"])
    if config.tie_word_embeddings and "model.embed_tokens.weight" in state:
        state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    state = {name: tensor.to(dtype or tensor.dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    require_every_tensor(model_class, *model.load_state_dict(state, strict=False, assign=True))
    tie_table(model)
    return model


def by_bits(quantization: dict[str, Any] | None) -> dict[int, list[str]]:
    """Return the names of the tensors at each width, the narrowest first; empty for a model of another format."""
    names_of_bits: dict[int, list[str]] = {}
    for name, grid in ((quantization or {}).get("tensors") or {}).items():
        names_of_bits.setdefault(grid["bits"], []).append(name)
    return dict(sorted(names_of_bits.items()))


def take_grouped(model: PreTrainedModel, state: dict[str, torch.Tensor], grids: dict[str, dict[str, Any]]) -> None:
    """Put, in place, integers where the linears and tables named in `grids` are, and take their tensors out of `state`.

    What is tied in the configuration is tied. Raises ValueError or KeyError if a tensor is missing or does not fit its grid.
    """
    for name, grid in grids.items():
        tensors = {each: state.pop(f"{name}.{each}") for each in TENSORS if f"{name}.{each}" in state}
        parts, module = (tensors, Grid(**grid)), model.get_submodule(name)
        if not isinstance(module, nn.Embedding):
            model.set_submodule(name, GroupedLinear.from_tensors(*parts, state.get(f"{name}.bias")))
            continue
        table = GroupedEmbedding.from_tensors(*parts, module.padding_idx)
        tied = module is model.get_input_embeddings() and model.config.tie_word_embeddings and model.get_output_embeddings()
        model.set_submodule(name, table)
        if tied:
            model.set_output_embeddings(TiedHead(table))


# ------------------------------------------------------------------------------------------------------------- other readers
def quantization_config(model: PreTrainedModel, quantization: dict[str, Any]) -> dict[str, Any] | None:
    """Return the entry with which compressed-tensors reads the file, None if it cannot."""
    if _reason_against(quantization):
        return None
    groups: dict[Grid, list[str]] = {}
    for name, grid in quantization["tensors"].items():
        groups.setdefault(Grid(**grid), []).append(name)
    targets = {grid: ["Linear"] if len(groups) == 1 else _patterns(names) for grid, names in groups.items()}
    return compressed_tensors.packed_config(targets, ignore=["lm_head"])


def _patterns(names: list[str]) -> list[str]:
    """Return `re:` and a pattern for each path inside a block, which match the linears of these names alone."""
    blocks: dict[str, list[str]] = {}
    for name in names:
        index, _, path = name.removeprefix(BLOCKS).partition(".")
        blocks.setdefault(path, []).append(index)
    return [f"re:^{re.escape(BLOCKS)}({'|'.join(each)}){re.escape('.' + path)}$" for path, each in blocks.items()]


def _reason_against(quantization: dict[str, Any]) -> str | None:
    """Return why nothing but this project reads the file, None if transformers with compressed-tensors does."""
    grids = {Grid(**grid) for grid in quantization["tensors"].values()}
    if not all(name.startswith(BLOCKS) for name in quantization["tensors"]):
        return "its embedding table is packed (embeddings as_released would not be)"
    if any(grid.zero == "float" for grid in grids):
        return "its zeros are floating-point"
    if any(grid.superblocks for grid in grids):
        return "its scales are multiples of one number for 256 weights"
    if not quantization.get("whole_groups"):
        return "its last groups of a row are shorter than the others"
    if len(grids) > 1 and any(grid.zero == "integer" for grid in grids):
        return "it has zero points on more than one grid"
    return None


def caveat(quantization: dict[str, Any]) -> str:
    """Return what a card says of other readers, empty if transformers with compressed-tensors reads the file without more ado."""
    if reason := _reason_against(quantization):
        return f"No other library reads the file ({reason}): `from_pretrained` would leave random weights where it finds packed ones."
    if any(grid["zero"] == "integer" for grid in quantization["tensors"].values()):
        return (
            "transformers 5.23 with compressed-tensors 0.20.0 reads its zero points only with "
            "`from_pretrained(..., quantization_config=CompressedTensorsConfig(dequantize=True))`."
        )
    return ""


# ------------------------------------------------------------------------------------------------------------------ counting
def weights(module: nn.Module) -> list[tuple[torch.Tensor, int]]:
    """Return the integers of a layer, a buffer, and how many weights they are."""
    return [(module.packed, math.prod(module.shape))] if isinstance(module, GroupedWeight) else []


def kernel(model: PreTrainedModel) -> str:
    """Return what multiplies, see methods/quantization/grouped.py; `avx2` as `avx512` where it is that."""
    names = {module.kernel for module in model.modules() if isinstance(module, GroupedWeight)}
    return ", ".join(sorted(kernels.few_rows_instructions() if name == "avx2" else name for name in names))
