"""A Llama block by block: what each block reads, and one block at a time in float32, so that memory holds one block and not a model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from compactmind.methods.llama import llama_blocks


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


@torch.no_grad()
def block_inputs(model: PreTrainedModel, windows: torch.Tensor) -> tuple[list[torch.Tensor], list[dict[str, Any]]]:
    """Return what the first block reads of each of the `windows` (windows, seq_len), float32 (1, seq_len, channels) each, and every
    block's other arguments (masks, positions), which are the same for all windows."""
    blocks, states = llama_blocks(model), []
    arguments: list[dict[str, Any]] = [{} for _ in blocks]

    def standing_in(index: int):
        def forward(hidden_states, **others):
            if index == 0:
                states.append(hidden_states.detach().clone())
            arguments[index] = others
            return hidden_states

        return forward

    handle = model.get_input_embeddings().register_forward_hook(
        lambda _, __, output: output.float()
    )  # positions follow its dtype
    try:
        for index, block in enumerate(blocks):
            block.module.forward = standing_in(index)
        for window in windows:
            model.model(input_ids=window[None].to(model.device), use_cache=False)
    finally:
        handle.remove()
        for block in blocks:
            block.module.__dict__.pop("forward", None)
    return states, arguments


def run_block(block: nn.Module, states: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    """Return what a block makes of (1, seq_len, channels)."""
    output = block(states, **arguments)
    return output[0] if isinstance(output, tuple) else output
