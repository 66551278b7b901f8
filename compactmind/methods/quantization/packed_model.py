"""Replace the block linears of a model by packed ones (NF4 4-bit or LLM.int8()).

NF4: Dettmers et al. 2023 (https://arxiv.org/abs/2305.14314). LLM.int8(): Dettmers et al. 2022
(https://arxiv.org/abs/2208.07339). bitsandbytes does the arithmetic; this file decides what is packed (never a classifier
head) and keeps the embedding tables in half precision, or in integers of fewer bits (tables.py).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from compactmind.errors import CompactMindError
from compactmind.methods.quantization.error_compensation import compensation_of, input_second_moments
from compactmind.methods.quantization.tables import INTEGERS, replace_tables, table_grid

PACKINGS = ("nf4", "int8")
EMBEDDINGS = ("fp16", "float32", *INTEGERS)
"""What the tables of a classifier may be stored in; float32 is as they are."""
SKIPPED_MODULES = ("classifier", "pre_classifier", "pooler", "score", "lm_head", "embeddings_project")
"""Heads and what feeds them, a few thousand weights that decide the answer (transformers#29701, #24037), and ELECTRA's small linear
between table and blocks."""


class HalfEmbedding(nn.Embedding):
    """An embedding whose table, empty at first, is held in float16 and whose output is float32, as the norms that follow expect."""

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None):
        table = torch.empty(num_embeddings, embedding_dim, dtype=torch.float16)
        super().__init__(num_embeddings, embedding_dim, padding_idx=padding_idx, _weight=table)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(batch, tokens) ids -> (batch, tokens, embedding_dim) float32."""
        return super().forward(input).float()


def require_finite(modules: Mapping[str, nn.Module], dtype: torch.dtype = torch.float32) -> None:
    """Raise CompactMindError naming the first of `modules` whose weight is NaN or infinite, or would be in `dtype`.

    Rounded to integers such a weight looks like any other.
    """
    for name, module in modules.items():
        largest = module.weight.detach().abs().max()
        if not torch.isfinite(largest):
            raise CompactMindError(f"{name}: its weight is NaN or infinite: download or make the model again")
        if not torch.isfinite(largest.to(dtype)):
            raise CompactMindError(
                f"{name}: its weight reaches {largest.item():g}, and {str(dtype).removeprefix('torch.')} ends at "
                f"{torch.finfo(dtype).max:g}: with --embeddings float32 tables stay as they are, with --method nf4 linears do not go "
                "through float16"
            )


def require_quantizable(model: PreTrainedModel, embeddings: str, half_precision_linears: bool = False) -> None:
    """Raise CompactMindError, see `require_finite`, for what is to be packed and for the embedding tables of a model.

    Raises ValueError if `embeddings` is none of EMBEDDINGS.
    """
    if embeddings not in EMBEDDINGS:
        raise ValueError(f"unknown embeddings {embeddings!r}: choose one of {', '.join(EMBEDDINGS)}")
    half = {True: torch.float16, False: torch.float32}
    require_finite(dict(linears_to_quantize(model)), half[half_precision_linears])
    require_finite(dict(embedding_tables(model)), half[embeddings == "fp16"])


def quantize_model(
    model: PreTrainedModel,
    method: str,
    *,
    double_quantization: bool = True,
    embeddings: str = "fp16",
    calibration: Iterable[dict[str, torch.Tensor]] | None = None,
) -> dict[str, Any]:
    """Replace, in place, the block linears of `model` by packed ones and return the description a loader needs.

    `method` is nf4 or int8, `embeddings` one of EMBEDDINGS. With `calibration` batches (`input_ids`, `attention_mask`), NF4 rounding errors
    are compensated (error_compensation.py). Raises ValueError on another method or other embeddings and CompactMindError, see
    `require_finite`, before anything is changed.
    """
    if method not in PACKINGS:
        raise ValueError(f"unknown quantization method {method!r}, expected one of {', '.join(PACKINGS)}")
    require_quantizable(model, embeddings, method == "int8")  # bitsandbytes rounds to float16 before it rounds to int8
    device = model.device
    plain = dict(linears_to_quantize(model))
    compensated = method == "nf4" and calibration is not None
    moments = input_second_moments(model, plain, calibration) if compensated else {}
    description = {
        "method": method,
        "bits": 4 if method == "nf4" else 8,
        "granularity": "block of 64 weights" if method == "nf4" else "output row",
        "double_quantization": double_quantization if method == "nf4" else None,
        "error_compensation": "gptq" if compensated else None,
        "skipped_modules": skipped_modules(model),
        "embeddings": embeddings,
        "tables": store_tables(model, embeddings),
    }
    replace_linears(model, description, device)
    for name, linear in plain.items():
        packed = model.get_submodule(name)
        packed.bias = linear.bias
        packed.pack(linear.weight.data, *([compensation_of(moments[name])] if compensated else []))
    return description


def store_tables(model: PreTrainedModel, embeddings: str) -> dict[str, dict[str, Any]]:
    """Store, in place, every embedding table in one of EMBEDDINGS; return the grids of integers that a loader needs, by name."""
    tables, grid = dict(embedding_tables(model)), table_grid(embeddings)
    if embeddings == "fp16":
        for name, table in tables.items():
            half = HalfEmbedding(table.num_embeddings, table.embedding_dim, table.padding_idx)
            half.weight = nn.Parameter(table.weight.data.half(), requires_grad=False)
            model.set_submodule(name, half.train(table.training))
    return replace_tables(model, dict.fromkeys(tables, grid) if grid else {})


def linears_to_quantize(model: PreTrainedModel) -> list[tuple[str, nn.Linear]]:
    """Return (name, module) of every linear of the blocks: all of them except the heads in SKIPPED_MODULES."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear) and not _is_skipped(name)]


def skipped_modules(model: PreTrainedModel) -> list[str]:
    """Return the names of the linears that are not packed."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and _is_skipped(name)]


def _is_skipped(name: str) -> bool:
    return not set(name.split(".")).isdisjoint(SKIPPED_MODULES)


def embedding_tables(model: PreTrainedModel) -> list[tuple[str, nn.Embedding]]:
    """Return (name, module) of every embedding table."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Embedding)]


def replace_linears(model: PreTrainedModel, description: dict[str, Any], device: torch.device | str) -> None:
    """Put, in place, packed linears where the plain ones were; their weights are still empty."""
    from compactmind.methods.quantization.packed_linear import packed_linear_like  # bitsandbytes takes seconds to import

    for name, linear in linears_to_quantize(model):
        packed = packed_linear_like(linear, description["method"], device, description["double_quantization"])
        model.set_submodule(name, packed)


def replace_by_half_tables(model: PreTrainedModel, description: dict[str, Any]) -> None:
    """Put, in place, empty half-precision tables where a description has them."""
    in_files_before = description.get("half_precision_embeddings", False)
    if description.get("embeddings") == "fp16" or in_files_before:
        for name, table in embedding_tables(model):
            model.set_submodule(name, HalfEmbedding(table.num_embeddings, table.embedding_dim, table.padding_idx))
