"""Projections re-fitted after pruning: the best ones there are, each block on what the smaller blocks before it pass on."""

import copy
from types import SimpleNamespace

import helpers
import pytest
import torch
from llamas import OTHERS, logits_of, make, make_other

from compactmind.methods.llama import llama_blocks
from compactmind.methods.pruning.llama_compensation import BlockByBlock, DenseStates, refit
from compactmind.methods.pruning.llama_masks import PruneRecipe
from compactmind.methods.pruning.llama_pruning import prune_llama


@pytest.fixture(scope="module")
def windows():
    return helpers.example_windows(count=6, length=24)


@pytest.mark.parametrize("kind", OTHERS)
def test_compensation_knows_what_each_type_adds_to_the_stream(windows, kind):
    small, _ = prune_llama(make_other(kind), PruneRecipe(0.0, round_to=8), windows)
    torch.testing.assert_close(logits_of(small), logits_of(make_other(kind)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("damping", [1e-9, 0.3])
def test_the_refitted_weight_is_the_least_squares_solution(damping):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    weight, keep = torch.randn(5, 12, generator=generator), torch.tensor([True] * 8 + [False] * 4)
    wanted = x @ weight.t() + 0.5 * torch.randn(300, 5, generator=generator)
    result = refit(weight, x.t() @ x / len(x), wanted.t() @ x / len(x), keep, damping)
    # The damping as rows of its own: as much of every kept input alone, and the old weight as what is wanted there.
    pull = (damping * x.square().mean(dim=0).median() * len(x)).sqrt() * torch.eye(8)
    rows, aims = torch.cat([x[:, keep], pull]), torch.cat([wanted, pull @ weight[:, keep].t()])
    expected = torch.linalg.lstsq(rows.double(), aims.double()).solution.t().float()
    assert torch.allclose(result[:, keep], expected, atol=1e-3) and result[:, ~keep].eq(0).all()
    loss = lambda candidate: (x @ candidate.t() - wanted).square().sum()  # noqa: E731
    assert loss(result) < 0.9 * loss(weight * keep)


def test_an_outlier_channel_does_not_keep_the_others_from_being_refitted():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    weight, keep = torch.randn(5, 12, generator=generator), torch.tensor([True] * 8 + [False] * 4)
    wanted = x @ weight.t()
    loss = lambda x, fitted: (x @ fitted.t() - wanted).square().sum().item()  # noqa: E731
    # the same function: what goes in at one channel a thousand times as large, its weights as much smaller
    x[:, 0], weight[:, 0] = 1000 * x[:, 0], weight[:, 0] / 1000
    fitted = refit(weight, x.t() @ x / len(x), wanted.t() @ x / len(x), keep, 0.01)
    assert loss(x, fitted) < 0.8 * loss(x, weight * keep)


def test_few_tokens_and_mostly_silent_channels_do_not_throw_the_weights_off():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 12, generator=generator), torch.randn(5, 12, generator=generator)
    x[:, :7] = 0
    wanted = torch.randn(3, 5, generator=generator)
    result = refit(weight, x.t() @ x / 3, wanted.t() @ x / 3, torch.ones(12, dtype=torch.bool), 1.0)
    assert torch.equal(result[:, :7], weight[:, :7]) and (result - weight).abs().max() < 5


def test_with_nothing_gone_and_no_error_so_far_refitting_changes_nothing(windows):
    model = make(attention_bias=True, mlp_bias=True)
    small, _ = prune_llama(copy.deepcopy(model), PruneRecipe(sparsity=0.0, round_to=8), windows)
    for old, new in zip(llama_blocks(model), llama_blocks(small), strict=True):
        torch.testing.assert_close(new.down.weight, old.down.weight, atol=1e-5, rtol=0)
        torch.testing.assert_close(new.o.weight, old.o.weight, atol=1e-5, rtol=0)


@torch.no_grad()
def test_an_error_that_came_in_is_made_good(windows):
    model = make()
    disturbed = copy.deepcopy(model)
    runner = BlockByBlock(disturbed, windows)
    for state in runner.states:
        state[:] = state + 0.1 * state.norm(dim=-1, keepdim=True) / state.shape[-1] ** 0.5
    runner.dense_states = [state.clone() for state in BlockByBlock(model, windows).states]
    block, before = llama_blocks(disturbed)[0], list(runner.states)
    runner.run_dense(block, 0)
    error = lambda states: sum((a - b).square().sum() for a, b in zip(states, runner.dense_states, strict=True))  # noqa: E731
    untouched = error([block.module(state, **runner.arguments) for state in before])
    runner.refit_output(block, torch.ones(32, dtype=torch.bool), 0.05)
    runner.refit_down(block, 0.05)
    assert error(runner.states) < 0.9 * untouched
    again = [block.module(state, **runner.arguments) for state in before]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(runner.states, again, strict=True))


