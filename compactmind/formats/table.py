"""Every way a model is stored, beside METHODS, every way it is changed: FORMATS, a table to read from top to bottom.

Who saves, loads, counts, measures or describes a model asks the row of its kind. A new format is one file beside this one and one row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from compactmind.formats import bitsandbytes, dense, grouped, w8a8


@dataclass(frozen=True)
class Format:
    """One entry of FORMATS; the linears of its models have `in_features` and `out_features`, as those of torch.

    `quantization` is what the method that made the model says it did, kept in its manifest.
    """

    name: str
    """The `kind` of a manifest."""
    words: str
    """What that means, for the card."""
    load: Callable[[Path, type[PreTrainedModel], dict[str, Any] | None, torch.device | str, torch.dtype | None], PreTrainedModel]
    """(directory, class, quantization, device, dtype of what is not packed or None for the file's) -> the model, strictly: a tensor that
    is missing or left over raises ValueError or KeyError."""
    quantized: bool = True
    """Whether it can no longer be pruned, trained, smoothed or quantized."""
    quantization_config: Callable[[PreTrainedModel, dict[str, Any]], dict[str, Any] | None] = lambda model, quantization: None
    """(model, quantization) -> what config.json says of the tensors, so that other libraries read them; None: nothing."""
    weights: Callable[[nn.Module], list[tuple[torch.Tensor, int]]] = lambda module: []
    """module -> tensors that hold weights otherwise than as a parameter with an element for each, and how many weights they hold."""
    kernel: Callable[[PreTrainedModel], str] = dense.kernel
    """What multiplies the matrices of the blocks."""
    as_released: Callable[[str, torch.Tensor], bool] = dense.as_released
    """(name, parameter) -> whether the file has it in the dtype of the release."""
    libraries: str | None = None
    """What reads the file with `from_pretrained`, None if nothing does."""
    caveat: Callable[[dict[str, Any]], str] = lambda quantization: ""
    """quantization -> what the card says instead, where a library would read the file wrongly."""
    exports: tuple[str, ...] = ()
    """What such a model can be exported to."""


FORMATS: dict[str, Format] = {
    "dense": Format(
        "dense", "full precision, nothing removed", dense.load, quantized=False,
        libraries="transformers alone", exports=("onnx",),
    ),
    "pruned": Format(
        "pruned", "structurally pruned: physically smaller", dense.load, quantized=False,
        libraries="transformers alone", exports=("onnx",),
    ),
    "nf4": Format(
        "nf4", "NF4 4-bit weights (bitsandbytes)", bitsandbytes.load, quantization_config=bitsandbytes.nf4_config,
        weights=bitsandbytes.weights, kernel=bitsandbytes.kernel,
    ),
    "int8": Format(
        "int8", "LLM.int8() weights (bitsandbytes)", bitsandbytes.load,
        kernel=bitsandbytes.kernel, caveat=bitsandbytes.int8_caveat,
    ),
    "w8a8": Format(
        "w8a8", "int8 weights and activations (compressed-tensors layout)", w8a8.load, quantization_config=w8a8.quantization_config,
        weights=w8a8.weights, kernel=w8a8.kernel, as_released=w8a8.as_released,
        libraries="transformers and compressed-tensors", caveat=w8a8.caveat, exports=("onnx",),
    ),
    "grouped": Format(
        "grouped", "integers of 2 to 8 bits, a scale for every group of a row", grouped.load,
        quantization_config=grouped.quantization_config, weights=grouped.weights, kernel=grouped.kernel,
        libraries="transformers and compressed-tensors", caveat=grouped.caveat,
    ),
}  # fmt: skip
"""Kind -> format."""


def format_named(kind: str) -> Format:
    """Return an entry of FORMATS; raises ValueError listing all for any other name."""
    if kind not in FORMATS:
        raise ValueError(f"unknown kind {kind!r}, expected one of {', '.join(FORMATS)}")
    return FORMATS[kind]


def unquantized_kinds() -> list[str]:
    """Return the kinds a model may be of that is to be pruned, trained or quantized."""
    return [name for name, each in FORMATS.items() if not each.quantized]


def is_quantized(kind: str) -> bool:
    """Tell whether a kind is one of the quantized FORMATS; a foreign model is whatever its folder says."""
    return kind in FORMATS and FORMATS[kind].quantized


def kernel_of(model: PreTrainedModel, kind: str) -> str:
    """Return what multiplies the matrices of a model's blocks: int8 kernels by name, bitsandbytes, or the float dtype (foreign too)."""
    return FORMATS[kind].kernel(model) if kind in FORMATS else dense.kernel(model)


def parameters_of(model: nn.Module) -> int:
    """Count parameters as weights, not as storage: a 4-bit linear counts in_features x out_features (+ bias), a tied table once."""
    counts = {_place(parameter): parameter.numel() for parameter in model.parameters()}
    for module in model.modules():
        for each in FORMATS.values():
            counts |= {_place(tensor): count for tensor, count in each.weights(module)}
    return sum(counts.values())


def _place(tensor: torch.Tensor) -> tuple[int, torch.Size]:
    return tensor.data_ptr(), tensor.shape
