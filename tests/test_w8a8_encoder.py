"""W8A8 of BERT and DistilBERT: the numbers of its linears, in a forward pass of its own, with heads left alone, and it reloads."""

import copy

import helpers
import pytest
import torch
from transformers import AutoModelForSequenceClassification
from transformers.activations import ACT2FN

from compactmind import kernels
from compactmind.checkpoint import load_checkpoint, save_checkpoint
from compactmind.formats import w8a8
from compactmind.formats.table import parameters_of
from compactmind.methods.pruning.encoder import encoder_blocks, encoder_layers
from compactmind.methods.pruning.masks import compact
from compactmind.methods.quantization import w8a8_encoder
from compactmind.methods.quantization.packed_model import linears_to_quantize
from compactmind.methods.quantization.w8a8_encoder import W8A8EncoderBlock, quantize_encoder
from compactmind.methods.quantization.w8a8_linear import W8A8Linear


@pytest.fixture(params=["bert", "distilbert"])
def model(request):
    return (helpers.make_bert() if request.param == "bert" else helpers.make_distilbert()).eval()


def quantized(model, **settings):
    result = copy.deepcopy(model)
    return result, quantize_encoder(result, **settings)


def test_every_linear_of_the_blocks_is_int8_and_no_head_is(model):
    small, description = quantized(model)
    names = {name for name, module in small.named_modules() if isinstance(module, W8A8Linear)}
    assert len(names) == 6 * len(encoder_layers(small)) and not any("classifier" in name or "pooler" in name for name in names)
    assert description["bits"] == 8 and description["granularity"]["activations"] == "per_token"
    assert parameters_of(small) == parameters_of(model)


@pytest.mark.parametrize("tokens", [3, 24, 512])
def test_the_forward_pass_is_that_of_its_linears(model, monkeypatch, tokens):
    monkeypatch.setattr(w8a8_encoder, "TOKENS", tokens)  # of sentences of 12 each alone, two, two and one, all
    small, _ = quantized(model)
    plain = copy.deepcopy(model)
    for name, linear in linears_to_quantize(plain):
        plain.set_submodule(name, W8A8Linear.from_linear(linear))
    for module in plain.modules():
        if isinstance(module, torch.nn.Embedding):
            module.weight.data = module.weight.data.half().float()
    batch = helpers.example_batch()
    assert torch.allclose(helpers.logits_of(small, batch), helpers.logits_of(plain, batch), atol=2e-3)
    difference = helpers.logits_of(small, batch) - helpers.logits_of(model, batch)
    assert 0 < difference.norm() < 0.1 * helpers.logits_of(model, batch).norm()


@pytest.mark.parametrize("activation", ["gelu", "relu", "gelu_new"])
def test_kernels_do_what_lies_between_products_where_they_compute_the_same(model, monkeypatch, activation):
    for module in model.modules():
        if isinstance(getattr(module, "intermediate_act_fn", None), torch.nn.Module):
            module.intermediate_act_fn = ACT2FN[activation]
        if isinstance(getattr(module, "activation", None), torch.nn.Module):
            module.activation = ACT2FN[activation]
    small, _ = quantized(model)
    blocks = [block for block in small.modules() if isinstance(block, W8A8EncoderBlock)]
    around = all(linear.around for linear in small.modules() if isinstance(linear, W8A8Linear))
    assert blocks and all(block.has_kernels == (around and activation == "gelu") for block in blocks)
    result, calls = helpers.logits_of(small), []
    original = w8a8_encoder._by_torch
    monkeypatch.setattr(w8a8_encoder, "_by_torch", lambda *given: calls.append(1) or original(*given))
    monkeypatch.setattr(W8A8EncoderBlock, "has_kernels", False)
    assert torch.allclose(helpers.logits_of(small), result, atol=2e-3) and len(calls) == len(blocks)


@pytest.mark.skipif(kernels.reason_against() is not None, reason=f"no kernels: {kernels.reason_against()}")
def test_whatever_multiplies_the_integers_gives_the_same(model, monkeypatch):
    monkeypatch.delenv(kernels.KERNEL_VARIABLE, raising=False)
    small, _ = quantized(model)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    other, _ = quantized(model)
    assert {linear.kernel for linear in other.modules() if isinstance(linear, W8A8Linear)} == {"avx2"}
    assert all(block.has_kernels for block in other.modules() if isinstance(block, W8A8EncoderBlock))
    assert torch.allclose(helpers.logits_of(other), helpers.logits_of(small), atol=2e-3)


def test_a_sentence_alone_gives_what_it_gives_in_a_batch(model):
    small, _ = quantized(model)
    batch = helpers.example_batch()
    together = helpers.logits_of(small, batch)
    for row in range(len(together)):
        length = int(batch["attention_mask"][row].sum())
        alone = {
            name: values[row : row + 1, :length] for name, values in batch.items() if name in ("input_ids", "attention_mask")
        }
        assert torch.allclose(helpers.logits_of(small, alone)[0], together[row], atol=1e-4)


