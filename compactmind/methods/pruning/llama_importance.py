"""How much each FFN channel and each key-value group of a Llama matters.

A structure is read in one place: channel j by column j of down_proj, group g by its columns of o_proj. With x the input there, W the
weight, m a mask on the input that is 1 for all:

taylor      sum over tokens of (dL/dm)^2, the squared first-order change of the loss when m goes from 1 to 0 at that token. Molchanov
            et al. 2019 (https://arxiv.org/abs/1906.10771). dL/dm is x times dL/dx, for a group summed over its columns before it is
            squared: so no gradient of a weight is ever computed or stored
activation  ||x_j|| ||W_j||: weight times input norm, as in Wanda (Sun et al. 2023, https://arxiv.org/abs/2306.11695)
variance    var(x_j) ||W_j||^2: FLAP's (An et al. 2024, https://arxiv.org/abs/2312.11983): a constant input can be made up for
l2          norm of the structure's weights, all of them: the classical one, and the worst for language models
random      uniform noise: the control every criterion has to beat

A group of several columns, or a structure of several matrices (l2), is put together by `aggregate`.
"""

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from compactmind.devices import mixed_precision
from compactmind.errors import CompactMindError
from compactmind.methods.blockwise import block_inputs, logits_behind, run_block
from compactmind.methods.llama import LlamaBlock, llama_blocks, stream_norms
from compactmind.methods.retraining.loss import token_loss
from compactmind.precision import widened

CRITERIA = ("taylor", "activation", "variance", "l2", "random")
AGGREGATES = ("sum", "mean", "max")


@dataclass
class BlockScores:
    """Importance of one block's structures: the larger, the more it matters."""

    channels: torch.Tensor  # (intermediate_size,)
    groups: torch.Tensor  # (num_key_value_heads,)


