"""A model block by block computes what it computes whole, and is afterwards what it was."""

import helpers
import pytest
import torch

from compactmind.methods.blockwise import SecondMoment, block_inputs, in_float32, run_block, walk_blocks
from compactmind.methods.llama import llama_blocks
from compactmind.methods.quantization.calibration import SITES
from compactmind.methods.registry import METHODS, Resources


def state_of(model) -> dict:
    result = {name: (each, each.data_ptr(), each.dtype, each.requires_grad) for name, each in model.named_parameters()}
    return result | {"hooks": sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())}


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_blocks_one_after_the_other_are_the_model(biases, tied):
    model = helpers.make_llama(tie_word_embeddings=tied, attention_bias=biases, mlp_bias=biases)
    before, windows = state_of(model), helpers.example_windows(3, 20)
    states, arguments = block_inputs(model, windows)
    assert [tuple(each.shape) for each in states] == [(1, 20, 32)] * 3 and len(arguments) == 2
    assert state_of(model) == before and not any("forward" in block.module.__dict__ for block in llama_blocks(model))
    with torch.no_grad():
        for block, others in zip(llama_blocks(model), arguments, strict=True):
            states = [run_block(block.module, each, others) for each in states]
        result = model.lm_head(model.model.norm(torch.cat(states)))
        assert torch.allclose(result, model(windows).logits, atol=1e-5)


def test_a_model_in_bf16_is_read_in_float32_and_stays_in_bf16():
    model, windows = helpers.released_llama(), helpers.example_windows(2, 20)
    before = state_of(model)
    states, arguments = block_inputs(model, windows)
    block = llama_blocks(model)[0].module
    with in_float32(block), torch.no_grad():
        assert {each.dtype for each in block.parameters()} == {torch.float32} and not any(
            p.requires_grad for p in block.parameters()
        )
        result = run_block(block, states[0], arguments[0])
    assert state_of(model) == before and result.dtype == torch.float32
    expected, others = block_inputs(model.float(), windows)
    assert torch.equal(states[1], expected[1])
    with torch.no_grad():
        assert torch.allclose(result, run_block(llama_blocks(model)[0].module, expected[0], others[0]), atol=1e-5)


def moments_of(windows: torch.Tensor, tokens=None) -> list[dict[str, torch.Tensor]]:
    return [moments for _, _, moments in walk_blocks(helpers.make_llama(), windows, tokens)]


@pytest.mark.parametrize("weighted", [False, True])
def test_text_is_observed_in_bf16_where_that_is_multiplied_and_moments_are_near_those_of_float32(monkeypatch, weighted):
    windows = helpers.example_windows(3, 40)
    tokens = [dict.fromkeys(SITES, torch.rand(3, 40, generator=torch.Generator().manual_seed(1)))] * 2 if weighted else None
    exact = moments_of(windows, tokens)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    near = moments_of(windows, tokens)
    assert len(exact) == len(near) == 2
    for one, other in zip(exact, near, strict=True):
        assert list(one) == list(other) == list(SITES) and {each.dtype for each in other.values()} == {torch.float32}
        for site in SITES:
            error = ((one[site] - other[site]).norm() / one[site].norm()).item()
            assert error < 0.02 and (error > 1e-5 or site == "qkv"), (site, error)


@pytest.mark.parametrize("method", ["prune", "gptq", "nf4", "sparse24"])
def test_what_is_made_from_text_observed_in_bf16_is_nearly_the_same(monkeypatch, method):
    settings = {
        "prune": {"sparsity": 0.3, "round_to": 8, "criterion": "l2"}, "gptq": {"bits": 4, "group_size": 32}, "nf4": {},
        "sparse24": {"criterion": "wanda"},
    }  # fmt: skip
    windows, step = helpers.example_windows(4, 32), METHODS[method]
    dense = helpers.make_llama()
    resources = lambda: Resources(windows, windows, windows, dense=helpers.make_llama)  # noqa: E731
    exact, _ = step.apply(helpers.make_llama(), resources(), step.parameters(settings[method]))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    near, _ = step.apply(helpers.make_llama(), resources(), step.parameters(settings[method]))
    wanted, one, other = (helpers.logits_of(model, {"input_ids": windows}) for model in (dense, exact, near))
    assert other.dtype == torch.float32
    assert 0 < (one - other).norm() < 0.3 * (one - wanted).norm()


@pytest.mark.parametrize("where", ["model.layers.1.mlp", "model.norm", "model.embed_tokens"])
def test_what_stops_in_the_middle_leaves_the_model_as_it_was(where):
    model = helpers.released_llama()

    def fail(*_):
        raise RuntimeError("in the middle")

    failing = model.get_submodule(where).register_forward_pre_hook(fail)
    before, whole = state_of(model), where.startswith("model.layers")
    if whole:
        states, arguments = block_inputs(model, helpers.example_windows(1, 8))
    with pytest.raises(RuntimeError, match="in the middle"), in_float32(model.model.layers[1]):
        if whole:
            run_block(model.model.layers[1], states[0], arguments[1])
        block_inputs(model, helpers.example_windows(1, 8))
    assert state_of(model) == before and not any("forward" in block.module.__dict__ for block in llama_blocks(model))
    failing.remove()
    assert len(block_inputs(model, helpers.example_windows(1, 8))[0]) == 1


@pytest.mark.parametrize("width", [1, 2, 3, 5, 8, 33])
def test_half_of_a_second_moment_is_summed_and_the_other_filled_in(width):
    x, moment = torch.randn(40, width, generator=torch.Generator().manual_seed(width)), SecondMoment(width, torch.device("cpu"))
    for part, share in zip(x.split(25), (1.0, 0.5), strict=True):
        moment.add(part, share)
    expected = x[:25].t() @ x[:25] + 0.5 * x[25:].t() @ x[25:]
    torch.testing.assert_close(moment.whole(), expected, rtol=1e-5, atol=1e-5)
