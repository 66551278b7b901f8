"""Hadamard rotations: the block computes what it did, and an int8 linear loses less of inputs with a few large values."""

import helpers
import pytest
import torch

from compactmind.methods.llama import llama_blocks
from compactmind.methods.quantization.calibration import SITES, readers_of
from compactmind.methods.quantization.rotation import InputRotation, fold_rotation, hadamard, rotate, rotation_sizes, signs
from compactmind.methods.quantization.w8a8_linear import W8A8Linear


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model(helpers.example_windows()).logits


@pytest.mark.parametrize("size", [1, 2, 16, 64])
def test_the_matrix_is_orthogonal_symmetric_and_spreads_evenly(size):
    matrix = hadamard(size)
    assert torch.allclose(matrix @ matrix.t(), torch.eye(size), atol=1e-6)
    assert torch.equal(matrix, matrix.t())
    assert torch.allclose(matrix.abs(), torch.full((size, size), size**-0.5))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"qkv": 16, "o": 8, "gate_up": 16, "down": 16}),
        ({"hidden_size": 256, "intermediate_size": 192}, {"qkv": 32, "o": 32, "gate_up": 32, "down": 32}),
        ({"head_dim": 10, "intermediate_size": 7}, {"o": 2}),
    ],
    ids=str,
)
def test_blocks_are_powers_of_two_that_divide_the_channels_of_all_linears(changes, expected):
    assert rotation_sizes(llama_blocks(helpers.make_llama(**changes)), SITES) == expected


def test_an_input_that_stays_as_it_is_does_not_count():
    blocks = llama_blocks(helpers.make_llama(intermediate_size=7))
    assert rotation_sizes(blocks, ["qkv", "o"]) == {"qkv": 32, "o": 8}


def test_rotate_multiplies_each_block_of_channels():
    x, matrix = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(0)), hadamard(4)
    expected = x @ torch.block_diag(matrix, matrix, matrix)
    assert torch.allclose(rotate(x, matrix), expected, atol=1e-6)
    assert torch.allclose(rotate(rotate(x, matrix), matrix), x, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1}, {"num_key_value_heads": 1, "head_dim": 10}, {"attention_bias": True}],
    ids=str,
)  # fmt: skip
def test_the_rotation_before_o_proj_is_folded_into_the_weights_around_it(changes):
    model = helpers.make_llama(**changes)
    expected, before = logits_of(model), model.model.layers[0].self_attn.o_proj.weight.clone()
    for block in llama_blocks(model):
        fold_rotation(block, "o", 2 if "head_dim" in changes else 8)
    assert not torch.allclose(model.model.layers[0].self_attn.o_proj.weight, before)
    assert (logits_of(model) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("site", ["qkv", "gate_up", "down"])
def test_any_other_rotation_needs_the_input_rotated(site):
    model = helpers.make_llama()
    expected = logits_of(model)
    for block in llama_blocks(model):
        fold_rotation(block, site, 16)
    assert (logits_of(model) - expected).abs().max() > 0.05 * expected.abs().max()  # weights alone: another model
    rotation = InputRotation(16)
    for block in llama_blocks(model):
        for reader in readers_of(block, site):
            reader.register_forward_pre_hook(lambda _, inputs: (rotation(inputs[0]),))
    assert (logits_of(model) - expected).abs().max() < 1e-5 * expected.abs().max()


def heavy_tailed(rows: int = 200, channels: int = 512) -> torch.Tensor:
    """Return inputs of which each row is large in a few channels, others every time, as before down_proj."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, channels, generator=generator) ** 3


@pytest.mark.parametrize("activations", ["per_token", "per_tensor"])
@torch.no_grad()
def test_an_int8_linear_loses_less_behind_a_rotation(activations):
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(512, 32), heavy_tailed()
    wanted, plain = linear(x), W8A8Linear.from_linear(linear, activations)
    linear.weight.copy_(rotate(linear.weight, hadamard(64)))
    rotated = W8A8Linear.from_linear(linear, activations, rotation=64)
    assert (rotated(x) - wanted).norm() < 0.7 * (plain(x) - wanted).norm()
    assert set(rotated.state_dict()) == {"weight", "weight_scale", "bias", "hadamard_input.weight"}
    assert torch.equal(rotated.hadamard_input.weight.float(), signs(64))


@torch.no_grad()
def test_a_rotated_linear_keeps_the_dtype_of_its_input_and_survives_a_cast():
    linear = torch.nn.Linear(16, 8)
    layer = W8A8Linear.from_linear(linear, rotation=16)
    expected = layer(torch.ones(2, 16))
    layer.half()
    assert layer.hadamard_input.weight.dtype == torch.bfloat16 and torch.equal(layer(torch.ones(2, 16)), expected)
    assert layer(torch.ones(2, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16
