"""A group of weights on a grid: levels that a file can hold, errors no larger than plain rounding's, and bits that are really taken."""

import itertools
from dataclasses import replace

import pytest
import torch

from compactmind.methods.quantization.gptq import round_nearest
from compactmind.methods.quantization.grid import BITS, ZEROS, Grid, fit, from_integers, to_integers
from compactmind.methods.quantization.grouped import GroupedWeight

GRIDS = [Grid(bits, 32, zero) for bits, zero in itertools.product(BITS, ZEROS)]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)


def example(rows: int = 16, width: int = 32, seed: int = 0) -> torch.Tensor:
    """Return weights (rows, width) whose rows differ in size and in their mean, as (rows of) a trained matrix do."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator) ** 3
    return (weight + torch.randn(rows, 1, generator=generator)) * torch.logspace(-3, 1, rows)[:, None]


def plain(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return each row of a weight rounded between its extremes, the way every textbook does it: scale and minimum in fp16."""
    low, high, top = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), 2**grid.bits - 1
    if grid.zero == "symmetric":
        half = 2 ** (grid.bits - 1)
        scale = (torch.maximum(-low, high) / (half - 1)).half().float()
        return (weight / scale).round().clamp(-half, half - 1) * scale
    if grid.zero == "integer":
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = ((high - low) / top).half().float()
        zero = (-low / scale).round()
        return ((weight / scale).round() + zero).clamp(0, top).sub(zero) * scale
    scale, minimum = ((high - low) / top).half().float(), low.half().float()
    return ((weight - minimum) / scale).round().clamp(0, top) * scale + minimum


def is_fp16(x: torch.Tensor) -> bool:
    return torch.equal(x.half().float(), x) and bool(torch.isfinite(x).all())


# ---------------------------------------------------------------------------------------------------------------- levels
@pytest.mark.parametrize(("group_size", "width"), [(32, 40), (64, 200), (128, 144), (128, 128), (-1, 72), (64, 9)])
@every_grid
def test_integers_are_in_range_and_what_is_stored_is_what_is_meant(grid, group_size, width):
    grid, weight = replace(grid, group_size=group_size), example(4, width)
    bits, zero = grid.bits, grid.zero
    groups = grid.groups(width)
    assert [column for columns in groups for column in range(width)[columns]] == list(range(width))
    size = width if group_size == -1 else group_size
    assert (
        all(columns.stop - columns.start == size for columns in groups[:-1]) and 0 < groups[-1].stop - groups[-1].start <= size
    )
    result = round_nearest(weight, grid)
    assert result.q.dtype == torch.uint8 and result.q.shape == weight.shape and int(result.q.max()) < grid.levels == 2**bits
    assert result.scale.shape == result.zero.shape == (4, len(groups)) and is_fp16(result.scale) and (result.scale != 0).all()
    if zero == "float":
        assert is_fp16(result.zero)
    else:
        assert torch.equal(result.zero, result.zero.round()) and result.zero.min() >= 0 and result.zero.max() < grid.levels
    if zero == "symmetric":
        assert (result.zero == 2 ** (bits - 1)).all()
    group = torch.arange(width) // size
    scales, zeros = result.scale[:, group], result.zero[:, group]
    by_hand = result.q * scales + zeros if zero == "float" else (result.q - zeros) * scales
    assert torch.allclose(result.weight(), by_hand, rtol=1e-6, atol=1e-7)


@every_grid
def test_every_weight_gets_its_nearest_level(grid):
    weight = example()
    scale, zero = fit(weight, grid)
    levels = from_integers(torch.arange(grid.levels).float().expand(16, 1, -1), scale[..., None], zero[..., None], grid)
    nearest = (weight[..., None] - levels).abs().amin(-1)
    result = from_integers(to_integers(weight, scale, zero, grid), scale, zero, grid)
    assert torch.allclose((weight - result).abs(), nearest, atol=1e-5 * float(weight.abs().max()))


# ----------------------------------------------------------------------------------------------------------------- errors
@every_grid
def test_no_group_is_worse_than_between_its_extremes(grid):
    weight = example(200)
    result = (round_nearest(weight, grid).weight() - weight).square().sum(1)
    assert (result <= (plain(weight, grid) - weight).square().sum(1) * (1 + 1e-5)).all()


@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("group_size", [32, -1])
def test_more_bits_and_smaller_groups_leave_smaller_errors(zero, group_size):
    weight = example(8, 256)
    errors = [float((round_nearest(weight, Grid(bits, group_size, zero)).weight() - weight).norm()) for bits in BITS]
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 15
    by_size = [float((round_nearest(weight, Grid(4, size, zero)).weight() - weight).norm()) for size in (32, 64, 128, -1)]
    assert by_size == sorted(by_size)


