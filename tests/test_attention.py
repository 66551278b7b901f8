"""Attention of a whole text by a kernel: what torch computes, where it is asked for; torch's own where anything else is."""

import json

import built_kernels
import helpers
import pytest
import torch
from built_kernels import drawn, needs_kernels
from torch.nn.functional import scaled_dot_product_attention
from transformers import OPTConfig, OPTForCausalLM

from compactmind import attention, kernels
from compactmind.checkpoint import load_any, load_checkpoint, save_checkpoint
from compactmind.methods.pruning.llama_structure import rebuilt

native, ops, instructions = built_kernels.native, built_kernels.ops, built_kernels.instructions
pytestmark = needs_kernels


def expected(query, key, value, scaling=None, **what):
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, dim=1).double() for each in (key, value))
    return scaled_dot_product_attention(query.double(), key, value, scale=scaling, **(what or {"is_causal": True})).transpose(
        1, 2
    )


@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 31, 33, 64, 131])
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(3, 3, 8), (4, 2, 40), (9, 3, 64), (2, 1, 128), (1, 1, 33)])
def test_every_token_reads_itself_and_those_before_it(ops, instructions, tokens, heads, key_heads, size):
    query, key, value = (
        drawn(2, heads, tokens, size),
        drawn(2, key_heads, tokens, size, seed=1),
        drawn(2, key_heads, tokens, size, seed=2),
    )
    result = ops.attention(query, key, value, None, True, 0.3)
    assert result.shape == (2, tokens, heads, size) and result.is_contiguous()
    torch.testing.assert_close(result.double(), expected(query, key, value, 0.3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 8, 33, 77])
@pytest.mark.parametrize("queries", [1, 7, 40])
def test_all_of_a_text_is_read(ops, instructions, queries, tokens):
    query, key, value = drawn(2, 4, queries, 24), drawn(2, 2, tokens, 24, seed=1), drawn(2, 2, tokens, 24, seed=2)
    result = ops.attention(query, key, value, None, False, 0.3)
    torch.testing.assert_close(result.double(), expected(query, key, value, 0.3, is_causal=False), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 1, 40, 37), (1, 1, 40, 37), (2, 1, 1, 37), (1, 1, 1, 37)])
def test_what_is_masked_is_not_read(ops, instructions, shape):
    query, key, value = drawn(2, 4, 40, 24), drawn(2, 2, 37, 24, seed=1), drawn(2, 2, 37, 24, seed=2)
    mask = drawn(*shape, seed=4) > 0.5
    wanted = expected(query, key, value, 0.3, attn_mask=mask)
    torch.testing.assert_close(ops.attention(query, key, value, mask, False, 0.3).double(), wanted, rtol=1e-5, atol=1e-5)
    key[..., 2, :], value[..., 2, :] = 1e4, 1e4
    mask[..., 2] = False
    result = ops.attention(query, key, value, mask, False, 0.3)
    torch.testing.assert_close(result.double(), expected(query, key, value, 0.3, attn_mask=mask), rtol=1e-5, atol=1e-5)
    mask[..., :] = False
    assert not ops.attention(query, key, value, mask, False, 0.3).any()  # as torch has it


def test_texts_lie_in_memory_as_they_like(ops, instructions):
    query, key = drawn(1, 50, 4, 24).transpose(1, 2), drawn(1, 2, 90, 24)[:, :, 10:60]
    value = drawn(2, 50, 2, 30).transpose(1, 2)[1:, :, :, :24]
    result = ops.attention(query, key, value, None, True, 24**-0.5)
    torch.testing.assert_close(result.double(), expected(query, key, value), rtol=1e-5, atol=2e-6)


