"""Turn a Llama into integers of 2 to 8 bits, block by block, every tensor in as many bits as a byte target leaves it.

1. sensitivity  with a target: what it costs to round each tensor, measured one after the other (sensitivity.py)
2. allocation   the grid of every tensor, by an integer program (allocation.py)
3. rounding     each block reads what the quantized blocks before it write, and its weights are rounded on that (gptq.py)

Memory is one block in float32; all others wait in the dtype they were released in, or as integers.
"""

from collections import Counter
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from compactmind.errors import CompactMindError
from compactmind.methods.allocation import Choice, allocate, least_size
from compactmind.methods.blockwise import walk_blocks
from compactmind.methods.llama import LINEARS, llama_blocks, llama_type
from compactmind.methods.quantization.calibration import SITES, require_dense, require_text
from compactmind.methods.quantization.gptq import ORDERS, columns_in_order, inverse_factor, round_compensated, round_nearest
from compactmind.methods.quantization.grid import BITS, GGUF_ARCHITECTURES, GGUF_BLOCK, GGUF_TYPES, Grid
from compactmind.methods.quantization.grouped import GroupedLinear, forget_unpacked
from compactmind.methods.quantization.scale_tuning import tune_scales
from compactmind.methods.quantization.sensitivity import (
    SHARPNESS,
    Gradients,
    gradient_costs,
    measure_gradients,
    measured_costs,
    measured_table_cost,
    table_errors,
)
from compactmind.methods.quantization.stream_rotation import random_orthogonal, rotate_stream
from compactmind.methods.quantization.superblocks import K_GRIDS, k_grid_for
from compactmind.methods.quantization.tables import EMBEDDINGS, INTEGERS, replace_tables, table_grid, tables_of

AUTO = "auto"
GRIDS = [Grid(bits, size) for bits in BITS for size in (32, 64, 128)] + [Grid(bits, 32, "float") for bits in (2, 3, 4, 5)]
"""What an allocation chooses from for the linears of the blocks. A float zero costs half a bit more and finds a grid again on which the
weights lie already (models published as Q4_1)."""
TABLE_GRIDS = [Grid(bits, size) for bits in (4, 5, 6, 8) for size in (32, 64, -1)]
"""... and for tables and heads."""
TABLE_REFERENCE = Grid(4, 64)
"""What a table is rounded to when its cost is measured."""
LAYOUTS = ("any", "gguf", "gguf_k")
SENSITIVITIES = ("measured", "gradients")
SENSITIVITY_WINDOWS = 4
"""Windows of the calibration text that costs are measured on."""
HEADER = 62
"""Bytes that a tensor takes in the head of a safetensors file, beside its name and where it begins and ends, at most."""