@every_grid
def test_errors_count_as_much_as_they_matter(grid):
    weight, importance = example(64), torch.logspace(-3, 3, 32)
    asked, even = (round_nearest(weight, grid, each).weight() for each in (importance, None))
    share = [((result - weight).square() * importance).sum(1) / (weight.square() * importance).sum(1) for result in (asked, even)]
    assert share[0].mean() < 0.9 * share[1].mean()
    assert torch.equal(round_nearest(weight, grid, torch.full((32,), 3.0)).weight(), even)


def test_a_weight_of_nothing_that_matters_is_left_to_the_extremes():
    weight = example()
    for grid in GRIDS:
        assert torch.isfinite(round_nearest(weight, grid, torch.zeros(32)).weight()).all()


# ----------------------------------------------------------------------------------------------- weights published as Q4_1
def q4_1(rows: int, blocks: int, seed: int = 0) -> torch.Tensor:
    """Return weights (rows, 32 * blocks) as llama.cpp dequantizes Q4_1: of a block the least is level 0 and the largest level 15."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 16, (rows, blocks, 32), generator=generator)
    ends = torch.rand(rows, blocks, 32, generator=generator).argsort(-1)[..., :2]
    q.scatter_(-1, ends, torch.tensor([0, 15]).expand(rows, blocks, 2))
    scale = (torch.rand(rows, blocks, 1, generator=generator) * torch.logspace(-4, 0, rows)[:, None, None]).half().float()
    minimum = (-15 * scale * torch.rand(rows, blocks, 1, generator=generator)).half().float()
    return (q * scale + minimum).flatten(1)


@pytest.mark.parametrize("importance", [None, torch.logspace(-2, 2, 96)], ids=["alike", "weighed"])
def test_a_weight_published_as_q4_1_is_found_again_exactly(importance):
    weight = q4_1(64, 3)
    weight[3, 32:64] = 0.125  # a block of one value: its scale is 0 in the file
    assert torch.equal(round_nearest(weight, Grid(4, 32, "float"), importance).weight(), weight)
    assert not torch.equal(round_nearest(weight, Grid(4, 32, "symmetric"), importance).weight(), weight)


# ------------------------------------------------------------------------------------------------------------------ limits
@every_grid
def test_groups_of_zeros_and_of_one_value_stay_what_they_are(grid):
    weight = torch.zeros(4, 40)  # the second group of a row has 8 weights
    weight[1], weight[2], weight[3, :32] = 0.3, -0.7, 1e-2
    result = round_nearest(weight, grid).weight()
    assert torch.equal(result[0], weight[0]) and torch.equal(result[3, 32:], weight[3, 32:])
    assert torch.allclose(result, weight, rtol=2**-10, atol=1e-7)


@pytest.mark.parametrize("size", [6e4, 1e-6, 1e-9, 1e-30])
@every_grid
def test_huge_and_tiny_weights_stay_numbers_and_near(grid, size):
    weight = (torch.rand(16, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1) * size
    result = round_nearest(weight, grid)
    assert is_fp16(result.scale) and torch.isfinite(result.weight()).all()
    step = 2 * size / (grid.levels - 1)
    least = 2.0**-24  # of fp16: a scale is a multiple of it
    assert (result.weight() - weight).abs().max() <= 1.01 * step + 2.0**-11 * size + grid.levels * least


def test_beyond_fp16_the_nearest_that_can_be_stored_is_taken():
    result = round_nearest(torch.tensor([[1e9, -1e9] * 16]), Grid(4, 32))
    assert torch.isfinite(result.weight()).all() and result.weight().abs().min() >= 65504 * 7


# ------------------------------------------------------------------------------------------------------------------- bytes
@pytest.mark.parametrize("width", [64, 200, 33])
@every_grid
@pytest.mark.parametrize("group_size", [32, -1])
def test_stored_bits_are_those_of_the_tensors(grid, group_size, width):
    grid, rows = replace(grid, group_size=group_size), 32
    groups = torch.ones(rows, len(grid.groups(width)))
    tensors = GroupedWeight.of(torch.zeros(rows, width, dtype=torch.uint8), groups, groups, grid).tensors()
    shape = tensors.pop("weight_shape")
    assert shape.tolist() == [rows, width]
    assert rows * grid.stored_bits(width) == 8 * sum(each.numel() * each.element_size() for each in tensors.values())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bits": 7}, "bits 7: choose one of 2, 3, 4, 5, 6, 8"),
        ({"bits": 1}, "bits 1: choose"),
        ({"zero": "half"}, "zero 'half': choose one of symmetric, integer, float"),
        ({"group_size": 0}, "group_size 0: choose 32, 64, 128, or -1"),
        ({"group_size": 4}, "group_size 4: choose"),
        ({"group_size": 32.0}, "group_size 32.0: choose"),
    ],
    ids=str,
)
def test_a_grid_that_does_not_exist_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Grid(**{"bits": 4, "group_size": 32} | given)
