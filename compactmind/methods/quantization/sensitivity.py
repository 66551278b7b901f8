"""How much an error of a weight costs, in nats of KL to the model as it is: the second-order estimate that a bit allocation is made by.

A small change of a model's outputs costs half its square in the metric of Fisher: KL = 1/2 E[(g . dy)^2] with g the gradient of
-log p(y) at labels y drawn from the model's own prediction. For a linear layer y = W x and an error dW that is

    1/2 E[(g^T dW x)^2]  ~  1/2 sum_i E[g_i^2] dW_i (sum_t w_t x_t x_t^T / sum_t w_t) dW_i^T,    w_t = mean_i g_ti^2

(the Kronecker factors of K-FAC, Martens & Grosse 2015, https://arxiv.org/abs/1503.05671, the factor of the inputs weighted by the tokens'
gradients, without the correlation of outputs). The weights w_t also say on which tokens GPTQ should look: a few tokens of a Llama have
inputs hundreds of times as large as the others', and hardly any gradient.

One pass forward and one backward, block by block: of the gradients sums are kept, of the states what each block reads.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from compactmind.forward import logits_divisor
from compactmind.methods.blockwise import block_inputs, in_float32, run_block, walk_blocks
from compactmind.methods.llama import LINEARS, llama_blocks
from compactmind.methods.probe import Probe, require_finite
from compactmind.methods.quantization.calibration import SITES, readers_of
from compactmind.methods.quantization.gptq import inverse_factor, round_nearest
from compactmind.methods.quantization.grid import Grid

TOKENS_AT_ONCE = 64
"""Tokens whose logits exist at one time."""
RANGES = 4
"""Ranges tried for the scales of what is only measured."""
REFERENCE = Grid(3, 64)
"""What a tensor is rounded to when its cost is measured: far enough that what is fragile shows, not so far that all is lost."""
PROBE_TOKENS = 128
"""Tokens on which that is measured."""
ROWS = 48
"""Rows of a weight on which the cost of a grid is measured: an even sample tells the sum of all within a few percent."""
SHARPNESS = 0.5
"""Power of a token's weight in GPTQ: 1 trusts the gradients of few tokens too much, 0 looks at the largest inputs alone."""


@dataclass
class Gradients:
    """What the gradients of a model tell, over windows (windows, seq_len) of text."""

    tokens: list[dict[str, torch.Tensor]]
    """Per block and site of SITES: the weight of every token, float32 (windows, seq_len) with mean 1."""
    rows: list[dict[str, torch.Tensor]]
    """Per block and linear: mean squared gradient of every output, (out,)."""


@torch.no_grad()
def measure_gradients(model: PreTrainedModel, windows: torch.Tensor, seed: int = 0) -> Gradients:
    """Return how sensitive a dense model is by its gradients on `windows` (windows, seq_len) of text. The model stays as it is."""
    blocks, head, divisor = llama_blocks(model), model.get_output_embeddings().weight, logits_divisor(model)
    generator = torch.Generator(model.device).manual_seed(seed)
    names = list(LINEARS)
    energy = [{name: [] for name in names} for _ in blocks]
    rows: list[dict[str, torch.Tensor]] = [dict.fromkeys(names, 0.0) for _ in blocks]
    model.eval()
    for window in windows:
        (states,), arguments = block_inputs(model, window[None])
        reads = []
        for block, others in zip(blocks, arguments, strict=True):
            reads.append(states)
            with in_float32(block.module):
                states = run_block(block.module, states, others)
            require_finite(block.name, states)
        with in_float32(model.model.norm):
            last = states.requires_grad_()
            with torch.enable_grad():
                normed = model.model.norm(last)
            gradient = torch.empty_like(normed[0])
            for start in range(0, len(window), TOKENS_AT_ONCE):
                read = normed[0, start : start + TOKENS_AT_ONCE].detach() / divisor
                p = (read @ head.float().t()).softmax(dim=-1)
                require_finite("the prediction", p)
                drawn = torch.multinomial(p, 1, generator=generator)
                change = p.scatter_add_(1, drawn, -torch.ones_like(p[:, :1]))
                gradient[start : start + TOKENS_AT_ONCE] = change @ head.float() / divisor
            (gradient,) = torch.autograd.grad(normed, last, gradient[None])
        for index in reversed(range(len(blocks))):
            gradient = _backward(blocks[index], reads.pop(), arguments[index], gradient, energy[index], rows[index])
    count = windows.numel()
    tokens = []
    for seen in energy:
        sites = {site: sum(torch.stack(seen[name]) for name in readers) for site, readers in SITES.items()}
        tokens.append({site: weights / weights.mean().clamp_min(1e-30) for site, weights in sites.items()})
    return Gradients(tokens, [{name: total / count for name, total in each.items()} for each in rows])


