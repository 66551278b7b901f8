"""The criteria of pruning a Llama are what they say."""

import gc
import weakref

import llamas
import pytest
import torch
from llamas import make

from compactmind.methods.llama import llama_blocks
from compactmind.methods.pruning.llama_importance import block_influence, score
from compactmind.methods.pruning.llama_masks import PruneRecipe
from compactmind.methods.pruning.llama_pruning import prune_llama

windows = llamas.windows


def test_taylor_is_the_derivative_of_the_loss_by_a_mask_per_token(windows):
    model = make()
    scores, block = score(model, "taylor", windows)[1], llama_blocks(model)[1]
    expected = {"down": 0, "o": 0}
    for window in windows:
        masks = {"down": torch.ones(1, 24, 48, requires_grad=True), "o": torch.ones(1, 24, 2, requires_grad=True)}
        hooks = [
            block.down.register_forward_pre_hook(lambda _, inputs, masks=masks: (inputs[0] * masks["down"],)),
            block.o.register_forward_pre_hook(
                lambda _, inputs, masks=masks: (inputs[0] * masks["o"].repeat_interleave(16, -1),)
            ),
        ]
        model(window[None], labels=window[None]).loss.backward()
        for hook in hooks:
            hook.remove()
        for name, mask in masks.items():
            expected[name] = expected[name] + mask.grad[0].square().sum(dim=0)
    assert torch.allclose(scores.channels, expected["down"], rtol=1e-3)
    assert torch.allclose(scores.groups, expected["o"], rtol=1e-3)


def test_taylor_predicts_what_removing_a_little_does(windows):
    model = make()
    channel = score(model, "taylor", windows[:1])[2].channels
    silent = llama_blocks(model)[2].down.weight
    with torch.no_grad():
        loss, changes = model(windows[:1], labels=windows[:1]).loss.double(), []
        for index in range(48):
            kept = silent[:, index].clone()
            silent[:, index] = 0
            changes.append((model(windows[:1], labels=windows[:1]).loss.double() - loss).abs().item())
            silent[:, index] = kept
    order, result = channel.argsort(descending=True)[:12], torch.tensor(changes)
    assert result[order].mean() > 1.5 * result.mean()  # the channels it ranks first are those whose loss shows


def test_taylor_in_bf16_says_nearly_the_same(windows, monkeypatch):
    model, types = make(), set()
    llama_blocks(model)[1].down.register_forward_hook(lambda _, __, output: types.add(output.dtype))
    exact = score(model, "taylor", windows)[1]
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    half = score(model, "taylor", windows)[1]
    assert types == {torch.float32, torch.bfloat16} and half.channels.dtype == torch.float32
    for ours, theirs in ((half.channels, exact.channels), (half.groups, exact.groups)):
        assert not torch.equal(ours, theirs) and torch.allclose(ours, theirs, rtol=0.1)


def test_taylor_leaves_no_trace(windows):
    model = make()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    score(model, "taylor", windows)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_taylor_keeps_nothing_of_a_window(windows):
    model, seen = make(), []
    for block in llama_blocks(model):
        for linear in (block.down, block.o):
            linear.register_forward_pre_hook(lambda _, inputs: seen.append(weakref.ref(inputs[0])))
    score(model, "taylor", windows)
    gc.collect()
    assert len(seen) == 2 * 6 * len(windows)  # forward, and again in the backward pass
    assert [each for each in seen if each() is not None] == []


@pytest.mark.parametrize("aggregate", ["sum", "mean", "max"])
@torch.no_grad()
def test_activation_and_variance_are_weight_times_what_goes_in(windows, aggregate):
    model, inputs = make(), {}
    block = llama_blocks(model)[2]
    hooks = []
    for name in ("down", "o"):
        hook = getattr(block, name).register_forward_hook(
            lambda _, args, __, name=name: inputs.update({name: args[0].flatten(0, 1)})
        )
        hooks.append(hook)
    model(windows)
    for hook in hooks:
        hook.remove()
    result = {criterion: score(model, criterion, windows, aggregate=aggregate)[2] for criterion in ("activation", "variance")}
    join = {"sum": torch.sum, "mean": torch.mean, "max": torch.amax}[aggregate]
    wanda = lambda name: inputs[name].norm(dim=0) * getattr(block, name).weight.norm(dim=0)  # noqa: E731
    assert torch.allclose(result["activation"].channels, wanda("down"), rtol=1e-4)
    assert torch.allclose(result["activation"].groups, join(wanda("o").view(2, 16), 1), rtol=1e-4)
    flap = inputs["down"].var(dim=0, unbiased=False) * block.down.weight.norm(dim=0).square()
    assert torch.allclose(result["variance"].channels, flap, rtol=1e-3)


@torch.no_grad()
def test_l2_is_the_norm_of_every_matrix_a_structure_has_a_part_of():
    model = make()
    block, result = llama_blocks(model)[0], score(model, "l2")[0]
    expected = block.gate.weight[7].norm() + block.up.weight[7].norm() + block.down.weight[:, 7].norm()
    assert result.channels[7].item() == pytest.approx(expected.item(), rel=1e-5)
    parts = [block.q.weight[16:], block.k.weight[8:], block.v.weight[8:], block.o.weight[:, 16:]]
    assert result.groups[1].item() == pytest.approx(sum(part.norm() for part in parts).item(), rel=1e-5)


def test_random_is_the_same_for_one_seed_and_another_for_another():
    model = make()
    first, again, other = (score(model, "random", seed=seed)[0].channels for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_least_influential_block_is_the_one_that_adds_nothing(windows):
    model = make()
    with torch.no_grad():
        for linear in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
            linear.weight.mul_(0.01)
    influence = block_influence(model, windows)
    assert influence.argmin() == 1 and influence[1] < 0.01 * influence[0]
    small, done = prune_llama(model, PruneRecipe(sparsity=0.0, blocks=1, compensate=False), windows)
    assert done["removed_blocks"] == [1] and len(small.model.layers) == 2 and small.config.num_hidden_layers == 2
    assert [layer.self_attn.layer_idx for layer in small.model.layers] == [0, 1]
    assert done["sparsity"] == pytest.approx(1 / 3)
