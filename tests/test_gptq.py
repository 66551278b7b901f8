"""Rounding that makes up for its errors, against the textbook: invert H, round a column, shift all others, and again."""

import pytest
import torch

from compactmind.methods.quantization.gptq import columns_in_order, inverse_factor, round_compensated, round_nearest
from compactmind.methods.quantization.grid import ZEROS, Grid, from_integers, to_integers

GRIDS = [Grid(4, 32), Grid(3, 16, "integer"), Grid(2, 24, "float"), Grid(4, -1, "float"), Grid(5, 48), Grid(8, 32, "integer")]


def correlated(count: int, width: int, seed: int = 0) -> torch.Tensor:
    """Return inputs (count, width) that are correlated and of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) * torch.logspace(0, -2, width)[:, None]
    inputs = torch.randn(count, width, generator=generator) @ mixing
    return inputs * torch.linspace(0.3, 2, width)[torch.randperm(width, generator=generator)]


def example(rows: int = 12, width: int = 72, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a weight (rows, width), inputs, and their second moment (width, width)."""
    inputs = correlated(400, width, seed)
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed + 1))
    return weight, inputs, inputs.t() @ inputs / len(inputs)


def damped(moment: torch.Tensor, damping: float) -> torch.Tensor:
    return moment.double() + damping * moment.double().diagonal().mean() * torch.eye(len(moment), dtype=torch.double)


def textbook(weight, moment, grid, damping, scales, zeros, order) -> torch.Tensor:
    """Return the integers of GPTQ as its paper derives them: H of the columns that are left, inverted anew for each of them."""
    weight, hessian, size = weight.double().clone(), damped(moment, damping), grid.group_size
    q = torch.empty(weight.shape, dtype=torch.uint8)
    for step, column in enumerate(order):
        left = order[step:]
        inverse = torch.linalg.inv(hessian[left][:, left])
        group = 0 if size == -1 else column // size
        scale, zero = scales[:, group].double(), zeros[:, group].double()
        result = to_integers(weight[:, column].clone(), scale, zero, grid)
        error = (weight[:, column] - from_integers(result, scale, zero, grid)) / inverse[0, 0]
        weight[:, left] -= error[:, None] * inverse[0]
        q[:, column] = result.to(torch.uint8)
    return q


def compensated_by(weight, moment, grid, damping: float = 0.01, ordered: bool = False):
    order = columns_in_order(moment, grid, "activation" if ordered else "index")
    return round_compensated(weight, inverse_factor(moment[order][:, order], damping), order, grid)


def output_error(weight: torch.Tensor, rounded, inputs: torch.Tensor) -> float:
    return float(((weight - rounded.weight()) @ inputs.t()).square().mean())


