"""What the inputs of a model's linears look like on calibration text: per-channel maxima, and a few rows of each.

Streaming: one window at a time, and what is kept does not grow with the number of windows.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from compactmind.errors import CompactMindError
from compactmind.methods.llama import LlamaBlock, llama_blocks

SITES = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}
"""Distinct inputs of a block -> the linears that read them."""


@dataclass
class InputStatistics:
    """What was seen at one input: `absmax` (channels,) over all tokens, `rows` (kept, channels) an even sample of the tokens."""

    absmax: torch.Tensor
    rows: torch.Tensor


@torch.no_grad()
def calibrate(model: PreTrainedModel, windows: torch.Tensor, rows: int = 256) -> list[dict[str, InputStatistics]]:
    """Return, per block and per site of SITES, the statistics of its input over `windows` (windows, seq_len).

    `rows` tokens are kept per site, evenly many of each window and at random places in it. The model is left in evaluation
    mode. Raises CompactMindError naming the layer if an input is
    NaN or infinite, or if there are no windows.
    """
    if len(windows) == 0:
        raise CompactMindError("there are no calibration windows: use more text, or a smaller --seq_len")
    blocks = llama_blocks(model)
    statistics: list[dict[str, InputStatistics]] = [{} for _ in blocks]
    picked = torch.empty(0, dtype=torch.long)  # the places to keep of the window that is being read
    model.eval()
    with ExitStack() as hooks:
        for block, seen in zip(blocks, statistics, strict=True):
            for site, readers in SITES.items():
                handle = _first_reader(block, readers).register_forward_pre_hook(_observer(block, site, seen, lambda: picked))
                hooks.callback(handle.remove)
        for index, window in enumerate(windows):
            count = min((index + 1) * rows // len(windows) - index * rows // len(windows), len(window))
            picked = torch.randperm(len(window), generator=torch.Generator().manual_seed(index))[:count].sort().values
            model.model(
                input_ids=window[None].to(model.device), use_cache=False
            )  # without the head: nobody reads its input here
    return statistics


def _first_reader(block: LlamaBlock, readers: tuple[str, ...]) -> nn.Module:
    return getattr(block, readers[0])


def _observer(block: LlamaBlock, site: str, seen: dict[str, InputStatistics], picked: Callable[[], torch.Tensor]):
    def observe(_, inputs) -> None:
        values = inputs[0].detach().flatten(0, -2).float()
        absmax = values.abs().amax(dim=0)
        if not torch.isfinite(absmax).all():
            channel = int((~torch.isfinite(absmax)).nonzero()[0])
            raise CompactMindError(
                f"{block.name}: the input of {'/'.join(SITES[site])} is NaN or infinite (channel {channel}) on calibration text: "
                f"the weights are damaged, or overflow in {inputs[0].dtype}; try --dtype float32"
            )
        kept = values[picked().to(values.device)]
        if site not in seen:
            seen[site] = InputStatistics(absmax, kept)
        else:
            seen[site] = InputStatistics(torch.maximum(seen[site].absmax, absmax), torch.cat([seen[site].rows, kept]))

    return observe
