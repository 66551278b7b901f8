"""Turn a Llama into integers of 2 to 8 bits, block by block, every tensor in as many bits as a byte target leaves it.

1. sensitivity  one pass forward and back: on which tokens an error matters, and at which outputs (sensitivity.py)
2. allocation   with a target: the cost of every tensor on every grid, then an integer program (allocation.py)
3. rounding     each block reads what the quantized blocks before it write, and its weights are rounded on that (gptq.py)

Memory is one block in float32; all others wait in the dtype they were released in, or as integers.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from compactmind.errors import CompactMindError
from compactmind.methods.llama import LINEARS, LlamaBlock, llama_blocks
from compactmind.methods.quantization.allocation import Choice, allocate
from compactmind.methods.quantization.blockwise import block_inputs, in_float32, run_block
from compactmind.methods.quantization.calibration import SITES, readers_of
from compactmind.methods.quantization.gptq import ORDERS, Rounded, inverse_factor, round_compensated, round_nearest
from compactmind.methods.quantization.grid import BITS, Grid
from compactmind.methods.quantization.grouped import GroupedEmbedding, GroupedLinear, TiedHead
from compactmind.methods.quantization.packed_model import require_finite
from compactmind.methods.quantization.sensitivity import SHARPNESS, Sensitivity, cost_of, measure_sensitivity

EMBEDDINGS = ("as_released", "int8", "int6", "int5", "int4")
"""What tables and heads may be stored in."""
TABLE_GROUP = 64
"""Weights of a table that share a scale, where no target chooses."""
AUTO = "auto"
GRIDS = [Grid(bits, size) for bits in BITS for size in (32, 64, 128)] + [Grid(bits, 32, "float") for bits in (2, 3, 4, 5)]
"""What an allocation chooses from for the linears of the blocks. A float zero costs half a bit more and finds a grid again on which the
weights lie already (models published as Q4_1)."""
TABLE_GRIDS = [Grid(bits, size) for bits in (4, 5, 6, 8) for size in (32, 64, -1)]
"""... and for tables and heads."""
SENSITIVITY_WINDOWS = 8
"""Windows of the calibration text whose gradients are looked at."""
HEADER = 90
"""Bytes that a tensor takes in the head of a safetensors file, beside its name, at most."""
TENSORS_OF_A_WEIGHT = 4
"""Packed integers, scales, minima or zero points, shape: so many tensors at most for each weight."""
TOKENS_PER_INPUT = 0.25
"""So many tokens of calibration text for each input of the widest linear, at least: with fewer, what GPTQ sees is chance."""


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
    target_compression: float = 0.0
    """Bytes of the dense weight file as released / bytes of the result, at least; bits are chosen tensor by tensor. 0: `bits` for all."""
    compensation: bool = True
    """Let the columns that follow make up for the error (GPTQ), or round every weight to its nearest level."""
    order: str = "index"
    """Of the columns: index, each group's scale chosen when its turn comes; activation, the largest inputs first."""
    damping: float = 0.01
    """Share of the mean diagonal added to H, in (0, 1]."""
    weigh_tokens: bool = True
    """Count every token of the calibration text by how much an error matters there, or all alike."""

    def __post_init__(self):
        Grid(self.bits, self.group_size, self.zero)
        choices = {"embeddings": (AUTO, *EMBEDDINGS), "order": ORDERS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r}: choose one of {', '.join(known)}")
        if self.target_compression != 0 and not 1 < self.target_compression < 16:
            raise ValueError(f"target_compression {self.target_compression:g} is not in (1, 16), and not 0 for none")
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping {self.damping:g} is not in (0, 1]")

    @property
    def bits_per_weight(self) -> tuple[float, float | None]:
        """Bits of a weight of the blocks and of a table, scales included, where no target chooses; None: as released."""
        blocks, wide = Grid(self.bits, self.group_size, self.zero), 1024
        return blocks.stored_bits(wide) / wide, self.table and self.table.stored_bits(wide) / wide

    @property
    def table(self) -> Grid | None:
        """The grid of table and head where no target chooses, None: as released."""
        return table_grid("int8" if self.embeddings == AUTO else self.embeddings)


def table_grid(embeddings: str) -> Grid | None:
    """Return the grid that a word of EMBEDDINGS stands for, None for as_released."""
    return None if embeddings == "as_released" else Grid(int(embeddings.removeprefix("int")), TABLE_GROUP)