@dataclass(frozen=True)
class GPTQRecipe:
    """How a Llama becomes integers. Raises ValueError on a value outside its range."""

    bits: int = 4
    """Of every weight of the blocks, one of BITS; a target chooses by itself."""
    group_size: int = 32
    """Weights of a row that share a scale; -1: the whole row. The last group of a row may be shorter. A target chooses by itself."""
    zero: str = "symmetric"
    """symmetric, integer (a zero point) or float (a minimum in fp16). A target chooses by itself."""
    embeddings: str = AUTO
    """Width of table and head: one of EMBEDDINGS; auto: int8, or what a target chooses."""
    layout: str = "any"
    """any grid, or those that GGUF holds as they are: gguf, its simple types (4, 5 or 8 bits in groups of 32, symmetric or with a float
    zero); gguf_k, its K types (superblocks.py) too: without a target the one of `bits` bits, 2 to 6, whatever group_size and zero are."""
    target_compression: float = 0.0
    """Bytes of the dense weight file as released / bytes of the result, at least; bits are chosen tensor by tensor. 0: `bits` for all."""
    compensation: bool = True
    """Let the columns that follow make up for the error (GPTQ), or round every weight to its nearest level."""
    order: str = "activation"
    """Of the columns: activation, groups and columns with the largest inputs first; index, as they stand."""
    damping: float = 0.05
    """Share of the mean diagonal added to H, in (0, 1]."""
    tuning_tokens: int = 0
    """Tokens on which scales and norms then learn from the dense model (scale_tuning.py); 0: none."""
    tuning_lr: float = 3e-4
    """How far a scale moves in a step at most, as a share of its size."""
    stream_rotation: bool = False
    """Rotate the residual stream in the weights first (stream_rotation.py): no outlier channels, no work at run time, and where the head is
    tied a second table."""
    weigh_tokens: bool = False
    """Count every token of the calibration text by its gradients (sensitivity.py), or all alike."""
    sensitivity: str = "measured"
    """What a target goes by: measured (KL with one tensor after the other rounded) or gradients (an estimate)."""

    def __post_init__(self):
        Grid(self.bits, self.group_size, self.zero)
        choices = {"layout": LAYOUTS, "embeddings": (AUTO, *EMBEDDINGS), "order": ORDERS, "sensitivity": SENSITIVITIES}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r}: choose one of {', '.join(known)}")
        if self.target_compression != 0 and not 1 < self.target_compression < 16:
            raise ValueError(f"target_compression {self.target_compression:g} is not in (1, 16), and not 0 for none")
        for name in ("damping", "tuning_lr"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name):g} is not in (0, 1]")
        if self.layout == "gguf":
            blocks = [] if self.target_compression else [self.grid_of(0)]
            table = [self.table_of(0)] if self.table_of(0) and self.embeddings != AUTO else []
            if wrong := [grid for grid in blocks + table if not grid.is_gguf]:
                known = ", ".join(f"{bits} bits {zero}" for zero, bits in GGUF_TYPES)
                raise ValueError(f"layout gguf has no {wrong[0]}: choose one of {known}, in groups of {GGUF_BLOCK}")
        if self.layout == "gguf_k" and not self.target_compression and self.bits not in K_GRIDS:
            raise ValueError(f"layout gguf_k has no type of {self.bits} bits: choose one of {', '.join(map(str, K_GRIDS))}")
        if self.tuning_tokens < 0:
            raise ValueError(f"tuning_tokens {self.tuning_tokens} is not in [0, inf)")

    @property
    def bits_per_weight(self) -> tuple[float, float | None]:
        """Bits of a weight of the blocks and of a table, scales included, where no target chooses; None: as released."""
        wide = 1024
        table = self.table_of(wide)
        return self.grid_of(wide).stored_bits(wide) / wide, table and table.stored_bits(wide) / wide

    def grid_of(self, width: int) -> Grid:
        """Return the grid of a linear of the blocks with rows of `width`, where no target chooses."""
        return k_grid_for(self.bits, width) if self.layout == "gguf_k" else Grid(self.bits, self.group_size, self.zero)

    def table_of(self, width: int) -> Grid | None:
        """Return the grid of a table or head with rows of `width` where no target chooses, None: as released."""
        if self.layout == "gguf_k" and self.embeddings in (AUTO, *INTEGERS):
            return k_grid_for(6 if self.embeddings == AUTO else int(self.embeddings.removeprefix("int")), width)
        grid = table_grid("int8" if self.embeddings == AUTO else self.embeddings)
        return replace(grid, group_size=GGUF_BLOCK) if grid and self.layout == "gguf" else grid


# ---------------------------------------------------------------------------------------------------------------- allocation
Choices = dict[str, list[Choice]]
"""Tensor by the name it has in a file -> its ways to be stored, with their bits and their cost."""


