"""Pruning a Llama: the smaller model is the masked one, the criteria are what they say, and it reloads."""

import copy
import gc
import subprocess
import sys
import weakref

import helpers
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, MistralForCausalLM

from compactmind.checkpoint import load_checkpoint, save_checkpoint
from compactmind.errors import CompactMindError
from compactmind.methods.llama import ARCHITECTURES, llama_blocks
from compactmind.methods.pruning import llama_pruning
from compactmind.methods.pruning.llama_importance import block_influence, hidden_importance, score
from compactmind.methods.pruning.llama_masks import PruneRecipe, choose_masks
from compactmind.methods.pruning.llama_pruning import prune_llama
from compactmind.methods.pruning.llama_structure import (
    FAMILIES,
    BlockMask,
    full_mask,
    kept_parameters,
    prunable_parameters,
    rebuilt,
    remove_blocks,
    remove_hidden_channels,
    shrink_block,
    silence,
    silence_hidden_channels,
)
from compactmind.methods.pruning.modeling_pruned_llama import PrunedLlamaForCausalLM

STAGE = {"script": "test", "config": {}, "inputs": {}}


@pytest.fixture(scope="module")
def windows():
    return helpers.example_windows(count=6, length=24)


def make(**changes):
    """Return a Llama with 3 blocks, 4 query and 2 key-value heads of 8, MLP 48, unless `changes` say otherwise."""
    return helpers.make_llama(**{"num_hidden_layers": 3, **changes})


SLIDING = {"use_sliding_window": True, "sliding_window": 6}
"""Shorter than the windows of text."""
BIASES = {"attention_bias": True, "mlp_bias": True}
OTHERS = {
    "mistral": {"sliding_window": 6},
    "qwen2": {**SLIDING, "max_window_layers": 2},
    "qwen3": {**SLIDING, "max_window_layers": 2, "head_dim": 8, "attention_bias": True},
    "granite": {
        **BIASES,
        "residual_multiplier": 0.5,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "attention_multiplier": 0.2,
    },
    "smollm3": {**SLIDING, **BIASES, "no_rope_layer_interval": 2},
    "helium": {"head_dim": 4},
    "stablelm": {"use_qkv_bias": True},
}
"""Model type -> settings in which it differs from a Llama."""
WHOLE_HEADS = [kind for kind in OTHERS if kind not in ("helium", "stablelm")]


def make_other(kind: str, **changes):
    """Return a model of any type with 4 blocks, 8 query and 4 key-value heads of 4, MLP 48, unless `changes` say otherwise."""
    settings = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, **OTHERS.get(kind, {}), **changes}
    config = AutoConfig.for_model(kind, **helpers.llama_settings(**settings))
    return helpers.randomize(AutoModelForCausalLM.from_config(config))


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model(helpers.example_windows()).logits


def random_masks(model, channels: int | list[int], groups: int | list[int], seed: int = 0) -> list[BlockMask]:
    """Return masks that keep so many channels and groups (of every block, or one number per block), at random places."""
    generator, masks = torch.Generator().manual_seed(seed), []
    for index, block in enumerate(llama_blocks(model)):
        mask = full_mask(block)
        for kept, values in ((channels, mask.channels), (groups, mask.groups)):
            kept = kept if isinstance(kept, int) else kept[index]
            values[torch.randperm(len(values), generator=generator)[kept:]] = False
        masks.append(mask)
    return masks


def shrunk(model, masks):
    """Return a smaller copy of a model."""
    model = copy.deepcopy(model)
    for block, mask in zip(llama_blocks(model), masks, strict=True):
        shrink_block(block, mask)
    return rebuilt(model)


