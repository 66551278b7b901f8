"""What every width of every block of a Llama costs, measured: what scope `measured` decides by how much to prune where.

The FFN or the attention of one block at a time is cut to a width, what has the lowest scores first, its projection is re-fitted to what is
left, and KL to the model as it is is measured on a few tokens of text (compactmind/methods/probe.py). Between the widths that are tried it
is interpolated. The losses of parts are taken to add up, and an integer program chooses the widths (compactmind/methods/allocation.py), as
ZipLM does with the error of each layer's output (Kurtic et al. 2023, https://arxiv.org/abs/2302.04089).
"""

from collections.abc import Sequence
from itertools import accumulate

import numpy
import torch
from transformers import PreTrainedModel

from compactmind.methods.allocation import Choice, allocate, least_size
from compactmind.methods.blockwise import walk_blocks
from compactmind.methods.llama import LlamaBlock, llama_blocks
from compactmind.methods.probe import Probe
from compactmind.methods.pruning.llama_compensation import refit
from compactmind.methods.pruning.llama_importance import BlockScores
from compactmind.methods.pruning.llama_structure import channel_parameters, columns_of_o, group_parameters

PROBE_TOKENS = 256
"""Tokens on which a cut is measured."""
WINDOWS = 16
"""Windows of text at most that projections are re-fitted on for it."""
TRIED = 6
"""Widths of an FFN that are tried, beside the one it has."""

Losses = list[dict[str, list[list[float]]]]
"""Per block, structure -> [[how many are kept, nats a token], ...] from all of them to the fewest."""


@torch.no_grad()
def measured_losses(
    model: PreTrainedModel, scores: Sequence[BlockScores], windows: torch.Tensor, structures: Sequence[str], round_to: int,
    damping: float | None,
) -> Losses:  # fmt: skip
    """Return what cuts of every block cost; the model stays as it is.

    `windows`: (windows, seq_len) of text; `damping`: of re-fitting, see PruneRecipe, None: nothing is re-fitted. No block is emptied.
    """
    probe, losses = Probe(model, windows.flatten()[:PROBE_TOKENS]), []
    for index, block, moments in walk_blocks(model, windows[:WINDOWS], None):
        of_block: dict[str, list[list[float]]] = {}
        if "channels" in structures:
            of_block["channels"] = _losses(
                probe, index, "down", scores[index].channels, moments["down"], _widths(len(scores[index].channels), round_to), damping
            )
        if "groups" in structures:
            count = len(scores[index].groups)
            by_column = columns_of_o(block, scores[index].groups)
            each = len(by_column) // count
            of_block["groups"] = [
                [kept // each, nats]
                for kept, nats in _losses(
                    probe, index, "o", by_column, moments["o"], [each * kept for kept in range(count - 1, 0, -1)], damping
                )
            ]
        losses.append(of_block)
    return losses


def _widths(width: int, round_to: int) -> list[int]:
    """Return the widths below `width` that are tried: about TRIED multiples of `round_to`, evenly, the least one among them."""
    below = list(range((width - 1) // round_to * round_to, 0, -round_to))
    places = numpy.linspace(0, len(below) - 1, min(TRIED, len(below))).round().astype(int) if below else []
    return [below[place] for place in dict.fromkeys(places)]


def _losses(
    probe: Probe, index: int, field: str, scores: torch.Tensor, moment: torch.Tensor, widths: Sequence[int], damping: float | None
) -> list[list[float]]:
    """Return [[columns kept, nats], ...] of a projection of which the columns with the lowest scores go; never less for fewer."""
    weight, order = getattr(probe.blocks[index], field).weight, scores.argsort(descending=True)

    def left(kept: int) -> torch.Tensor:
        keep = torch.zeros(len(scores), dtype=torch.bool)
        keep[order[:kept]] = True
        return weight * keep.to(weight.device) if damping is None else refit(weight, moment, weight.float() @ moment, keep, damping)

    costs = probe.with_weights(index, ((field, left(kept)) for kept in widths))
    return [[len(scores), 0.0], *map(list, zip(widths, accumulate(costs, max), strict=True))]


def widths_within(
    model: PreTrainedModel, losses: Losses, budget: int, round_to: int, protect: int = 0
) -> list[dict[str, int]]:
    """Return per block how many of each structure stay, so that at most `budget` parameters of these structures are left and the
    losses add up to the least; the fewest there may be where that is more.

    `protect` blocks at either end stay whole.
    """
    blocks, choices = llama_blocks(model), {}
    for index, (block, of_block) in enumerate(zip(blocks, losses, strict=True)):
        for structure, measured in of_block.items():
            counts = _counts(measured, round_to if structure == "channels" else 1)
            counts = counts if protect <= index < len(blocks) - protect else counts[:1]
            kept, nats = zip(*reversed(measured), strict=True)
            choices[index, structure] = [
                Choice(count, count * _parameters(block, structure), float(numpy.interp(count, kept, nats))) for count in counts
            ]
    picked = allocate(choices, max(budget, least_size(choices)))
    return [{structure: picked[index, structure].what for structure in of_block} for index, of_block in enumerate(losses)]


def _counts(measured: list[list[float]], multiple: int) -> list[int]:
    """Return all that there is, and every multiple below it down to the fewest that was measured."""
    most, least = int(measured[0][0]), int(measured[-1][0])
    return [most, *range((most - 1) // multiple * multiple, least - 1, -multiple)] if least < most else [most]


def _parameters(block: LlamaBlock, structure: str) -> int:
    return channel_parameters(block) if structure == "channels" else group_parameters(block)
