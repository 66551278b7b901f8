"""Embedding tables and heads as integers of 4 to 8 bits with a scale for every group of a row (grouped.py): what every quantizer can do.

A table is most of a small model: 56.6 of the 111.9 MB of a SmolLM2 whose blocks have 4 bits. Every weight is rounded to its nearest level;
a head that is tied to the table reads the table's integers, which a file has once.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from compactmind.methods.quantization.gptq import round_nearest
from compactmind.methods.quantization.grid import Grid
from compactmind.methods.quantization.grouped import GroupedEmbedding, GroupedLinear, TiedHead

INTEGERS = ("int8", "int6", "int5", "int4")
"""Words for integers in groups of TABLE_GROUP."""
EMBEDDINGS = ("as_released", *INTEGERS)
"""What table and head of a Llama may be stored in."""
TABLE_GROUP = 64
"""Weights of a table that share a scale, where no target chooses."""


def table_grid(embeddings: str) -> Grid | None:
    """Return the grid that a word of INTEGERS stands for, None for one that leaves tables floating-point."""
    return Grid(int(embeddings.removeprefix("int")), TABLE_GROUP) if embeddings in INTEGERS else None


def table_bits(embeddings: str) -> float | None:
    """Return the bits of a weight of a table, scales included, None where it stays floating-point."""
    grid, wide = table_grid(embeddings), 1024
    return grid and grid.stored_bits(wide) / wide


def tables_of(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the embedding table and, where it has a table of its own, the head, by the names they have in a file."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    tables = {names[id(table)]: table}
    if head.weight.data_ptr() != table.weight.data_ptr():
        tables[names[id(head)]] = head
    return tables


@torch.no_grad()
def replace_tables(model: PreTrainedModel, grids: Mapping[str, Grid]) -> dict[str, dict[str, Any]]:
    """Put, in place, integers where the tables and heads named in `grids` were; what is tied stays tied.

    Returns what a loader needs: the fields of each Grid, by name.
    """
    for name, grid in grids.items():
        module, head = model.get_submodule(name), model.get_output_embeddings()
        tied = head is not None and head is not module and head.weight.data_ptr() == module.weight.data_ptr()
        rounded = round_nearest(module.weight, grid)
        parts = rounded.q, rounded.scale, rounded.zero, rounded.grid
        if not isinstance(module, nn.Embedding):
            model.set_submodule(name, GroupedLinear.of(*parts, module.bias))
            continue
        small = GroupedEmbedding.of(*parts, module.padding_idx)
        model.set_submodule(name, small)
        if tied:
            model.set_output_embeddings(TiedHead(small))
    return {name: grid.described() for name, grid in grids.items()}
