"""What it costs to round a tensor: measured, it is the KL of the rounded model; by gradients, near it where errors are small."""


import helpers
import pytest
import torch
from llamas import make_other

from compactmind.evaluation.divergence import divergence
from compactmind.methods.llama import LINEARS, llama_blocks
from compactmind.methods.probe import Probe
from compactmind.methods.quantization.gptq import round_nearest
from compactmind.methods.quantization.grid import Grid
from compactmind.methods.quantization.sensitivity import (
    gradient_costs,
    measure_gradients,
    measured_costs,
    measured_sensitivities,
    measured_table_cost,
)

GRIDS = [Grid(bits, 16) for bits in (3, 4, 6, 8)]


def granite(logits_scaling: float = 2.0):
    """Return a model whose logits are divided by a number."""
    return make_other("granite", logits_scaling=logits_scaling, tie_word_embeddings=False)


@pytest.mark.parametrize("make", [helpers.make_llama, granite])
def test_a_probe_measures_what_the_whole_model_does(make):
    model, window = make(), helpers.example_windows(1, 40)[0]
    probe, other = Probe(model, window), make()
    for index in (0, 1):
        changes = [(field, round_nearest(getattr(llama_blocks(model)[index], field).weight, Grid(3, 16)).weight()) for field in LINEARS]
        results = probe.with_weights(index, iter(changes))
        for (field, weight), result in zip(changes, results, strict=True):
            other.load_state_dict(model.state_dict())
            getattr(llama_blocks(other)[index], field).weight.data = weight
            p, q = (each(window[None]).logits[0].detach().double().log_softmax(-1) for each in (model, other))
            assert result == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3)
    assert probe.with_weights(0, []) == []
    assert torch.equal(model(window[None]).logits, make()(window[None]).logits)  # as it was


def test_costs_fall_with_bits_and_are_those_of_the_reference_there():
    model, windows = helpers.make_llama(), helpers.example_windows(2, 64)
    costs = measured_costs(model, windows, GRIDS, reference=GRIDS[0])
    assert set(costs) == {(index, field) for index in range(len(llama_blocks(model))) for field in LINEARS}
    assert all(each == sorted(each, reverse=True) and each[-1] > 0 for each in costs.values())


def test_what_is_made_of_a_model_goes_by_what_errors_cost_in_that_model():
    model, windows = helpers.make_llama(), helpers.example_windows(2, 64)
    known = measured_sensitivities(model, windows, GRIDS[0])
    own = measured_costs(model, windows, GRIDS, known=known)
    assert own == measured_costs(model, windows, GRIDS, reference=GRIDS[0])
    halved = measured_costs(model, windows, GRIDS, known={name: value / 2 for name, value in known.items()})
    assert all(halved[key] == pytest.approx([cost / 2 for cost in costs]) for key, costs in own.items())
    smaller = helpers.make_llama()
    llama_blocks(smaller)[0].down.weight.data[0] = 0.0
    errors = measured_costs(smaller, windows, GRIDS, known=known)[0, "down"]  # its own, at the price of the other model
    assert all(0 < cost < before for cost, before in zip(errors, own[0, "down"], strict=True))


def test_a_grid_on_which_the_weights_lie_already_costs_nothing():
    model = helpers.make_llama()
    for block in llama_blocks(model):
        for field in LINEARS:
            linear = getattr(block, field)
            linear.weight.data = round_nearest(linear.weight, Grid(4, 16, "float")).weight()
    result = measured_costs(model, helpers.example_windows(2, 64), [Grid(4, 16, "float"), Grid(4, 16)])
    assert all(on_grid < 1e-3 * off_grid for on_grid, off_grid in result.values())


def test_a_table_costs_what_rounding_it_does():
    model, windows, grid = helpers.make_llama(tie_word_embeddings=True), helpers.example_windows(1, 64), Grid(4, 16)
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    result = measured_table_cost(model, windows, tables, grid)
    other = helpers.make_llama(tie_word_embeddings=True)
    other.get_input_embeddings().weight.data.copy_(round_nearest(model.get_input_embeddings().weight, grid).weight())
    p, q = (each(windows[:1]).logits[0].detach().double().log_softmax(-1) for each in (model, other))
    assert result == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3)
    assert tables[0].weight.data_ptr() == tables[1].weight.data_ptr()  # still tied


def test_gradients_are_those_of_autograd_and_leave_the_model_as_it_was():
    model, windows = helpers.make_llama(), helpers.example_windows(2, 16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = measure_gradients(model, windows)
    assert [set(each) for each in result.rows] == [set(LINEARS)] * len(llama_blocks(model))
    for tokens in result.tokens:
        for weights in tokens.values():
            assert weights.shape == windows.shape and weights.mean().item() == pytest.approx(1, rel=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_a_number_that_logits_are_divided_by_is_part_of_the_head():
    model, plain, windows = granite(6.0), granite(1.0), helpers.example_windows(2, 16)
    with torch.no_grad():
        plain.lm_head.weight /= 6.0
    for result, wanted in zip(measure_gradients(model, windows).rows, measure_gradients(plain, windows).rows, strict=True):
        for name in LINEARS:
            torch.testing.assert_close(result[name], wanted[name], rtol=1e-4, atol=1e-12)


def test_the_estimate_by_gradients_orders_the_blocks_linears_as_the_measurement_does():
    model, windows = helpers.make_llama(scale=0.1), helpers.example_windows(16, 64)
    grids = [Grid(6, 16)]
    measured = measured_costs(model, windows, grids, reference=grids[0])
    estimated = gradient_costs(model, windows, grids, damping=0.01)
    keys = sorted(measured)
    a, b = (torch.tensor([each[key][0] for key in keys]).argsort().argsort().double() for each in (measured, estimated))
    assert torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.6


def test_divergence_agrees_with_the_probe_on_the_same_tokens():
    model, windows = helpers.make_llama(), helpers.example_windows(1, 64)
    other = helpers.make_llama()
    weight = round_nearest(llama_blocks(model)[0].up.weight, Grid(3, 16)).weight()
    llama_blocks(other)[0].up.weight.data = weight
    result = divergence(model, other, windows)["mean"]  # of the predicted tokens: all but the last
    assert Probe(model, windows[0]).with_weights(0, [("up", weight)])[0] == pytest.approx(result, rel=0.1)
