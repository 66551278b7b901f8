"""Turn the linears of a Llama into NF4, block by block, rounding errors compensated on what the quantized blocks before produce.

NF4: Dettmers et al. 2023 (https://arxiv.org/abs/2305.14314); the compensation: error_compensation.py. Table and head, which NF4's kernels
do not touch, stay as released or become integers of 4 to 8 bits (grouped.py). Memory is that of the model and one block in float32.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from compactmind.methods.llama import LINEARS
from compactmind.methods.quantization.blockwise import walk_blocks
from compactmind.methods.quantization.calibration import SITES
from compactmind.methods.quantization.gptq_model import EMBEDDINGS, check_source, replace_tables, table_grid, tables_of


@dataclass(frozen=True)
class NF4Recipe:
    """How a Llama becomes NF4. Raises ValueError on a value outside its range."""

    double_quantization: bool = True
    """Quantize the block scales too."""
    compensation: bool = True
    """Let the columns that follow make up for the error (GPTQ), or round every weight to its nearest level."""
    embeddings: str = "int8"
    """Width of table and head: one of EMBEDDINGS."""

    def __post_init__(self):
        if self.embeddings not in EMBEDDINGS:
            raise ValueError(f"embeddings {self.embeddings!r}: choose one of {', '.join(EMBEDDINGS)}")

    @property
    def bits_per_weight(self) -> tuple[float, float | None]:
        """Bits of a weight of the blocks and of a table, scales included; None: as released."""
        grid = table_grid(self.embeddings)
        return 4.13 if self.double_quantization else 4.5, grid and grid.stored_bits(1024) / 1024


@torch.no_grad()
def quantize_nf4(model: PreTrainedModel, windows: torch.Tensor, recipe: NF4Recipe) -> dict[str, Any]:
    """Make, in place, the linears of a Llama's blocks NF4 and its tables integers; return what a loader and a manifest need.

    `windows` (windows, seq_len): calibration text, which nothing but the compensation reads. Raises CompactMindError before anything is
    changed: a weight that is NaN or infinite, too little text, a quantized model.
    """
    from compactmind.methods.quantization.packed_linear import packed_linear_like  # bitsandbytes takes seconds to import

    check_source(model, windows)
    heads = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and not name.startswith("model.layers.")
    ]
    for _, block, moments in walk_blocks(model, windows if recipe.compensation else windows[:1], None):
        for site, fields in SITES.items():
            for field in fields:
                linear = getattr(block, field)
                packed = packed_linear_like(linear, "nf4", model.device, recipe.double_quantization)
                packed.bias = linear.bias
                packed.pack(linear.weight.data, *([moments[site]] if recipe.compensation else []))
                model.set_submodule(f"{block.name}.{LINEARS[field]}", packed)
    grid = table_grid(recipe.embeddings)
    grids = dict.fromkeys(tables_of(model), grid) if grid else {}
    replace_tables(model, grids)
    return {
        "method": "nf4",
        "bits": 4,
        "granularity": "block of 64 weights",
        "double_quantization": recipe.double_quantization,
        "error_compensation": "gptq" if recipe.compensation else None,
        "skipped_modules": heads,
        "half_precision_embeddings": False,
        "tables": {name: grid.described() for name, grid in grids.items()},
    }