# ------------------------------------------------------------------------------------------------------------ block by block
Moments = dict[str, torch.Tensor]
"""Site of SITES -> weighted mean of x x^T of what its linears read, float32 (in, in)."""


@torch.no_grad()
def walk_blocks(
    model: PreTrainedModel, windows: torch.Tensor, tokens: Sequence[dict[str, torch.Tensor]] | None
) -> Iterator[tuple[int, LlamaBlock, Moments]]:
    """Yield every block in float32 with the moments of its inputs over `windows`; the next one reads what it then computes.

    Whoever walks may replace the linears of the block while it has it. `tokens`: weights, see `Sensitivity`; None: all tokens alike.
    Raises CompactMindError naming the layer if an input is NaN or infinite.
    """
    model.eval()
    states, arguments = block_inputs(model, windows)
    for index, others in enumerate(arguments):
        block = llama_blocks(model)[index]
        with in_float32(block.module):
            moments = _moments(block, states, others, None if tokens is None else tokens[index])
            yield index, block, moments
            del moments
            for number, each in enumerate(states):
                states[number] = run_block(block.module, each, others)


def _moments(block: LlamaBlock, states: list[torch.Tensor], arguments: dict, tokens: dict[str, torch.Tensor] | None) -> Moments:
    sums: Moments = {}
    window, total = 0, sum(each.shape[1] for each in states)

    def watch(site: str):
        def see(_, inputs) -> None:
            x = inputs[0][0].float()
            if tokens is not None:
                x = x * tokens[site][window].sqrt()[:, None].to(x.device)
            if site in sums:
                sums[site].addmm_(x.t(), x, alpha=1 / total)
            else:
                sums[site] = (x.t() @ x).div_(total)

        return see

    handles = [readers_of(block, site)[0].register_forward_pre_hook(watch(site)) for site in SITES]
    try:
        for window, each in enumerate(states):  # noqa: B007  the hooks read it
            run_block(block.module, each, arguments)
    finally:
        for handle in handles:
            handle.remove()
    for site, moment in sums.items():
        if not torch.isfinite(moment.diagonal()).all():
            raise CompactMindError(
                f"{block.name}: the input of {'/'.join(SITES[site])} is NaN or infinite on calibration text: the weights of this layer or "
                "of one before it are damaged, download or make the model again"
            )
    return sums


