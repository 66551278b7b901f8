"""Structured pruning of a Llama: scored (llama_importance.py), masked (llama_masks.py), and made smaller block by block
(llama_structure.py), its projections re-fitted to what is left (llama_compensation.py).
"""

from dataclasses import replace

import torch
from transformers import PreTrainedModel

from compactmind.errors import CompactMindError
from compactmind.methods.llama import llama_blocks
from compactmind.methods.pruning.llama_allocation import Losses, measured_losses
from compactmind.methods.pruning.llama_compensation import BlockByBlock, DenseStates
from compactmind.methods.pruning.llama_importance import BlockScores, block_influence, hidden_importance, score
from compactmind.methods.pruning.llama_masks import PruneRecipe, check_prunable, choose_masks, hidden_channels_to_keep
from compactmind.methods.pruning.llama_structure import (
    columns_of_o,
    prunable_parameters,
    rebuilt,
    remove_blocks,
    remove_hidden_channels,
    shrink_block,
)
from compactmind.precision import computes_in_float32, is_widened, widen


@torch.no_grad()
def prune_llama(
    model: PreTrainedModel,
    recipe: PruneRecipe,
    windows: torch.Tensor | None = None,
    scores: list[BlockScores] | None = None,
    states: DenseStates | None = None,
    losses: Losses | None = None,
) -> tuple[PreTrainedModel, dict]:
    """Return a physically smaller model and what was done to it; `model` gives its weights away and must not be used again.

    `windows` (windows, seq_len) of text are needed unless the criterion is l2 or random, nothing is compensated or measured and no block
    or hidden channel is removed. `scores` spares scoring `model` if what the recipe asks for is known already, `losses` measuring its cuts,
    `states` running it on the windows if another pruning of it has; only the first round uses them, and only if no block or hidden channel
    goes before it. Raises CompactMindError on a recipe that does not fit the model, before anything is computed wherever that is possible.
    """
    check_prunable(model, recipe)
    observes = recipe.compensate or recipe.blocks or recipe.hidden_sparsity or recipe.scope == "measured"
    if (windows is None or len(windows) == 0) and observes:
        raise CompactMindError(
            "compensation, the scope measured and the removal of blocks or hidden channels need calibration text: use more text or a "
            "smaller --seq_len"
        )
    if not computes_in_float32(model):
        widen(model)
    before, removed = prunable_parameters(model), set()
    if recipe.hidden_sparsity:
        remove_hidden_channels(model, _kept_hidden_channels(model, recipe, windows))
    if recipe.blocks:
        influence = block_influence(model, windows)
        ends = range(recipe.protect), range(len(influence) - recipe.protect, len(influence))
        for index in (*ends[0], *ends[1]):
            influence[index] = float("inf")
        removed = set(influence.argsort()[: recipe.blocks].tolist())
        remove_blocks(model, removed)
    without_blocks = prunable_parameters(model)
    for number in range(1, recipe.rounds + 1):
        wanted = (1 - recipe.sparsity * number / recipe.rounds) * without_blocks
        known = (scores, states, losses) if number == 1 and not recipe.blocks and not recipe.hidden_sparsity else (None, None, None)
        _remove(model, replace(recipe, sparsity=max(0.0, 1 - wanted / prunable_parameters(model))), windows, *known)
    result = rebuilt(model)
    if is_widened(model):
        widen(result)
    description = {
        "sparsity": 1 - prunable_parameters(result) / before,
        "removed_blocks": sorted(removed),
        "hidden_size": result.config.hidden_size,
        "kept_channels": [block.up.out_features for block in llama_blocks(result)],
        "kept_groups": [block.k.out_features // block.head_dim for block in llama_blocks(result)],
    }
    return result, description


def losses_for(model: PreTrainedModel, recipe: PruneRecipe, windows: torch.Tensor, scores: list[BlockScores]) -> Losses:
    """Return what a recipe with scope measured goes by; its sparsity makes no difference."""
    damping = recipe.damping if recipe.compensate else None
    return measured_losses(model, scores, windows, recipe.structures, recipe.round_to, damping)


def _kept_hidden_channels(model: PreTrainedModel, recipe: PruneRecipe, windows: torch.Tensor) -> torch.Tensor:
    keep = torch.zeros(model.config.hidden_size, dtype=torch.bool)
    keep[hidden_importance(model, windows).topk(hidden_channels_to_keep(len(keep), recipe)).indices] = True
    return keep


def _remove(
    model: PreTrainedModel,
    recipe: PruneRecipe,
    windows: torch.Tensor | None,
    scores: list[BlockScores] | None,
    states: DenseStates | None,
    losses: Losses | None,
) -> None:
    """Score, measure, choose, re-fit and shrink, in place; the model's configuration does not follow."""
    scores = scores or score(model, recipe.criterion, windows, aggregate=recipe.aggregate, seed=recipe.seed)
    if recipe.scope == "measured" and losses is None:
        losses = losses_for(model, recipe, windows, scores)
    masks = choose_masks(model, scores, recipe, losses)
    runner = BlockByBlock(model, windows, states) if recipe.compensate else None
    for index, mask in enumerate(masks):
        block = llama_blocks(model)[index]
        if runner:
            runner.run_dense(block, index)
            runner.refit_output(block, columns_of_o(block, mask.groups), recipe.damping)
        shrink_block(block, mask)
        if runner:  # what is pruned of the FFN has no part in it
            runner.refit_down(llama_blocks(model)[index], recipe.damping)