@torch.no_grad()
def tensor_choices(
    model: PreTrainedModel, windows: torch.Tensor, recipe: GPTQRecipe, uncounted: Sequence[str] = (), known: dict[str, float] | None = None
) -> Choices:
    """Return what every tensor can be stored in and what that costs, tables too; the same for every target.

    Costs are measured on the first SENSITIVITY_WINDOWS of `windows`, those of linears by what is `known`, see `measured_costs`.
    Tables named in `uncounted` take what the counted one does: what they cost is in its costs.
    """
    windows = windows[:SENSITIVITY_WINDOWS]
    more = list(K_GRIDS.values()) if recipe.layout == "gguf_k" else []
    grids = GRIDS + more
    by_gradients = recipe.sensitivity == "gradients"
    costs = gradient_costs(model, windows, grids, recipe.damping) if by_gradients else measured_costs(model, windows, grids, known=known)
    choices: Choices = {}
    for index, block in enumerate(llama_blocks(model)):
        for field, path in LINEARS.items():
            weight = getattr(block, field).weight
            choices[f"{block.name}.{path}"] = _choices(weight, grids, costs[index, field])
    tables = tables_of(model)
    for name in tables:
        if name in uncounted:
            continue
        both = [model.get_input_embeddings(), model.get_output_embeddings()]
        together = both if uncounted or len(tables) == 1 else [tables[name]]
        weight = tables[name].weight
        measured = measured_table_cost(model, windows, together, TABLE_REFERENCE)
        grids = TABLE_GRIDS + more
        of_reference, *errors = table_errors(weight, [TABLE_REFERENCE, *grids])
        choices[name] = _choices(weight, grids, [measured * error / max(of_reference, 1e-30) for error in errors])
    return choices


def _choices(weight: torch.Tensor, grids: Sequence[Grid], costs: Sequence[float]) -> list[Choice]:
    """Return the ways to store a weight (out, in), those of `grids` that its rows fit."""
    return [
        Choice(grid, grid.stored_bits(weight.shape[1]) * len(weight), cost)
        for grid, cost in zip(grids, costs, strict=True)
        if grid.fits(weight.shape[1])
    ]


def choices_to_keep(choices: Choices) -> dict[str, list[list[Any]]]:
    """Return choices as JSON has them."""
    return {name: [[each.what.described(), each.size, each.cost] for each in its] for name, its in choices.items()}


def choices_from(kept: dict[str, list[list[Any]]]) -> Choices:
    """Return what `choices_to_keep` was given."""
    return {name: [Choice(Grid(**what), bits, cost) for what, bits, cost in its] for name, its in kept.items()}


def choose_grids(
    model: PreTrainedModel,
    choices: Choices,
    recipe: GPTQRecipe,
    budget_bytes: int,
    released: torch.dtype,
    uncounted: Sequence[str] = (),
) -> tuple[dict[str, Grid], float]:
    """Return the grid of every tensor and the cost to expect, in nats a token, so that the file keeps to `budget_bytes`.

    What stays as it is is stored in the dtype `released`; tables named in `uncounted` are free. Raises CompactMindError if no widths do.
    """
    tables, fixed = tables_of(model), recipe.embeddings != AUTO
    if fixed:
        choices = {name: each for name, each in choices.items() if name not in tables}
    if recipe.layout != "any":
        choices = {name: [each for each in its if each.what.is_gguf] for name, its in choices.items()}
    table = recipe.table_of(model.config.hidden_size) if fixed else None
    taken = _bytes_beside(model, choices, uncounted, tables if fixed else {}, table, released.itemsize, budget_bytes)
    choices = {
        name: [each._replace(size=each.size + 8 * _bytes_of_head(name, each.what, budget_bytes)) for each in its]
        for name, its in choices.items()
    }
    budget = int(budget_bytes - taken) * 8
    if least_size(choices) > budget:
        raise CompactMindError(
            f"the smallest that these widths can make of the weights is {least_size(choices) / 8e6:.2f} MB, more than the "
            f"{max(budget, 0) / 8e6:.2f} MB that the target leaves them: choose a smaller target_compression, allow "
            "embeddings of fewer bits, or prune before"
        )
    picked = allocate(choices, budget)
    grids = {name: choice.what for name, choice in picked.items()}
    if table:
        grids |= dict.fromkeys(tables, table)
    elif not fixed:
        counted = next(name for name in tables if name not in uncounted)
        grids |= {name: grids[counted] for name in uncounted}
    return grids, sum(choice.cost for choice in picked.values())