def test_large_products_neither_overflow_nor_drown_the_others(ops, instructions):
    query, key, value = 40 * drawn(1, 2, 40, 16), 40 * drawn(1, 2, 40, 16, seed=1), drawn(1, 2, 40, 16, seed=2)
    result = ops.attention(query, key, value, None, True, 1.0)
    torch.testing.assert_close(result.double(), expected(query, key, value, 1.0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_what_is_no_number_stays_none_and_only_where_it_is_read(ops, instructions, where):
    parts = {name: drawn(1, 1, 20, 8, seed=seed) for seed, name in enumerate(("query", "key", "value"))}
    parts[where][0, 0, 11, 3] = torch.nan
    result = ops.attention(*parts.values(), None, True, 1.0)[0].isnan().any(-1).flatten().tolist()
    first = {"query": 11, "key": 11, "value": 8}[where]  # of the same tile: nothing times it is no number either
    assert result == [token == 11 if where == "query" else token >= first for token in range(20)]


def test_what_does_not_fit_together_is_refused(ops):
    query = drawn(1, 4, 6, 8)
    for key, value, reason in (
        (drawn(1, 3, 6, 8), drawn(1, 3, 6, 8), "4 heads for 3"),
        (drawn(2, 4, 6, 8), drawn(2, 4, 6, 8), "of the same tokens"),
        (drawn(1, 4, 6, 8), drawn(1, 4, 6, 6), "of the same tokens"),
        (drawn(1, 4, 5, 8), drawn(1, 4, 5, 8), "6 queries of 5 tokens"),
        (query.half(), query.half(), "float32"),
        (query.transpose(2, 3), query.transpose(2, 3), "contiguous"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            ops.attention(query, key, value, None, True, 1.0)
    for mask in (torch.ones(1, 4, 6, 6).bool(), torch.ones(1, 1, 6, 5).bool(), torch.ones(1, 1, 6, 6), torch.ones(6, 6).bool()):
        with pytest.raises(RuntimeError, match="mask: bool"):
            ops.attention(query, query, query, mask, True, 1.0)


@pytest.fixture
def calls(monkeypatch):
    """How often attention went to torch."""
    calls = []
    real = attention.sdpa_attention_forward
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    return calls


@pytest.fixture
def saved(tmp_path):
    model = helpers.make_llama()
    save_checkpoint(tmp_path / "llama", model, helpers.make_byte_tokenizer(), kind="dense", parent=None, stage={})
    model.set_attn_implementation("sdpa")
    return model.eval(), tmp_path / "llama"


def test_a_loaded_model_uses_it_wherever_it_can(saved, calls):
    plain, path = saved
    model, ids = load_checkpoint(path).model, torch.tensor([[5, 9, 3, 7, 1, 2], [8, 8, 2, 1, 4, 3]])
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    blocks = model.config.num_hidden_layers
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-5)
        assert calls == []
        for padded in (mask, mask.flip(1)):
            read = padded.bool()
            result, wanted = (each(ids, attention_mask=padded).logits[read] for each in (model, plain))
            torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-5)
        first, whole = model(ids[:, :4], use_cache=True), plain(ids).logits
        rest = model(ids[:, 4:], past_key_values=first.past_key_values).logits  # some behind others
        torch.testing.assert_close(rest, whole[:, 4:], rtol=1e-5, atol=1e-5)
        assert calls == []
        model(ids[:, :1])
        assert len(calls) == blocks
    model(ids).logits.sum().backward()
    assert len(calls) == 2 * blocks and model.model.embed_tokens.weight.grad is not None
    with torch.no_grad():
        model.bfloat16()(ids)
        assert len(calls) == 2 * blocks
        model.half()(ids)
        assert len(calls) == 3 * blocks


def test_without_kernels_torch_computes_all(saved, calls, monkeypatch):
    plain, path = saved
    monkeypatch.setenv(kernels.KERNEL_VARIABLE, "simulated")
    with torch.no_grad():
        assert torch.equal(
            load_checkpoint(path).model(torch.tensor([[5, 9, 3]])).logits, plain(torch.tensor([[5, 9, 3]])).logits
        )
    assert len(calls) == plain.config.num_hidden_layers


def test_it_is_of_a_process_and_not_of_a_file(saved, tmp_path):
    model, path = saved
    loaded = load_checkpoint(path).model
    pruned = rebuilt(loaded)
    assert loaded.config._attn_implementation == pruned.config._attn_implementation == attention.NAME
    loaded.save_pretrained(tmp_path / "again")
    assert attention.NAME not in json.dumps(json.loads((tmp_path / "again" / "config.json").read_text()))
    eager = helpers.make_llama()
    eager.set_attn_implementation("eager")
    assert attention.with_attention_kernel(eager).config._attn_implementation == "eager"


def test_models_of_others_use_it_too(tmp_path, calls):
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = OPTForCausalLM(OPTConfig(vocab_size=300, max_position_embeddings=32, **sizes)).eval()
    model.save_pretrained(tmp_path / "opt")
    helpers.make_byte_tokenizer().save_pretrained(tmp_path / "opt")
    loaded, ids = load_any(tmp_path / "opt").model, torch.tensor([[5, 9, 3, 7]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert calls == [] and loaded.config._attn_implementation == attention.NAME
