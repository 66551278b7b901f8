"""Integers without gaps: what a file holds read bit by bit, layers that compute with it, and who else reads it."""

import copy
import re

import helpers
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from compactmind.checkpoint import load_checkpoint, save_checkpoint
from compactmind.formats import grouped
from compactmind.formats.table import parameters_of
from compactmind.methods.llama import LINEARS, llama_blocks
from compactmind.methods.quantization.gptq import round_nearest
from compactmind.methods.quantization.gptq_model import GPTQRecipe, quantize_gptq
from compactmind.methods.quantization.grid import BITS, ZEROS, Grid
from compactmind.methods.quantization.grouped import (
    TENSORS,
    GroupedEmbedding,
    GroupedLinear,
    GroupedWeight,
    TiedHead,
    pack,
    unpack,
)

GRIDS = [Grid(bits, size, zero) for bits in BITS for zero in ZEROS for size in (32, -1)]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)


def example(rows: int = 6, width: int = 72, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def make(kind: type, grid: Grid, weight: torch.Tensor | None = None, *others) -> GroupedWeight:
    result = round_nearest(example() if weight is None else weight, grid)
    return kind.of(result.q, result.scale, result.zero, grid, *others)


def bits_of(words: list[int]) -> list[int]:
    """Return the bits of int32 words, the lowest of the first word first."""
    return [(word >> place) & 1 for word in words for place in range(32)]


def read(words: list[int], bits: int, count: int) -> list[int]:
    """Return `count` integers of `bits` bits each, one behind the other, in plain Python."""
    stream = bits_of(words)
    assert not any(stream[count * bits :])  # what is left over of the last word
    return [sum(stream[number * bits + place] << place for place in range(bits)) for number in range(count)]


# ---------------------------------------------------------------------------------------------------------------- packing
@pytest.mark.parametrize("width", [1, 5, 31, 32, 33, 64, 100])
@pytest.mark.parametrize("bits", BITS)
def test_integers_are_packed_without_gaps_and_come_back(bits, width):
    q = torch.randint(0, 2**bits, (3, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(width))
    q[0] = 2**bits - 1
    packed = pack(q, bits)
    assert packed.dtype == torch.int32 and packed.shape == (3, -(-width * bits // 32)) and packed.is_contiguous()
    assert [read(row, bits, width) for row in packed.tolist()] == q.tolist()
    assert torch.equal(unpack(packed, bits, width), q)


def test_rows_beyond_a_thousand_are_packed_alike():
    q = torch.randint(0, 8, (2500, 11), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = pack(q, 3)
    assert all(torch.equal(packed[row], pack(q[row : row + 1], 3)[0]) for row in (0, 1023, 1024, 2047, 2048, 2499))
    assert torch.equal(unpack(packed, 3, 11), q)


def test_the_layout_is_the_one_written_down():
    """Literally, as compressed-tensors 0.20.0 has it: a change here makes files of before, and of others, unreadable."""
    q = torch.arange(9, dtype=torch.uint8)[None] % 8
    assert pack(q, 4).tolist() == [[0x76543210, 0]]
    assert pack(q, 8).tolist() == [[0x03020100, 0x07060504, 0]]
    assert pack(q, 3).tolist() == [[0o76543210]]
    assert pack(torch.full((1, 8), 15, dtype=torch.uint8), 4).tolist() == [[-1]]
    ones = sum(1 << 5 * place for place in range(6))  # the seventh lies on the border of two words: 30, 31 | 0, 1, 2
    assert pack(torch.tensor([[1] * 6 + [31]], dtype=torch.uint8), 5).tolist() == [[ones + (3 << 30) - 2**32, 7]]
    scale, zero = torch.tensor([[0.5], [0.25], [2.0]]), torch.tensor([[1], [2], [15]])
    weight = GroupedWeight.of(torch.arange(24, dtype=torch.uint8).reshape(3, 8) % 16, scale, zero, Grid(4, -1, "integer"))
    tensors = weight.tensors()
    assert {name: (each.dtype, each.tolist()) for name, each in tensors.items()} == {
        "weight_packed": (torch.int32, [[0x76543210], [0xFEDCBA98 - 2**32], [0x76543210]]),
        "weight_scale": (torch.float16, [[0.5], [0.25], [2.0]]),
        "weight_zero_point": (torch.int32, [[0xF21]]),
        "weight_shape": (torch.int64, [3, 8]),
    }


# ------------------------------------------------------------------------------------------------------------------ tensors
@every_grid
def test_what_a_file_holds_stands_for_the_weights_that_are_computed_with(grid):
    weight = make(GroupedWeight, grid)
    tensors = weight.state_dict()
    extra = {"symmetric": set(), "integer": {"weight_zero_point"}, "float": {"weight_minimum"}}[grid.zero]
    assert tensors.keys() == {"weight_packed", "weight_scale", "weight_shape"} | extra <= set(TENSORS)
    rows, width = tensors["weight_shape"].tolist()
    assert (rows, width) == (6, 72) and all(each.is_contiguous() for each in tensors.values())
    scale = tensors["weight_scale"].float()
    groups, size = scale.shape[1], width if grid.group_size == -1 else grid.group_size
    assert groups == (1 if grid.group_size == -1 else 3)  # 32, 32 and 8
    zeros = torch.full_like(scale, 2 ** (grid.bits - 1))
    if grid.zero == "integer":
        columns = tensors["weight_zero_point"].t().tolist()
        zeros = torch.tensor([read(column, grid.bits, rows) for column in columns]).t()
    q = torch.tensor([read(row, grid.bits, width) for row in tensors["weight_packed"].tolist()])
    expected = torch.empty(rows, width)
    for row in range(rows):
        for column in range(width):
            group = column // size
            if grid.zero == "float":
                expected[row, column] = q[row, column] * scale[row, group] + tensors["weight_minimum"][row, group].float()
            else:
                expected[row, column] = (q[row, column] - zeros[row, group]) * scale[row, group]
    assert torch.allclose(weight.dequantize(), expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(weight.dequantize(), round_nearest(example(), grid).weight())
    again = GroupedWeight.from_tensors(tensors, grid)
    assert torch.equal(again.dequantize(), weight.dequantize())
    assert all(torch.equal(each, tensors[name]) for name, each in again.tensors().items())


@pytest.mark.parametrize("size", [24, 32, 64, -1])
@pytest.mark.parametrize("zero", ZEROS)
def test_some_rows_of_a_table_are_those_of_all(zero, size):
    table = make(GroupedEmbedding, Grid(4, size, zero), example(20))
    ids = torch.tensor([[3, 0, 19], [7, 7, 1]])
    assert table(ids).shape == (2, 3, 72) and table(ids).dtype == torch.float32
    assert torch.equal(table(ids), table.dequantize()[ids])


@every_grid
def test_tensors_of_another_grid_are_refused(grid):
    tensors = make(GroupedWeight, grid).tensors()
    other = Grid(3 if grid.bits == 8 else 8, grid.group_size, grid.zero)
    with pytest.raises(ValueError, match="a weight of 6 x 72 in .* has other tensors"):
        GroupedWeight.from_tensors(tensors, other)
    with pytest.raises(ValueError, match="has other tensors"):
        GroupedWeight.from_tensors(tensors, Grid(grid.bits, 16, grid.zero))
    for name in {"weight_zero_point", "weight_minimum"} & tensors.keys():
        with pytest.raises(ValueError, match="has other tensors"):
            GroupedWeight.from_tensors(tensors | {name: tensors[name][:, :0]}, grid)
    for name in tensors:
        with pytest.raises(KeyError, match=name):
            GroupedWeight.from_tensors({key: each for key, each in tensors.items() if key != name}, grid)


# ------------------------------------------------------------------------------------------------------------------- layers
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_is_the_product_with_what_its_integers_stand_for(bias, dtype):
    given = torch.linspace(-1, 1, 6) if bias else None
    linear = make(GroupedLinear, Grid(4, 32, "float"), None, given)
    x = example(5, 72, seed=1).to(dtype)[None]
    expected = nn.functional.linear(x, linear.dequantize().to(dtype), None if given is None else given.to(dtype))
    assert linear(x).dtype == dtype and torch.equal(linear(x), expected) and linear(x).shape == (1, 5, 6)
    assert ("bias" in linear.state_dict()) == bias and (linear.in_features, linear.out_features) == (72, 6)
    assert "4b g32 float" in repr(linear)


@pytest.mark.parametrize("move", [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.double(), lambda m: m.to("cpu")])
@pytest.mark.parametrize("zero", ZEROS)
def test_a_weight_keeps_its_dtypes_wherever_it_goes(move, zero):
    linear = make(GroupedLinear, Grid(4, 32, zero), None, torch.ones(6))
    before = {name: (each.dtype, each.clone()) for name, each in [*linear.named_buffers(), *linear.named_parameters()]}
    move(linear)
    for name, each in [*linear.named_buffers(), *linear.named_parameters()]:
        assert each.dtype == before[name][0] and torch.equal(each, before[name][1])
    assert {each.device.type for each in linear.to("meta").buffers()} == {"meta"}


def test_scales_to_be_trained_get_gradients_and_are_stored_in_fp16():
    linear = make(GroupedLinear, Grid(4, 32))
    linear.scale = linear.scale.float().requires_grad_()
    linear(example(3)).square().sum().backward()
    assert linear.scale.grad.shape == (6, 3) and (linear.scale.grad != 0).all()
    assert linear.tensors()["weight_scale"].dtype == torch.float16


# ---------------------------------------------------------------------------------------------------------------- tied heads
def quantized(tied: bool = True, grids: list[Grid] | None = None, windows: int = 4, **recipe):
    """Return a bf16 Llama made integers, channels 64, and what is to be known of it; `grids` go round its linears."""
    model = helpers.released_llama(helpers.make_llama(tie_word_embeddings=tied, hidden_size=64, intermediate_size=96))
    description = quantize_gptq(model, helpers.example_windows(windows, 32), GPTQRecipe(compensation=False, **recipe))
    names = [f"{block.name}.{path}" for block in llama_blocks(model) for path in LINEARS.values()]
    for number, name in enumerate(names if grids else ()):
        grid = grids[number % len(grids)]
        model.set_submodule(name, make(GroupedLinear, grid, model.get_submodule(name).dequantize()))
        description["tensors"][name] = {"bits": grid.bits, "group_size": grid.group_size, "zero": grid.zero}
    return model, description


def save(directory, model, description):
    settings = {"kind": "grouped", "parent": None, "stage": {}, "quantization": description, "dtype": "bfloat16"}
    save_checkpoint(directory, model, helpers.make_byte_tokenizer(), **settings)


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model(helpers.example_windows()).logits.float()


@pytest.mark.parametrize(
    "move", [lambda model: model, copy.deepcopy, lambda model: model.to(torch.float64)], ids=["here", "copy", "moved"]
)
def test_a_tied_head_has_no_tensors_of_its_own(move):
    model = move(quantized()[0])
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    assert isinstance(head, TiedHead) and head.table is table and not head.state_dict() and not list(head.buffers())
    assert not any(name.startswith("lm_head") for name in model.state_dict())
    x = example(3, 64)
    assert torch.allclose(head(x), x @ table.dequantize().t(), rtol=1e-5, atol=1e-6) and (head.in_features, head.out_features) == (64, 264)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_weights_are_counted_as_before(tied):
    dense = helpers.make_llama(tie_word_embeddings=tied, hidden_size=64, intermediate_size=96)
    model, description = quantized(tied)
    assert parameters_of(model) == parameters_of(dense)
    assert ("lm_head" in description["tensors"]) != tied and "model.embed_tokens" in description["tensors"]


# ------------------------------------------------------------------------------------------------------------ other readers
def entry(group_size: int | None, bits: int = 4, symmetric: bool = True, targets: tuple[str, ...] = ("Linear",)) -> dict:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False}
    weights |= {"strategy": "channel"} if group_size is None else {"strategy": "group", "group_size": group_size}
    return {"targets": list(targets), "weights": weights, "input_activations": None, "format": "pack-quantized"}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("group_size", "said"), [(32, 32), (-1, None)])
@pytest.mark.parametrize("zero", ["symmetric", "integer"])
def test_config_json_says_what_compressed_tensors_has_to_know(tmp_path, bits, group_size, said, zero):
    model, description = quantized(bits=bits, group_size=group_size, zero=zero, embeddings="as_released")
    save(tmp_path / "m", model, description)
    assert helpers.read_json(tmp_path / "m" / "config.json")["quantization_config"] == {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed", "ignore": ["lm_head"],
        "config_groups": {"group_0": entry(said, bits, zero == "symmetric")},
    }  # fmt: skip
    state = load_file(tmp_path / "m" / "model.safetensors")
    name, groups = "model.layers.1.mlp.down_proj", 3 if group_size == 32 else 1
    result = {
        key.removeprefix(f"{name}."): (each.dtype, tuple(each.shape)) for key, each in state.items() if key.startswith(name)
    }
    expected = {
        "weight_packed": (torch.int32, (64, 96 * bits // 32)), "weight_scale": (torch.float16, (64, groups)),
        "weight_shape": (torch.int64, (2,)), "weight_zero_point": (torch.int32, (64 * bits // 32, groups)),
    }  # fmt: skip
    assert result == {key: each for key, each in expected.items() if zero == "integer" or key != "weight_zero_point"}
    assert "model.embed_tokens.weight" in state and "lm_head.weight" not in state
    card = (tmp_path / "m" / "README.md").read_text()
    assert ("With transformers and compressed-tensors:" in card) == (zero == "symmetric")
    assert ("CompressedTensorsConfig(dequantize=True)" in card) == (zero == "integer")


def test_every_grid_of_a_mixture_has_a_group_of_exactly_its_linears():
    grids = [Grid(4, 32), Grid(8, 32), Grid(3, -1)]
    model, description = quantized(grids=grids, embeddings="as_released")
    said = grouped.quantization_config(model, description)
    assert [entry(each.group_size if each.group_size > 0 else None, each.bits)["weights"] for each in grids] == [
        group["weights"] for group in said["config_groups"].values()
    ]
    for name, grid in description["tensors"].items():
        fitting = [
            group["weights"]["num_bits"]
            for group in said["config_groups"].values()
            if any(re.match(target.removeprefix("re:"), name) for target in group["targets"])
        ]
        assert fitting == [grid["bits"]], name
    targets = [target for group in said["config_groups"].values() for target in group["targets"]]
    assert not any(re.match(target.removeprefix("re:"), "model.layers.10.mlp.down_proj") for target in targets)


@pytest.mark.parametrize(
    ("recipe", "grids", "reason"),
    [
        ({"embeddings": "int8"}, None, "its embedding table is packed"),
        ({"embeddings": "as_released", "zero": "float"}, None, "its zeros are floating-point"),
        ({"embeddings": "as_released", "group_size": 64}, None, "shorter than the others"),
        ({"embeddings": "as_released"}, [Grid(4, 32), Grid(4, 32, "integer")], "it has zero points on more than one grid"),
    ],
    ids=lambda each: str(each) if isinstance(each, dict) else "",
)
def test_the_card_says_why_nothing_else_reads_a_file(tmp_path, recipe, grids, reason):
    model, description = quantized(grids=grids, **recipe)
    save(tmp_path / "m", model, description)
    assert "quantization_config" not in helpers.read_json(tmp_path / "m" / "config.json")
    card = (tmp_path / "m" / "README.md").read_text()
    assert f"No other library reads the file ({reason}" in card.replace("its last groups of a row are ", "")
    assert "AutoModelForCausalLM.from_pretrained" not in card


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "grids", [[each] for each in GRIDS if each.zero == "symmetric"] + [[Grid(4, 32), Grid(8, 32), Grid(3, -1)]]
)
def test_compressed_tensors_reads_the_file(tmp_path, grids, tied):
    """With `pip install compressed-tensors==0.20.0`, which transformers uses to read such files without this project."""
    pytest.importorskip("compressed_tensors")
    save(tmp_path / "m", *quantized(tied, grids, embeddings="as_released"))
    theirs, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32, output_loading_info=True)
    assert not any(loading.values())
    assert torch.equal(logits_of(theirs), logits_of(load_checkpoint(tmp_path / "m").model))


@pytest.mark.slow
@pytest.mark.parametrize("bits", BITS)
def test_compressed_tensors_reads_zero_points_if_it_dequantizes(tmp_path, bits):
    """As above; it computes weights in fp16 then, whose rounding is 2^-11 of each."""
    pytest.importorskip("compressed_tensors")
    from transformers import CompressedTensorsConfig

    save(tmp_path / "m", *quantized(bits=bits, zero="integer", embeddings="as_released"))
    settings = {"dtype": torch.float32, "quantization_config": CompressedTensorsConfig(dequantize=True)}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m", **settings)
    expected = logits_of(load_checkpoint(tmp_path / "m").model)
    assert (logits_of(theirs) - expected).norm() < 0.005 * expected.norm()