@pytest.mark.parametrize("criterion", ["taylor", "random"])
def test_compensation_brings_the_outputs_closer(windows, criterion):
    model = make()
    with torch.no_grad():
        for block in llama_blocks(model):  # every channel has a twin that could speak for it
            for linear in (block.gate, block.up):
                linear.weight[24:] = linear.weight[:24] + 0.01 * torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
    whole, difference = logits_of(model), {}
    for compensate in (False, True):
        recipe = PruneRecipe(0.2, criterion, round_to=8, compensate=compensate)
        text = helpers.example_windows(count=40, length=24)
        small, _ = prune_llama(copy.deepcopy(model), recipe, text)
        difference[compensate] = (logits_of(small) - whole).norm()
    assert difference[True] < 0.9 * difference[False]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", *OTHERS])
def test_block_by_block_is_the_model(windows, kind):
    model = make_other(kind)
    runner = BlockByBlock(model, windows)
    for number, block in enumerate(llama_blocks(model)):
        runner.run_dense(block, number)
        runner.refit_output(block, torch.ones(block.o.in_features, dtype=torch.bool), 0.1)
        runner.refit_down(block, 0.1)
    for states in (runner.states, runner.dense_states):
        expected = model.model.norm(torch.cat(states))
        assert torch.allclose(model.model(windows).last_hidden_state, expected, atol=1e-5)


def test_a_model_that_another_pruning_has_run_is_not_run_again_and_nothing_else_changes(windows):
    model, states = make(), DenseStates()
    first = PruneRecipe(0.2, "l2", round_to=8)
    prune_llama(copy.deepcopy(model), first, windows, states=states)
    assert states.blocks.keys() == {0, 1, 2}
    before = {number: [state.clone() for state in targets["down"]] for number, targets in states.blocks.items()}
    for recipe in (
        PruneRecipe(0.3, "activation", round_to=8),
        PruneRecipe(0.4, "l2", "global", round_to=4, rounds=2),
    ):
        fresh, _ = prune_llama(copy.deepcopy(model), recipe, windows)
        again, _ = prune_llama(copy.deepcopy(model), recipe, windows, states=states)
        assert torch.equal(logits_of(fresh), logits_of(again))
    assert all(
        torch.equal(a, b) for number in before for a, b in zip(before[number], states.blocks[number]["down"], strict=True)
    )
    runner = BlockByBlock(model, windows, states)
    block = SimpleNamespace(module=lambda *_, **__: pytest.fail("it was run again"), post_norm=model.model.norm)
    for number in range(3):
        runner.run_dense(block, number)
    assert torch.equal(runner.dense_states[0], before[2][0])


def test_states_that_would_not_all_fit_are_not_kept(windows):
    states = DenseStates(limit_bytes=2 * 2 * windows.numel() * 32 * 4)  # of two blocks
    prune_llama(make(), PruneRecipe(0.2, "l2", round_to=8), windows, states=states)
    assert states.blocks == {}
