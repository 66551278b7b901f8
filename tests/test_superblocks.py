"""Scales as multiples of one number for 256 weights: exact in fp16, in few bits, and hardly worse than scales of their own."""

import gguf
import helpers
import pytest
import torch
from test_gguf import byte_level

from compactmind.checkpoint import load_checkpoint, save_checkpoint
from compactmind.errors import CompactMindError
from compactmind.gguf_blocks import encoded
from compactmind.gguf_export import export_gguf, largest_difference
from compactmind.methods.llama import llama_blocks
from compactmind.methods.quantization.gptq import columns_in_order, inverse_factor, round_compensated, round_nearest
from compactmind.methods.quantization.gptq_model import GPTQRecipe, quantize_gptq
from compactmind.methods.quantization.grid import Grid
from compactmind.methods.quantization.grouped import GroupedWeight
from compactmind.methods.quantization.superblocks import FALLBACK, K_GRIDS, from_multiples, k_grid_for, multiples_of

every_grid = pytest.mark.parametrize("grid", K_GRIDS.values(), ids=str)
BITS_A_WEIGHT = {2: 2.625, 3: 3.4375, 4: 4.5, 5: 5.5, 6: 6.5625}


def example(rows: int = 6, width: int = 512, seed: int = 0) -> torch.Tensor:
    """Return weights whose groups differ in size by a factor of thousands, with a mean that is not 0."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-3, 0, width // 16)[torch.randperm(width // 16, generator=generator)].repeat_interleave(16)
    return (torch.randn(rows, width, generator=generator) + 0.3) * sizes * torch.logspace(-2, 2, rows)[:, None]


def layer(grid: Grid, weight: torch.Tensor) -> GroupedWeight:
    result = round_nearest(weight, grid)
    return GroupedWeight.of(result.q, result.scale, result.zero, grid)


def moment_of(width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(2 * width, width, generator=generator) @ torch.randn(width, width, generator=generator)
    return inputs.t() @ inputs / len(inputs)


# ---------------------------------------------------------------------------------------------------------------- the scales
@every_grid
def test_what_is_rounded_is_what_is_stored(grid):
    """Scale and minimum of every group are multiples of one number, in fp16 to the bit, and of no more bits than the type has."""
    result = round_nearest(example(), grid)
    assert torch.equal(result.scale.half().float(), result.scale) and (result.scale != 0).all()
    made, x = GroupedWeight.of(result.q, result.scale, result.zero, grid), torch.randn(2, 512)
    assert torch.allclose(made.dequantize(), result.weight(), rtol=1e-6, atol=0)
    assert torch.allclose(made.product(x), x @ result.weight().t(), rtol=1e-4, atol=1e-4 * float(result.weight().norm()))
    values = [result.scale.half()]
    if grid.zero == "float":
        assert (result.zero <= 0).all() and (result.scale > 0).all() and torch.equal(result.zero.half().float(), result.zero)
        values.append(-result.zero.half())
    low = 0 if grid.zero == "float" else -(2 ** (grid.scale_bits - 1))
    for each in values:
        step, multiples = multiples_of(each, grid.fitted_together)
        assert step.shape == (6, 2) and torch.isfinite(step).all() and (step > 0).all()
        assert low <= int(multiples.min()) and int(multiples.max()) < low + 2**grid.scale_bits
        assert torch.equal(from_multiples(step, multiples), each)


@every_grid
@pytest.mark.parametrize("value", [0.0, 3.0, -3.0, 1e-9, -3000.0])
def test_what_is_all_alike_is_no_trouble(grid, value):
    weight = torch.full((2, 256), value)
    made = layer(grid, weight)
    again = GroupedWeight.from_tensors(made.tensors(), grid)
    assert torch.equal(again.dequantize(), made.dequantize())
    assert (made.dequantize() - weight).abs().max() <= 0.04 * weight.abs().max() + 1e-6


@every_grid
def test_shared_numbers_cost_next_to_nothing(grid):
    """On weights as they are; where groups differ by thousands in size a multiple of 4 bits cannot reach them all."""
    weight = torch.randn(32, 512, generator=torch.Generator().manual_seed(1)) * 0.05
    own = Grid(grid.bits, grid.group_size, grid.zero)
    shared, single = (float((round_nearest(weight, each).weight() - weight).norm()) for each in (grid, own))
    assert shared < 1.03 * single


@every_grid
def test_the_errors_of_a_row_are_made_up_for_and_a_super_block_stays_together(grid):
    weight, moment = torch.randn(32, 512, generator=torch.Generator().manual_seed(1)) * 0.05, moment_of(512)
    order = columns_in_order(moment, grid, "activation")
    assert order.sort().values.tolist() == list(range(512))
    assert (
        len(set((order[:256] // 256).tolist())) == 1
        and len({*(order[:32] // grid.group_size).tolist()}) == 32 // grid.group_size
    )
    factor = inverse_factor(moment[order[:, None], order], 0.05)
    errors = [each.weight() - weight for each in (round_compensated(weight, factor, order, grid), round_nearest(weight, grid))]
    compensated, nearest = (float(((error @ moment) * error).sum()) for error in errors)
    assert compensated < 0.7 * nearest


# ----------------------------------------------------------------------------------------------------------------- the bytes
@every_grid
def test_a_file_has_the_bits_of_the_type_and_gives_the_weight_back(grid):
    made = layer(grid, example())
    tensors = made.tensors()
    held = sum(each.nbytes for name, each in tensors.items() if name != "weight_shape")
    assert 8 * held == grid.stored_bits(512) * 6 == BITS_A_WEIGHT[grid.bits] * 512 * 6
    assert torch.equal(GroupedWeight.from_tensors(tensors, grid).dequantize(), made.dequantize())
    with pytest.raises(ValueError, match="has other tensors: weight_scale"):
        GroupedWeight.from_tensors({**tensors, "weight_scale": tensors["weight_scale"][:, 1:]}, grid)


@every_grid
def test_the_gguf_package_reads_the_same_weights(grid):
    made = layer(grid, example())
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    data, kind = encoded(made, order)
    assert kind == f"Q{grid.bits}_K" and 8 * data.nbytes == grid.stored_bits(512) * 6
    read = torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]))
    assert torch.allclose(read, made.dequantize()[order], rtol=3e-7, atol=0)


@every_grid
def test_rows_that_no_super_block_fills_are_refused(grid):
    with pytest.raises(ValueError, match="for rows of a multiple of 256 weights, not 576"):
        round_nearest(torch.randn(2, 576), grid)
    assert k_grid_for(grid.bits, 576) == FALLBACK[grid.bits] and k_grid_for(grid.bits, 1536) == grid


@pytest.mark.parametrize("given", [(4, 32, "symmetric", 6), (4, 64, "float", 6), (8, 32, "symmetric", 6), (4, 32, "float", 5)])
def test_a_grid_that_no_type_has_is_refused(given):
    with pytest.raises(ValueError, match="scale_bits .: choose 16, or .*4, 32, float, 6"):
        Grid(*given)


# ----------------------------------------------------------------------------------------------------------------- the models
def large(**changes):
    settings = {
        "hidden_size": 256,
        "intermediate_size": 320,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    }
    return helpers.released_llama(helpers.make_llama(tie_word_embeddings=True, **settings | changes))


@pytest.mark.parametrize("recipe", [*({"bits": bits} for bits in K_GRIDS), {"bits": 4, "embeddings": "int4"}, {"target_compression": 3.2}],
                         ids=str)  # fmt: skip
def test_a_model_is_in_k_types_where_its_widths_allow_it(tmp_path, tokenizer, recipe):
    model = large()
    description = quantize_gptq(model, helpers.example_windows(4, 32), GPTQRecipe(layout="gguf_k", **recipe))
    block = llama_blocks(model)[0]
    assert all(module.grid.is_gguf for module in model.modules() if isinstance(module, GroupedWeight))
    assert not block.down.grid.superblocks  # 320 columns
    if "bits" in recipe:
        table = 4 if "embeddings" in recipe else 6
        assert block.up.grid == K_GRIDS[recipe["bits"]] and model.get_input_embeddings().grid == K_GRIDS[table]
    save_checkpoint(tmp_path / "made", model, tokenizer, kind="grouped", parent=None, stage={}, quantization=description)
    again = load_checkpoint(tmp_path / "made").model
    windows = helpers.example_windows(2, 16)
    with torch.no_grad():
        assert torch.equal(again(windows).logits, model(windows).logits)
    counts = export_gguf(again, byte_level(), tmp_path / "x.gguf", "tiny")
    assert any(kind.endswith("_K") for kind in counts) and largest_difference(again, tmp_path / "x.gguf") == ""
    if "target_compression" in recipe:
        written = sum(each.stat().st_size for each in (tmp_path / "made").glob("*.safetensors"))
        released = sum(each.numel() * 2 for each in large().parameters())
        assert 0.97 < written * 3.2 / released <= 1  # a small model, whose steps are large


def test_tuning_leaves_shared_scales_alone():
    model, dense = large(), large()
    windows = helpers.example_windows(8, 32)
    description = quantize_gptq(
        model, windows, GPTQRecipe(layout="gguf_k", bits=2, tuning_tokens=64, tuning_lr=1e-2), teacher=lambda: dense.float()
    )
    assert description["tuning"]["steps"] == 2
    for module in model.modules():
        if isinstance(module, GroupedWeight):
            assert torch.equal(GroupedWeight.from_tensors(module.tensors(), module.grid).scale, module.scale)


def test_a_width_that_the_layout_has_no_type_for_is_refused():
    with pytest.raises(ValueError, match="layout gguf_k has no type of 8 bits: choose one of 2, 3, 4, 5, 6"):
        GPTQRecipe(bits=8, layout="gguf_k")
    assert GPTQRecipe(bits=4, layout="gguf_k").bits_per_weight == (4.5, 6.5625)


def test_a_card_says_that_no_other_library_reads_it(tmp_path, tokenizer):
    model = large()
    description = quantize_gptq(
        model, helpers.example_windows(4, 32), GPTQRecipe(layout="gguf_k", bits=3, embeddings="as_released", compensation=False)
    )
    save_checkpoint(tmp_path / "made", model, tokenizer, kind="grouped", parent=None, stage={}, quantization=description)
    card = (tmp_path / "made" / "README.md").read_text()
    assert "No other library reads the file (its scales are multiples of one number for 256 weights)" in card


def test_a_target_without_a_reachable_width_is_refused():
    with pytest.raises(CompactMindError, match="smallest"):
        quantize_gptq(large(), helpers.example_windows(4, 32), GPTQRecipe(layout="gguf_k", target_compression=9.0))
