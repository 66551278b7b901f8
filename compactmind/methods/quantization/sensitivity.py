"""How much an error of a weight costs, in nats of KL to the model as it is: the second-order estimate that a bit allocation is made by.

A small change of a model's outputs costs half its square in the metric of Fisher: KL = 1/2 E[(g . dy)^2] with g the gradient of
-log p(y) at labels y drawn from the model's own prediction. For a linear layer y = W x and an error dW that is

    1/2 E[(g^T dW x)^2]  ~  1/2 sum_i E[g_i^2] dW_i (sum_t w_t x_t x_t^T / sum_t w_t) dW_i^T,    w_t = mean_i g_ti^2

(the Kronecker factors of K-FAC, Martens & Grosse 2015, https://arxiv.org/abs/1503.05671, the factor of the inputs weighted by the tokens'
gradients, without the correlation of outputs). The weights w_t also say on which tokens GPTQ should look: a few tokens of a Llama have
inputs hundreds of times as large as the others', and hardly any gradient.

One pass forward and one backward, block by block: of the gradients sums are kept, of the states what each block reads.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from compactmind.methods.llama import LINEARS, llama_blocks
from compactmind.methods.quantization.blockwise import block_inputs, in_float32, run_block
from compactmind.methods.quantization.calibration import SITES
from compactmind.methods.quantization.gptq import inverse_factor, round_nearest
from compactmind.methods.quantization.grid import Grid

TOKENS_AT_ONCE = 64
"""Tokens whose logits exist at one time."""
ROWS = 128
"""Rows of a weight on which the cost of a grid is measured: an even sample tells the sum of all within a few percent."""
SHARPNESS = 0.5
"""Power of a token's weight in GPTQ: 1 trusts the gradients of few tokens too much, 0 looks at the largest inputs alone."""


@dataclass
class Sensitivity:
    """What the gradients of a model tell, over windows (windows, seq_len) of text."""

    tokens: list[dict[str, torch.Tensor]]
    """Per block and site of SITES: the weight of every token, float32 (windows, seq_len) with mean 1."""
    rows: list[dict[str, torch.Tensor]]
    """Per block and linear: mean squared gradient of every output, (out,)."""
    head_rows: torch.Tensor
    """The same of the logits, from the model's own probabilities: mean of p - p^2, (vocabulary,)."""
    head_moment: torch.Tensor
    """Mean of x x^T of what the head reads, (channels, channels)."""
    embedding: torch.Tensor
    """Mean squared gradient of the embeddings' output, (channels,)."""
    frequency: torch.Tensor
    """Share of every token among the windows', (vocabulary,)."""


@torch.no_grad()
def measure_sensitivity(model: PreTrainedModel, windows: torch.Tensor, seed: int = 0) -> Sensitivity:
    """Return how sensitive a dense model is, from `windows` (windows, seq_len) of calibration text. The model stays as it is."""
    blocks, head = llama_blocks(model), model.get_output_embeddings().weight
    generator = torch.Generator(model.device).manual_seed(seed)
    names = list(LINEARS)
    energy = [{name: [] for name in names} for _ in blocks]
    rows: list[dict[str, torch.Tensor]] = [dict.fromkeys(names, 0.0) for _ in blocks]
    head_rows, moment, embedding = torch.zeros(len(head), device=head.device), 0.0, 0.0
    model.eval()
    for window in windows:
        (states,), arguments = block_inputs(model, window[None])
        reads = []
        for block, others in zip(blocks, arguments, strict=True):
            reads.append(states)
            with in_float32(block.module):
                states = run_block(block.module, states, others)
        with in_float32(model.model.norm):
            last = states.requires_grad_()
            with torch.enable_grad():
                normed = model.model.norm(last)
            gradient = torch.empty_like(normed[0])
            for start in range(0, len(window), TOKENS_AT_ONCE):
                read = normed[0, start : start + TOKENS_AT_ONCE].detach()
                p = (read @ head.float().t()).softmax(dim=-1)
                drawn = torch.multinomial(p, 1, generator=generator)
                head_rows += (p - p.square()).sum(dim=0)
                gradient[start : start + TOKENS_AT_ONCE] = p.scatter_add_(1, drawn, -torch.ones_like(p[:, :1])) @ head.float()
            moment = moment + normed[0].detach().t() @ normed[0].detach()
            (gradient,) = torch.autograd.grad(normed, last, gradient[None])
        for index in reversed(range(len(blocks))):
            gradient = _backward(blocks[index], reads.pop(), arguments[index], gradient, energy[index], rows[index])
        embedding = embedding + gradient[0].square().sum(dim=0)
    count = windows.numel()
    tokens = []
    for seen in energy:
        sites = {site: sum(torch.stack(seen[name]) for name in readers) for site, readers in SITES.items()}
        tokens.append({site: weights / weights.mean().clamp_min(1e-30) for site, weights in sites.items()})
    frequency = torch.bincount(windows.flatten(), minlength=len(head)).float() / count
    return Sensitivity(
        tokens, [{name: total / count for name, total in each.items()} for each in rows],
        head_rows / count, moment / count, embedding / count, frequency.to(head.device),
    )  # fmt: skip


def _backward(block, read, arguments, gradient, energy, rows) -> torch.Tensor:
    """Return the gradient at what a block read, given that at what it wrote; adds to `energy` and `rows` by linear, in place."""
    handles = []
    for name in LINEARS:

        def watch(_, __, output, name=name):
            def note(found):
                squared = found[0].square()
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


# --------------------------------------------------------------------------------------------------------------- the cost
def sampled_rows(count: int) -> slice:
    """Return an even sample of at most about ROWS rows."""
    return slice(None, None, max(1, count // ROWS))


def cost_of(weight: torch.Tensor, moment: torch.Tensor, rows: torch.Tensor, grids: list[Grid], damping: float) -> list[float]:
    """Return what each grid would cost for a weight (out, in), in nats a token, if the rounding is compensated.

    `moment` (in, in) is that of the inputs, `rows` (out,) the mean squared gradient. An error of column j that is compensated costs
    error^2 / U[j, j]^2 (gptq.py): only the rounding has to be tried, not the compensation.
    """
    importance = inverse_factor(moment, damping).diagonal().reciprocal().square()
    chosen = sampled_rows(len(weight))
    part, share = weight[chosen].float(), rows[chosen] * (rows.sum() / rows[chosen].sum().clamp_min(1e-30))
    return [
        0.5 * float(share @ ((round_nearest(part, grid, importance).weight() - part).square() @ importance)) for grid in grids
    ]
