"""Computing the last block for the first token only: the same logits and gradients, and nothing left behind."""

import copy

import helpers
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compactmind.errors import CompactMindError
from compactmind.methods.first_token import read_all_tokens, read_first_token_only
from compactmind.methods.pruning.masks import compact


def logits_and_gradients(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    output = model(**helpers.example_batch(), labels=torch.tensor([0, 1, 0, 1, 0]))
    output.loss.backward()
    return output.logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(params=["bert", "distilbert", "pruned bert", "pruned distilbert"])
def model(request, bert, distilbert):
    dense = bert if "distil" not in request.param else distilbert
    return compact(dense, helpers.uneven_masks(dense)) if "pruned" in request.param else dense


def test_logits_and_gradients_are_those_of_the_ordinary_forward_pass(model):
    expected_logits, expected = logits_and_gradients(model.eval())
    read_first_token_only(model)
    logits, gradients = logits_and_gradients(model)
    assert torch.allclose(logits, expected_logits, atol=1e-6)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, expected[name], atol=1e-6), name


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_does_not_reach_the_first_token(bert, implementation):
    bert.set_attn_implementation(implementation)
    bert.eval()
    ids = torch.tensor([[2, 7, 9, 3]])
    padded = torch.tensor([[2, 7, 9, 3, 0, 0]])
    read_first_token_only(bert)
    plain = bert(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    with_padding = bert(input_ids=padded, attention_mask=(padded > 0).long()).logits
    assert torch.allclose(plain, with_padding, atol=1e-6)


def test_the_last_block_really_computes_one_token_and_all_of_them_again_afterwards(distilbert):
    widths = []
    distilbert.distilbert.transformer.layer[-1].ffn.register_forward_hook(
        lambda _, inputs, __: widths.append(inputs[0].shape[1])
    )
    batch = helpers.example_batch()
    read_first_token_only(distilbert)
    distilbert(**batch)
    read_all_tokens(distilbert)
    distilbert(**batch)
    assert widths == [1, batch["input_ids"].shape[1]]


def test_a_copy_computes_with_its_own_weights(distilbert):
    distilbert.eval()
    read_first_token_only(distilbert)
    twin = copy.deepcopy(distilbert)
    before = distilbert(**helpers.example_batch()).logits
    with torch.no_grad():
        twin.distilbert.transformer.layer[-1].ffn.lin2.weight.zero_()
    assert torch.equal(distilbert(**helpers.example_batch()).logits, before)
    assert not torch.allclose(twin(**helpers.example_batch()).logits, before)


def test_dropout_of_attention_is_active_in_training_only(bert):
    read_first_token_only(bert)
    for module in bert.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    bert.bert.encoder.layer[-1].attention.self.dropout.p = 0.5
    bert.train()
    first, second = (bert(**helpers.example_batch()).logits for _ in range(2))
    assert not torch.equal(first, second)
    bert.eval()
    first, second = (bert(**helpers.example_batch()).logits for _ in range(2))
    assert torch.equal(first, second)


def test_another_architecture_is_refused_by_name():
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(CompactMindError, match="llama"):
        read_first_token_only(llama)