# ---------------------------------------------------------------------------------------------------------------- allocation
def tables_of(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the embedding table and, where it has a table of its own, the head, by the names they have in a file."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    found = {names[id(table)]: table}
    if head.weight.data_ptr() != table.weight.data_ptr():
        found[names[id(head)]] = head
    return found


def _table_metric(
    model: PreTrainedModel, name: str, found: Sensitivity, damping: float
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return what an error of a table costs: pairs of a factor per row and one per column, whose products add up."""
    head = found.head_rows, inverse_factor(found.head_moment, damping).diagonal().reciprocal().square()
    embedding = found.frequency, found.embedding
    if len(tables_of(model)) == 1:
        return [head, embedding]
    return [embedding] if tables_of(model)[name] is model.get_input_embeddings() else [head]


def round_table(weight: torch.Tensor, grid: Grid, metric: list[tuple[torch.Tensor, torch.Tensor]] | None) -> Rounded:
    """Return a table (rows, channels) on its grid, each weight at its nearest level; scales are chosen by the mean row's metric."""
    importance = None if metric is None else sum(rows.mean() * columns for rows, columns in metric)
    return round_nearest(weight, grid, importance)


def _table_choices(weight: torch.Tensor, metric: list[tuple[torch.Tensor, torch.Tensor]]) -> list[Choice]:
    sample = slice(None, None, max(1, len(weight) // 4096))
    part, found = weight[sample].float(), []
    for grid in TABLE_GRIDS:
        error = (round_table(part, grid, metric).weight() - part).square()
        cost = 0.0
        for rows, columns in metric:
            share = rows[sample] * (rows.sum() / rows[sample].sum().clamp_min(1e-30))
            cost += 0.5 * float(share @ (error @ columns))
        found.append(Choice(grid, grid.stored_bits(weight.shape[1]) * len(weight), cost))
    return found


def choose_grids(
    model: PreTrainedModel, windows: torch.Tensor, recipe: GPTQRecipe, found: Sensitivity, budget_bytes: int,
    released: torch.dtype, uncounted: Sequence[str] = (),
) -> tuple[dict[str, Grid], float]:  # fmt: skip
    """Return the grid of every tensor by the name it has in a file, tables included, and the cost to expect, in nats a token.

    The file keeps to `budget_bytes`, with what stays as it is in the dtype `released`; tables named in `uncounted` take what the counted
    one does and are free. Raises CompactMindError if no widths do.
    """
    choices: dict[str, list[Choice]] = {}
    for index, block, moments in walk_blocks(model, windows, found.tokens):
        for site, readers in SITES.items():
            for field in readers:
                weight = getattr(block, field).weight
                costs = cost_of(weight, moments[site], found.rows[index][field], GRIDS, recipe.damping)
                choices[f"{block.name}.{LINEARS[field]}"] = [
                    Choice(grid, grid.stored_bits(weight.shape[1]) * len(weight), cost)
                    for grid, cost in zip(GRIDS, costs, strict=True)
                ]
    tables, fixed = tables_of(model), recipe.embeddings != AUTO
    for name, module in tables.items():
        if fixed or name in uncounted:
            continue
        choices[name] = _table_choices(module.weight, _table_metric(model, name, found, recipe.damping))
        for other in uncounted:  # what it costs there counts too
            more = _table_choices(tables[other].weight, _table_metric(model, other, found, recipe.damping))
            choices[name] = [each._replace(cost=each.cost + its.cost) for each, its in zip(choices[name], more, strict=True)]
    free = [name for name in tables if name in uncounted]
    taken = _bytes_beside(model, [*choices, *free], tables if fixed else {}, recipe.table, released.itemsize)
    picked = allocate(choices, int(budget_bytes - taken) * 8)
    grids = {name: choice.what for name, choice in picked.items()}
    if fixed:
        grids |= {name: recipe.table for name in tables if recipe.table}
    elif free:
        counted = next(name for name in tables if name not in uncounted)
        grids |= dict.fromkeys(free, grids[counted])
    return grids, sum(choice.cost for choice in picked.values())


def _bytes_beside(
    model: PreTrainedModel, chosen: Sequence[str], fixed: dict[str, nn.Module], table: Grid | None, itemsize: int
) -> int:
    """Return the bytes of the file that no choice decides: the head of the file, what stays as it is, tables of a fixed width."""
    size = 0
    for name, parameter in model.named_parameters():  # what is tied once
        owner, head = name.removesuffix(".weight"), HEADER + len(name)
        if owner in chosen:
            size += TENSORS_OF_A_WEIGHT * head
        elif owner in fixed and table:
            size += table.stored_bits(parameter.shape[1]) * len(parameter) // 8 + TENSORS_OF_A_WEIGHT * head
        else:
            size += parameter.numel() * itemsize + head
    return size


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
    show: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Make, in place, the linears of the blocks, the table and the head of a Llama integers; return what a loader and a manifest need.

    `windows` (windows, seq_len): calibration text. `released_bytes`: what a target_compression is a ratio of (0: this model's bytes) and
    `released` the dtype in which the file will have what stays as it is (None: the model's). Tables named in `uncounted` are free in it.
    Raises CompactMindError before anything is changed: a weight that is NaN or infinite, too little text, a quantized model, a target that
    no widths reach; a model whose quantization is interrupted is of no more use.
    """
    tables = _check(model, windows)
    released = released or model.dtype
    found = None
    if recipe.target_compression or (recipe.weigh_tokens and recipe.compensation):
        show("sensitivity ...")
        found = measure_sensitivity(
            model, windows if recipe.weigh_tokens and recipe.compensation else windows[:SENSITIVITY_WINDOWS]
        )
    grid, predicted = Grid(recipe.bits, recipe.group_size, recipe.zero), None
    grids = {f"{block.name}.{path}": grid for block in llama_blocks(model) for path in LINEARS.values()}
    grids |= {name: recipe.table for name in tables if recipe.table}
    if recipe.target_compression:
        show("allocation ...")
        whole = released_bytes or sum(each.numel() * released.itemsize for each in model.parameters())
        budget = int(whole / recipe.target_compression)
        grids, predicted = choose_grids(model, windows[:SENSITIVITY_WINDOWS], recipe, found, budget, released, uncounted)
    metrics = {name: _table_metric(model, name, found, recipe.damping) if found else None for name in tables}
    show("rounding ...")
    tokens = None
    if found and recipe.weigh_tokens:
        tokens = [{site: _sharpened(weights) for site, weights in each.items()} for each in found.tokens]
    for _, block, moments in walk_blocks(model, windows, tokens):
        for site, readers in SITES.items():
            factors = inverse_factor(moments[site], recipe.damping) if recipe.compensation and recipe.order == "index" else None
            for field in readers:
                name, linear = f"{block.name}.{LINEARS[field]}", getattr(block, field)
                if not recipe.compensation:
                    rounded = round_nearest(linear.weight, grids[name], moments[site].diagonal())
                elif factors is None:
                    rounded = round_compensated(linear.weight, moments[site], grids[name], recipe.damping, ordered=True)
                else:
                    rounded = round_compensated(linear.weight, moments[site], grids[name], recipe.damping, factor=factors)
                model.set_submodule(name, GroupedLinear(rounded.q, rounded.scale, rounded.zero, rounded.grid, linear.bias))
    _replace_tables(model, grids, metrics)
    whole = all(grid.divides(model.get_submodule(name).shape[1]) for name, grid in grids.items())
    return describe(recipe, grids, predicted, whole)


def _check(model: PreTrainedModel, windows: torch.Tensor) -> dict[str, nn.Module]:
    """Return the tables of a model; raises CompactMindError if it or the text is none to quantize by."""
    linears = {
        f"{block.name}.{path}": getattr(block, field) for block in llama_blocks(model) for field, path in LINEARS.items()
    }
    other = next((name for name, linear in linears.items() if not isinstance(linear, nn.Linear)), None)
    if other:
        raise CompactMindError(
            f"{other} is a {type(linears[other]).__name__}: the model is quantized already; give the dense one"
        )
    tables = tables_of(model)
    require_finite({**linears, **tables})
    widest = max(linear.in_features for linear in linears.values())
    if windows.numel() < TOKENS_PER_INPUT * widest:
        raise CompactMindError(
            f"{windows.numel()} tokens of calibration text are too few for linears of {widest} inputs, which want at least "
            f"{math.ceil(TOKENS_PER_INPUT * widest)}: more --calibration_windows, or a longer text"
        )
    return tables


def _sharpened(weights: torch.Tensor) -> torch.Tensor:
    weights = weights**SHARPNESS
    return weights / weights.mean().clamp_min(1e-30)


def _replace_tables(model: PreTrainedModel, grids: dict[str, Grid], metrics: dict[str, Any]) -> None:
    """Put, in place, integers where the table and the head were that have a grid; what is tied stays tied."""
    tables, embedding = tables_of(model), model.get_input_embeddings()
    for name, module in tables.items():
        if name not in grids:
            continue
        rounded = round_table(module.weight, grids[name], metrics[name])
        parts = rounded.q, rounded.scale, rounded.zero, rounded.grid
        if module is embedding:
            small = GroupedEmbedding(*parts)
            model.set_input_embeddings(small)
            if len(tables) == 1:
                model.set_output_embeddings(TiedHead(small))
        else:
            model.set_output_embeddings(GroupedLinear(*parts, module.bias))


def describe(recipe: GPTQRecipe, grids: dict[str, Grid], predicted: float | None, whole_groups: bool) -> dict[str, Any]:
    """Return what the manifest says: the grid of every tensor, whether its groups are all whole, and how they were chosen."""
    blocks = [grid for name, grid in grids.items() if name.startswith("model.layers.")]
    bits = Counter(grid.bits for grid in blocks)
    return {
        "method": "gptq" if recipe.compensation else "round to nearest",
        "bits": recipe.bits if not recipe.target_compression else {str(width): count for width, count in sorted(bits.items())},
        "granularity": "groups of a row, see tensors",
        "whole_groups": whole_groups,
        "target_compression": recipe.target_compression or None,
        "expected_kl": predicted,
        "order": recipe.order,
        "damping": recipe.damping,
        "weigh_tokens": recipe.weigh_tokens,
        "tensors": {
            name: {"bits": grid.bits, "group_size": grid.group_size, "zero": grid.zero} for name, grid in grids.items()
        },
    }
