"""Projections of a Llama re-fitted to the inputs that pruning leaves them, block by block.

Once inputs of a projection that writes to the residual stream are gone, its remaining columns are re-fitted so that the
stream behind it is as near to the dense model's as it can be on calibration text: least squares in closed form, held to the weights it
had by damping (SlimGPT, Ling et al. 2024, https://arxiv.org/abs/2412.18110, refits to the layer's own output; taking the error that
came in along is GPTAQ's idea, Li et al. 2025, https://arxiv.org/abs/2504.02692). Blocks are handled in order, each on the text as the
smaller blocks before it pass it on; at no time is more than one block's moments in memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import nn
from transformers import PreTrainedModel

from compactmind.methods.blockwise import Reached, SecondMoment, block_inputs, observe_block, observing
from compactmind.methods.llama import LlamaBlock

SMALLEST = 1e-3
"""Share of the mean that the median counts as at least, where most channels are silent."""


def refit(weight: torch.Tensor, moment: torch.Tensor, cross: torch.Tensor, keep: torch.Tensor, damping: float) -> torch.Tensor:
    """Return the weight (out, in) with pruned columns 0 and the kept ones W' such that W' x is nearest to what is wanted.

    moment: (in, in), mean of x x^T; cross: (out, in), mean of wanted x^T; keep: (in,) boolean. Minimises the mean of ||wanted - W' x||^2 +
    damping times the median of the channels' mean squares times ||W' - W||^2 over the kept columns: not their mean, which is that of a few
    outlier channels and would hold all others where they were. Computed in float64.
    """
    kept = keep.nonzero()[:, 0].to(weight.device)
    inner = moment.double() if keep.all() else moment[kept][:, kept].double()
    old = weight.double()[:, kept]
    left = cross.double()[:, kept].sub_(old @ inner)  # (out, kept): what the old columns leave unexplained
    squares = moment.diagonal().double()
    inner.diagonal().add_(damping * torch.maximum(squares.median(), SMALLEST * squares.mean()) + 1e-12)
    factor = torch.linalg.cholesky(inner, out=inner)
    result = torch.zeros_like(weight)
    result[:, kept] = old.add_(torch.cholesky_solve(left.t(), factor).t()).to(weight.dtype)
    return result


class DenseStates:
    """The residual stream of one model on one text behind every o_proj and down_proj, kept from one pruning to the next.

    A search prunes the same model many times: it then runs once. What would not fit into `limit_bytes` altogether is not kept at all.
    """

    def __init__(self, limit_bytes: int = 2_000_000_000):
        self.limit_bytes, self.blocks = limit_bytes, {}

    def keep(self, index: int, targets: dict[str, list[torch.Tensor]], count: int) -> None:
        """Keep what is behind block number `index` of `count`, {"o", "down"} -> a state per window."""
        size = sum(state.numel() * state.element_size() for states in targets.values() for state in states)
        if count * size <= self.limit_bytes:
            self.blocks[index] = targets


class BlockByBlock:
    """Runs a model on calibration text one block at a time, keeping only what passes between blocks: as the dense model has it, and as the
    smaller one has it so far."""

    def __init__(self, model: PreTrainedModel, windows: torch.Tensor, known: DenseStates | None = None):
        self.states, self.of_blocks = block_inputs(model, windows)
        self.arguments = self.of_blocks[0]  # of the block at hand: one with a sliding window has another mask
        self.targets: dict[str, list[torch.Tensor]] = {}
        self.known = known or DenseStates(0)
        self.dense_states = list(self.states)
        self.share = getattr(model.config, "residual_multiplier", 1.0)  # Granite adds only a share of what a block computes

    @torch.no_grad()
    def run_dense(self, block: LlamaBlock, number: int) -> None:
        """Let the dense model's states pass through block number `number`, still unchanged; what they are behind o and down is the aim."""
        self.arguments = self.of_blocks[number]
        if number in self.known.blocks:
            self.targets = self.known.blocks[number]
            self.dense_states = list(self.targets["down"])
            return
        self.targets = {"o": [], "down": []}
        for index, state in enumerate(self.dense_states):
            with _inputs_of(block.post_norm, end=False) as middle:
                self.dense_states[index] = observe_block(block.module, state, self.arguments)
            self.targets["o"].append(middle[0])
            self.targets["down"].append(self.dense_states[index])
        self.known.keep(number, self.targets, len(self.of_blocks))

    @torch.no_grad()
    def refit_output(self, block: LlamaBlock, keep: torch.Tensor, damping: float) -> None:
        """Re-fit, in place, o_proj to what `run_dense` found behind it, and let the states pass through it; keep: (in,) boolean."""
        moments, inputs = _Moments(block.o), []
        for state, target in zip(self.states, self.targets["o"], strict=True):
            with _inputs_of(block.o) as x, suppress(Reached):  # the rest of the block is not needed
                observe_block(block.module, state, self.arguments)
            moments.add(x[0], (target - state) / self.share)
            inputs.append(x[0])
        moments.refit(keep, damping)
        with observing(block.o.weight.device):
            self.states = [state + self.share * block.o(x) for state, x in zip(self.states, inputs, strict=True)]

    @torch.no_grad()
    def refit_down(self, block: LlamaBlock, damping: float) -> None:
        """Re-fit, in place, down_proj to what `run_dense` found behind it, and let the states pass through it."""
        moments, inputs = _Moments(block.down), []
        for state, target in zip(self.states, self.targets["down"], strict=True):
            with _inputs_of(block.down) as x, suppress(Reached), observing(state.device):
                block.module.mlp(block.post_norm(state))
            moments.add(x[0], (target - state) / self.share)
            inputs.append(x[0])
        moments.refit(torch.ones(block.down.in_features, dtype=torch.bool), damping)
        with observing(block.down.weight.device):
            self.states = [state + self.share * block.down(x) for state, x in zip(self.states, inputs, strict=True)]


class _Moments:
    """Means of x x^T and wanted x^T at a linear: x what goes in, wanted what should come out."""

    def __init__(self, linear: nn.Linear):
        self.linear, self.tokens = linear, 0
        self.moment = SecondMoment(linear.in_features, linear.weight.device)
        self.cross = torch.zeros(linear.out_features, linear.in_features, device=linear.weight.device)

    def add(self, x: torch.Tensor, wanted: torch.Tensor) -> None:
        if self.linear.bias is not None:
            wanted = wanted - self.linear.bias
        x, wanted = x.flatten(0, -2).float(), wanted.flatten(0, -2).float()
        self.moment.add(x)
        self.cross.addmm_(wanted.t(), x)
        self.tokens += len(x)

    def refit(self, keep: torch.Tensor, damping: float) -> None:
        """Give the linear, in place, the weights that `refit` finds."""
        weight = self.linear.weight
        weight.copy_(refit(weight, self.moment.whole().div_(self.tokens), self.cross.div_(self.tokens), keep, damping))


@contextmanager
def _inputs_of(module: nn.Module, end: bool = True) -> Iterator[list[torch.Tensor]]:
    """Inside the `with` block the input of `module` is appended to the list it gives; `end`: nothing behind it is computed."""
    seen: list[torch.Tensor] = []

    def catch(_, inputs):
        seen.append(inputs[0])
        if end:
            raise Reached

    handle = module.register_forward_pre_hook(catch)
    try:
        yield seen
    finally:
        handle.remove()
