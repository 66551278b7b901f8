"""A model block by block computes what it computes whole, and is afterwards what it was."""

import helpers
import pytest
import torch

from compactmind.methods.blockwise import block_inputs, in_float32, run_block
from compactmind.methods.llama import llama_blocks


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
    with in_float32(block):
        assert {each.dtype for each in block.parameters()} == {torch.float32} and not any(
            p.requires_grad for p in block.parameters()
        )
        result = run_block(block, states[0], arguments[0])
    assert state_of(model) == before and result.dtype == torch.float32
    expected, others = block_inputs(model.float(), windows)
    assert torch.equal(states[1], expected[1])
    with torch.no_grad():
        assert torch.allclose(result, run_block(llama_blocks(model)[0].module, expected[0], others[0]), atol=1e-5)


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