# ----------------------------------------------------------------------------------------------------------- the textbook
@pytest.mark.parametrize("width", [72, 200], ids="width {}".format)  # 200: more than are shifted at a time
@pytest.mark.parametrize("ordered", [False, True], ids=["index", "activation"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_it_rounds_as_the_textbook_does(grid, ordered, width):
    weight, _, moment = example(width=width)
    result = compensated_by(weight, moment, grid, 0.02, ordered=ordered)
    order = columns_in_order(moment, grid, "activation" if ordered else "index")
    expected = textbook(weight, moment, grid, 0.02, result.scale, result.zero, order.tolist())
    same = (result.q == expected).all(1)  # of a row that lies on the border of two levels once all that follows is another
    assert same.sum() >= len(same) - 1
    assert result.q.dtype == torch.uint8 and result.scale.shape == result.zero.shape == (12, len(grid.groups(width)))


@pytest.mark.parametrize("ordered", [False, True], ids=["index", "activation"])
@pytest.mark.parametrize("grid", [Grid(bits, 32, zero) for bits in (2, 3, 4) for zero in ZEROS], ids=str)
def test_outputs_are_nearer_than_with_every_weight_at_its_nearest_level(grid, ordered):
    weight, inputs, moment = example(24)
    compensated = output_error(weight, compensated_by(weight, moment, grid, ordered=ordered), inputs)
    nearest = output_error(weight, round_nearest(weight, grid, moment.diagonal()), inputs)
    assert compensated < 0.6 * nearest


@pytest.mark.parametrize("ordered", [False, True], ids=["index", "activation"])
def test_uncorrelated_inputs_leave_nothing_to_make_up_for(ordered):
    weight, _, _ = example()
    moment, grid = torch.diag(torch.linspace(0.1, 3, 72)), Grid(4, 32)
    result, nearest = (
        compensated_by(weight, moment, grid, ordered=ordered),
        round_nearest(weight, grid, damped(moment, 0.01).diagonal()),
    )
    assert (result.q == nearest.q).float().mean() > 0.999 and torch.allclose(result.scale, nearest.scale, rtol=1e-2)


@pytest.mark.parametrize("ordered", [False, True], ids=["index", "activation"])
def test_a_weight_on_its_grid_stays_there(ordered):
    _, _, moment = example()
    q = torch.randint(0, 16, (12, 3, 32), generator=torch.Generator().manual_seed(0))
    q[..., 5], q[..., 9] = 0, 15
    weight = (q * 0.125 - 1.5).flatten(1)[:, :72]
    weight[:, 64], weight[:, 71] = -1.5, 0.375  # the shorter last group has both ends too
    result = compensated_by(weight, moment, Grid(4, 32, "float"), ordered=ordered)
    assert torch.equal(result.weight(), weight)


# -------------------------------------------------------------------------------------------------------- the inverse of H
@pytest.mark.parametrize("damping", [1e-4, 0.01, 1.0])
def test_the_factor_is_that_of_the_damped_inverse(damping):
    _, _, moment = example()
    before = moment.clone()
    factor = inverse_factor(moment, damping)
    assert torch.equal(moment, before) and torch.equal(factor, factor.triu()) and factor.dtype == torch.float32
    product = factor.double().t() @ factor.double() @ damped(moment, damping)
    assert torch.allclose(product, torch.eye(72, dtype=torch.double), atol=1e-3)


def test_fewer_tokens_than_inputs_are_enough_to_invert():
    inputs = correlated(5, 72)
    weight, moment = example()[0], inputs.t() @ inputs / 5
    result = compensated_by(weight, moment, Grid(3, 32), 0.01)
    assert torch.isfinite(result.weight()).all()
    assert output_error(weight, result, inputs) < 0.05 * output_error(weight, round_nearest(weight, Grid(3, 32)), inputs)


def test_damping_holds_weights_to_their_nearest_levels():
    weight, _, moment = example()
    nearest = round_nearest(weight, Grid(4, 32))
    away = [
        float((compensated_by(weight, moment, Grid(4, 32), damping).weight() - weight).norm())
        for damping in (1e-4, 0.01, 1.0, 1e4)
    ]
    assert away == sorted(away, reverse=True) and away[-1] == pytest.approx(float((nearest.weight() - weight).norm()), rel=0.02)


def test_nothing_given_is_changed():
    weight, _, moment = example()
    order = columns_in_order(moment, Grid(4, 32), "activation")
    factor = inverse_factor(moment[order][:, order], 0.01)
    given = [each.clone() for each in (weight, moment, factor, order)]
    round_compensated(weight, factor, order, Grid(4, 32))
    assert all(torch.equal(*pair) for pair in zip((weight, moment, factor, order), given, strict=True))


def test_columns_of_a_group_stay_together_the_largest_first():
    moment = torch.diag(torch.tensor([1.0, 9, 2, 3, 4, 5, 0, 8, 7, 6]))
    assert columns_in_order(moment, Grid(4, 8), "activation").tolist() == [1, 7, 5, 4, 3, 2, 0, 6, 8, 9]
    moment[8, 8] = 10
    assert columns_in_order(moment, Grid(4, 8), "activation").tolist()[:3] == [8, 9, 1]
    assert columns_in_order(moment, Grid(4, 8), "index").tolist() == list(range(10))


# ------------------------------------------------------------------------------------------------------------- dead inputs
@pytest.mark.parametrize("ordered", [False, True], ids=["index", "activation"])
def test_inputs_that_are_always_zero_are_rounded_and_shift_nothing(ordered):
    weight, _, moment = example()
    moment[32:64] = moment[:, 32:64] = 0
    grid = Grid(4, 32)
    result = compensated_by(weight, moment, grid, ordered=ordered)
    assert torch.equal(result.weight()[:, 32:64], round_nearest(weight[:, 32:64], grid).weight())
    other = weight.clone()
    other[:, 32:64] *= 3
    again = compensated_by(other, moment, grid, ordered=ordered)
    alive = [*range(32), *range(64, 72)]
    assert torch.equal(result.q[:, alive], again.q[:, alive]) and not torch.equal(result.weight(), again.weight())


@pytest.mark.parametrize("ordered", [False, True], ids=["index", "activation"])
def test_without_any_input_it_is_rounding(ordered):
    weight, _, _ = example()
    result = compensated_by(weight, torch.zeros(72, 72), Grid(4, 32), ordered=ordered)
    assert torch.equal(result.weight(), round_nearest(weight, Grid(4, 32)).weight())