@pytest.mark.parametrize("half", [True, False])
def test_it_reloads_with_equal_logits_and_the_names_of_its_parent(model, tokenizer, tmp_path, half):
    small, description = quantized(model, embeddings="fp16" if half else "float32")
    save_checkpoint(
        tmp_path / "small", small, tokenizer, kind="w8a8", parent=None, stage={}, quantization=description, data_fingerprint=""
    )
    loaded = load_checkpoint(tmp_path / "small")
    assert torch.equal(helpers.logits_of(loaded.model), helpers.logits_of(small))
    added = set(loaded.model.state_dict()) - set(model.state_dict())
    assert added and all(name.endswith(".weight_scale") for name in added)
    with pytest.raises(ValueError, match="missing"):
        weights = tmp_path / "small" / "model.safetensors"
        from safetensors.torch import load_file, save_file

        state = load_file(weights)
        state.pop(sorted(added)[0])
        save_file(state, weights)
        w8a8.load(weights.parent, type(model), description)


def test_a_copy_and_a_move_take_the_joined_weights_along(model):
    small, _ = quantized(model)
    moved = copy.deepcopy(small).to("cpu").float()
    assert torch.equal(helpers.logits_of(moved), helpers.logits_of(small))
    with torch.no_grad():
        for module in moved.modules():
            if isinstance(module, W8A8Linear):
                module.weight_scale.mul_(0)
    moved = moved.to(torch.device("cpu"))
    assert not torch.equal(helpers.logits_of(moved), helpers.logits_of(small))


@pytest.mark.slow
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("pruned", [False, True], ids=["whole", "pruned"])
def test_compressed_tensors_reads_the_file(model, tokenizer, tmp_path, pruned, half):
    """With `pip install compressed-tensors==0.20.0`, as in test_w8a8_model.py: two draws of the same noise."""
    pytest.importorskip("compressed_tensors")
    dense = compact(model, helpers.uneven_masks(model)).eval() if pruned else model
    small, description = quantized(dense, embeddings="fp16" if half else "float32")
    save_checkpoint(tmp_path / "m", small, tokenizer, kind="w8a8", parent=None, stage={}, quantization=description)
    theirs, loading = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "m", dtype=torch.float32, trust_remote_code=True, output_loading_info=True
    )
    assert not any(loading.values())
    ours = helpers.logits_of(load_checkpoint(tmp_path / "m").model)
    noise = (ours - helpers.logits_of(dense)).norm()
    assert (helpers.logits_of(theirs) - ours).norm() < 2 * noise < 0.2 * ours.norm()
    for name, linear in linears_to_quantize(theirs):  # unpacked by the first forward pass
        packed = small.get_submodule(name)
        assert torch.allclose(linear.weight, packed.weight * packed.weight_scale)


def test_a_plain_reader_is_told_that_the_weights_are_integers(model):
    small, description = quantized(model)
    config = w8a8.quantization_config(small, description)
    heads = {name for name, module in small.named_modules() if isinstance(module, torch.nn.Linear)}
    assert config["quant_method"] == "compressed-tensors" and set(config["ignore"]) == heads != set()


# ------------------------------------------------------------------------------------------------------- the first token
@pytest.mark.parametrize("tokens", [24, 512])
def test_a_classifier_computes_the_first_token_of_its_last_block_and_whoever_sees_more_gets_all(model, monkeypatch, tokens):
    monkeypatch.setattr(w8a8_encoder, "TOKENS", tokens)
    small, _ = quantized(model)
    last, seen = encoder_blocks(small)[-1], []
    original = last.first_token
    monkeypatch.setitem(last.__dict__, "first_token", lambda *given: seen.append(1) or original(*given))
    batch = helpers.example_batch()
    logits = helpers.logits_of(small, batch)
    assert len(seen) == 1
    with torch.no_grad():
        whole = small(**batch, output_hidden_states=True)
        encoder = small.base_model(**batch).last_hidden_state
    assert len(seen) == 1  # not of these
    assert whole.hidden_states[-1].shape == encoder.shape == (*batch["input_ids"].shape, encoder.shape[-1])
    assert torch.allclose(whole.logits, logits, atol=1e-4) and torch.allclose(whole.hidden_states[-1], encoder, atol=1e-4)
    small.config.output_hidden_states = True
    assert torch.allclose(helpers.logits_of(small, batch), logits, atol=1e-4) and len(seen) == 1


def test_after_a_forward_pass_that_fails_the_encoder_alone_computes_all_tokens(model):
    small, _ = quantized(model)
    batch = helpers.example_batch()
    with pytest.raises(RuntimeError, match="in the head"), torch.no_grad():
        small.classifier.register_forward_hook(lambda *_: exec("raise RuntimeError('in the head')"))
        small(**batch)
    assert small.base_model(**batch).last_hidden_state.shape[:2] == batch["input_ids"].shape


def test_a_block_without_ffn_or_attention_is_computed_at_the_first_token_too(model):
    masks = helpers.uneven_masks(model)
    masks[-1].neurons[:] = False
    small, _ = quantized(compact(model, masks))
    batch = helpers.example_batch()
    with torch.no_grad():
        whole = small(**batch, output_hidden_states=True)
    assert torch.allclose(helpers.logits_of(small, batch), whole.logits, atol=1e-4)
    assert not isinstance(encoder_blocks(small)[-1], W8A8EncoderBlock)
