"""How much to prune where by what cuts cost: what is measured is what a cut does, and the widths are the best of all that keep to it."""

import copy
import itertools

import helpers
import llamas
import pytest
import torch
from llamas import logits_of, make, make_other

from compactmind.errors import CompactMindError
from compactmind.methods.llama import llama_blocks
from compactmind.methods.pruning import llama_allocation
from compactmind.methods.pruning.llama_allocation import measured_losses, widths_within
from compactmind.methods.pruning.llama_importance import score
from compactmind.methods.pruning.llama_masks import PruneRecipe, choose_masks
from compactmind.methods.pruning.llama_pruning import losses_for, prune_llama
from compactmind.methods.pruning.llama_structure import (
    channel_parameters,
    full_mask,
    group_parameters,
    prunable_parameters,
    silence,
)

windows = llamas.windows
BOTH = ("channels", "groups")


@pytest.fixture
def model():
    return make(num_attention_heads=8, num_key_value_heads=4)


@pytest.fixture
def scores(model, windows):
    return score(model, "taylor", windows)


def kl(dense: torch.Tensor, logits: torch.Tensor) -> float:
    """Return KL(dense || other) in nats a token of logits (1, tokens, vocabulary)."""
    wanted, given = (each[0].log_softmax(dim=-1) for each in (dense, logits))
    return (wanted.exp() * (wanted - given)).sum(dim=-1).mean().item()


def test_a_cut_costs_the_divergence_of_the_model_in_which_it_is_made(model, scores, windows, monkeypatch):
    monkeypatch.setattr(llama_allocation, "PROBE_TOKENS", windows.shape[1])
    before = copy.deepcopy(model.state_dict())
    losses = measured_losses(model, scores, windows, BOTH, 8, None)
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in before.items())
    dense = model(windows[:1]).logits
    for index, structure in itertools.product((0, 2), BOTH):
        measured = losses[index][structure]
        values = getattr(scores[index], structure)
        assert measured[0] == [len(values), 0.0]
        assert [nats for _, nats in measured] == sorted(nats for _, nats in measured)
        kept, nats = measured[1]
        masks = [full_mask(block) for block in llama_blocks(model)]
        getattr(masks[index], structure)[values.argsort()[: len(values) - int(kept)]] = False
        cut = copy.deepcopy(model)
        silence(cut, masks)
        assert nats == pytest.approx(kl(dense, cut(windows[:1]).logits), rel=1e-3, abs=1e-6)
    assert [kept for kept, _ in losses[0]["groups"]] == [4, 3, 2, 1]
    assert all(kept % 8 == 0 for kept, _ in losses[0]["channels"][1:]) and losses[0]["channels"][-1][0] == 8


def test_what_is_re_fitted_costs_less(model, scores, windows):
    plain, fitted = (measured_losses(model, scores, windows, BOTH, 8, damping) for damping in (None, 0.01))
    total = [sum(nats for block in losses for its in block.values() for _, nats in its) for losses in (plain, fitted)]
    assert total[1] < 0.9 * total[0]


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5])
def test_no_widths_within_the_budget_cost_less(sparsity):
    model, generator = make(num_hidden_layers=2), torch.Generator().manual_seed(0)
    blocks, losses = llama_blocks(model), []
    for _ in blocks:
        steps = torch.rand(2, 4, generator=generator).cumsum(dim=1)
        channels = [[64, 0.0], *([kept, nats] for kept, nats in zip((48, 32, 16), steps[0].tolist(), strict=False))]
        losses.append({"channels": channels, "groups": [[2, 0.0], [1, steps[1, 0].item()]]})
    each = {"channels": channel_parameters(blocks[0]), "groups": group_parameters(blocks[0])}
    budget = round((1 - sparsity) * len(blocks) * (64 * each["channels"] + 2 * each["groups"]))
    chosen = widths_within(model, losses, budget, 16)
    options = [its for block in losses for its in block.values()]

    def cost(kept) -> float:
        return sum(dict(map(tuple, its))[count] for its, count in zip(options, kept, strict=True))

    def size(kept) -> int:
        return sum(count * each[name] for (name, count) in zip([*BOTH] * len(blocks), kept, strict=True))

    combinations = [kept for kept in itertools.product(*([k for k, _ in its] for its in options)) if size(kept) <= budget]
    found = [count for block in chosen for count in block.values()]
    assert size(found) <= budget and cost(found) <= min(map(cost, combinations)) * (1 + 1e-3)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "stablelm"])
def test_models_are_pruned_by_it(windows, kind):
    model = make() if kind == "llama" else make_other(kind)
    structures = BOTH if kind != "stablelm" else BOTH[:1]
    recipe = PruneRecipe(0.3, scope="measured", round_to=4, structures=structures)
    whole, dense = prunable_parameters(model), logits_of(model)
    small, done = prune_llama(model, recipe, windows)
    assert done["sparsity"] == pytest.approx(0.3, abs=0.01) and prunable_parameters(small) < 0.71 * whole
    assert torch.isfinite(logits_of(small)).all() and not torch.equal(logits_of(small), dense)


def test_known_losses_spare_measuring_and_protected_blocks_stay_whole(model, scores, windows, monkeypatch):
    recipe = PruneRecipe(0.2, scope="measured", round_to=4, structures=BOTH, protect=1)
    losses = losses_for(model, recipe, windows, scores)
    masks = choose_masks(model, scores, recipe, losses)
    assert masks[0].channels.all() and masks[-1].groups.all() and not masks[1].channels.all()
    monkeypatch.setattr("compactmind.methods.pruning.llama_pruning.measured_losses", None)
    small, _ = prune_llama(model, recipe, windows, scores, losses=losses)
    assert [block.up.out_features for block in llama_blocks(small)] == [int(mask.channels.sum()) for mask in masks]


def test_what_cannot_be_met_and_what_lacks_text_is_refused(model, scores, windows):
    recipe = PruneRecipe(0.6, scope="measured", round_to=4, structures=("groups",))
    with pytest.raises(CompactMindError, match="sparsity 0.6 cannot be met"):
        prune_llama(model, recipe, windows)
    recipe = PruneRecipe(0.2, "l2", scope="measured", round_to=4, compensate=False)
    with pytest.raises(CompactMindError, match="scope measured .* need calibration text"):
        prune_llama(helpers.make_llama(), recipe)
