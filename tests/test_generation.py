"""One token after the other: a cache that grows in place, and all blocks in one call, against transformers' own way."""

import copy

import helpers
import pytest
import torch
from test_w8a8_block import make_model
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from compactmind import generation, kernels
from compactmind.generation import DecodesByPlan, GrowingCache, GrowingLayer, growing_cache, plan_of
from compactmind.kernels import KERNEL_VARIABLE
from compactmind.methods.quantization.gptq_model import GPTQRecipe, quantize_gptq
from compactmind.methods.quantization.nf4_model import NF4Recipe, quantize_nf4
from compactmind.methods.quantization.w8a8_block import fuse_blocks
from compactmind.methods.quantization.w8a8_linear import ACTIVATIONS

needs_kernels = pytest.mark.skipif(kernels.reason_against() is not None, reason=f"no kernels: {kernels.reason_against()}")


@pytest.fixture(autouse=True)
def native(monkeypatch):
    monkeypatch.delenv(KERNEL_VARIABLE, raising=False)


# -------------------------------------------------------------------------------------------------------------- the cache
def states(batch: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, 2, tokens, 4, generator=generator) for _ in range(2))


def test_a_layer_holds_what_a_dynamic_one_does_and_copies_only_to_grow():
    grown, wanted, places = GrowingLayer(), DynamicCache().layer_class_to_replicate(), set()
    for seed, tokens in enumerate([5, *[1] * 200, 70, 1]):
        new = states(2, tokens, seed)
        for result, expected in zip(grown.update(*new), wanted.update(*new), strict=True):
            assert torch.equal(result, expected)
        assert grown.get_seq_length() == wanted.get_seq_length() and grown.get_mask_sizes(1) == wanted.get_mask_sizes(1)
        places.add(grown.keys.data_ptr())
    assert len(places) <= 5


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.crop(-3),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.batch_select_indices(torch.tensor([1])),
        lambda layer: layer.batch_select_indices(torch.tensor([1, 0])),
        lambda layer: layer.reorder_cache(torch.tensor([1, 1])),
        lambda layer: layer.reset(),
    ],
)
def test_a_layer_goes_on_after_what_a_search_does_to_it(change):
    grown, wanted = GrowingLayer(), DynamicCache().layer_class_to_replicate()
    for layer in (grown, wanted):
        layer.update(*states(2, 9, 0))
        change(layer)
    for seed in (1, 2):
        batch = wanted.keys.shape[0] if wanted.is_initialized and wanted.get_seq_length() else 2
        new = states(batch, 2, seed)
        for result, expected in zip(grown.update(*new), wanted.update(*new), strict=True):
            assert torch.equal(result, expected)


def test_layers_with_a_sliding_window_stay_what_they_are():
    model = helpers.randomize(MistralForCausalLM(MistralConfig(**helpers.llama_settings(head_dim=16, sliding_window=5))))
    cache = growing_cache(model)
    assert isinstance(cache, GrowingCache) and not any(isinstance(layer, GrowingLayer) for layer in cache.layers)
    windows = helpers.example_windows(1, 12)
    plain = model.generate(windows, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(windows, max_new_tokens=8, do_sample=False, past_key_values=cache), plain)


# -------------------------------------------------------------------------------------------------------------- one token
def fused(**changes):
    model = make_model(**changes)
    fuse_blocks(model)
    return model


def in_integers(tied: bool = False, **recipe):
    model = helpers.make_llama(tie_word_embeddings=tied, hidden_size=64, intermediate_size=96)
    quantize_gptq(model, helpers.example_windows(4, 32), GPTQRecipe(compensation=False, **recipe))
    return model


MODELS = {
    "dense": lambda: helpers.make_llama(),
    "one key head": lambda: helpers.make_llama(num_key_value_heads=1, head_dim=10),
    "mistral": lambda: helpers.randomize(
        MistralForCausalLM(MistralConfig(**helpers.llama_settings(head_dim=16, sliding_window=None)))
    ),
    "long rope": lambda: helpers.make_llama(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}),
    **{f"w8a8 {each}": lambda each=each: fused(activations=each) for each in ACTIVATIONS},
    "w8a8 rotated": lambda: fused(rotation=16),
    "w8a8 apart": lambda: make_model(),
    "4 bits": lambda: in_integers(bits=4),
    "3 bits, tied": lambda: in_integers(tied=True, bits=3, group_size=-1, zero="float"),
    "nf4": lambda: packed_by_others(),
    "nf4, rows filled up": lambda: packed_by_others(hidden_size=72, head_dim=16, num_attention_heads=4),
    "mixture": lambda: in_integers(target_compression=3.0),
}


def one_by_one(model, windows: torch.Tensor, cache) -> torch.Tensor:
    """Return the logits of the last tokens of windows (1, tokens), read one by one behind the first five."""
    with torch.inference_mode():
        output = model(input_ids=windows[:, :5], past_key_values=cache, use_cache=True)
        result = []
        for token in windows[0, 5:]:
            output = model(input_ids=token[None, None], past_key_values=output.past_key_values)
            result.append(output.logits[0, -1])
    return torch.stack(result)


