"""A Llama block by block: what each block reads, and one block at a time in float32, so that memory holds one block and not a model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from compactmind.devices import mixed_precision
from compactmind.errors import CompactMindError
from compactmind.methods.llama import LlamaBlock, llama_blocks
from compactmind.methods.quantization.calibration import SITES, readers_of


@contextmanager
def in_float32(module: nn.Module) -> Iterator[None]:
    """Inside the `with` block the parameters of a module are in float32 without gradients; afterwards those it still has are as before."""
    before = [(parameter, parameter.data, parameter.requires_grad) for parameter in module.parameters()]
    for parameter, data, _ in before:
        parameter.requires_grad_(False)
        parameter.data = data.float()
    try:
        yield
    finally:
        for parameter, data, wanted in before:
            parameter.data = data
            parameter.requires_grad_(wanted)


@contextmanager
def _instead_of_blocks(model: PreTrainedModel, forward: Callable[[int], Callable]) -> Iterator[None]:
    """Inside the `with` block each decoder block does what `forward` of its number returns; the embeddings are float32."""
    blocks = llama_blocks(model)
    handle = model.get_input_embeddings().register_forward_hook(
        lambda _, __, output: output.float()
    )  # positions follow its dtype
    try:
        for index, block in enumerate(blocks):
            block.module.forward = forward(index)
        yield
    finally:
        handle.remove()
        for block in blocks:
            block.module.__dict__.pop("forward", None)


@torch.no_grad()
def block_inputs(model: PreTrainedModel, windows: torch.Tensor) -> tuple[list[torch.Tensor], list[dict[str, Any]]]:
    """Return what the first block reads of each of the `windows` (windows, seq_len), float32 (1, seq_len, channels) each, and every
    block's other arguments (masks, positions), which are the same for all windows."""
    states: list[torch.Tensor] = []
    arguments: list[dict[str, Any]] = [{} for _ in model.model.layers]

    def standing_in(index: int):
        def forward(hidden_states, **others):
            if index == 0:
                states.append(hidden_states.detach().clone())
            arguments[index] = others
            return hidden_states

        return forward

    with _instead_of_blocks(model, standing_in):
        for window in windows:
            model.model(input_ids=window[None].to(model.device), use_cache=False)
    return states, arguments


def logits_behind(model: PreTrainedModel, ids: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
    """Return the logits (1, tokens, vocabulary) of ids (1, tokens) whose last block has written (1, tokens, channels)."""
    with _instead_of_blocks(model, lambda _: lambda hidden_states, **__: written):
        return model(input_ids=ids.to(model.device), use_cache=False).logits


def run_block(block: nn.Module, states: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    """Return what a block makes of (1, seq_len, channels)."""
    output = block(states, **arguments)
    return output[0] if isinstance(output, tuple) else output


def observe_block(block: nn.Module, states: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    """As `run_block`, for text that is only observed: products in bf16 where `mixed_precision` says that, all else and the result float32.

    On CPUs that multiply bf16 a product takes half of the time, and what is made of it is as good (CHANGELOG.md).
    """
    with observing(states.device):
        return run_block(block, states, arguments).float()


def observing(device: torch.device, enabled: bool = True) -> torch.autocast:
    """Return the context in which products are as `observe_block` says; not `enabled`: in which they are float32 again."""
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled and mixed_precision() == "bf16")


class Reached(Exception):
    """Raised by a hook at the place behind which nothing of a block is needed."""


PARTS = 4
"""Strips of columns in which a second moment is summed: of its symmetric halves one is, and the diagonal's squares, 5/8 of the products."""


class SecondMoment:
    """The sum of x x^T over tokens, float32 (width, width)."""

    def __init__(self, width: int, device: torch.device):
        self.total = torch.zeros(width, width, device=device)
        size = -(-width // PARTS)
        self.strips = [slice(start, min(start + size, width)) for start in range(0, width, size)]

    def add(self, x: torch.Tensor, share: float = 1.0) -> None:
        """Add `share` of what the tokens x (tokens, width) make."""
        for strip in self.strips:
            self.total[strip.start :, strip].addmm_(x[:, strip.start :].t(), x[:, strip], alpha=share)

    def whole(self) -> torch.Tensor:
        """Return the sum itself, its other half filled in."""
        for strip in self.strips:
            self.total[strip, strip.stop :] = self.total[strip.stop :, strip].t()
        return self.total


Moments = dict[str, torch.Tensor]
"""Site of SITES -> weighted mean of x x^T of what its linears read, float32 (in, in)."""


@torch.no_grad()
def walk_blocks(
    model: PreTrainedModel, windows: torch.Tensor, tokens: Sequence[dict[str, torch.Tensor]] | None
) -> Iterator[tuple[int, LlamaBlock, Moments]]:
    """Yield every block in float32 with the moments of its inputs over `windows`; the next one reads what it then computes.

    Whoever walks may replace the linears of the block while it has it. `tokens`: weights by block and site, (windows, seq_len); None: all
    tokens alike.
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
                states[number] = observe_block(block.module, each, others)


def _moments(block: LlamaBlock, states: list[torch.Tensor], arguments: dict, tokens: dict[str, torch.Tensor] | None) -> Moments:
    sums: dict[str, SecondMoment] = {}
    window, total, last = 0, sum(each.shape[1] for each in states), list(SITES)[-1]

    def watch(site: str):
        def see(_, inputs) -> None:
            x = inputs[0][0].float()
            if tokens is not None:
                x = x * tokens[site][window].sqrt()[:, None].to(x.device)
            with observing(x.device, enabled=False):
                if site not in sums:
                    sums[site] = SecondMoment(x.shape[1], x.device)
                sums[site].add(x, 1 / total)
            if site == last:
                raise Reached

        return see

    handles = [readers_of(block, site)[0].register_forward_pre_hook(watch(site)) for site in SITES]
    try:
        for window, each in enumerate(states):  # noqa: B007  the hooks read it
            with suppress(Reached):
                observe_block(block.module, each, arguments)
    finally:
        for handle in handles:
            handle.remove()
    moments = {site: each.whole() for site, each in sums.items()}
    for site, moment in moments.items():
        if not torch.isfinite(moment.diagonal()).all():
            raise CompactMindError(
                f"{block.name}: the input of {'/'.join(SITES[site])} is NaN or infinite on calibration text: the weights of this layer or "
                "of one before it are damaged, download or make the model again"
            )
    return moments
