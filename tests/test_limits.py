"""What a model can be given: as many tokens as it runs with and not one more, ids it knows, rows it can tell from padding."""

from pathlib import Path

import helpers
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from compactmind.data import EncodedSentences, Sentence
from compactmind.errors import CompactMindError
from compactmind.forward import predict_logits
from compactmind.guards import check_tokenizer
from compactmind.limits import positions_of, require_known_ids, require_positions, vocabulary_of
from compactmind.methods.quantization.gptq_model import GPTQRecipe, quantize_gptq
from compactmind.methods.quantization.packed_model import quantize_model
from compactmind.methods.quantization.w8a8_model import W8A8Recipe, calibrate_llama, quantize_llama

WIDTHS = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32, "vocab_size": 60}


def gpt2(**changes):
    settings = {"vocab_size": len(helpers.VOCABULARY), "n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return GPT2ForSequenceClassification(GPT2Config(**{**settings, "bos_token_id": 1, "eos_token_id": 1, **changes}))


MODELS = {
    "bert": lambda: helpers.make_bert(max_position_embeddings=24),
    "distilbert": lambda: helpers.make_distilbert(max_position_embeddings=24),
    "roberta, two places for padding": lambda: RobertaForSequenceClassification(
        RobertaConfig(**WIDTHS, max_position_embeddings=26, pad_token_id=1)
    ),
    "gpt2": gpt2,
    "opt, two places in front": lambda: OPTForCausalLM(
        OPTConfig(vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, ffn_dim=32,
                  word_embed_proj_dim=32, max_position_embeddings=24)
    ),
    "nf4": lambda: packed(helpers.make_distilbert(max_position_embeddings=24)),
}  # fmt: skip


def packed(model):
    quantize_model(model, "nf4")
    return model


@pytest.mark.parametrize("name", MODELS)
def test_a_model_runs_with_as_many_tokens_as_it_has_positions_for_and_not_with_one_more(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    assert positions_of(model) == 24
    ids = torch.randint(5, 50, (1, 25))
    with torch.inference_mode():
        model(input_ids=ids[:, :24], attention_mask=torch.ones(1, 24, dtype=torch.long))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=ids, attention_mask=torch.ones(1, 25, dtype=torch.long))
    require_positions(model, 24, "cost_length")
    with pytest.raises(CompactMindError, match="positions for 24 tokens, not for 25: choose a smaller --cost_length"):
        require_positions(model, 25, "cost_length")


def test_rotary_positions_have_no_end():
    model = helpers.make_llama()
    assert positions_of(model) is None
    require_positions(model, 10**6, "seq_len")


@pytest.mark.parametrize("embeddings", ["as_released", "int8"])
def test_the_vocabulary_is_that_of_the_table(embeddings):
    model = helpers.make_llama(vocab_size=80)
    quantize_llama(model, calibrate_llama(model, helpers.example_windows() % 80), W8A8Recipe(embeddings=embeddings))
    assert vocabulary_of(model) == 80
    require_known_ids(model, torch.tensor([[0, 79]]))
    with pytest.raises(CompactMindError, match="gives the token 80 and the model knows 80 of them, 0 to 79"):
        require_known_ids(model, torch.tensor([[0, 80]]))


def test_the_vocabulary_of_a_packed_table_is_that_of_its_rows():
    model = helpers.make_llama(vocab_size=80)
    quantize_gptq(model, helpers.example_windows() % 80, GPTQRecipe(embeddings="int4"))
    assert vocabulary_of(model) == 80
    tokenizer = helpers.make_byte_tokenizer()
    with pytest.raises(CompactMindError, match="token ids up to 256, the model knows 0 to 79"):
        check_tokenizer(model, tokenizer, Path("models/x"))


def test_a_tokenizer_of_another_model_is_refused_by_name(tokenizer, sentences):
    small = helpers.make_distilbert(vocab_size=20)
    with pytest.raises(CompactMindError, match="the model knows 20 of them"):
        predict_logits(small, EncodedSentences(tokenizer, sentences, 64), 8)


def test_a_sentence_without_tokens_is_refused(distilbert, tokenizer):
    encoded = EncodedSentences(tokenizer, [Sentence("good", 1), Sentence("bad", 0)], 64)
    encoded.input_ids = [encoded.input_ids[0], []]
    with pytest.raises(CompactMindError, match="sentence 2 of 2 has no tokens"):
        predict_logits(distilbert, encoded, 8)


# -------------------------------------------------------------------------------------------------------------- padding
def llama_classifier(**changes):
    return LlamaForSequenceClassification(LlamaConfig(**helpers.llama_settings(vocab_size=len(helpers.VOCABULARY), **changes)))


@pytest.mark.parametrize("padding", ["none", "the tokenizer's", "the model's", "both, another one", "both, the same"])
@pytest.mark.parametrize("make", [gpt2, llama_classifier], ids=["gpt2", "llama"])
def test_a_decoder_finds_the_end_of_every_row_whatever_is_said_of_padding(tmp_path, sentences, make, padding):
    tokenizer = helpers.make_tokenizer(tmp_path)
    if padding in ("none", "the model's"):
        tokenizer.pad_token = None
    torch.manual_seed(0)
    known = {"the model's": 0, "both, another one": 1, "both, the same": 0}.get(padding)
    model = helpers.randomize(make(pad_token_id=known), scale=0.3)
    encoded = EncodedSentences(tokenizer, sentences[:12], 64)
    result = predict_logits(model, encoded, 8)
    for row, ids in enumerate(encoded.input_ids):
        alone = model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long)).logits[0]
        torch.testing.assert_close(result[row], alone, atol=1e-4, rtol=1e-4)
    assert result.std(dim=0).min() > 0.01


def test_an_encoder_needs_no_padding_token(tmp_path, distilbert, encoded, sentences):
    tokenizer = helpers.make_tokenizer(tmp_path)
    tokenizer.pad_token = None
    without = EncodedSentences(tokenizer, sentences, 64)
    torch.testing.assert_close(predict_logits(distilbert, without, 16), predict_logits(distilbert, encoded, 16))
