"""Which heads and neurons are kept so that the model costs no more than a budget: milliseconds of a batch, or operations.

Sparsity says little of time: a head less may free nothing, half the FFN a third. Here a table says what the attention of a layer costs
with every number of heads and its FFN with every width, measured on the machine (evaluation/cost_table.py), and among all choices
that fit, the one with the least importance removed is taken. Nothing left of an attention or FFN is a choice like any other, the one that
frees most: so depth is pruned along with width. The choice is a knapsack with one item per attention and per FFN, solved by dynamic
programming over the cost, as in ZipLM (Kurtic et al. 2023, https://arxiv.org/abs/2302.04089); there the importance is a layer-wise error,
here the first-order loss change that gradual pruning has anyway.
"""

from dataclasses import dataclass

import numpy
import torch
from transformers import PreTrainedModel

from compactmind.methods.pruning.encoder import encoder_layers
from compactmind.methods.pruning.importance import LayerScores, head_parameters, neuron_parameters
from compactmind.methods.pruning.masks import LayerMask

BUCKETS = 4000
"""Steps the budget is divided into: costs are rounded up to them, so that a choice never exceeds it."""


@dataclass(frozen=True)
class CostTable:
    """What the parts of an encoder cost, in any one unit; every layer of it is as wide as the others before pruning."""

    unit: str
    """ms or GFLOPs, with what it is of."""
    rest: float
    """All that pruning leaves: embeddings, norms, the head of the classifier."""
    heads: tuple[float, ...]
    """Attention of one layer with 0, 1, 2 ... heads; the first is 0, and none is below the one before."""
    neurons: tuple[tuple[int, float], ...]
    """Some widths of an FFN, rising from 0, with their cost; between them it is a straight line."""

    def of_neurons(self, width: int) -> float:
        """Return the cost of one FFN of some width."""
        return float(numpy.interp(width, *zip(*self.neurons, strict=True)))

    def of(self, heads: list[int], neurons: list[int]) -> float:
        """Return the cost of a model with so many heads and neurons per layer."""
        return self.rest + sum(self.heads[each] for each in heads) + sum(self.of_neurons(each) for each in neurons)

    def of_masks(self, masks: list[LayerMask]) -> float:
        """Return the cost of what masks leave."""
        return self.of([int(mask.heads.sum()) for mask in masks], [int(mask.neurons.sum()) for mask in masks])


@dataclass
class _Choice:
    """What may become of one attention or FFN: from everything to nothing, the least important structures gone first."""

    mask: torch.Tensor  # (structures,) bool, a view: what is chosen is written into it
    groups: list[torch.Tensor]  # structures that go together, in the order in which they go
    losses: list[float]  # importance removed once 0, 1, 2 ... groups are gone
    costs: list[float]  # cost of what is left then


def choose_masks_within(
    model: PreTrainedModel, scores: list[LayerScores], masks: list[LayerMask], table: CostTable, budget: float, round_to: int = 1
) -> list[LayerMask]:
    """Return smaller masks: among all that cost at most `budget` by `table`, those that remove the least importance.

    `scores` are importance per parameter, as in `choose_masks`; neurons go in groups of `round_to`, so that widths stay multiples of it. A
    layer may lose all its heads or neurons; the most important head of the model stays, or no token would see another. Raises ValueError
    if the budget cannot be met.
    """
    masks = [LayerMask(mask.heads.clone(), mask.neurons.clone()) for mask in masks]
    choices = _choices(model, scores, masks, table, round_to)
    left = budget - table.rest
    least = sum(choice.costs[-1] for choice in choices)
    if left < least:
        raise ValueError(f"a model of {budget:.4g} {table.unit} cannot be reached: at least {table.rest + least:.4g} is left")
    for choice, gone in zip(choices, _solve(choices, left), strict=True):
        for group in choice.groups[:gone]:
            choice.mask[group] = False
    return masks


def _choices(
    model: PreTrainedModel, scores: list[LayerScores], masks: list[LayerMask], table: CostTable, round_to: int
) -> list[_Choice]:
    layers, choices = encoder_layers(model), []
    worth = [
        (score.heads * head_parameters(layer), score.neurons * neuron_parameters(layer))
        for layer, score in zip(layers, scores, strict=True)
    ]  # importance of the structures themselves, which adds up
    most = [heads[mask.heads].max().item() if mask.heads.any() else -1.0 for mask, (heads, _) in zip(masks, worth, strict=True)]
    best = max(range(len(most)), key=most.__getitem__)  # the layer of the most important head
    for index, (mask, (heads, neurons)) in enumerate(zip(masks, worth, strict=True)):
        for part, values, size, cost in (
            (mask.heads, heads, 1, lambda left: table.heads[left]),
            (mask.neurons, neurons, round_to, table.of_neurons),
        ):
            alive = part.nonzero().flatten()
            ranked = alive[values[alive].argsort(stable=True)]
            odd = len(ranked) % size  # a width that is no multiple yet: its remainder goes first
            groups = [group for group in (ranked[:odd], *ranked[odd:].split(size)) if len(group)]
            if part is mask.heads and index == best and groups:
                groups.pop()
            losses, costs, left = [0.0], [cost(len(alive))], len(alive)
            for group in groups:
                left -= len(group)
                losses.append(losses[-1] + values[group].sum().item())
                costs.append(cost(left))
            choices.append(_Choice(part, groups, losses, costs))
    return choices


def _solve(choices: list[_Choice], budget: float) -> list[int]:
    """Return how many groups of each choice go: the least loss whose cost is within the budget, to a bucket of it per choice."""
    free = sum(choice.costs[-1] for choice in choices)  # what even the least costs: buckets divide what is above it
    size = max((budget - free) / BUCKETS, 1e-12)
    needs = [
        [int(min(numpy.ceil((cost - choice.costs[-1]) / size - 1e-9), BUCKETS + 1)) for cost in choice.costs] for choice in choices
    ]
    best, taken = numpy.zeros(BUCKETS + 1), []
    for choice, need in zip(choices, needs, strict=True):
        options = numpy.full((len(need), BUCKETS + 1), numpy.inf)
        for gone, buckets in enumerate(need):
            if buckets <= BUCKETS:
                options[gone, buckets:] = best[: BUCKETS + 1 - buckets] + choice.losses[gone]
        taken.append(options.argmin(axis=0))
        best = options.min(axis=0)
    bucket, chosen = BUCKETS, []
    for take, need in zip(reversed(taken), reversed(needs), strict=True):
        chosen.append(int(take[bucket]))
        bucket -= need[chosen[-1]]
    return chosen[::-1]
