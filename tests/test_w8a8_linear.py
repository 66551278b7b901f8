"""The int8 linear against the same arithmetic written down in plain floats, kernel against kernel, and through its life."""

import copy

import helpers
import pytest
import torch
from torch import nn

from compactmind import kernels
from compactmind.errors import CompactMindError
from compactmind.kernels import KERNEL_VARIABLE
from compactmind.methods.quantization.w8a8_encoder import quantize_encoder
from compactmind.methods.quantization.w8a8_linear import (
    ACTIVATIONS,
    W8A8Linear,
    activation_scale,
    kernel_for,
    quantize_activation,
    quantize_weight,
)
from compactmind.methods.quantization.w8a8_model import W8A8Recipe, calibrate_llama, quantize_llama

needs_vnni = pytest.mark.skipif(
    not torch.cpu._is_vnni_supported(), reason="torch._int_mm saturates on processors without int8 instructions"
)
KERNELS = ["simulated", pytest.param("int_mm", marks=needs_vnni)]

SHAPES = {"one row": (1, 24), "odd rows": (13, 24), "many rows": (40, 24), "batch": (3, 7, 24), "vector": (24,)}
STATIC_ABSMAX = 1.9
"""Below the largest value of the inputs, so that static scales clip."""


def make_linear(in_features: int = 24, out_features: int = 16, bias: bool = True, seed: int = 0) -> nn.Linear:
    """Return a linear layer whose rows differ in size by a factor of a hundred."""
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(in_features, out_features, bias=bias)
    with torch.no_grad():
        sizes = torch.logspace(-1, 1, out_features)[:, None]
        linear.weight.copy_(torch.randn(out_features, in_features, generator=generator) * sizes)
        if bias:
            linear.bias.copy_(torch.randn(out_features, generator=generator))
    return linear.requires_grad_(False)


