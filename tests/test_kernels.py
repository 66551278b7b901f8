"""The C++ kernels against the same arithmetic in torch, at widths that are multiples of nothing, and how they are built."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import built_kernels
import pytest
import torch
from built_kernels import drawn, needs_kernels
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from compactmind import kernels
from compactmind.formats import grouped, w8a8
from compactmind.kernels import KERNEL_VARIABLE
from compactmind.methods.quantization.error_compensation import compensate_rounding, compensation_of, smaller_scales
from compactmind.methods.quantization.gptq import columns_in_order, inverse_factor, round_compensated, round_nearest
from compactmind.methods.quantization.grid import BITS, K_TYPES, ZEROS, Grid, fit, from_integers, to_integers
from compactmind.methods.quantization.grouped import GroupedEmbedding, GroupedLinear, TiedHead, pack
from compactmind.methods.quantization.rotation import hadamard, rotate
from compactmind.methods.quantization.superblocks import fit_groups
from compactmind.methods.quantization.w8a8_linear import (
    ACTIVATIONS,
    W8A8Linear,
    activation_scale,
    quantize_activation,
)

native, ops, instructions = built_kernels.native, built_kernels.ops, built_kernels.instructions
GRIDS = [Grid(bits, size, zero) for bits in BITS for zero in ZEROS for size in (32, 64, -1)]


def integers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------------------- int8
@needs_kernels
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 6, 7, 13, 65])
@pytest.mark.parametrize(("width", "channels"), [(1, 1), (8, 3), (31, 16), (32, 17), (576, 50), (1030, 33)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("vnni", [False, True], ids=["avx2", "avx_vnni"])
def test_products_of_int8_are_exact_and_scaled_in_a_known_order(ops, instructions, rows, width, channels, bias, vnni):
    q, weight = integers(rows, width), integers(channels, width, seed=1)
    if rows:
        q[0], weight[0], weight[-1] = 127, 127, -127
    row, channel, added = drawn(rows, 1).abs(), drawn(channels, seed=1).abs(), drawn(channels, seed=2)
    result = ops.int8_linear(q, row, weight, channel, added if bias else None, vnni)
    expected = (q.long() @ weight.long().t()).to(torch.int32) * channel * row
    assert torch.equal(result, expected + added if bias else expected)


@needs_kernels
@pytest.mark.parametrize("vnni", [False, True], ids=["avx2", "avx_vnni"])
def test_the_largest_sums_do_not_overflow_or_saturate(ops, instructions, vnni):
    for rows, width in ((1, 11008), (4, 11008), (8, 11008), (8, 131072)):
        for sign in (-1, 1):
            q = torch.full((rows, width), 127, dtype=torch.int8)
            weight = torch.full((5, width), sign * 127, dtype=torch.int8)
            result = ops.int8_linear(q, torch.ones(rows, 1), weight, torch.ones(5), None, vnni)
            assert torch.equal(result, torch.full((rows, 5), float(sign * width * 127 * 127)))
    with pytest.raises(RuntimeError, match="do not fit into 32 bits"):
        wide = torch.zeros(1, 140000, dtype=torch.int8)
        ops.int8_linear(wide, torch.ones(1, 1), wide, torch.ones(1), None)


@needs_kernels
@pytest.mark.parametrize("largest", [127, 90, 64, 40, 12])
@pytest.mark.parametrize("sign", ["both", "positive", "negative"])
@pytest.mark.parametrize("shape", [(13, 40), (64, 1600)], ids=str)
def test_products_are_exact_whatever_would_not_fit_into_sixteen_bits(ops, largest, sign, shape):
    """Weights of the largest size, 128 among them, and inputs some of which are taken apart: all, one in sixteen, in rows of one sign."""
    q = (integers(*shape).int() * largest // 127).to(torch.int8)
    q = q if sign == "both" else q.abs() * (1 if sign == "positive" else -1)
    q[:, ::16], q[3:9] = 127, -128
    q[5, 1::8] = 127
    weight = integers(35, shape[1], seed=1)
    weight[:8], weight[8:16], weight[16:24, ::2] = 127, -128, -128
    result = ops.int8_linear(q, torch.ones(shape[0], 1), weight, torch.ones(35), None, False)
    assert torch.equal(result, (q.long() @ weight.long().t()).float())


@needs_kernels
@pytest.mark.parametrize("rows", [0, 1, 5, 70])
@pytest.mark.parametrize("channels", [1, 7, 96])
@pytest.mark.parametrize("bias", [False, True])
def test_products_of_another_kernel_are_scaled_in_the_same_order(ops, rows, channels, bias):
    product = torch.randint(-(2**30), 2**30, (rows, channels), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    row, channel, added = drawn(rows, 1).abs(), drawn(1, channels, seed=1).abs(), drawn(channels, seed=2)
    result = ops.scale_product(product, row, channel, added if bias else None)
    assert torch.equal(result, product * channel * row + added if bias else product * channel * row)


def product_of(scaled: bool, rows: int, width: int) -> tuple[tuple[torch.Tensor | None, ...], torch.Tensor]:
    """Return a product as what lies between two products takes it, and its float32 values: int32 with scales and bias, or those values."""
    sums = torch.randint(-(2**16), 2**16, (rows, width), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    row, channel, bias = drawn(rows, 1).abs() * 1e-4, drawn(1, width, seed=1).abs(), drawn(width, seed=2)
    values = sums * channel * row + bias
    return ((values, None, None, None) if scaled else (sums, row, channel, bias)), values


def check_rounded(q: torch.Tensor, scale: torch.Tensor, expected: torch.Tensor) -> None:
    """Check int8 and the scales of rows against what they are of, but for values that are all but half way between two levels."""
    assert torch.allclose(scale, activation_scale(expected, "per_token"), rtol=1e-5, atol=1e-12)
    largest = expected.abs().max() if expected.numel() else 0.0
    assert q.dtype == torch.int8 and ((q * scale - expected).abs() <= 0.501 * scale + 1e-6 * largest).all()


@needs_kernels
@pytest.mark.parametrize("scaled", [False, True], ids=["int32", "float32"])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (2, 7), (5, 8), (3, 33), (70, 100), (4, 1030)])
def test_what_lies_between_two_products_of_an_encoder_is_what_torch_computes(ops, rows, width, scaled):
    product, values = product_of(scaled, rows, width)
    check_rounded(*ops.gelu_quantize(*product), torch.nn.functional.gelu(values))
    residual, weight, bias = drawn(rows, width, seed=3), drawn(width, seed=4), drawn(width, seed=5)
    y, q, scale = ops.add_norm_quantize(*product, residual, weight, bias, 1e-12)
    expected = torch.nn.functional.layer_norm((values + residual).double(), (width,), weight.double(), bias.double(), 1e-12).float()
    assert torch.allclose(y, expected, rtol=1e-4, atol=1e-5)
    check_rounded(q, scale, y)


@needs_kernels
@pytest.mark.parametrize("scaled", [False, True], ids=["int32", "float32"])
@pytest.mark.parametrize(("rows", "width", "rotation"), [(0, 8, 0), (1, 7, 0), (5, 8, 8), (3, 33, 0), (70, 96, 32), (4, 1032, 4)])
def test_what_lies_between_two_products_of_a_llama_is_what_torch_computes(ops, rows, width, rotation, scaled):
    turn = (lambda x: rotate(x, hadamard(rotation))) if rotation else (lambda x: x)
    product, values = product_of(scaled, rows, 2 * width)
    first, second = values.chunk(2, dim=-1) if scaled else (values - product_of(False, rows, 2 * width)[0][3]).chunk(2, dim=-1)
    check_rounded(*ops.gate_quantize(*product[:3], rotation), turn(torch.nn.functional.silu(first) * second))
    product, values = product_of(scaled, rows, width)
    values = values if scaled else values - product_of(False, rows, width)[0][3]
    residual, weight = drawn(rows, width, seed=3), drawn(width, seed=4)
    y, q, scale = ops.add_rms_quantize(*product[:3], residual, weight, 1e-6, rotation)
    assert torch.allclose(y, values + residual, rtol=1e-5, atol=1e-5)
    check_rounded(q, scale, turn(torch.nn.functional.rms_norm(y.double(), (width,), weight.double(), 1e-6).float()))
    alone, q, scale = ops.add_rms_quantize(*product[:3], residual, None, 0.0, 0)
    assert torch.equal(alone, y) and q.numel() == scale.numel() == 0


@needs_kernels
@pytest.mark.parametrize("scaled", [False, True], ids=["int32", "float32"])
@pytest.mark.parametrize(("batch", "of_each"), [(1, 1), (3, 1), (3, 3)])
def test_heads_are_turned_by_the_place_of_their_token(ops, batch, of_each, scaled):
    product, values = product_of(scaled, batch * 7, 5 * 12)
    heads = (values if scaled else values - product_of(False, batch * 7, 5 * 12)[0][3]).view(batch, 7, 5, 12)
    angles = drawn(of_each, 7, 6, seed=3).repeat(1, 1, 2)
    result = ops.turn_heads(*product[:3], angles.cos(), angles.sin(), 3)
    expected, other = apply_rotary_pos_emb(*(heads[:, :, part] for part in (slice(3), slice(3, None))), angles.cos(), angles.sin(), 2)
    assert torch.allclose(result[:, :, :3], expected, rtol=1e-5, atol=1e-5) and not torch.allclose(result[:, :, 3:], other)
    assert torch.allclose(result[:, :, 3:], heads[:, :, 3:], rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="6 of 5 heads"):
        ops.turn_heads(*product[:3], angles.cos(), angles.sin(), 6)
    for wrong in (angles[:, :6], angles[..., :8], angles.double(), angles[:0]):
        with pytest.raises(RuntimeError, match="cos and sin: contiguous float32|cos: "):
            ops.turn_heads(*product[:3], wrong.cos(), wrong.sin(), 3)


@needs_kernels
def test_gelu_is_near_over_its_whole_range_and_passes_on_what_is_no_number(ops):
    x = torch.cat([torch.linspace(-40, 40, 20_001), torch.tensor([-1e30, 1e30, -0.0])])
    for low, high in ((-6.0, -1.0), (-1.0, 1.0), (1.0, 40.0), (40.0, 1e31)):
        part = x[(x >= low) & (x <= high)][None]
        check_rounded(*ops.gelu_quantize(part, None, None, None), torch.nn.functional.gelu(part.double()).float())
    q, scale = ops.gelu_quantize(x[x < -6][None], None, None, None)  # all but 0: erf is near to 1.5e-7
    assert (q * scale).abs().max() < 5e-6
    for wrong in (float("nan"), float("inf")):
        _, scale = ops.gelu_quantize(torch.tensor([[1.0, wrong], [1.0, 2.0]]), None, None, None)
        assert not torch.isfinite(scale[0]) and torch.isfinite(scale[1])
        ones = torch.ones(2)
        y, _, scale = ops.add_norm_quantize(torch.tensor([[1.0, wrong]]), None, None, None, torch.zeros(1, 2), ones, ones, 1e-5)
        assert torch.isnan(y).all() and torch.isnan(scale).all()


@needs_kernels
def test_what_does_not_fit_a_product_is_refused(ops):
    product, row, channel = torch.ones(3, 8, dtype=torch.int32), torch.ones(3, 1), torch.ones(8)
    for wrong in ((product, None, None), (product, row[:2], channel), (product, row, channel[:7]), (product.float(), row, channel)):
        with pytest.raises(RuntimeError, match="scale"):
            ops.gelu_quantize(*wrong, None)
    for residual, norm in ((torch.ones(3, 7), channel), (torch.ones(2, 8), channel), (torch.ones(3, 8), channel[:7])):
        with pytest.raises(RuntimeError, match="residual|norm"):
            ops.add_norm_quantize(product, row, channel, None, residual, norm, channel, 1e-5)


@needs_kernels
def test_the_report_names_the_instructions(ops, monkeypatch):
    flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split()
    assert ops.avx_vnni() == ("avx_vnni" in flags)
    assert kernels.int8_instructions() == ("avx_vnni" if "avx_vnni" in flags else "avx2")
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    layer = W8A8Linear.from_linear(torch.nn.Linear(64, 8))
    assert w8a8.kernel(torch.nn.Sequential(layer)) == kernels.int8_instructions()


@needs_kernels
@pytest.mark.parametrize("rotation", [0, 8])
@pytest.mark.parametrize("shape", [(1, 64), (2, 9, 64)], ids=str)
def test_they_do_what_is_around_the_products_of_torch(ops, monkeypatch, shape, rotation):
    if not torch.cpu._is_vnni_supported():
        pytest.skip("torch._int_mm saturates without int8 instructions")
    linear = torch.nn.Linear(64, 24).requires_grad_(False)
    layer, x = W8A8Linear.from_linear(linear, rotation=rotation), drawn(*shape)
    assert layer.kernel == "int_mm" and layer.parts.around
    result = layer(x)
    layer.around = False
    expected = layer(x)
    assert result.shape == (*shape[:-1], 24) and torch.allclose(result, expected, atol=0.02 * float(expected.std()))
    if not rotation:
        assert torch.allclose(result, expected, rtol=1e-5, atol=1e-6)


@needs_kernels
@pytest.mark.parametrize("width", [1, 7, 8, 31, 32, 33, 100, 576])
def test_rows_are_rounded_to_int8_as_torch_rounds_them(ops, width):
    x = drawn(9, width) * torch.logspace(-4, 4, 9)[:, None]
    x[3] = 0
    x[4] = (torch.arange(width) % 13 - 6 + 0.5) * 2  # halves: to the even
    x[4, 0] = 254
    q, scale = ops.quantize_rows(x, None, 0.0, False, 0)
    expected = activation_scale(x, "per_token")
    assert torch.equal(scale, expected) and torch.equal(q, quantize_activation(x, expected))


@needs_kernels
@pytest.mark.parametrize("rotation", [0, 2, 8, 32])
@pytest.mark.parametrize("first", ["nothing", "norm", "gate"])
def test_what_comes_before_the_rounding_is_done_on_the_way(ops, first, rotation):
    x, weight = drawn(7, 128 if first == "gate" else 64) * 3, drawn(64, seed=1)
    q, scale = ops.quantize_rows(x, weight if first == "norm" else None, 1e-5, first == "gate", rotation)
    wanted = x.double()
    if first == "norm":
        wanted = torch.nn.functional.rms_norm(wanted, (64,), weight.double(), 1e-5)
    if first == "gate":
        wanted = torch.nn.functional.silu(wanted[:, :64]) * wanted[:, 64:]
    if rotation:
        wanted = rotate(wanted, hadamard(rotation))
    assert torch.allclose(scale.double(), wanted.abs().amax(1, keepdim=True) / 127, rtol=1e-6)
    assert ((q * scale.double() - wanted).abs() <= 0.5001 * scale).all()


@needs_kernels
@pytest.mark.parametrize("place", [0, 9, 33])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_does_not_come_out_finite(ops, place, value):
    x = drawn(3, 34)
    x[1, place] = value
    q, scale = ops.quantize_rows(x, None, 0.0, False, 0)
    result = ops.int8_linear(q, scale, integers(5, 34), torch.ones(5), None)
    assert not result[1].isfinite().any() and result[[0, 2]].isfinite().all()


@needs_kernels
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_a_layer_gives_the_same_numbers_with_and_without_them(monkeypatch, activations, bias, rows):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    linear = torch.nn.Linear(100, 33, bias=bias).requires_grad_(False)
    layer = W8A8Linear.from_linear(linear, activations, 1.9)
    assert layer.kernel == "avx2"
    x = drawn(2, rows, 100)
    result = layer(x)
    layer.kernel = "simulated"
    assert torch.allclose(result, layer(x), rtol=1e-6, atol=1e-6) and result.shape == (2, rows, 33)
    assert torch.equal(result[0], result[:1][0])


# ---------------------------------------------------------------------------------------------------------------- in groups
def rounded(grid: Grid, rows: int, width: int) -> tuple[GroupedLinear, torch.Tensor]:
    """Return a layer and the weights its integers stand for, by torch alone."""
    result = round_nearest(drawn(rows, width) + 0.3, grid)
    return GroupedLinear.of(result.q, result.scale, result.zero, grid), result.weight()


@needs_kernels
@pytest.mark.parametrize("width", [5, 40, 96, 100])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_packed_integers_are_the_weights_they_stand_for(grid, width, instructions):
    layer, weight = rounded(grid, 11, width)
    assert layer.kernel == "avx2" and torch.equal(layer.dequantize(), weight)
    for rows in (1, 2, 3, 4, 5, 9):
        x = drawn(rows, width, seed=rows)
        expected = (x.double() @ weight.double().t()).float()
        allowed = 1e-6 * x.norm(dim=1, keepdim=True) * weight.norm(dim=1)
        assert ((layer(x) - expected).abs() <= allowed).all() and ((layer(x[None])[0] - expected).abs() <= allowed).all()
    assert layer.unpacked is None  # nothing was made larger on the way


@needs_kernels
@pytest.mark.parametrize("size", [8, 16, 24, 64, 128, 192])
@pytest.mark.parametrize("bits", BITS)
def test_groups_of_any_size_are_multiplied_however_their_inputs_differ(instructions, bits, size):
    layer, weight = rounded(Grid(bits, size, "float"), 9, 576)
    x = drawn(3, 576, seed=bits)
    x[0, 5], x[1], x[2] = 1e4, x[1] * 1e-15, 0  # an outlier, small numbers, nothing
    expected = (x.double() @ weight.double().t()).float()
    allowed = 1e-6 * x.norm(dim=1, keepdim=True) * weight.norm(dim=1)
    assert ((layer(x) - expected).abs() <= allowed).all() and not layer(x)[2].any()
    assert (layer(torch.full((1, 576), 1e-37)).abs() < 1e-33).all()  # what one of them counts would be no normal number
    for wrong in (float("nan"), float("inf"), float("-inf")):
        x[1, 575] = wrong
        assert not layer(x)[1].isfinite().any() and torch.equal(layer(x)[[0, 2]], layer(x[[0, 2]]))


@needs_kernels
def test_the_report_names_what_multiplies_few_rows(instructions):
    layer, _ = rounded(Grid(4, 32), 6, 64)
    assert grouped.kernel(torch.nn.Sequential(layer)) == instructions
    layer.kernel = "dequantized"
    assert grouped.kernel(torch.nn.Sequential(layer)) == "dequantized"


@needs_kernels
def test_a_table_and_its_head_read_the_packed_integers():
    result = round_nearest(drawn(50, 64), Grid(6, 32))
    table = GroupedEmbedding.of(result.q, result.scale, result.zero, result.grid)
    ids = torch.tensor([[3, 49, 0]])
    assert torch.equal(table(ids), result.weight()[ids]) and table.unpacked is None
    x = drawn(1, 1, 64)
    assert torch.allclose(TiedHead(table)(x), x @ result.weight().t(), rtol=1e-5, atol=1e-5)


@needs_kernels
def test_gradients_go_through_a_layer_to_what_is_before_it():
    layer, weight = rounded(Grid(4, 32), 6, 64)
    x = drawn(2, 64).requires_grad_()
    layer(x).sum().backward()
    assert torch.allclose(x.grad, weight.sum(0).expand(2, -1), rtol=1e-5, atol=1e-5)


@needs_kernels
def test_groups_that_begin_inside_a_byte_are_left_to_torch():
    layer, weight = rounded(Grid(3, 12), 6, 64)
    assert layer.kernel == "dequantized" and torch.equal(layer.dequantize(), weight)


@needs_kernels
@pytest.mark.parametrize("changed", [{"bits": 8}, {"size": 32}, {"width": 1000}, {"bits": 7}])
def test_what_does_not_fit_together_is_refused(ops, changed):
    layer, _ = rounded(Grid(4, 64), 6, 128)
    given = {"bits": 4, "size": 64, "width": 128} | changed
    with pytest.raises(RuntimeError, match="not a weight of 6 x|integers of 7 bits"):
        ops.grouped_dequantize(layer.packed, layer.scale, layer.zero, given["bits"], given["size"], given["width"])


@needs_kernels
def test_shapes_are_known_without_computing():
    ops = torch.ops.compactmind
    with torch.device("meta"):
        q, scale = ops.quantize_rows(torch.empty(3, 64), None, 0.0, False, 0)
        assert (q.shape, q.dtype, scale.shape) == ((3, 64), torch.int8, (3, 1))
        assert ops.int8_linear(q, scale, torch.empty(5, 64, dtype=torch.int8), torch.empty(5), None).shape == (3, 5)
        product = torch.empty(3, 5, dtype=torch.int32), torch.empty(3, 1), torch.empty(5), None
        assert [each.shape for each in ops.gelu_quantize(*product)] == [(3, 5), (3, 1)]
        normed = ops.add_norm_quantize(*product, torch.empty(3, 5), torch.empty(5), torch.empty(5), 1e-5)
        assert [(each.shape, each.dtype) for each in normed] == [((3, 5), torch.float32), ((3, 5), torch.int8), ((3, 1), torch.float32)]
        parts = torch.empty(5, 8, dtype=torch.int32), torch.empty(5, 1).half(), torch.empty(5, 1, dtype=torch.uint8)
        assert ops.grouped_dequantize(*parts, 4, 64, 64).shape == (5, 64)
        assert ops.grouped_linear(torch.empty(2, 64), *parts, 4, 64).shape == (2, 5)


@needs_kernels
@pytest.mark.parametrize("double_quantization", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [64, 100, 192])
def test_nf4_is_multiplied_as_bitsandbytes_decodes_it(width, bias, double_quantization, instructions):
    from compactmind.methods.quantization.packed_linear import packed_linear_like

    linear = torch.nn.Linear(width, 11, bias=bias).requires_grad_(False)
    packed = packed_linear_like(linear, "nf4", "cpu", double_quantization)
    packed.pack(linear.weight)
    packed.bias = linear.bias
    for rows in (1, 2, 3, 4):
        x = drawn(2, rows // 2 or 1, width) if rows != 3 else drawn(3, width)
        many = x.reshape(-1, width).repeat(5, 1)  # what bitsandbytes multiplies
        expected = packed(many)[: x[..., 0].numel()].view(*x.shape[:-1], 11)
        assert len(many) > kernels.FEW_ROWS and torch.allclose(packed(x), expected, rtol=1e-5, atol=1e-5)
    assert packed(x.bfloat16()).dtype == torch.bfloat16


# ----------------------------------------------------------------------------------------------------------------- without them
@pytest.mark.parametrize("grid", [Grid(4, 32), Grid(3, -1, "float"), Grid(5, 64, "integer")], ids=str)
def test_without_kernels_integers_are_unpacked_once(monkeypatch, grid):
    monkeypatch.setenv(KERNEL_VARIABLE, "simulated")
    layer, weight = rounded(grid, 6, 72)
    assert layer.kernel == "dequantized" and layer.unpacked is None
    x = drawn(3, 72)
    assert torch.equal(layer(x), x @ weight.t())
    assert torch.equal(pack(layer.unpacked, grid.bits), layer.packed)
    before = layer.unpacked
    layer(x)
    assert layer.unpacked is before
    layer.to(torch.float64)
    assert layer.unpacked is None


def loaded(*environments: dict[str, str]) -> list[tuple[str, str]]:
    """Return what a process with each environment says on standard output and standard error; they are forked from one that has torch."""
    code = """