def least_bytes(model: PreTrainedModel, recipe: GPTQRecipe, itemsize: int) -> tuple[float, float]:
    """Return how few bytes a target can make of the blocks' linears and of all else: a bound, its share for a share of the blocks."""
    more = list(K_GRIDS.values()) if recipe.layout == "gguf_k" else []

    def narrowest(grids: Sequence[Grid], width: int) -> float:
        able = [grid for grid in (*grids, *more) if grid.fits(width) and (recipe.layout == "any" or grid.is_gguf)]
        return min(grid.stored_bits(width) for grid in able) / width / 8

    hidden, of_linear = model.config.hidden_size, narrowest(GRIDS, 1024)
    table = recipe.table_of(hidden)
    of_table = table.stored_bits(hidden) / hidden / 8 if table else itemsize
    of_table = narrowest(TABLE_GRIDS, hidden) if recipe.embeddings == AUTO else of_table
    linears = {f"{block.name}.{path}.weight" for block in llama_blocks(model) for path in LINEARS.values()}
    tables = [id(each.weight) for each in (model.get_input_embeddings(), model.get_output_embeddings())]
    blocks, others = 0.0, float(HEADER)
    for name, parameter in model.named_parameters():  # what is tied once
        if name in linears:
            blocks += parameter.numel() * of_linear + _bytes_of_head(name.removesuffix(".weight"), GRIDS[0], 1)
        else:
            others += parameter.numel() * (of_table if id(parameter) in tables else itemsize)
    return blocks, others


def _bytes_beside(
    model: PreTrainedModel,
    chosen: Container[str],
    free: Container[str],
    fixed: dict[str, nn.Module],
    table: Grid | None,
    itemsize: int,
    whole: int,
) -> int:
    """Return the bytes of a file of `whole` bytes that no choice decides: what stays as it is, tables of a fixed width, how it begins."""
    size = HEADER
    for name, parameter in model.named_parameters():  # what is tied once
        owner = name.removesuffix(".weight")
        if owner in free or owner in chosen:
            continue
        if owner in fixed and table:
            size += table.stored_bits(parameter.shape[1]) * len(parameter) // 8 + _bytes_of_head(owner, table, whole)
        else:
            size += parameter.numel() * itemsize + _bytes_of_entry(name, whole)
    return size


def _bytes_of_head(name: str, grid: Grid, whole: int) -> int:
    """Return the bytes of a weight that are neither integers, scales nor zeros: its shape, and what the head of the file says of it."""
    zeros = {"symmetric": [], "integer": ["weight_zero_point"], "float": ["weight_minimum"]}[grid.zero]
    tensors = ["weight_packed", "weight_scale", "weight_shape", *zeros]
    if grid.superblocks:
        tensors += [f"{each}_step" for each in ("weight_scale", *zeros)]
    return 2 * torch.int64.itemsize + sum(_bytes_of_entry(f"{name}.{each}", whole) for each in tensors)


def _bytes_of_entry(name: str, whole: int) -> int:
    return HEADER + len(name) + 2 * len(str(whole))


