"""A model whose block linears are replaced by bitsandbytes' packed ones: NF4 4-bit or LLM.int8().

NF4 (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314) maps blocks of 64 weights to 16 quantiles of a normal
distribution; with double quantization the scale of each block is itself stored in 8 bits. LLM.int8() (Dettmers et al. 2022,
https://arxiv.org/abs/2208.07339) keeps one scale per output row. bitsandbytes does the arithmetic; this file decides what is
packed (never a classifier head), keeps the embedding tables in half precision, and rebuilds a packed model from a file.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it advises optional CPU kernels at import
import bitsandbytes as bnb  # noqa: E402

QUANTIZED_KINDS = ("nf4", "int8")
SKIPPED_MODULES = ("classifier", "pre_classifier", "pooler", "score", "lm_head")
"""Heads and what feeds them: a few thousand weights that decide the answer (transformers#29701, #24037)."""


class HalfEmbedding(nn.Embedding):
    """An embedding whose table is held in float16 and whose output is float32, as the norms that follow expect."""

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None):
        super().__init__(num_embeddings, embedding_dim, padding_idx=padding_idx, dtype=torch.float16)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).float()


def compute_dtype_for(device: torch.device | str) -> torch.dtype:
    """Return the dtype 4-bit weights are multiplied in: bf16 on a GPU; fp32 on a CPU, where bf16 is slower."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def quantize_model(
    model: PreTrainedModel,
    method: str,
    *,
    double_quantization: bool = True,
    half_precision_embeddings: bool = True,
) -> dict[str, Any]:
    """Replace, in place, the block linears of `model` by packed ones and return the description a loader needs.

    `method` is nf4 or int8. Raises ValueError on another method.
    """
    if method not in QUANTIZED_KINDS:
        raise ValueError(f"unknown quantization method {method!r}, expected one of {', '.join(QUANTIZED_KINDS)}")
    device = model.device
    description = {
        "method": method,
        "bits": 4 if method == "nf4" else 8,
        "granularity": "block of 64 weights" if method == "nf4" else "output row",
        "double_quantization": double_quantization if method == "nf4" else None,
        "skipped_modules": [
            name for name, module in model.named_modules() if isinstance(module, nn.Linear) and _is_skipped(name)
        ],
        "half_precision_embeddings": half_precision_embeddings,
    }
    weights = {name: module.weight.data for name, module in linears_to_quantize(model)}
    biases = {name: module.bias for name, module in linears_to_quantize(model)}
    tables = {name: module.weight.data for name, module in _embeddings(model)}
    _replace_by_packed_modules(model, description, device)
    for name, weight in weights.items():
        linear = model.get_submodule(name)
        if method == "nf4":
            linear.weight = bnb.nn.Params4bit(
                weight, requires_grad=False, compress_statistics=double_quantization, quant_type="nf4", module=linear
            ).to(device)
        else:
            linear.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(device)
        linear.bias = biases[name]
    if half_precision_embeddings:
        for name, table in tables.items():
            model.get_submodule(name).weight = nn.Parameter(table.half(), requires_grad=False)
    if method == "nf4":
        # With this entry, transformers' own from_pretrained reads the checkpoint as well.
        model.config.quantization_config = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": double_quantization,
            "bnb_4bit_compute_dtype": str(compute_dtype_for(device)).removeprefix("torch."),
            "llm_int8_skip_modules": description["skipped_modules"],
        }
    return description


def load_quantized(
    weights_file: Path, model_class: type[PreTrainedModel], description: dict[str, Any], device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Rebuild a packed model from its weight file and the description `quantize_model` returned.

    The configuration is read from the directory of `weights_file`. Raises ValueError if a tensor is missing or left over.
    """
    config = model_class.config_class.from_pretrained(weights_file.parent)
    model = model_class(config)
    _replace_by_packed_modules(model, description, device)
    state = load_file(weights_file)
    for name, linear in linears_to_quantize(model):
        packed = state.pop(f"{name}.weight")
        statistics = {key: state.pop(key) for key in list(state) if key.startswith(f"{name}.weight.")}
        if description["method"] == "nf4":
            statistics = {key.removeprefix(f"{name}."): value for key, value in statistics.items()}
            linear.weight = bnb.nn.Params4bit.from_prequantized(packed, statistics, device=device, module=linear)
        else:
            state.pop(f"{name}.weight_format")
            scales = state.pop(f"{name}.SCB")
            linear.weight = bnb.nn.Int8Params(packed, requires_grad=False, has_fp16_weights=False, CB=packed, SCB=scales)
    missing, unexpected = model.load_state_dict(state, strict=False)
    packed_names = {name for name, _ in linears_to_quantize(model)}
    missing = [name for name in missing if name.rsplit(".", 1)[0] not in packed_names or name.endswith("bias")]
    if missing or unexpected:
        raise ValueError(f"tensors do not fit {model_class.__name__}: missing {missing}, unexpected {unexpected}")
    return model


def linears_to_quantize(model: PreTrainedModel) -> list[tuple[str, nn.Linear]]:
    """Return (name, module) of every linear of the blocks: all of them except the heads in SKIPPED_MODULES."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear) and not _is_skipped(name)]


def _is_skipped(name: str) -> bool:
    return not set(name.split(".")).isdisjoint(SKIPPED_MODULES)


def _embeddings(model: PreTrainedModel) -> list[tuple[str, nn.Embedding]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Embedding)]


def _replace_by_packed_modules(model: PreTrainedModel, description: dict[str, Any], device: torch.device | str) -> None:
    """Put, in place, modules of the packed types where the plain ones were; their weights are still empty."""
    for name, linear in linears_to_quantize(model):
        size = (linear.in_features, linear.out_features)
        bias = linear.bias is not None
        if description["method"] == "nf4":
            packed = bnb.nn.Linear4bit(
                *size, bias=bias, compute_dtype=compute_dtype_for(device), quant_type="nf4",
                compress_statistics=description["double_quantization"],
            )  # fmt: skip
            # On CPUs with AVX512-BF16, bitsandbytes would repack the weights at the first call and multiply in bf16: slower
            # for batches, other logits than before saving, and an error for widths that are no multiple of 64.
            packed.support_avx512bf16_for_cpu = False
        else:
            packed = bnb.nn.Linear8bitLt(*size, bias=bias, has_fp16_weights=False)
        model.set_submodule(name, packed.train(linear.training))
    if description["half_precision_embeddings"]:
        for name, table in _embeddings(model):
            model.set_submodule(name, HalfEmbedding(table.num_embeddings, table.embedding_dim, table.padding_idx))
