"""What to remove from a Llama, whether its shapes allow that, and how much goes where.

`uniform` takes the same share of every block, so the result is a Llama of other widths; `global` spreads the budget
by score over all blocks, `measured` by what cuts of every block cost. Channels go in bundles of `round_to`, because kernels like such
widths; groups go whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from compactmind.errors import CompactMindError
from compactmind.methods.llama import LlamaBlock, llama_blocks, llama_type
from compactmind.methods.pruning.llama_allocation import Losses, widths_within
from compactmind.methods.pruning.llama_importance import AGGREGATES, CRITERIA, BlockScores
from compactmind.methods.pruning.llama_structure import (
    FAMILIES,
    STRUCTURES,
    BlockMask,
    channel_parameters,
    full_mask,
    group_parameters,
    kept_parameters,
    prunable_parameters,
)

SCOPES = ("uniform", "global", "measured")
TOLERANCE = 0.01
"""Sparsity is met within this much."""


@dataclass(frozen=True)
class PruneRecipe:
    """What to remove from a Llama, and how. Raises ValueError on a value outside its range."""

    sparsity: float = 0.2
    """Share of the prunable parameters (FFN channels and key-value groups of all blocks) to remove, in [0, 1); of what is left, if blocks
    or hidden channels go too."""
    criterion: str = "taylor"
    """How structures are scored: taylor, activation, variance, l2 or random."""
    scope: str = "uniform"
    """uniform: the same widths in every block; global: where the scores are lowest; measured: where cuts cost the least, by KL."""
    structures: Sequence[str] = ("channels",)
    """channels (of the FFN), groups (key-value heads with their query heads), or both."""
    aggregate: str = "sum"
    """How the scores of a structure's parts are put together: sum, mean or max."""
    round_to: int = 64
    """FFN widths stay multiples of this; uniform halves it as often as the sparsity needs."""
    compensate: bool = True
    """Re-fit down_proj and o_proj to the inputs that are left."""
    damping: float = 1.0
    """What holds re-fitted weights to those they were, as a multiple of the mean square of the median channel of what goes in."""
    rounds: int = 1
    """Remove it in this many equal parts, scoring what is left before each."""
    protect: int = 0
    """This many blocks at either end stay whole (not with uniform)."""
    blocks: int = 0
    """Remove this many whole blocks first, those that turn the residual stream least."""
    hidden_sparsity: float = 0.0
    """Share of the channels of the residual stream to remove before that, everywhere, rounded to a multiple of round_to; in [0, 1)."""
    seed: int = 0

    def __post_init__(self):
        for name in ("sparsity", "hidden_sparsity"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is not in [0, 1): for example 0.2")
        for name, value, choices in (
            ("criterion", self.criterion, CRITERIA),
            ("scope", self.scope, SCOPES),
            ("aggregate", self.aggregate, AGGREGATES),
            *(("structure", structure, STRUCTURES) for structure in self.structures),
        ):
            if value not in choices:
                raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(choices)}")
        if not self.structures:
            raise ValueError(f"no structures to remove: choose from {', '.join(STRUCTURES)}")
        if self.round_to < 1 or self.rounds < 1 or self.protect < 0 or self.blocks < 0 or self.damping <= 0:
            raise ValueError("round_to and rounds must be at least 1, protect and blocks at least 0, damping above 0")
        if self.protect and self.scope == "uniform":
            raise ValueError(f"protect {self.protect} leaves some blocks wider than others: it needs scope global or measured")


