"""Turn a Llama into NF4 block by block: each block reads what the 4-bit blocks before it write, and its rounding errors are compensated.

What packed_model.py does for a classifier, whose inputs are all observed at once in the unchanged model, with the memory of one block and
with inputs that the errors made before are part of. Table and head are as released or integers (tables.py).
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from compactmind.methods.blockwise import walk_blocks
from compactmind.methods.llama import LINEARS, llama_blocks
from compactmind.methods.quantization.calibration import SITES, require_dense, require_text
from compactmind.methods.quantization.error_compensation import compensation_of
from compactmind.methods.quantization.packed_model import skipped_modules
from compactmind.methods.quantization.tables import EMBEDDINGS, replace_tables, table_grid, tables_of

DAMPING = 0.05
"""Of the inputs' second moment, see error_compensation.py: a block reads what the 4-bit blocks before it write."""


@dataclass(frozen=True)
class NF4Recipe:
    """How a Llama becomes NF4. Raises ValueError on a value outside its range."""

    double_quantization: bool = True
    """Quantize the block scales too."""
    compensation: bool = True
    """Let the columns that follow make up for the error of each (error_compensation.py), or round every weight to its nearest level."""
    embeddings: str = "int8"
    """Width of table and head: one of EMBEDDINGS."""

    def __post_init__(self):
        if self.embeddings not in EMBEDDINGS:
            raise ValueError(f"embeddings {self.embeddings!r}: choose one of {', '.join(EMBEDDINGS)}")


@torch.no_grad()
def quantize_nf4(model: PreTrainedModel, windows: torch.Tensor, recipe: NF4Recipe) -> dict[str, Any]:
    """Make, in place, the linears of the blocks of a Llama NF4, table and head integers; return the description a loader needs.

    `windows` (windows, seq_len): calibration text, looked at with compensation only. What stays as it is keeps its dtype. Raises
    CompactMindError before anything is changed: a weight that is NaN or infinite, a quantized model, too little text to compensate by. A
    model whose quantization is interrupted is of no more use.
    """
    from compactmind.methods.quantization.packed_linear import packed_linear_like  # bitsandbytes takes seconds to import

    require_dense(model)
    if recipe.compensation:
        require_text(model, windows)
    description = {
        "method": "nf4",
        "bits": 4,
        "granularity": "block of 64 weights",
        "double_quantization": recipe.double_quantization,
        "error_compensation": "gptq" if recipe.compensation else None,
        "skipped_modules": skipped_modules(model),
        "embeddings": recipe.embeddings,
    }
    blocks = walk_blocks(model, windows, None) if recipe.compensation else ((0, block, {}) for block in llama_blocks(model))
    for _, block, moments in blocks:
        for site, fields in SITES.items():
            compensation = compensation_of(moments[site], DAMPING, largest_first=True) if recipe.compensation else None
            for field in fields:
                linear = getattr(block, field)
                packed = packed_linear_like(linear, "nf4", linear.weight.device, recipe.double_quantization)
                packed.bias = linear.bias
                packed.pack(linear.weight.data, compensation, refined=True)
                model.set_submodule(f"{block.name}.{LINEARS[field]}", packed)
    grid = table_grid(recipe.embeddings)
    return {**description, "tables": replace_tables(model, dict.fromkeys(tables_of(model), grid) if grid else {})}