def score(
    model: PreTrainedModel, criterion: str, windows: torch.Tensor | None = None, *, aggregate: str = "sum", seed: int = 0
) -> list[BlockScores]:
    """Return the scores of every block; `windows` (windows, seq_len) of text are needed by all criteria but l2 and random.

    The model is unchanged. One window is in memory at a time. Raises ValueError on an unknown criterion or aggregate,
    CompactMindError without windows or if a score is not a number.
    """
    for value, choices, name in ((criterion, CRITERIA, "criterion"), (aggregate, AGGREGATES, "aggregate")):
        if value not in choices:
            raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(choices)}")
    blocks = llama_blocks(model)
    if criterion == "random":
        generator = torch.Generator().manual_seed(seed)
        rand = lambda count: torch.rand(count, generator=generator)  # noqa: E731
        return [BlockScores(rand(block.up.out_features), rand(block.k.out_features // block.head_dim)) for block in blocks]
    if criterion == "l2":
        return [_l2(block, aggregate) for block in blocks]
    if windows is None or len(windows) == 0:
        raise CompactMindError(f"criterion {criterion} needs calibration text: use more text or a smaller --seq_len")
    if criterion == "taylor":
        with widened(model):
            scores = _taylor(model, blocks, windows)
    else:
        scores = [
            BlockScores(channels, _together(of_o.view(-1, block.groups * block.head_dim).t(), aggregate))
            for block, (channels, of_o) in zip(blocks, _activation(model, blocks, windows, criterion), strict=True)
        ]
    for block, block_scores in zip(blocks, scores, strict=True):
        if not (torch.isfinite(block_scores.channels).all() and torch.isfinite(block_scores.groups).all()):
            raise CompactMindError(f"{block.name}: scores are not numbers: the weights are damaged, make the model again")
    return scores


def _together(parts: torch.Tensor, aggregate: str) -> torch.Tensor:
    """Return (structures,) of (parts, structures)."""
    return {"sum": parts.sum(dim=0), "mean": parts.mean(dim=0), "max": parts.amax(dim=0)}[aggregate]


@torch.no_grad()
def _l2(block: LlamaBlock, aggregate: str) -> BlockScores:
    """Norm of each structure in each matrix it has a part of, put together."""
    channels = [
        block.gate.weight.float().norm(dim=1),
        block.up.weight.float().norm(dim=1),
        block.down.weight.float().norm(dim=0),
    ]
    size, of_queries = block.head_dim, block.groups * block.head_dim
    groups = [block.q.weight.float().view(-1, of_queries * block.q.in_features).norm(dim=1)]
    groups += [linear.weight.float().view(-1, size * linear.in_features).norm(dim=1) for linear in (block.k, block.v)]
    groups.append(block.o.weight.float().t().reshape(-1, of_queries * block.o.out_features).norm(dim=1))
    return BlockScores(_together(torch.stack(channels), aggregate).cpu(), _together(torch.stack(groups), aggregate).cpu())


def _taylor(model: PreTrainedModel, blocks: list[LlamaBlock], windows: torch.Tensor) -> list[BlockScores]:
    """Return x dL/dx at the inputs of down_proj and o_proj, summed per structure, squared, summed over tokens.

    The gradient goes back block by block, each computed again from what it read: a third more time, and the activations of one block
    instead of all. In bf16 where `mixed_precision` says that (fp16 has no range for it: float32); sums are float32.
    """
    device = model.device
    scores = [
        BlockScores(
            torch.zeros(block.down.in_features, device=device),
            torch.zeros(block.k.out_features // block.head_dim, device=device),
        )
        for block in blocks
    ]
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        for window in windows.to(device):
            with torch.autocast(device.type, torch.bfloat16, enabled=mixed_precision() == "bf16"):
                _taylor_of_window(model, blocks, window[None], scores)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    return [BlockScores(block_scores.channels.cpu(), block_scores.groups.cpu()) for block_scores in scores]


def _taylor_of_window(model: PreTrainedModel, blocks: list[LlamaBlock], window: torch.Tensor, scores: list[BlockScores]) -> None:
    """Add, in place, what a window (1, seq_len) says of every block."""
    (state,), arguments = block_inputs(model, window[:, :-1])
    states = [state]
    for block, others in zip(blocks, arguments, strict=True):
        with torch.no_grad():
            states.append(run_block(block.module, states[-1], others))
    with torch.enable_grad():
        last = states.pop().requires_grad_(True)
        logits = logits_behind(model, window[:, :-1], last)[0]
        token_loss(logits, None, window[0, 1:], temperature=1.0, alpha=0.0).backward()
    gradient = last.grad
    for block, others, block_scores in zip(reversed(blocks), reversed(arguments), reversed(scores), strict=True):
        gradient = _taylor_of_block(block, states.pop(), others, gradient, block_scores)


@torch.enable_grad()
def _taylor_of_block(
    block: LlamaBlock, state: torch.Tensor, arguments: dict, gradient: torch.Tensor, block_scores: BlockScores
) -> torch.Tensor:
    """Add, in place, what one window says of a block; return dL/d(its input) of `gradient`, dL/d(its output)."""

    def watch(total: torch.Tensor, columns: int):
        def before(_, inputs):
            value = inputs[0].detach()  # a hook that knows the tensor it hangs on keeps it, and all before it, for ever

            def backward(gradient) -> None:
                change = (gradient.float() * value).flatten(0, -2)  # (tokens, channels)
                total.add_(change.unflatten(-1, (-1, columns)).sum(dim=-1).square().sum(dim=0))

            inputs[0].register_hook(backward)

        return before

    state.requires_grad_(True)
    with ExitStack() as hooks:
        for linear, hook in (
            (block.down, watch(block_scores.channels, 1)),
            (block.o, watch(block_scores.groups, block.groups * block.head_dim)),
        ):
            hooks.callback(linear.register_forward_pre_hook(hook).remove)
        run_block(block.module, state, arguments).backward(gradient)
    return state.grad


@torch.no_grad()
def _activation(
    model: PreTrainedModel, blocks: list[LlamaBlock], windows: torch.Tensor, criterion: str
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return per block the score of every input channel of down_proj and of o_proj."""
    linears = [linear for block in blocks for linear in (block.down, block.o)]
    sums, squares = ([torch.zeros(x.in_features, dtype=torch.float64) for x in linears] for _ in range(2))
    with ExitStack() as hooks:
        for index, linear in enumerate(linears):

            def observe(_, inputs, index=index):
                x = inputs[0].detach().flatten(0, -2).float()
                sums[index] += x.sum(dim=0).double().cpu()
                squares[index] += x.square().sum(dim=0).double().cpu()

            hooks.callback(linear.register_forward_pre_hook(observe).remove)
        for window in windows:
            model.model(input_ids=window[None].to(model.device), use_cache=False)
    tokens, scores = windows.numel(), []
    for linear, total, square in zip(linears, sums, squares, strict=True):
        norm = linear.weight.float().norm(dim=0).double().cpu()
        if criterion == "activation":
            scores.append((square.sqrt() * norm).float())
        else:
            scores.append(((square / tokens - (total / tokens).square()).clamp(min=0) * norm.square()).float())
    return list(zip(scores[::2], scores[1::2], strict=True))


@torch.no_grad()
def block_influence(model: PreTrainedModel, windows: torch.Tensor) -> torch.Tensor:
    """Return 1 - cos(input, output) of every block, mean over the tokens of `windows`: (blocks,).

    ShortGPT's measure (Men et al. 2024, https://arxiv.org/abs/2403.03853): a block that hardly turns the residual stream can go.
    """
    watched = [
        *model.model.layers,
        model.model.norm,
    ]  # what reads the stream before the first block, between blocks, after the last
    totals = torch.zeros(len(watched) - 1, dtype=torch.float64)
    states: list[torch.Tensor] = []
    with ExitStack() as hooks:
        for module in watched:
            hook = module.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0][0].float()))
            hooks.callback(hook.remove)
        for window in windows:
            states.clear()
            model.model(input_ids=window[None].to(model.device), use_cache=False)
            for index, (before, after) in enumerate(zip(states[:-1], states[1:], strict=True)):
                totals[index] += (1 - torch.cosine_similarity(before, after, dim=-1)).mean().double().cpu()
    return totals / len(windows)


@torch.no_grad()
def hidden_importance(model: PreTrainedModel, windows: torch.Tensor) -> torch.Tensor:
    """Return the mean magnitude of every channel of the residual stream behind its norms, summed over the norms: (hidden_size,).

    Minitron's measure (Muralidharan et al. 2024, https://arxiv.org/abs/2407.14679): what the linears that read the stream get of it.
    """
    norms = stream_norms(model)
    total = torch.zeros(model.config.hidden_size, dtype=torch.float64)

    def add(_, __, output) -> None:
        total.add_(output.float().abs().flatten(0, -2).mean(dim=0).double().cpu())

    with ExitStack() as hooks:
        for norm in norms:
            hooks.callback(norm.register_forward_hook(add).remove)
        for window in windows:
            model.model(input_ids=window[None].to(model.device), use_cache=False)
    return (total / len(windows)).float()