# ------------------------------------------------------------------------------------------------------------- couplings
CASES = {
    "channels": ({}, 24, 2, LlamaForCausalLM),
    "groups": ({}, 48, 1, LlamaForCausalLM),
    "both": ({}, 20, 1, LlamaForCausalLM),
    "three groups of four": ({"num_attention_heads": 8, "num_key_value_heads": 4}, 40, 3, MistralForCausalLM),
    "no grouped queries": ({"num_key_value_heads": 4}, 30, 3, MistralForCausalLM),
    "tied": ({"tie_word_embeddings": True}, 24, 1, LlamaForCausalLM),
    "biases": ({"attention_bias": True, "mlp_bias": True}, 24, 1, LlamaForCausalLM),
    "three groups of four, biases": (
        {"num_attention_heads": 8, "num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
        40,
        3,
        PrunedLlamaForCausalLM,
    ),
    "unequal": ({}, [48, 8, 24], [1, 2, 1], PrunedLlamaForCausalLM),
    "unequal, biases": ({"attention_bias": True, "mlp_bias": True}, [48, 8, 24], [1, 2, 1], PrunedLlamaForCausalLM),
}


@pytest.mark.parametrize(("changes", "channels", "groups", "expected"), CASES.values(), ids=CASES)
def test_the_smaller_model_computes_what_the_masked_one_does(changes, channels, groups, expected):
    model = make(**changes)
    masks, whole = random_masks(model, channels, groups), logits_of(model)
    small = shrunk(model, masks)
    silence(model, masks)
    masked = logits_of(model)
    assert type(small) is expected
    assert (masked - whole).abs().max() > 0.01 * whole.abs().max()  # something was removed
    assert (logits_of(small) - masked).abs().max() < 1e-5 * masked.abs().max()
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    cached = small.generate(helpers.example_windows()[:1], max_new_tokens=5, do_sample=False)
    plain = small.generate(helpers.example_windows()[:1], max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)


@pytest.mark.parametrize(
    ("kind", "changes", "kept"),
    [
        ("llama", {}, 24),
        ("llama", {}, 27),
        ("llama", {"tie_word_embeddings": True}, 27),
        ("llama", BIASES, 24),
        ("llama", BIASES, 27),
        *((kind, {}, 27) for kind in WHOLE_HEADS),
    ],
    ids=str,
)
def test_without_hidden_channels_it_computes_what_it_does_with_silent_ones(kind, changes, kept):
    changes = {"tie_word_embeddings": False, "rms_norm_eps": 1e-2, **changes}  # a large eps: forgetting to scale it would show
    model = make_other(kind, **changes)
    keep = torch.zeros(model.config.hidden_size, dtype=torch.bool)
    keep[torch.randperm(len(keep), generator=torch.Generator().manual_seed(0))[:kept]] = True
    small, before = copy.deepcopy(model), logits_of(model)
    silence_hidden_channels(model, keep)
    remove_hidden_channels(small, keep)
    small = rebuilt(small)
    assert small.config.hidden_size == small.get_input_embeddings().weight.shape[1] == kept
    torch.testing.assert_close(logits_of(small), logits_of(model), rtol=0, atol=1e-5)
    assert not torch.allclose(logits_of(small), before, atol=1e-2)
    assert (small.lm_head.weight is small.model.embed_tokens.weight) == changes["tie_word_embeddings"]


def test_parameters_are_counted_as_they_go():
    model = make(attention_bias=True)
    masks = random_masks(model, 20, 1)
    small = shrunk(model, masks)
    in_blocks = lambda each: sum(p.numel() for n, p in each.model.layers.named_parameters())  # noqa: E731
    assert prunable_parameters(model) - prunable_parameters(small) == in_blocks(model) - in_blocks(small)
    assert prunable_parameters(small) == sum(kept_parameters(b, m) for b, m in zip(llama_blocks(model), masks, strict=True))


# --------------------------------------------------------------------------------------------------------------- reload
def save(model, directory):
    save_checkpoint(directory, model, helpers.make_byte_tokenizer(), kind="pruned", parent="x", stage=STAGE)


@pytest.mark.parametrize("case", ["both", "three groups of four", "three groups of four, biases", "tied"])
def test_a_process_without_this_package_reloads_it(case, tmp_path):
    changes, channels, groups, expected = CASES[case]
    model = make(**changes)
    small = shrunk(model, random_masks(model, channels, groups))
    save(small, tmp_path / "small")
    again = load_checkpoint(tmp_path / "small")
    assert type(again.model) is expected and torch.equal(logits_of(again.model), logits_of(small))
    torch.save(helpers.example_windows(), tmp_path / "windows.pt")
    trusted = ", trust_remote_code=True" if expected is PrunedLlamaForCausalLM else ""
    code = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained('small', dtype=torch.float32{trusted})\n"
        "torch.save(model(torch.load('windows.pt')).logits.detach(), 'logits.pt')\n"
        "assert not any(name.startswith('compactmind') for name in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.allclose(torch.load(tmp_path / "logits.pt"), logits_of(small), atol=1e-6)


# --------------------------------------------------------------------------------------------------- other model types
def test_all_that_can_be_taken_apart_can_be_pruned():
    assert set(FAMILIES) == set(ARCHITECTURES) == {"llama", *OTHERS}


def reloaded(model, directory):
    """Return what transformers alone reads of a checkpoint."""
    save(model, directory)
    assert torch.equal(logits_of(load_checkpoint(directory).model), logits_of(model))
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


EQUAL = [*((kind, ("channels",)) for kind in OTHERS), *((kind, ("channels", "groups")) for kind in WHOLE_HEADS)]


@pytest.mark.parametrize(("kind", "structures"), EQUAL, ids=str)
def test_another_type_with_equal_widths_is_of_its_class_and_computes_what_the_masked_one_does(
    windows, kind, structures, tmp_path
):
    model = make_other(kind)
    recipe = PruneRecipe(0.25, "taylor", structures=structures, round_to=8, compensate=False)
    small, done = prune_llama(copy.deepcopy(model), recipe, windows)
    whole, masks = logits_of(model), choose_masks(model, score(model, "taylor", windows), recipe)
    silence(model, masks)
    masked = logits_of(model)
    assert (masked - whole).abs().max() > 0.01 * whole.abs().max()
    assert (logits_of(small) - masked).abs().max() < 1e-5 * masked.abs().max()
    again = reloaded(small, tmp_path / "small")
    assert type(again) is type(model) and torch.equal(logits_of(again), logits_of(small))
    assert [again.config.intermediate_size] * 4 == done["kept_channels"] and again.config.intermediate_size < 48
    assert [again.config.num_key_value_heads] * 4 == done["kept_groups"] == [3 if "groups" in structures else 4] * 4


@pytest.mark.parametrize("index", [0, 1, 3])
@pytest.mark.parametrize("kind", OTHERS)
@torch.no_grad()
def test_what_each_block_is_by_its_number_stays_with_it_when_others_go(kind, index, tmp_path):
    model = make_other(kind)
    small = copy.deepcopy(model)
    remove_blocks(small, {index})
    small = rebuilt(small)
    block = llama_blocks(model)[index]
    for parameter in (*block.o.parameters(), *block.down.parameters()):
        parameter.zero_()
    torch.testing.assert_close(logits_of(small), logits_of(model), rtol=0, atol=1e-5)
    again = reloaded(small, tmp_path / "small")
    assert type(again) is type(model) and torch.equal(logits_of(again), logits_of(small))
    if hasattr(model.config, "max_window_layers"):  # who does not read layer_types derives them from this
        told = {name: value for name, value in again.config.to_dict().items() if name != "layer_types"}
        assert type(again.config)(**told).layer_types == again.config.layer_types


def test_a_process_without_this_package_reloads_every_type_with_unequal_widths(tmp_path):
    kinds = ["llama", *OTHERS]
    torch.save(helpers.example_windows(), tmp_path / "windows.pt")
    for kind in kinds:
        model = make_other(kind)
        masks = random_masks(model, [48, 8, 24, 40], [1, 4, 3, 2] if kind in ("llama", *WHOLE_HEADS) else 4)
        small = shrunk(model, masks)
        silence(model, masks)
        assert (logits_of(small) - logits_of(model)).abs().max() < 1e-5 * logits_of(model).abs().max()
        assert type(small).__name__.startswith("Pruned") and isinstance(small, type(model))
        cached, plain = (
            small.generate(helpers.example_windows()[:1], max_new_tokens=5, do_sample=False, use_cache=each)
            for each in (True, False)
        )
        assert torch.equal(cached, plain)
        save(small, tmp_path / kind)
        assert torch.equal(logits_of(load_checkpoint(tmp_path / kind).model), logits_of(small))
    code = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM\n"
        f"for kind in {kinds}:\n"
        "    model = AutoModelForCausalLM.from_pretrained(kind, dtype=torch.float32, trust_remote_code=True)\n"
        "    torch.save(model(torch.load('windows.pt')).logits.detach(), f'{kind}.pt')\n"
        "assert not any(name.startswith('compactmind') for name in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for kind in kinds:
        expected = logits_of(load_checkpoint(tmp_path / kind).model)
        assert torch.allclose(torch.load(tmp_path / f"{kind}.pt"), expected, atol=1e-6), kind


@pytest.mark.parametrize("kind", OTHERS)
def test_a_model_of_unequal_widths_can_be_pruned_again(windows, kind):
    recipe = PruneRecipe(0.2, scope="global", round_to=4)
    small, _ = prune_llama(make_other(kind), recipe, windows)
    smaller, done = prune_llama(small, recipe, windows)
    assert type(smaller) is FAMILIES[kind].unequal and done["sparsity"] == pytest.approx(0.2, abs=0.01)


# -------------------------------------------------------------------------------------------------------------- criteria
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
    order, found = channel.argsort(descending=True)[:12], torch.tensor(changes)
    assert found[order].mean() > 1.5 * found.mean()  # the channels it ranks first are those whose loss shows


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
    found = {criterion: score(model, criterion, windows, aggregate=aggregate)[2] for criterion in ("activation", "variance")}
    join = {"sum": torch.sum, "mean": torch.mean, "max": torch.amax}[aggregate]
    wanda = lambda name: inputs[name].norm(dim=0) * getattr(block, name).weight.norm(dim=0)  # noqa: E731
    assert torch.allclose(found["activation"].channels, wanda("down"), rtol=1e-4)
    assert torch.allclose(found["activation"].groups, join(wanda("o").view(2, 16), 1), rtol=1e-4)
    flap = inputs["down"].var(dim=0, unbiased=False) * block.down.weight.norm(dim=0).square()
    assert torch.allclose(found["variance"].channels, flap, rtol=1e-3)


@torch.no_grad()
def test_l2_is_the_norm_of_every_matrix_a_structure_has_a_part_of():
    model = make()
    block, found = llama_blocks(model)[0], score(model, "l2")[0]
    expected = block.gate.weight[7].norm() + block.up.weight[7].norm() + block.down.weight[:, 7].norm()
    assert found.channels[7].item() == pytest.approx(expected.item(), rel=1e-5)
    parts = [block.q.weight[16:], block.k.weight[8:], block.v.weight[8:], block.o.weight[:, 16:]]
    assert found.groups[1].item() == pytest.approx(sum(part.norm() for part in parts).item(), rel=1e-5)


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


# ---------------------------------------------------------------------------------------------------- rounds, blocks, stream
def test_known_scores_are_used_once_and_only_for_the_model_they_are_of(windows, monkeypatch):
    calls = []
    monkeypatch.setattr(llama_pruning, "score", lambda *args, **options: calls.append(1) or score(*args, **options))
    known = score(make(), "taylor", windows)
    for changes, expected in (({}, 0), ({"rounds": 2}, 1), ({"blocks": 1}, 1), ({"hidden_sparsity": 0.25}, 1)):
        calls.clear()
        recipe = PruneRecipe(sparsity=0.3, round_to=4, **changes)
        _, with_known = prune_llama(make(), recipe, windows, known)
        assert len(calls) == expected, changes
        assert with_known == prune_llama(make(), recipe, windows)[1]


def test_the_hidden_channels_that_go_are_the_ones_the_norms_pass_least_of(windows):
    model = make()
    with torch.no_grad():
        for block in llama_blocks(model):
            block.input_norm.weight[[3, 17]] = 1e-4
            block.post_norm.weight[[3, 17]] = 1e-4
        model.model.norm.weight[[3, 17]] = 1e-4
    importance = hidden_importance(model, windows)
    assert set(importance.argsort()[:2].tolist()) == {3, 17}
    hidden, before = model.config.hidden_size, logits_of(model)
    recipe = PruneRecipe(sparsity=0, hidden_sparsity=2 / hidden, round_to=1, compensate=False)
    small, done = prune_llama(copy.deepcopy(model), recipe, windows)
    assert done["hidden_size"] == small.config.hidden_size == hidden - 2
    assert done["sparsity"] == pytest.approx(2 / hidden)
    change = (logits_of(small) - before).norm() / before.norm()
    with torch.no_grad():
        keep = torch.ones(hidden, dtype=torch.bool)
        keep[[5, 6]] = False
        other = copy.deepcopy(model)
        remove_hidden_channels(other, keep)
    assert change < 0.5 * (logits_of(rebuilt(other)) - before).norm() / before.norm()


@pytest.mark.parametrize(("scope", "round_to", "hidden_size"), [("uniform", 4, 24), ("global", 2, 26)])
@pytest.mark.parametrize("kind", ["llama", *WHOLE_HEADS])
def test_hidden_channels_blocks_and_widths_go_together_and_reload(windows, kind, scope, round_to, hidden_size, tmp_path):
    share = 1 - hidden_size / 32  # 26 is no multiple of the heads
    recipe = PruneRecipe(
        0.25, scope=scope, hidden_sparsity=share, blocks=1, round_to=round_to, structures=("channels", "groups")
    )
    model, done = prune_llama(make_other(kind), recipe, windows)
    assert done["hidden_size"] == hidden_size
    assert len(done["removed_blocks"]) == 1
    save(model, tmp_path / "small")
    assert torch.equal(logits_of(load_checkpoint(tmp_path / "small").model), logits_of(model))


@pytest.mark.parametrize("scope", ["uniform", "global"])
def test_several_rounds_meet_the_same_sparsity_and_score_anew(windows, scope):
    recipe = {"sparsity": 0.3, "scope": scope, "round_to": 4, "compensate": False}
    once, in_three = (prune_llama(make(), PruneRecipe(**recipe, rounds=rounds), windows) for rounds in (1, 3))
    assert once[1]["sparsity"] == pytest.approx(0.3, abs=0.01) == in_three[1]["sparsity"]
    assert not torch.equal(logits_of(once[0]), logits_of(in_three[0]))


# --------------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("settings", [{}, {"compensate": False}, {"criterion": "l2"}], ids=str)
def test_without_text_the_error_says_so(settings):
    with pytest.raises(CompactMindError, match="calibration text"):
        prune_llama(make(), PruneRecipe(round_to=8, **settings))


def test_l2_without_compensation_needs_no_text():
    assert prune_llama(make(), PruneRecipe(0.3, "l2", round_to=8, compensate=False))[1]["sparsity"] == pytest.approx(
        0.3, abs=0.01
    )


def test_damaged_weights_are_named(windows):
    model = make()
    model.model.layers[1].mlp.down_proj.weight.data[0, 3] = float("nan")
    with pytest.raises(CompactMindError, match="model.layers.1"):
        prune_llama(model, PruneRecipe(criterion="activation", round_to=8, compensate=False), windows)
