"""The fused forward pass of a W8A8 block against the same block linear by linear."""

import copy

import helpers
import pytest
import torch
from torch import nn
from transformers import MistralConfig, MistralForCausalLM

from compactmind.methods.quantization.w8a8_block import W8A8Block, compile_blocks, fuse_blocks
from compactmind.methods.quantization.w8a8_linear import ACTIVATIONS, W8A8Linear


def make_model(architecture: str = "llama", activations: str = "per_token", rotation: int = 0, **changes):
    """Return a small model whose block linears are int8, not fused yet; `rotation` is that of all inputs but o's."""
    if architecture == "llama":
        model = helpers.make_llama(**changes)
    else:
        model = helpers.randomize(MistralForCausalLM(MistralConfig(**helpers.llama_settings(head_dim=16, **changes))))
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            size = 0 if name.endswith("o_proj") else rotation
            model.model.layers.set_submodule(name, W8A8Linear.from_linear(module, activations, 4.0, size))
    return model


@torch.no_grad()
def logits_of(model, **inputs) -> torch.Tensor:
    return model(helpers.example_windows(), **inputs).logits


CASES = {
    "grouped": {}, "one group": {"num_key_value_heads": 4}, "one key head": {"num_key_value_heads": 1},
    "odd heads": {"num_key_value_heads": 1, "head_dim": 10}, "mistral": {"architecture": "mistral"},
    "rotated": {"rotation": 16}, "sliding window": {"architecture": "mistral", "sliding_window": 5},
    "long rope": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_fused_blocks_compute_what_the_linears_compute_one_by_one(case, activations):
    model = make_model(activations=activations, **case)
    plain = logits_of(model)
    assert fuse_blocks(model) == 2 and all(isinstance(layer, W8A8Block) for layer in model.model.layers)
    fused = logits_of(model)
    # Rounding to int8 may fall the other way on single values; the float model is much further off.
    dense = helpers.make_llama(**case) if not {"architecture", "rotation"} & set(case) else None
    assert (fused - plain).norm() / plain.norm() < 2e-3
    if dense is not None and activations == "per_token":
        assert (fused - plain).norm() < 0.3 * (logits_of(dense) - plain).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_residual_stream_keeps_its_dtype(dtype):
    model = helpers.cast_parameters(make_model(), dtype)
    exact = logits_of(helpers.cast_parameters(copy.deepcopy(model), torch.float32))
    plain = logits_of(model)
    fuse_blocks(model)
    fused = logits_of(model)
    assert fused.dtype == dtype and fused.shape == plain.shape
    assert (fused.float() - exact).norm() < 1.1 * (plain.float() - exact).norm()  # fewer roundings in between, not more


def test_padding_and_a_cache_are_heeded():
    model = make_model()
    windows, mask = helpers.example_windows(), torch.ones(3, 16, dtype=torch.long)
    mask[1, :6] = 0
    plain = logits_of(model, attention_mask=mask)
    plain_tokens = model.generate(windows[:1], max_new_tokens=8, do_sample=False)
    fuse_blocks(model)
    assert (logits_of(model, attention_mask=mask) - plain)[mask.bool()].norm() / plain[mask.bool()].norm() < 2e-3
    assert torch.equal(model.generate(windows[:1], max_new_tokens=8, do_sample=False), plain_tokens)
    with torch.no_grad():
        first = model(windows[:, :10], use_cache=True)
        second = model(windows[:, 10:], past_key_values=first.past_key_values).logits
    assert (second - logits_of(model)[:, 10:]).norm() / second.norm() < 1e-5


def test_fusing_changes_nothing_in_the_state_and_survives_a_copy_and_a_move():
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fuse_blocks(model)
    fused, state = logits_of(model), model.state_dict()
    assert list(state) == list(before) and all(torch.equal(state[name], tensor) for name, tensor in before.items())
    attention = model.model.layers[0].self_attn  # one block of memory: nothing is stored twice
    assert attention.k_proj.weight.untyped_storage().data_ptr() == attention.q_proj.weight.untyped_storage().data_ptr()
    twin = copy.deepcopy(model)
    model.model.layers[0].self_attn.q_proj.weight.zero_()
    assert torch.equal(logits_of(twin), fused)
    assert torch.equal(logits_of(twin.to("cpu")), fused)
    assert torch.equal(logits_of(twin.to(torch.float32)), fused)


@pytest.mark.parametrize("changes", [{"attention_bias": True}, {"mlp_bias": True}, {"hidden_act": "gelu"}], ids=str)
def test_blocks_that_do_not_fit_keep_their_own_forward(changes):
    model = make_model(**changes)
    plain = logits_of(model)
    assert fuse_blocks(model) == 0
    assert torch.equal(logits_of(model), plain)


def test_a_float_model_is_left_alone():
    assert fuse_blocks(helpers.make_llama()) == 0


@pytest.mark.slow
def test_compiled_functions_compute_what_the_eager_ones_do():
    model = make_model(rotation=16)
    fuse_blocks(model)
    eager = logits_of(model)
    compiled = logits_of(compile_blocks(model))
    assert (compiled - eager).norm() / eager.norm() < 2e-3
    assert torch.equal(logits_of(compile_blocks(model, False)), eager)