import json, os, subprocess, sys, tempfile
import torch
from compactmind import kernels
said = []
for environment in json.loads(sys.argv[1]):
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        child = os.fork()
        if not child:
            os.environ.clear()
            os.environ.update(environment)
            os.dup2(output.fileno(), 1)
            os.dup2(errors.fileno(), 2)
            print(kernels.available(), kernels.available(), flush=True)
            sys.stderr.flush()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        said.append([file.seek(0) or file.read() for file in (output, errors)])
json.dump(said, sys.stdout)
"""
    done = subprocess.run([sys.executable, "-c", code, json.dumps(environments)], capture_output=True, text=True, env=environments[0])
    assert done.returncode == 0, done.stderr
    return [tuple(each) for each in json.loads(done.stdout)]


def environment_of(folder: Path) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "PYTHONPATH": ":".join(sys.path), "TORCH_EXTENSIONS_DIR": str(folder)}


@needs_kernels
def test_they_are_built_once_into_a_folder_of_ones_own(tmp_path, monkeypatch):
    if kernels.compiler() is None:
        pytest.skip("no C++ compiler")
    environment = environment_of(tmp_path)
    first, again = loaded(environment, environment | {"PATH": "/nowhere"})
    assert first[0] == "True True\n" and first[1].count("building kernels") == 1
    (built,) = (tmp_path / "compactmind").iterdir()  # and nothing of the work is left
    assert built.name.startswith("avx2-") and built.suffix == ".so"
    assert again == ("True True\n", "")


@needs_kernels
def test_a_machine_that_cannot_build_them_goes_on_without_and_says_why(tmp_path):
    environment = environment_of(tmp_path)
    changes = [{"PATH": "/nowhere"}, {"CXX": "false"}, {"TORCH_EXTENSIONS_DIR": "/dev/null"}]
    reasons = (
        r"there is no C\+\+ compiler: install g\+\+", "building .* failed: Command .*false",
        "building .* failed: .*Not a directory|building .* failed: .*File exists",
    )  # fmt: skip
    for reason, (output, errors) in zip(reasons, loaded(*(environment | each for each in changes)), strict=True):
        text = [line for line in errors.splitlines() if "no kernels" in line]
        assert output == "False False\n" and len(text) == 1 and re.search(reason, text[0])
    assert not list(tmp_path.rglob("*.so"))


def test_what_a_time_depends_on_changes_with_what_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "reason_against", lambda: None)
    before = kernels.identity()
    assert before == kernels.library().stem
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert kernels.identity() == before  # wherever they lie
    monkeypatch.setattr(kernels, "OPTIONS", [*kernels.OPTIONS, "-g"])
    assert kernels.identity() not in (before, "none")
    monkeypatch.setenv(KERNEL_VARIABLE, "simulated")
    assert kernels.identity() == "none"
    monkeypatch.delenv(KERNEL_VARIABLE)
    monkeypatch.setattr(kernels, "reason_against", lambda: "there is no C++ compiler")
    assert kernels.identity() == "none"


def test_other_machines_are_told_apart(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "Linux on x86-64" in kernels.reason_against() and "darwin" in kernels.reason_against()
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: False)
    monkeypatch.setattr(kernels.platform, "machine", lambda: "x86_64")
    assert kernels.reason_against() == "this CPU has no AVX2"


@needs_kernels
@pytest.mark.parametrize("width", [3, 8, 31, 576, 1001])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_products_with_bf16_weights_are_those_of_the_same_numbers_in_float32(ops, width, rows):
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(rows, width, generator=generator)
    weight = torch.randn(77, width, generator=generator).bfloat16()
    torch.testing.assert_close(ops.bfloat16_linear(x, weight), (x.double() @ weight.double().T).float(), rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="bf16"):
        ops.bfloat16_linear(x, weight.float())
    with pytest.raises(RuntimeError, match="1 to 4"):
        ops.bfloat16_linear(torch.cat([x] * 5), weight)


@needs_kernels
@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [8, 32, 37, 576])
def test_scales_of_groups_are_those_of_torch_and_leave_no_more_error(size, bits, zero, monkeypatch):
    weight, counts, grid = drawn(60, 3, size), drawn(3, size, seed=1).abs() + 0.01, Grid(bits, size, zero)
    weight[0] = 0
    weight[1, 1] = 3.0  # all alike
    weight[2, 0] *= 1e25  # whose squared error is infinite

    def errors(scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        back = from_integers(to_integers(weight, scale, zero, grid), scale, zero, grid)
        return ((back - weight).square() * counts).sum(-1)

    for importance in (None, counts):
        fitted = fit(weight, grid, importance)
        with monkeypatch.context() as patch:
            patch.setenv(KERNEL_VARIABLE, "simulated")
            expected = fit(weight, grid, importance)
        same = (fitted[0] == expected[0]) & (fitted[1] == expected[1])
        assert fitted[0].shape == expected[0].shape == (60, 3, 1) and same.float().mean() > 0.98
    assert same[2, 0].all()
    finite = errors(*expected).isfinite()
    assert errors(*fitted)[finite].sum() <= 1.001 * errors(*expected)[finite].sum()


@needs_kernels
@pytest.mark.parametrize("bits", K_TYPES)
def test_scales_of_super_blocks_are_those_of_torch(bits, monkeypatch):
    size, zero, scale_bits = K_TYPES[bits]
    weight, grid = drawn(40, 2, 256 // size, size), Grid(bits, size, zero, scale_bits)
    fitted = fit_groups(weight, grid)
    monkeypatch.setenv(KERNEL_VARIABLE, "simulated")
    expected = fit_groups(weight, grid)
    assert all((one == other).float().mean() > 0.98 for one, other in zip(fitted, expected, strict=True))


def moment_of(width: int) -> torch.Tensor:
    x = drawn(4 * width + 8, width, seed=2) @ drawn(width, width, seed=3)
    return x.t() @ x / len(x)


@needs_kernels
@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("rows", "width", "size"), [(5, 37, 16), (77, 64, 32), (130, 200, -1)])
def test_columns_are_rounded_one_after_the_other_as_in_torch(rows, width, size, bits, zero, monkeypatch):
    grid, moment, weight = Grid(bits, size, zero), moment_of(width), drawn(rows, width)
    order = columns_in_order(moment, grid, "activation")
    factor = inverse_factor(moment[order[:, None], order], 0.01)
    rounded = round_compensated(weight, factor, order, grid)
    monkeypatch.setenv(KERNEL_VARIABLE, "simulated")
    expected = round_compensated(weight, factor, order, grid)
    # a level beside, where two are as near: what follows makes up for another error then
    assert (rounded.q == expected.q).float().mean() > 0.97
    error = [((each.weight() - weight) @ moment * (each.weight() - weight)).sum().item() for each in (rounded, expected)]
    assert error[0] == pytest.approx(error[1], rel=0.02)
    nearest = round_nearest(weight, grid, moment.diagonal()).weight() - weight
    assert error[0] < (nearest @ moment * nearest).sum()


@needs_kernels
def test_one_column_after_the_other_is_exact_where_none_is_near_two_levels(ops):
    """Errors of 1/8 of a step and shares of a half: every number is exact, so kernel and definition agree to the bit."""
    block, factor = torch.tensor([[1.125, -2.125, 3.0], [0.0, 1.0, 2.25]]), torch.tensor([[2.0, 0.5], [0.0, 4.0]])
    ones, eights = torch.ones(3), torch.full((3,), 8.0)
    q, errors = ops.round_columns(block, factor, ones, eights, 4, ZEROS.index("symmetric"))
    assert q.tolist() == [[9, 6, 11], [8, 9, 10]]
    assert errors.tolist() == [[0.0625, -0.0625, 0.0], [-0.0078125, 0.0078125, 0.0625]]
    with pytest.raises(RuntimeError, match="factor"):
        ops.round_columns(block, factor[:1], ones, eights, 4, 0)
    with pytest.raises(RuntimeError, match="each output"):
        ops.round_columns(block, factor, ones[:2], eights, 4, 0)


@needs_kernels
@pytest.mark.parametrize(("rows", "width"), [(5, 64), (77, 128)])
@pytest.mark.parametrize("levels", [[-1.0, -0.3, 0.0, 0.2, 1.0], torch.linspace(-1, 1, 16).tolist()], ids=len)
def test_levels_and_where_they_end_are_those_of_torch(rows, width, levels, monkeypatch):
    weight, levels, moment, found = drawn(rows, width), torch.tensor(levels), moment_of(width), []
    weight[0] = 0
    compensation = compensation_of(moment, largest_first=True)
    for kernel in ("", "simulated"):
        monkeypatch.setenv(KERNEL_VARIABLE, kernel)
        cut = smaller_scales(weight, compensation.importance, levels, 32)
        scale = cut.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True).expand(-1, -1, 32).flatten(1)
        found.append((cut, compensate_rounding(cut, compensation, levels, scale, scale * 1.01)))
    (cut, rounded), (expected_cut, expected) = found
    assert (cut == expected_cut).all(dim=1).float().mean() > 0.98
    assert (rounded == expected).float().mean() > 0.97
    assert rounded[0].eq(0).all() or not levels.eq(0).any()
    pinned = cut.abs() >= cut.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True).expand(-1, -1, 32).flatten(1)
    assert torch.equal(rounded[pinned], cut[pinned])


def test_a_changed_header_is_another_library(tmp_path, monkeypatch):
    for path in kernels.SOURCE.parent.glob("*.[ch]*"):
        (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.setattr(kernels, "SOURCE", tmp_path / kernels.SOURCE.name)
    before = kernels.library()
    (tmp_path / "grouped.h").write_text((tmp_path / "grouped.h").read_text() + "// changed\n")
    assert kernels.library() != before