def make_input(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def quantize(linear: nn.Linear, activations: str) -> W8A8Linear:
    return W8A8Linear.from_linear(linear, activations, STATIC_ABSMAX if activations == "per_tensor_static" else None)


def reference(linear: nn.Linear, x: torch.Tensor, activations: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the int8 layer has to compute, in float64: integers held in floats, one plain product, rescaled.

    Also returns how far the output may be off because an input lies half-way between two integers: 0 nearly everywhere.
    """
    weight, x = linear.weight.double(), x.double()
    weight_step = weight.abs().max(dim=1).values / 127
    if activations == "per_token":
        step = x.abs().max(dim=-1, keepdim=True).values / 127
    else:
        step = (x.abs().max() if activations == "per_tensor" else torch.tensor(STATIC_ABSMAX, dtype=torch.float64)) / 127
    levels = torch.clip(x / step, -127, 127)
    product = torch.round(levels) @ torch.round(weight / weight_step[:, None]).T * step * weight_step
    half_way = ((levels - torch.floor(levels) - 0.5).abs() < 2e-5).double()
    return product if linear.bias is None else product + linear.bias.double(), half_way @ weight.abs().T * step


def assert_is_reference(output: torch.Tensor, linear: nn.Linear, x: torch.Tensor, activations: str) -> None:
    """Assert that an output in x's dtype is `reference`, as exactly as that dtype can tell."""
    expected, allowed = reference(linear, x, activations)
    assert (allowed == 0).double().mean() > 0.5
    precision = 1e-5 if x.dtype == torch.float32 else torch.finfo(x.dtype).eps
    assert ((output.double() - expected).abs() <= allowed * (1 + precision) + precision * (1 + expected.abs())).all()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


# ------------------------------------------------------------------------------------------------------- the arithmetic
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_forward_is_the_arithmetic_written_down_in_floats(activations, shape, bias, dtype):
    linear, x = make_linear(bias=bias), make_input(*shape, dtype=dtype)
    output = quantize(linear, activations)(x)
    assert output.dtype == dtype and output.shape == (*shape[:-1], 16)
    assert_is_reference(output, linear, x, activations)


@pytest.mark.parametrize(("in_features", "out_features"), [(1, 1), (17, 11), (8, 3), (300, 5)])
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_widths_need_not_be_multiples_of_anything(activations, in_features, out_features):
    linear, x = make_linear(in_features, out_features), make_input(5, in_features)
    assert_is_reference(quantize(linear, activations)(x), linear, x, activations)


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_an_input_that_is_not_contiguous_is_read_in_its_own_order(activations):
    layer, x = quantize(make_linear(), activations), make_input(24, 5, 3).permute(2, 1, 0)
    assert torch.equal(layer(x), layer(x.contiguous()))


@pytest.mark.parametrize("rows", [1, 7, 16, 17, 31, 32, 33])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_gives_the_product_of_the_integers(rows, kernel):
    layer = quantize(make_linear(), "per_token")
    q = quantize_activation(make_input(rows, 24), torch.tensor([[0.02]]))
    layer.kernel = kernel
    product = layer.parts.product(q)
    assert product.shape == (rows, 16) and torch.equal(product.long(), q.long() @ layer.weight.long().t())


@pytest.mark.parametrize("in_features", [1040, 1041, 4096, 11008])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_product_of_a_wide_layer_is_exact_in_every_kernel(kernel, in_features):
    """Sums of products beyond 2^24 = 1040 x 127 x 127, above which float32 has no odd numbers any more."""
    generator = torch.Generator().manual_seed(0)
    q, weight = (torch.randint(120, 128, (rows, in_features), generator=generator, dtype=torch.int8) for rows in (5, 7))
    q[1], weight[1], q[2] = 127, 127, -127
    layer = W8A8Linear(in_features, 7, bias=False)
    layer.weight, layer.kernel = weight, kernel
    product = layer.parts.product(q)
    assert product.dtype == torch.int32
    assert torch.equal(product.long(), q.long() @ weight.long().t())


def test_the_largest_products_do_not_overflow():
    linear = nn.Linear(4096, 4, bias=False).requires_grad_(False)
    linear.weight.copy_(torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None].expand(4, 4096))
    output = quantize(linear, "per_token")(torch.tensor([[3.0], [-3.0]]).expand(2, 4096))
    expected = 3 * 4096 * torch.tensor([[1.0, -1.0, 1.0, -1.0], [-1.0, 1.0, -1.0, 1.0]])
    assert torch.allclose(output, expected, rtol=1e-5)


@pytest.mark.parametrize("activations", ["per_token", "per_tensor"])
def test_the_error_against_the_float_layer_is_small(activations):
    linear, x = make_linear(128, 96), make_input(50, 128)
    assert 0 < relative_error(quantize(linear, activations)(x), linear(x)) < 0.02


def test_the_error_with_a_static_scale_is_small_when_it_fits():
    linear, x = make_linear(128, 96), make_input(50, 128)
    layer = W8A8Linear.from_linear(linear, "per_tensor_static", x.abs().max().item())
    assert 0 < relative_error(layer(x), linear(x)) < 0.02
    assert torch.allclose(layer(x), quantize(linear, "per_tensor")(x), rtol=1e-4, atol=1e-4)


def test_one_large_token_spoils_the_others_unless_each_has_its_own_scale():
    linear, x = make_linear(128, 96), make_input(50, 128)
    x[0] *= 200
    errors = {name: relative_error(quantize(linear, name)(x)[1:], linear(x)[1:]) for name in ("per_token", "per_tensor")}
    assert errors["per_token"] < 0.02 < 0.2 < errors["per_tensor"]


def test_tokens_do_not_see_each_other_with_a_scale_of_their_own():
    layer, x = quantize(make_linear(), "per_token"), make_input(9, 24)
    assert torch.equal(layer(x)[4:5], layer(x[4:5]))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_a_zero_input_gives_the_bias(activations, bias):
    linear = make_linear(bias=bias)
    output = quantize(linear, activations)(torch.zeros(3, 24))
    assert torch.equal(output, linear.bias.expand(3, 16) if bias else torch.zeros(3, 16))


# --------------------------------------------------------------------------------------------------------- the integers
def test_weights_use_the_whole_symmetric_range_row_by_row():
    weight = make_linear(200, 50).weight
    levels, scale = quantize_weight(weight)
    assert levels.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == (50, 1)
    assert levels.int().abs().amax(dim=1).tolist() == [127] * 50
    assert levels.min() == -127
    assert ((levels * scale - weight).abs() <= scale / 2 * (1 + 1e-4)).all()


def test_weights_in_bfloat16_are_quantized_as_the_floats_they_are():
    weight = make_linear().weight.to(torch.bfloat16)
    for result, expected in zip(quantize_weight(weight), quantize_weight(weight.float()), strict=True):
        assert torch.equal(result, expected)


def test_a_weight_row_of_zeros_has_a_positive_scale_and_gives_the_bias():
    linear = make_linear()
    linear.weight[3] = 0
    levels, scale = quantize_weight(linear.weight)
    assert (levels[3] == 0).all()
    assert scale[3] > 0 and torch.isfinite(scale).all()
    output = quantize(linear, "per_token")(make_input(5, 24))
    assert torch.equal(output[:, 3], linear.bias[3].expand(5))
    assert torch.isfinite(output).all()


def test_activation_scales_have_the_shape_of_their_granularity():
    x = torch.tensor([[1.0, -12.7], [0.0, 0.5], [0.0, 0.0]])
    assert activation_scale(x, "per_token").flatten().tolist() == pytest.approx([0.1, 0.5 / 127, 0], abs=1e-8)
    assert activation_scale(x, "per_token").shape == (3, 1)
    assert (activation_scale(x, "per_token") > 0).all()
    assert activation_scale(x, "per_tensor").item() == pytest.approx(0.1)
    assert activation_scale(x, "per_tensor").shape == (1, 1)
    static = torch.tensor([[0.25]])
    assert activation_scale(x, "per_tensor_static", static) is static
    assert activation_scale(x.to(torch.bfloat16), "per_token").dtype == torch.float32


def test_activations_are_rounded_to_even_and_clipped_symmetrically():
    x = torch.tensor([[0.5, 1.5, -2.5, 125.5, 127.5, 500.0, -127.5, -500.0]])
    for dtype in (torch.float32, torch.bfloat16):
        levels = quantize_activation(x.to(dtype), torch.tensor([[1.0]]))
        assert levels.dtype == torch.int8
        assert levels.tolist() == [[0, 2, -2, 126, 127, 127, -127, -127]]


# -------------------------------------------------------------------------------------------------------- life of a layer
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_a_layer_comes_back_from_its_state(activations, bias):
    layer, x = quantize(make_linear(bias=bias), activations), make_input(6, 24)
    state = layer.state_dict()
    names = {"weight", "weight_scale"} | ({"bias"} if bias else set())
    assert set(state) == names | ({"input_scale"} if activations == "per_tensor_static" else set())
    again = W8A8Linear(24, 16, bias, activations)
    again.load_state_dict(state, strict=True)
    assert torch.equal(again.prepare()(x), layer(x))


@pytest.mark.parametrize("cast", [
    lambda module: module.to(torch.bfloat16), lambda module: module.half(), lambda module: module.double(),
    lambda module: module.to("cpu"), lambda module: module.to("cpu", torch.bfloat16), lambda module: module.cpu().float(),
], ids=["bfloat16", "half", "double", "cpu", "cpu bfloat16", "cpu float"])  # fmt: skip
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_a_cast_of_the_model_leaves_integers_and_scales_alone(activations, cast):
    layer, x = quantize(make_linear(), activations), make_input(6, 24)
    before, expected = {name: tensor.clone() for name, tensor in layer.state_dict().items()}, layer(x)
    model = cast(nn.Sequential(layer, nn.LayerNorm(16)))
    after = model[0].state_dict()
    assert {name: tensor.dtype for name, tensor in after.items()} == {name: tensor.dtype for name, tensor in before.items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert after["weight"].dtype == torch.int8 and after["weight_scale"].dtype == torch.float32
    assert torch.equal(model[0](x), expected)


def test_a_layer_made_from_a_bfloat16_one_computes_in_either():
    linear = make_linear().to(torch.bfloat16)
    layer, x = quantize(linear, "per_token"), make_input(6, 24, dtype=torch.bfloat16)
    assert layer.bias.dtype == torch.float32
    assert layer(x).dtype == torch.bfloat16 and layer(x.float()).dtype == torch.float32
    assert torch.equal(layer(x), layer(x.float()).to(torch.bfloat16))


def test_a_layer_has_nothing_to_train():
    assert not any(parameter.requires_grad for parameter in quantize(make_linear(), "per_token").parameters())


def test_the_original_layer_stays_as_it_was():
    linear = make_linear()
    weight, bias = linear.weight.clone(), linear.bias.clone()
    quantize(linear, "per_token")(make_input(3, 24))
    assert torch.equal(linear.weight, weight) and torch.equal(linear.bias, bias)


def test_an_unknown_granularity_is_refused_with_the_ones_there_are():
    for refuse in (
        lambda: W8A8Linear(24, 16, True, "per_channel"),
        lambda: W8A8Linear.from_linear(make_linear(), "per_channel"),
    ):
        with pytest.raises(ValueError, match="'per_channel'.*per_token, per_tensor, per_tensor_static"):
            refuse()


def test_a_printed_layer_tells_its_widths_activations_and_kernel():
    layer = quantize(make_linear(), "per_tensor")
    assert repr(layer) == f"W8A8Linear(24, 16, activations=per_tensor, kernel={layer.kernel})"


# -------------------------------------------------------------------------------------------------------------- kernels
@pytest.mark.parametrize(
    ("capability", "widths", "kernel"),
    [
        ((7, 5), (24, 16), "int_mm"),
        ((9, 0), (24, 16), "int_mm"),
        ((7, 0), (24, 16), "simulated"),
        ((9, 0), (20, 16), "simulated"),
        ((9, 0), (24, 15), "simulated"),
    ],
)
def test_cuda_multiplies_integers_where_it_can(monkeypatch, capability, widths, kernel):
    monkeypatch.delenv(KERNEL_VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert kernel_for(torch.device("cuda"), *widths) == kernel


def test_a_processor_without_int8_instructions_or_kernels_simulates_and_says_so(monkeypatch):
    monkeypatch.delenv(KERNEL_VARIABLE, raising=False)
    for vnni, built, kernel in ((True, True, "int_mm"), (True, False, "int_mm"), (False, True, "avx2"), (False, False, "simulated")):
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda vnni=vnni: vnni)
        monkeypatch.setattr(kernels, "available", lambda built=built: built)
        layer = quantize(make_linear(), "per_token")
        assert layer.kernel == kernel
    assert_is_reference(layer(make_input(6, 24)), make_linear(), make_input(6, 24), "per_token")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_environment_can_ask_for_the_simulation(monkeypatch, device):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    for value, kernel in ((None, "int_mm"), ("", "int_mm"), ("simulated", "simulated")):
        monkeypatch.delenv(KERNEL_VARIABLE, raising=False)
        if value is not None:
            monkeypatch.setenv(KERNEL_VARIABLE, value)
        assert kernel_for(torch.device(device), 24, 16) == kernel
    assert W8A8Linear.from_linear(make_linear()).kernel == "simulated"


@pytest.mark.parametrize("value", ["int_mm", "Simulated", "avx2"])
def test_another_kernel_is_refused_by_name(monkeypatch, value):
    monkeypatch.setenv(KERNEL_VARIABLE, value)
    with pytest.raises(CompactMindError, match=f"COMPACTMIND_KERNEL is '{value}'.*simulated"):
        kernel_for(torch.device("cpu"), 24, 16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_cuda_computes_what_the_processor_computes(monkeypatch, activations, shape, dtype):
    monkeypatch.delenv(KERNEL_VARIABLE, raising=False)
    linear, x = make_linear(), make_input(*shape, dtype=dtype)
    layer = quantize(linear, activations).to("cuda")
    assert layer.kernel == "int_mm"
    assert_is_reference(layer(x.to("cuda")).cpu(), linear, x, activations)
    assert torch.equal(layer.to("cpu")(x), quantize(linear, activations)(x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_simulates_widths_its_kernel_cannot_multiply():
    linear, x = make_linear(20, 11), make_input(5, 20)
    layer = quantize(linear.to("cuda"), "per_token")
    assert layer.kernel == "simulated"
    assert_is_reference(layer(x.to("cuda")).cpu(), linear.to("cpu"), x, "per_token")


def test_a_copy_computes_the_same_and_shares_nothing():
    linear = torch.nn.Linear(16, 8)
    layer = W8A8Linear.from_linear(linear)
    twin = copy.deepcopy(layer)
    x = torch.randn(3, 16)
    before = layer(x)
    with torch.no_grad():
        linear.bias.add_(1)
    twin.weight.zero_()
    assert torch.equal(layer(x), before)
    assert torch.equal(copy.deepcopy(layer)(x), before)


def test_static_activations_need_the_calibrated_maximum():
    with pytest.raises(ValueError, match="input_absmax"):
        W8A8Linear.from_linear(torch.nn.Linear(4, 4), "per_tensor_static")


def test_a_model_without_an_int8_kernel_says_so_when_it_is_made(monkeypatch, capsys):
    def made(model, kernel: str) -> str:
        monkeypatch.setenv(kernels.KERNEL_VARIABLE, kernel)
        capsys.readouterr()
        if "CausalLM" in type(model).__name__:
            quantize_llama(model, calibrate_llama(model, helpers.example_windows()), W8A8Recipe())
        else:
            quantize_encoder(model)
        return capsys.readouterr().err

    for make, count in ((helpers.make_llama, 14), (helpers.make_distilbert, 18)):
        said = made(make(), "simulated")
        assert f"{count} of {count} int8 linears run simulated on cpu" in said and "COMPACTMIND_KERNEL says simulated" in said
        assert len(said.splitlines()) == 1
    if kernels.reason_against() is None:
        assert "simulated" not in made(helpers.make_llama(), "")
