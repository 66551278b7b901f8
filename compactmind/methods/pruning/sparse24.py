"""2:4 sparsity of a Llama: of every four weights in a row two become zero, chosen by magnitude or by Wanda (two_of_four.py: the pattern).

Wanda (Sun et al. 2023, https://arxiv.org/abs/2306.11695): what a weight is worth is |weight| times the 2-norm of what it is multiplied with
on calibration text, each row ranked for itself. Nothing is updated to make up for what goes; each block is scored on what the blocks before
it, already sparse, hand on. Everything in the linears of the blocks gets the pattern; table, head and norms stay. The file is as large as
before: zeros are stored.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from compactmind.errors import CompactMindError
from compactmind.methods.blockwise import walk_blocks
from compactmind.methods.llama import LINEARS, LlamaBlock, llama_blocks
from compactmind.methods.pruning.two_of_four import PATTERN, keep_two_of_four, require_groups, share_of_zeros, zero_out
from compactmind.methods.quantization.calibration import SITES

CRITERIA = ("wanda", "magnitude")


@dataclass(frozen=True)
class Sparse24Recipe:
    """Which two of four weights stay. Raises ValueError on a value outside its range."""

    criterion: str = "wanda"
    """wanda: by |weight| times the norm of its input on calibration text; magnitude: by |weight| alone, which reads no text."""

    def __post_init__(self):
        if self.criterion not in CRITERIA:
            raise ValueError(f"criterion {self.criterion!r} is not one of {', '.join(CRITERIA)}")


def check_sparse24(model: PreTrainedModel, recipe: Sparse24Recipe, is_it: bool = True) -> None:
    """Raise CompactMindError if the inputs of a linear of a Llama cannot be divided into fours; of one yet to be cut nothing is known."""
    blocks = llama_blocks(model)
    if is_it:
        require_groups({f"{block.name}.{path}": getattr(block, field) for block in blocks for field, path in LINEARS.items()})


@torch.no_grad()
def sparsify_llama(model: PreTrainedModel, calibration: torch.Tensor, recipe: Sparse24Recipe) -> dict[str, Any]:
    """Zero, in place, two of every four weights of the linears in the blocks; return pattern, criterion and the share that is zero.

    `calibration`: (windows, seq_len) token ids. Raises CompactMindError as `check_sparse24`, and on inputs that are NaN or infinite.
    """
    check_sparse24(model, recipe)
    if recipe.criterion == "magnitude":
        for block in llama_blocks(model):
            for field in LINEARS:
                weight = getattr(block, field).weight
                zero_out(weight, keep_two_of_four(weight.abs()))
    else:
        if not calibration.numel():
            raise CompactMindError("Wanda reads calibration text and there is none: more --calibration_windows, or criterion magnitude")
        waiting: list[tuple[torch.nn.Linear, torch.Tensor]] = []
        for _, block, moments in walk_blocks(model, calibration, None):
            _zero(waiting)  # the block before it has its own weights again, which need not be float32
            waiting = [(getattr(block, field), kept) for field, kept in wanda_masks(block, moments).items()]
            _zero(waiting)  # what the next block reads
        _zero(waiting)
    linears = [getattr(block, field) for block in llama_blocks(model) for field in LINEARS]
    return {"pattern": PATTERN, "criterion": recipe.criterion, "zeros": share_of_zeros(linears)}


def wanda_masks(block: LlamaBlock, moments: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return which weights of each linear stay, boolean (out, in), by the mean of x x^T of its input (in, in)."""
    masks = {}
    for site, fields in SITES.items():
        norms = moments[site].diagonal().clamp(min=0).sqrt()  # (in,), all divided by one number: it changes no order
        for field in fields:
            masks[field] = keep_two_of_four(getattr(block, field).weight.float().abs() * norms)
    return masks


def _zero(masks: list[tuple[torch.nn.Linear, torch.Tensor]]) -> None:
    for linear, kept in masks:
        zero_out(linear.weight, kept)