def _backward(block, read, arguments, gradient, energy, rows) -> torch.Tensor:
    """Return the gradient at what a block read, given that at what it wrote; adds to `energy` and `rows` by linear, in place."""
    handles = []
    for name in LINEARS:

        def watch(_, __, output, name=name):
            def note(gradients):
                squared = gradients[0].square()
                energy[name].append(squared.mean(dim=-1))
                rows[name] = rows[name] + squared.sum(dim=0)

            output.register_hook(note)

        handles.append(getattr(block, name).register_forward_hook(watch))
    try:
        with torch.enable_grad(), in_float32(block.module):
            read = read.detach().requires_grad_()
            return torch.autograd.grad(run_block(block.module, read, arguments), read, gradient)[0]
    finally:
        for handle in handles:
            handle.remove()


# --------------------------------------------------------------------------------------------------------------- the costs
def sampled_rows(count: int) -> slice:
    """Return an even sample of at most about ROWS rows."""
    return slice(None, None, max(1, count // ROWS))


def _errors(weight: torch.Tensor, grids: Sequence[Grid], rows: torch.Tensor, columns: torch.Tensor) -> list[float]:
    """Return the squared rounding error of a weight (out, in) on each grid, counted by a factor per row and one per column.

    It is infinite on a grid that rows of this width cannot be on.
    """
    chosen = sampled_rows(len(weight))
    part, share = weight[chosen].float(), rows[chosen] * (rows.sum() / rows[chosen].sum().clamp_min(1e-30))

    def error(grid: Grid) -> float:
        if not grid.fits(weight.shape[1]):
            return math.inf
        return float(share @ ((round_nearest(part, grid, columns, RANGES).weight() - part).square() @ columns))

    return [error(grid) for grid in grids]


def gradient_cost(
    weight: torch.Tensor, moment: torch.Tensor, rows: torch.Tensor, grids: Sequence[Grid], damping: float
) -> list[float]:
    """Return what each grid would cost for a weight (out, in), in nats a token, by the gradients and if the rounding is compensated.

    `moment` (in, in) is that of the inputs, `rows` (out,) the mean squared gradient. An error of column j that is compensated costs
    error^2 / U[j, j]^2 (gptq.py): only the rounding has to be tried, not the compensation.
    """
    columns = inverse_factor(moment, damping).diagonal().reciprocal().square()
    return [0.5 * error for error in _errors(weight, grids, rows, columns)]


@torch.no_grad()
def gradient_costs(
    model: PreTrainedModel, windows: torch.Tensor, grids: Sequence[Grid], damping: float
) -> dict[tuple[int, str], list[float]]:
    """Return what `measured_costs` does, estimated by the gradients of `windows` (windows, seq_len)."""
    gradients, costs = measure_gradients(model, windows), {}
    for index, block, moments in walk_blocks(model, windows, gradients.tokens):
        for site, fields in SITES.items():
            for field in fields:
                rows = gradients.rows[index][field]
                costs[index, field] = gradient_cost(getattr(block, field).weight, moments[site], rows, grids, damping)
    return costs


@torch.no_grad()
def measured_costs(
    model: PreTrainedModel, windows: torch.Tensor, grids: Sequence[Grid], reference: Grid = REFERENCE,
    known: dict[str, float] | None = None,
) -> dict[tuple[int, str], list[float]]:
    """Return what each grid would cost for every linear of the blocks, by block and field: KL in nats a token.

    A grid costs its squared error at the output of the linear on `windows` (windows, seq_len), times what such an error costs: `known`,
    what `measured_sensitivities` returns of this model, or of the one it was made from and has the blocks and channels of; nothing known:
    measured now.
    """
    squares = _mean_squares(model, windows)
    known = known or measured_sensitivities(model, windows, reference, squares)
    costs = {}
    for index, block in enumerate(llama_blocks(model)):
        for site, fields in SITES.items():
            for field in fields:
                weight = getattr(block, field).weight
                errors = _errors(weight, grids, torch.ones(len(weight), device=weight.device), squares[index][site])
                costs[index, field] = [known[f"{block.name}.{LINEARS[field]}"] * error for error in errors]
    return costs


@torch.no_grad()
def measured_sensitivities(
    model: PreTrainedModel, windows: torch.Tensor, reference: Grid = REFERENCE, squares: list[dict[str, torch.Tensor]] | None = None
) -> dict[str, float]:
    """Return what a squared error at the output of every linear of the blocks costs, by its name in a file: KL in nats a token.

    One linear after the other is rounded to `reference`, and the first PROBE_TOKENS tokens of `windows` (windows, seq_len) are read; other
    errors cost in proportion. That an error is the same at every token, that it meets a softmax and that it is not small are in it, which
    an estimate by gradients does not know.
    """
    sensitivities: dict[str, float] = {}
    squares, sites = squares or _mean_squares(model, windows), {field: site for site, fields in SITES.items() for field in fields}
    probe = Probe(model, windows.flatten()[:PROBE_TOKENS])
    for index, block in enumerate(probe.blocks):
        columns = {field: squares[index][sites[field]] for field in LINEARS}
        rounded = ((field, round_nearest(getattr(block, field).weight, reference, columns[field], RANGES).weight()) for field in columns)
        for field, measured in zip(columns, probe.with_weights(index, rounded), strict=True):
            weight = getattr(block, field).weight
            (error,) = _errors(weight, [reference], torch.ones(len(weight), device=weight.device), columns[field])
            sensitivities[f"{block.name}.{LINEARS[field]}"] = measured / max(error, 1e-30)
    return sensitivities


def _mean_squares(model: PreTrainedModel, windows: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Return the mean square of every channel that linears read, by block and site."""
    squares: list[dict[str, torch.Tensor]] = []
    states, arguments = block_inputs(model, windows)
    for block, others in zip(llama_blocks(model), arguments, strict=True):
        seen: dict[str, torch.Tensor] = {}
        handles = [readers_of(block, site)[0].register_forward_pre_hook(_squares_watcher(seen, site)) for site in SITES]
        try:
            with in_float32(block.module):
                states = [run_block(block.module, each, others) for each in states]
        finally:
            for handle in handles:
                handle.remove()
        squares.append({site: total / windows.numel() for site, total in seen.items()})
    return squares


@torch.no_grad()
def measured_table_cost(model: PreTrainedModel, windows: torch.Tensor, tables: Sequence[nn.Module], reference: Grid) -> float:
    """Return the KL in nats a token, measured as in `measured_costs`, if `tables`, of the embeddings or the head or both, are rounded."""
    probe = Probe(model, windows.flatten()[:PROBE_TOKENS])
    before = [(table, table.weight.data) for table in tables]
    rounded = {data.data_ptr(): data for _, data in before}
    rounded = {place: round_nearest(data, reference, ranges=RANGES).weight().to(data.dtype) for place, data in rounded.items()}
    try:
        for table, data in before:
            table.weight.data = rounded[data.data_ptr()]
        (states,), _ = block_inputs(model, windows.flatten()[None, :PROBE_TOKENS])
        return probe.divergences(states, 0)[0]
    finally:
        for table, data in before:
            table.weight.data = data


def table_errors(weight: torch.Tensor, grids: Sequence[Grid]) -> list[float]:
    """Return the squared rounding error of a table (rows, channels) on each grid, on an even sample of its rows."""
    part = weight[:: max(1, len(weight) // 4096)].float()
    return [
        float((round_nearest(part, grid, ranges=RANGES).weight() - part).square().sum())
        if grid.fits(part.shape[1])
        else math.inf
        for grid in grids
    ]


def _squares_watcher(seen: dict[str, torch.Tensor], site: str):
    def watch(_, inputs) -> None:
        total = inputs[0][0].float().square().sum(dim=0)
        seen[site] = seen[site] + total if site in seen else total

    return watch
