"""A cut vocabulary: what is kept reads as before, what is gone falls into pieces that are kept, and the model stays the same function."""

import copy

import helpers
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, BertTokenizerFast, PreTrainedTokenizerFast

from compactmind.errors import CompactMindError
from compactmind.limits import vocabulary_of
from compactmind.methods.vocabulary import cut_table, same_tokenizer, smaller_tokenizer, tokens_to_keep

TEXTS = [sentence.text for sentence in helpers.make_sentences(200)]
OFTEN, SELDOM = TEXTS[:60], "a brilliantly boring film"


def wordpiece(folder):
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "brill", "##iant", "##ly", "filmed"]
    vocabulary += [*letters, *(f"##{letter}" for letter in letters), *helpers.POSITIVE, *helpers.NEGATIVE, *helpers.NEUTRAL]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(vocabulary)) + "\n", encoding="utf-8")
    return BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=64)


def unigram(folder):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(
        TEXTS, trainers.UnigramTrainer(vocab_size=150, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def bpe(folder):
    return helpers.make_byte_bpe(folder, 600)


@pytest.fixture(scope="module", params=[wordpiece, unigram, bpe], ids=["wordpiece", "unigram", "bpe"])
def tokenizer(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp("vocabulary"))


def tokens(tokenizer, text):
    return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])


def test_text_of_what_is_kept_reads_as_before_and_nothing_becomes_unknown(tokenizer, tmp_path):
    kept = tokens_to_keep(tokenizer, OFTEN, 1.0)
    assert kept == sorted(set(kept)) and len(kept) < len(tokenizer)
    smaller = smaller_tokenizer(tokenizer, kept)
    assert len(smaller) == len(kept) and smaller.get_vocab().keys() < tokenizer.get_vocab().keys()
    for text in OFTEN:
        assert tokens(smaller, text) == tokens(tokenizer, text)
    fewest = smaller_tokenizer(tokenizer, tokens_to_keep(tokenizer, OFTEN, 0.3))
    assert len(fewest) < len(smaller)
    for text in (*TEXTS, SELDOM):
        result = fewest(text)["input_ids"]
        assert tokenizer.unk_token_id in tokenizer(text)["input_ids"] or fewest.unk_token_id not in result
        read = fewest.decode(result, skip_special_tokens=True)
        assert read.replace(" ", "").replace("▁", "") == text.replace(" ", "")
    assert max(map(len, fewest(TEXTS)["input_ids"])) > max(map(len, tokenizer(TEXTS)["input_ids"]))
    for name in ("pad_token", "unk_token"):
        assert getattr(fewest, name) == getattr(tokenizer, name) == fewest.convert_ids_to_tokens(getattr(fewest, f"{name}_id"))
    assert fewest.pad_token_id == tokenizer.pad_token_id
    fewest.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert same_tokenizer(again, fewest) and not same_tokenizer(again, tokenizer)
    assert len(tokenizer) > len(smaller)  # what it was made of stays as it was


def test_the_fewest_tokens_that_cover_the_text_are_kept(tmp_path):
    tokenizer = wordpiece(tmp_path)
    texts = ["film film film film film film good good good bad"]
    always = set(tokens_to_keep(tokenizer, ["film"], 1.0)) - set(tokenizer("film", add_special_tokens=False)["input_ids"])
    for coverage, expected in ((0.5, {"film"}), (0.6, {"film"}), (0.61, {"film", "good"}), (0.91, {"film", "good", "bad"})):
        kept = set(tokens_to_keep(tokenizer, texts, coverage)) - always
        assert set(tokenizer.convert_ids_to_tokens(sorted(kept))) == expected
    names = set(tokenizer.convert_ids_to_tokens(sorted(always)))
    assert {"a", "##a", "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"} <= names and not {"brill", "[unused0]"} & names
    assert tokens(smaller_tokenizer(tokenizer, sorted(always)), "bad") == ["[CLS]", "b", "##a", "##d", "[SEP]"]


@pytest.mark.parametrize("family", ["distilbert", "roberta", "electra"])
def test_the_model_is_the_same_function_of_the_same_tokens(family, tmp_path):
    tokenizer = helpers.make_byte_bpe(tmp_path) if family == "roberta" else wordpiece(tmp_path)
    changes = {"vocab_size": len(tokenizer) + 3, "eos_token_id": tokenizer.sep_token_id}
    if family == "roberta":
        changes |= {"pad_token_id": 1, "bos_token_id": 0}
    model = helpers.make_encoder(family, **changes)
    kept = tokens_to_keep(tokenizer, OFTEN, 1.0)
    small, smaller = copy.deepcopy(model), smaller_tokenizer(tokenizer, kept)
    cut_table(small, kept)
    assert vocabulary_of(small) == small.config.vocab_size == len(kept) < vocabulary_of(model)
    assert small.config.eos_token_id == smaller.sep_token_id
    assert small.config.pad_token_id == smaller.pad_token_id and small.get_input_embeddings().padding_idx == smaller.pad_token_id

    def answers(model, tokenizer):
        return helpers.logits_of(model, tokenizer(OFTEN[:8], padding=True, return_tensors="pt", return_token_type_ids=False))

    assert torch.equal(answers(small, smaller), answers(model, tokenizer))


def test_what_lies_before_the_padding_stays_so_that_positions_do():
    words = Tokenizer(models.WordPiece({"not used": 0, "[PAD]": 1, "[UNK]": 2, "a": 3, "ab": 4}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]")
    assert tokens_to_keep(tokenizer, ["a"], 1.0) == [0, 1, 2, 3]
    assert smaller_tokenizer(tokenizer, [0, 1, 2, 3]).pad_token_id == 1


def test_what_cannot_be_cut_is_refused():
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(CompactMindError, match="kind WordLevel cannot be cut: WordPiece, Unigram, BPE can"):
        tokens_to_keep(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]"), ["a"], 0.9)
    for coverage in (0, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"coverage must be in \(0, 1\]"):
            tokens_to_keep(None, [], coverage)
