"""What the inputs of a model's linears look like on calibration text: per-channel maxima, and a few rows of each.

Streaming: one window at a time, and what is kept does not grow with the number of windows.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from compactmind.errors import CompactMindError
from compactmind.methods.llama import LINEARS, LlamaBlock, llama_blocks
from compactmind.methods.quantization.packed_model import require_finite
from compactmind.methods.quantization.tables import tables_of
from compactmind.precision import WidenedLinear

SITES = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}
"""Distinct inputs of a block -> the linears that read them."""


def readers_of(block: LlamaBlock, site: str) -> list[nn.Linear]:
    """Return the linears that read the input `site`."""
    return [getattr(block, name) for name in SITES[site]]


TOKENS_PER_INPUT = 0.25
"""So many tokens of calibration text for each input of the widest linear, at least: with fewer, what GPTQ sees is chance."""


def require_dense(model: PreTrainedModel) -> None:
    """Raise CompactMindError if a Llama is quantized already, or if a weight of it is NaN or infinite."""
    linears = {
        f"{block.name}.{path}": getattr(block, field) for block in llama_blocks(model) for field, path in LINEARS.items()
    }
    other = next((name for name, linear in linears.items() if type(linear) not in (nn.Linear, WidenedLinear)), None)
    if other:
        raise CompactMindError(
            f"{other} is a {type(linears[other]).__name__}: the model is quantized already; give the dense one"
        )
    require_finite({**linears, **tables_of(model)})


def require_text(model: PreTrainedModel, windows: torch.Tensor) -> None:
    """Raise CompactMindError if `windows` (windows, seq_len) are too little text to compensate the rounding of a Llama by."""
    widest = max(getattr(block, field).in_features for block in llama_blocks(model) for field in LINEARS)
    if windows.numel() < TOKENS_PER_INPUT * widest:
        raise CompactMindError(
            f"{windows.numel()} tokens of calibration text are too few for linears of {widest} inputs, which want at least "
            f"{math.ceil(TOKENS_PER_INPUT * widest)}: more --calibration_windows, or a longer text"
        )


ROWS = 64
"""Tokens kept per input: 256 gave the same alphas within a step, and took two fifths of the memory of SmolLM2's weights."""


@dataclass
class InputStatistics:
    """What was seen at one input.

    absmax (channels,): largest magnitude over all tokens; rows (kept, channels): an even sample of the tokens; row_weights (kept,):
    how much an error of what reads this input matters at that token. Where the output is added to the residual stream, that is
    1 / its root mean square there: the next norm divides by it, and some tokens are hundreds of times as large as others.
    """

    absmax: torch.Tensor
    rows: torch.Tensor
    row_weights: torch.Tensor

    def divided_by(self, scale: torch.Tensor) -> "InputStatistics":
        """Return the statistics of the input after its channels are divided by `scale` (channels,)."""
        return InputStatistics(self.absmax / scale, self.rows / scale, self.row_weights)


@torch.no_grad()
def calibrate(model: PreTrainedModel, windows: torch.Tensor, rows: int = ROWS) -> list[dict[str, InputStatistics]]:
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
            residual: dict[str, torch.Tensor] = {}
            for site, norm in (("o", block.input_norm), ("down", block.post_norm)):  # what their outputs are added to
                hooks.callback(norm.register_forward_pre_hook(_residual_watcher(residual, site)).remove)
            for site in SITES:
                observer = _observer(block, site, seen, residual, lambda: picked)
                hooks.callback(readers_of(block, site)[0].register_forward_pre_hook(observer).remove)
        for index, window in enumerate(windows):
            count = min((index + 1) * rows // len(windows) - index * rows // len(windows), len(window))
            picked = torch.randperm(len(window), generator=torch.Generator().manual_seed(index))[:count].sort().values
            model.model(
                input_ids=window[None].to(model.device), use_cache=False
            )  # without the head: nobody reads its input here
    return statistics


def _residual_watcher(residual: dict[str, torch.Tensor], site: str):
    def watch(_, inputs) -> None:
        residual[site] = inputs[0].detach().flatten(0, -2).float().square().mean(dim=-1).sqrt()

    return watch


def _observer(
    block: LlamaBlock, site: str, seen: dict[str, InputStatistics], residual: dict, picked: Callable[[], torch.Tensor]
):
    def observe(_, inputs) -> None:
        values = inputs[0].detach().flatten(0, -2).float()
        absmax = values.abs().amax(dim=0)
        if not torch.isfinite(absmax).all():
            channel = int((~torch.isfinite(absmax)).nonzero()[0])
            raise CompactMindError(
                f"{block.name}: the input of {'/'.join(SITES[site])} is NaN or infinite (channel {channel}, {inputs[0].dtype}) on "
                "calibration text: the weights of this layer or of one before it are damaged, download or make the model again"
            )
        index = picked().to(values.device)
        kept, weights = values[index], torch.ones(len(index), device=values.device)
        if site in residual:
            weights = 1 / residual[site][index].clamp(min=1e-6)
        if site in seen:
            before = seen[site]
            absmax = torch.maximum(before.absmax, absmax)
            kept, weights = torch.cat([before.rows, kept]), torch.cat([before.row_weights, weights])
        seen[site] = InputStatistics(absmax, kept, weights)

    return observe