@needs_kernels
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_token_is_what_the_blocks_make_of_it_one_after_the_other(make, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    model = make().eval()
    windows = helpers.example_windows(1, 90)
    wanted = one_by_one(model, windows, None)
    cache = growing_cache(model)
    assert cache.plan is not None and isinstance(model.model, DecodesByPlan)
    calls, decode = [], cache.plan.__class__.__call__
    monkeypatch.setattr(generation.Plan, "__call__", lambda *parts: calls.append(1) or decode(*parts))
    result = one_by_one(model, windows, cache)
    assert len(calls) == 85 and cache.get_seq_length() == 90
    # rounding an input to int8 may fall the other way where the sums before it are added up in another order
    assert (result - wanted).norm() / wanted.norm() < (2e-2 if "Int8" in repr(model) or "W8A8" in repr(model) else 1e-5)
    assert torch.equal(one_by_one(model, windows, None), wanted)  # without the cache nothing has changed


@needs_kernels
def test_text_is_the_same_with_and_without(monkeypatch):
    model, windows = helpers.make_llama(), helpers.example_windows(1, 7)
    plain = model.generate(windows, max_new_tokens=100, do_sample=False)
    assert torch.equal(
        model.generate(windows, max_new_tokens=100, do_sample=False, past_key_values=growing_cache(model)), plain
    )
    again = copy.deepcopy(model)
    assert torch.equal(
        again.generate(windows, max_new_tokens=100, do_sample=False, past_key_values=growing_cache(again)), plain
    )
    assert type(model.model).__name__ == "LlamaModel"


@needs_kernels
@pytest.mark.parametrize("asked", ["two texts", "padding", "gradients", "hidden states", "several tokens"])
def test_what_it_cannot_compute_goes_the_usual_way(monkeypatch, asked):
    model = helpers.make_llama()
    monkeypatch.setattr(generation.Plan, "__call__", lambda *_: pytest.fail("it was computed by the plan"))
    windows = helpers.example_windows(2 if asked == "two texts" else 1, 9)
    mask, more, first = None, {}, 8
    if asked == "padding":
        mask = torch.ones_like(windows)
        mask[0, 0] = 0
    if asked == "hidden states":
        more["output_hidden_states"] = True
    if asked == "several tokens":
        first = 5
    with torch.set_grad_enabled(asked == "gradients"):
        caches = growing_cache(model), DynamicCache(config=model.config)
        for cache in caches:
            model(input_ids=windows[:, :first], past_key_values=cache, attention_mask=None if mask is None else mask[:, :first])
        result, wanted = (
            model(input_ids=windows[:, first:], past_key_values=cache, attention_mask=mask, **more) for cache in caches
        )
    assert torch.allclose(result.logits, wanted.logits, rtol=1e-5, atol=1e-6)
    assert (result.hidden_states is not None) == (asked == "hidden states")


def biased():
    model = helpers.make_llama()
    linear = model.model.layers[1].mlp.up_proj
    linear.bias = nn.Parameter(torch.ones(linear.out_features))
    return model


def packed_by_others(**changes):
    model = helpers.make_llama(**({"hidden_size": 64, "intermediate_size": 96} | changes))
    quantize_nf4(model, helpers.example_windows(4, 32), NF4Recipe())
    return model


@pytest.mark.parametrize(
    "make",
    [
        biased,
        lambda: helpers.make_llama(hidden_act="gelu"),
        lambda: helpers.make_llama().bfloat16(),
        lambda: helpers.randomize(MistralForCausalLM(MistralConfig(**helpers.llama_settings(head_dim=16, sliding_window=5)))),
        lambda: helpers.make_llama().to("meta"),
    ],
    ids=["bias", "gelu", "bfloat16", "sliding window", "another device"],
)
def test_a_model_it_does_not_know_has_no_plan(make):
    assert plan_of(make()) is None


def test_without_kernels_there_is_no_plan_and_the_cache_still_grows(monkeypatch):
    monkeypatch.setenv(KERNEL_VARIABLE, "simulated")
    model, windows = helpers.make_llama(), helpers.example_windows(1, 7)
    cache = growing_cache(model)
    assert cache.plan is None and not isinstance(model.model, DecodesByPlan)
    plain = model.generate(windows, max_new_tokens=20, do_sample=False)
    assert torch.equal(model.generate(windows, max_new_tokens=20, do_sample=False, past_key_values=cache), plain)


def in_bf16_numbers() -> LlamaForCausalLM:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2)).eval().requires_grad_(False)
    for weight in model.parameters():
        weight.copy_(weight.bfloat16())
    return model


@needs_kernels
def test_weights_that_are_bf16_numbers_are_read_as_bf16_and_give_the_same_logits():
    model = in_bf16_numbers()
    ids, (first, wanted) = torch.arange(7).view(1, -1), (copy.deepcopy(model), model)
    with torch.inference_mode():
        cache = growing_cache(first)
        for each, past in ((first, cache), (wanted, DynamicCache(config=model.config))):
            each(input_ids=ids, past_key_values=past)
            each.logits = each(input_ids=ids[:, :1], past_key_values=past).logits
    assert type(first.lm_head) is generation.Bf16Head and {each.dtype for each in cache.plan.linears} == {torch.bfloat16}
    torch.testing.assert_close(first.logits, wanted.logits, rtol=1e-4, atol=1e-5)


@needs_kernels
def test_other_numbers_stay_float32_and_a_changed_weight_is_read_anew(monkeypatch):
    linear = nn.Linear(16, 8, bias=False).requires_grad_(False)
    assert generation.bf16_of(linear) is None
    linear.weight.copy_(linear.weight.bfloat16())
    once = generation.bf16_of(linear)
    assert once is generation.bf16_of(linear) and torch.equal(once.float(), linear.weight)
    linear.weight.mul_(2)
    assert torch.equal(generation.bf16_of(linear).float(), linear.weight)
    linear.__class__ = generation.Bf16Head
    x = torch.randn(1, 16)
    torch.testing.assert_close(linear(x), x @ linear.weight.T, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(generation, "COPIES", 0)
    model = in_bf16_numbers()
    assert {each.dtype for each in plan_of(model).linears} == {torch.float32}