# -------------------------------------------------------------------------------------------- what is known beforehand
def check_prunable(model: PreTrainedModel, recipe: PruneRecipe, as_it_is: bool = True) -> None:
    """Raise CompactMindError if a recipe cannot be carried out on a model, as far as its shapes tell: nothing is computed.

    Not `as_it_is`: other steps come before, so that only what they cannot change is looked at: the type of the model.
    """
    blocks, hidden = llama_blocks(model), model.config.hidden_size
    _check_family(model, recipe)
    if not as_it_is:
        return
    block, count = blocks[0], len(blocks)
    removable = max(0, count - 2 * recipe.protect)
    if recipe.blocks and recipe.blocks >= removable:
        raise CompactMindError(f"blocks {recipe.blocks} would leave none of the {removable} that may be removed")
    gone = hidden - hidden_channels_to_keep(hidden, recipe)
    if recipe.scope == "uniform":
        _check_equal(blocks)
    if not recipe.sparsity:
        return
    _check_bundles(blocks, recipe)
    per_channel = channel_parameters(block) - 3 * gone
    per_group = group_parameters(block) - block.head_dim * 2 * (block.groups + 1) * gone
    if recipe.scope == "uniform":
        width, groups = block.up.out_features, block.k.out_features // block.head_dim
        whole = width * per_channel + groups * per_group
        for number in range(1, recipe.rounds + 1):
            before = width * per_channel + groups * per_group
            sparsity = max(0.0, 1 - (1 - recipe.sparsity * number / recipe.rounds) * whole / before)
            width, groups = _uniform_widths((width, groups), (per_channel, per_group), replace(recipe, sparsity=sparsity))
            _check_met(replace(recipe, sparsity=sparsity), 1 - (width * per_channel + groups * per_group) / before)
    elif not recipe.blocks:  # else it depends on which ones go
        free = blocks[recipe.protect : count - recipe.protect] if removable else []
        most = total = 0
        for each in blocks:
            total += each.up.out_features * per_channel + each.k.out_features // each.head_dim * per_group
        for each in free:  # the best bundle and the best group of each stay
            most += max(0, each.up.out_features - recipe.round_to) * per_channel * ("channels" in recipe.structures)
            most += (each.k.out_features // each.head_dim - 1) * per_group * ("groups" in recipe.structures)
        if most / total < recipe.sparsity:
            _check_met(recipe, most / total)


def _check_family(model: PreTrainedModel, recipe: PruneRecipe) -> None:
    kind = llama_type(model)
    groups, hidden = recipe.sparsity and "groups" in recipe.structures, recipe.hidden_sparsity
    if FAMILIES[kind].heads_fill_hidden and (groups or hidden):
        asked = " and ".join(["key-value groups"] * bool(groups) + ["hidden channels"] * bool(hidden))
        raise CompactMindError(
            f"a model of type {kind!r} cannot be pruned of {asked}: its class wants num_attention_heads * head_dim = hidden_size; "
            "channels of the FFN and whole blocks can go: use structures channels, hidden_sparsity 0"
        )


def _check_bundles(blocks: list[LlamaBlock], recipe: PruneRecipe) -> None:
    narrowest = min(block.up.out_features for block in blocks)
    if recipe.round_to > narrowest and recipe.sparsity and "channels" in recipe.structures:
        raise CompactMindError(f"round_to {recipe.round_to} is more than the FFN width {narrowest}: choose a smaller multiple")


def _check_equal(blocks: list[LlamaBlock]) -> None:
    if len({(block.up.out_features, block.k.out_features) for block in blocks}) > 1:
        raise CompactMindError("scope uniform needs blocks of equal widths: use scope global")


def _check_met(recipe: PruneRecipe, sparsity: float) -> None:
    """Raise CompactMindError if the share that is removed is not the sparsity of the recipe."""
    if abs(sparsity - recipe.sparsity) > TOLERANCE:
        raise CompactMindError(
            f"sparsity {recipe.sparsity:.4g} cannot be met: {'/'.join(recipe.structures)} in steps of round_to {recipe.round_to} give "
            f"{sparsity:.3f} at the closest without emptying a block; use other structures, a smaller round_to or scope global"
        )


def hidden_channels_to_keep(size: int, recipe: PruneRecipe) -> int:
    """Return how many channels of the residual stream stay. Raises CompactMindError if round_to does not allow so few."""
    if not recipe.hidden_sparsity:
        return size
    multiple = recipe.round_to
    kept = min(size, max(multiple, round((1 - recipe.hidden_sparsity) * size / multiple) * multiple))
    if abs(1 - kept / size - recipe.hidden_sparsity) > multiple / size / 2 + 1e-9:
        raise CompactMindError(
            f"hidden_sparsity {recipe.hidden_sparsity} would leave less than round_to {multiple} of {size} hidden channels: "
            "choose a smaller one"
        )
    return kept


# ------------------------------------------------------------------------------------------------------- how much where
def choose_masks(
    model: PreTrainedModel, scores: list[BlockScores], recipe: PruneRecipe, losses: Losses | None = None
) -> list[BlockMask]:
    """Return what each block keeps; `losses` for scope measured. Raises CompactMindError if the recipe would empty a block or cannot meet
    its sparsity."""
    blocks = llama_blocks(model)
    _check_bundles(blocks, recipe)
    if recipe.scope == "measured":
        masks = _measured_masks(model, scores, recipe, losses)
    else:
        masks = (_uniform_masks if recipe.scope == "uniform" else _global_masks)(blocks, scores, recipe)
    total = prunable_parameters(model)
    _check_met(recipe, 1 - sum(kept_parameters(block, mask) for block, mask in zip(blocks, masks, strict=True)) / total)
    return masks


def _uniform_masks(blocks: list[LlamaBlock], scores: list[BlockScores], recipe: PruneRecipe) -> list[BlockMask]:
    block, whole = blocks[0], full_mask(blocks[0])
    width, count = len(whole.channels), len(whole.groups)
    _check_equal(blocks)
    each = channel_parameters(block), group_parameters(block)
    kept_channels, kept_groups = _uniform_widths((width, count), each, recipe)
    masks = []
    for block_scores in scores:
        mask = BlockMask(torch.zeros(width, dtype=torch.bool), torch.zeros(count, dtype=torch.bool))
        mask.channels[block_scores.channels.topk(kept_channels).indices] = True
        mask.groups[block_scores.groups.topk(kept_groups).indices] = True
        masks.append(mask)
    return masks


def _uniform_widths(widths: tuple[int, int], each: tuple[int, int], recipe: PruneRecipe) -> tuple[int, int]:
    """Return how many channels and groups every block keeps; `each`: the parameters a channel and a group own."""
    (width, count), (per_channel, per_group) = widths, each
    all_of_it = width * per_channel + count * per_group
    kept_channels, kept_groups = width, count
    if "groups" in recipe.structures:
        kept_groups = max(1, round(count * (1 - recipe.sparsity)))
    if "channels" in recipe.structures:
        wanted = ((1 - recipe.sparsity) * all_of_it - kept_groups * per_group) / per_channel
        multiple = recipe.round_to
        while multiple >= 1:
            kept_channels = min(width, max(multiple, round(wanted / multiple) * multiple))
            if abs(kept_channels - wanted) * per_channel <= TOLERANCE * all_of_it or multiple == 1:
                break
            multiple //= 2
    return kept_channels, kept_groups


def _global_masks(blocks: list[LlamaBlock], scores: list[BlockScores], recipe: PruneRecipe) -> list[BlockMask]:
    """Remove bundles of channels and groups in the order of their scores per parameter, least first."""
    candidates = []  # (score, block, structure, indices, parameters)
    for index, (block, block_scores) in enumerate(zip(blocks, scores, strict=True)):
        if not recipe.protect <= index < len(blocks) - recipe.protect:
            continue
        channels, groups = (_comparable(values, recipe.criterion) for values in (block_scores.channels, block_scores.groups))
        if "channels" in recipe.structures:
            order, width = block_scores.channels.argsort(), len(block_scores.channels)
            first = width % recipe.round_to or recipe.round_to  # a width that is no multiple becomes one
            bundles = order.split([first, *[recipe.round_to] * ((width - first) // recipe.round_to)])
            for bundle in bundles[:-1]:  # the best one stays: no block is emptied
                each = channel_parameters(block)
                candidates.append(
                    (channels[bundle].mean().item() / _size(each, recipe), index, "channels", bundle, each * len(bundle))
                )
        if "groups" in recipe.structures:
            each = group_parameters(block)
            for group in block_scores.groups.argsort()[:-1]:
                candidates.append((groups[group].item() / _size(each, recipe), index, "groups", group, each))
    masks, left = (
        [full_mask(block) for block in blocks],
        recipe.sparsity * sum(kept_parameters(b, full_mask(b)) for b in blocks),
    )
    for _, index, structure, which, parameters in sorted(candidates, key=lambda candidate: candidate[0]):
        if parameters / 2 > left:
            break
        getattr(masks[index], structure)[which] = False
        left -= parameters
    return masks


def _measured_masks(model: PreTrainedModel, scores: list[BlockScores], recipe: PruneRecipe, losses: Losses) -> list[BlockMask]:
    """Keep of every block the best by score, as many as an integer program over the losses says."""
    blocks = llama_blocks(model)
    masks, total = [full_mask(block) for block in blocks], prunable_parameters(model)
    beside = sum(  # what is not to be pruned
        kept_parameters(block, mask)
        - ("channels" in recipe.structures) * len(mask.channels) * channel_parameters(block)
        - ("groups" in recipe.structures) * len(mask.groups) * group_parameters(block)
        for block, mask in zip(blocks, masks, strict=True)
    )
    widths = widths_within(model, losses, round((1 - recipe.sparsity) * total) - beside, recipe.round_to, recipe.protect)
    for mask, block_scores, kept in zip(masks, scores, widths, strict=True):
        for structure, count in kept.items():
            values = getattr(block_scores, structure)
            getattr(mask, structure)[values.argsort(descending=True)[count:]] = False
    return masks


def _comparable(values: torch.Tensor, criterion: str) -> torch.Tensor:
    """Return scores that can be compared between blocks: a loss change as it is, any other in standard deviations of its block."""
    if criterion in ("taylor", "random") or len(values) < 2:
        return values
    return (values - values.mean()) / values.std().clamp(min=1e-12)


def _size(parameters: int, recipe: PruneRecipe) -> float:
    """Return what a score is divided by: a loss change is per parameter freed."""
    return parameters if recipe.criterion == "taylor" else 1.0