# ------------------------------------------------------------------------------------------------------------------ quantizing
@torch.no_grad()
def quantize_gptq(
    model: PreTrainedModel,
    windows: torch.Tensor,
    recipe: GPTQRecipe,
    *,
    released_bytes: int = 0,
    released: torch.dtype | None = None,
    uncounted: Sequence[str] = (),
    teacher: Callable[[], PreTrainedModel] | None = None,
    learn_from: tuple[torch.Tensor, torch.Tensor] | None = None,
    choices: Callable[[], Choices] | None = None,
    gradients: Callable[[], Gradients] | None = None,
    show: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Make, in place, the linears of the blocks, the table and the head of a Llama integers; return what a loader and a manifest need.

    `windows` (windows, seq_len): calibration text. `released_bytes`: what a target_compression is a ratio of (0: this model's bytes) and
    `released` the dtype in which the file will have what stays as it is (None: the model's). Tables named in `uncounted` are free in it.
    Raises CompactMindError before anything but the basis of the stream is changed: a weight that is NaN or infinite, too little text, a
    quantized model, a target that no widths reach. `teacher` makes the dense model that tuning_tokens learn from, `learn_from` is
    the text for it and text that decides whether that is kept (None: `windows`, the last eighth of them held out), `choices` what
    `tensor_choices` returns and `gradients` what `measure_gradients` does, if that is known. A model whose quantization is interrupted is
    of no use.
    """
    require_dense(model)
    require_text(model, windows)
    if recipe.layout != "any" and (kind := llama_type(model)) not in GGUF_ARCHITECTURES:
        raise CompactMindError(
            f"layout {recipe.layout} is for models that go into a GGUF file: {', '.join(GGUF_ARCHITECTURES)}, not {kind}; leave it out"
        )
    whole = released_bytes or sum(each.numel() * (released or model.dtype).itemsize for each in model.parameters())
    if recipe.stream_rotation:
        rotate_stream(model, random_orthogonal(model.config.hidden_size))
    tables = tables_of(model)
    released = released or model.dtype
    predicted, table = None, recipe.table_of(model.config.hidden_size)
    grids = {
        f"{block.name}.{path}": recipe.grid_of(getattr(block, field).in_features)
        for block in llama_blocks(model)
        for field, path in LINEARS.items()
    }
    grids |= {name: table for name in tables if table}
    if recipe.target_compression:
        show("gptq: choosing bits")
        budget = int(whole / recipe.target_compression)
        known = choices() if choices else tensor_choices(model, windows, recipe, uncounted)
        grids, predicted = choose_grids(model, known, recipe, budget, released, uncounted)
    tokens = None
    if recipe.weigh_tokens and recipe.compensation:
        show("gptq: gradients of the tokens")
        measured = gradients() if gradients else measure_gradients(model, windows)
        tokens = [{site: _sharpened(weights) for site, weights in each.items()} for each in measured.tokens]
    for index, block, moments in walk_blocks(model, windows, tokens):
        show(f"gptq: rounding block {index + 1}/{len(llama_blocks(model))}")
        if index:
            forget_unpacked(llama_blocks(model)[index - 1].module)
        for site, fields in SITES.items():
            moment, factors = moments[site], {}
            for field in fields:
                name, linear = f"{block.name}.{LINEARS[field]}", getattr(block, field)
                grid = grids[name]
                if recipe.compensation:
                    key = recipe.order == "activation" and (grid.group_size, grid.superblocks)  # what the order depends on
                    if key not in factors:
                        order = columns_in_order(moment, grid, recipe.order)
                        factors[key] = order, inverse_factor(moment[order[:, None], order], recipe.damping)
                    order, factor = factors[key]
                    rounded = round_compensated(linear.weight, factor, order, grid)
                else:
                    rounded = round_nearest(linear.weight, grid, moment.diagonal())
                model.set_submodule(name, GroupedLinear.of(rounded.q, rounded.scale, rounded.zero, rounded.grid, linear.bias))
    replace_tables(model, {name: grids[name] for name in tables if name in grids})
    whole = all(grid.divides(model.get_submodule(name).shape[1]) for name, grid in grids.items())
    description = describe(recipe, grids, predicted, whole)
    if recipe.tuning_tokens:
        with torch.enable_grad():
            text = learn_from or _held_out_of(windows)
            description["tuning"] = tune_scales(model, teacher(), *text, recipe.tuning_tokens, recipe.tuning_lr, show)
    return description


def _held_out_of(windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    count = max(1, len(windows) // 8)
    return (windows[:-count] if len(windows) > count else windows), windows[-count:]


def _sharpened(weights: torch.Tensor) -> torch.Tensor:
    weights = weights**SHARPNESS
    return weights / weights.mean().clamp_min(1e-30)


def describe(recipe: GPTQRecipe, grids: dict[str, Grid], predicted: float | None, whole_groups: bool) -> dict[str, Any]:
    """Return what the manifest says: the grid of every tensor, whether its groups are all whole, and how they were chosen."""
    blocks = [grid for name, grid in grids.items() if name.startswith("model.layers.")]
    bits = Counter(grid.bits for grid in blocks)
    return {
        "method": "gptq" if recipe.compensation else "round to nearest",
        "bits": recipe.bits if not recipe.target_compression else {str(width): count for width, count in sorted(bits.items())},
        "granularity": "groups of a row, see tensors",
        "whole_groups": whole_groups,
        "layout": recipe.layout,
        "target_compression": recipe.target_compression or None,
        "expected_kl": predicted,
        "order": recipe.order,
        "damping": recipe.damping,
        "stream_rotation": recipe.stream_rotation,
        "weigh_tokens": recipe.weigh_tokens,
        "sensitivity": recipe.sensitivity if recipe.target_compression else None,
        "tensors": {name: grid.described() for name, grid in grids.items()},
    }
