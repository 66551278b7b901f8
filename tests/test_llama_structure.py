"""Parts of a Llama that go: the smaller model is the masked one, of every type, and it reloads."""

import copy
import subprocess
import sys

import helpers
import llamas
import pytest
import torch
from llamas import BIASES, OTHERS, WHOLE_HEADS, logits_of, make, make_other, random_masks, save, shrunk
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MistralForCausalLM

from compactmind.attention import with_attention_kernel
from compactmind.checkpoint import load_checkpoint
from compactmind.methods.llama import ARCHITECTURES, llama_blocks
from compactmind.methods.pruning.llama_importance import score
from compactmind.methods.pruning.llama_masks import PruneRecipe, choose_masks
from compactmind.methods.pruning.llama_pruning import prune_llama
from compactmind.methods.pruning.llama_structure import (
    FAMILIES,
    kept_parameters,
    prunable_parameters,
    rebuilt,
    remove_blocks,
    remove_hidden_channels,
    silence,
    silence_hidden_channels,
)
from compactmind.methods.pruning.modeling_pruned_llama import PrunedLlamaForCausalLM

windows = llamas.windows


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
    torch.testing.assert_close(logits_of(small), logits_of(model), rtol=0, atol=2e-5)
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
def logits_elsewhere(folder, names, trusted=()) -> dict[str, torch.Tensor]:
    """Return the logits of saved models by a process without this package, which runs the code of those that are trusted."""
    torch.save(helpers.example_windows(), folder / "windows.pt")
    code = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM\n"
        f"for name in {list(names)}:\n"
        f"    more = dict(trust_remote_code=True) if name in {list(trusted)} else dict()\n"
        "    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **more)\n"
        "    torch.save(model(torch.load('windows.pt')).logits.detach(), f'{name}.pt')\n"
        "assert not any(name.startswith('compactmind') for name in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name: torch.load(folder / f"{name}.pt") for name in names}


def test_a_process_without_this_package_reloads_them(tmp_path):
    small = {}
    for case in ("both", "three groups of four", "three groups of four, biases", "tied"):
        changes, channels, groups, expected = CASES[case]
        model = make(**changes)
        small[case] = shrunk(model, random_masks(model, channels, groups))
        save(small[case], tmp_path / case)
        again = load_checkpoint(tmp_path / case)
        assert type(again.model) is expected and torch.equal(logits_of(again.model), logits_of(small[case])), case
    unusual = [case for case in small if CASES[case][-1] is PrunedLlamaForCausalLM]
    assert unusual
    for case, logits in logits_elsewhere(tmp_path, small, unusual).items():
        assert torch.allclose(logits, logits_of(small[case]), atol=1e-5), case


# --------------------------------------------------------------------------------------------------- other model types
def test_all_that_can_be_taken_apart_can_be_pruned():
    assert set(FAMILIES) == set(ARCHITECTURES) == {"llama", *OTHERS}


def reloaded(model, directory):
    """Return what transformers alone reads of a checkpoint, with the attention that a loaded one has."""
    save(model, directory)
    assert torch.equal(logits_of(load_checkpoint(directory).model), logits_of(model))
    return with_attention_kernel(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32))


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
        text = {name: value for name, value in again.config.to_dict().items() if name != "layer_types"}
        assert type(again.config)(**text).layer_types == again.config.layer_types


def test_a_process_without_this_package_reloads_every_type_with_unequal_widths(tmp_path):
    kinds = ["llama", *OTHERS]
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
    for kind, logits in logits_elsewhere(tmp_path, kinds, kinds).items():
        assert torch.allclose(logits, logits_of(load_checkpoint(tmp_path / kind).model), atol=1e-5), kind


@pytest.mark.parametrize("kind", OTHERS)
def test_a_model_of_unequal_widths_can_be_pruned_again(windows, kind):
    recipe = PruneRecipe(0.2, scope="global", round_to=4)
    small, _ = prune_llama(make_other(kind), recipe, windows)
    smaller, done = prune_llama(small, recipe, windows)
    assert type(smaller) is FAMILIES[kind].unequal and done["sparsity"] == pytest.approx(0.2, abs=0.01)
