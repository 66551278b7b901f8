"""Sentences: how they are split and held out, and batched."""

import hashlib
import random
import tracemalloc

import helpers
import pytest
import torch

from compactmind.data import EncodedSentences, Sentence, deduplicate, far_first, normalize, split_by_hash, spread, stable_share
from compactmind.phrases import hold_out_whole_sentences


# ------------------------------------------------------------------------------------------------------------- splitting
def test_normalize_keeps_letters_and_digits_only():
    assert normalize("  It's A  GOOD--film , 10/10 !") == "it s a good film 10 10"
    assert normalize("ﬁne Ünder_score") == "fine ünder score"
    assert normalize("... !") == ""


def test_deduplicate_keeps_the_first_and_none_of_the_others():
    kept = deduplicate([Sentence("Good film.", 1), Sentence("good  film", 0), Sentence("bad", 0), Sentence("Bad!", 1)])
    assert kept == [Sentence("Good film.", 1), Sentence("bad", 0)]
    assert deduplicate(kept, against=[Sentence("BAD ...", 1)]) == [Sentence("Good film.", 1)]


def test_the_share_of_a_sentence_never_changes():
    assert stable_share("A good film!") == stable_share("a good film")
    assert stable_share("a good film") == int(hashlib.sha256(b"a good film").hexdigest()[:16], 16) / 16**16
    assert stable_share("a good film") == pytest.approx(0.32646143974748104, abs=1e-15)  # the same in every release


def test_split_by_hash_is_stable_and_near_its_shares():
    sentences = helpers.make_sentences(2000)
    shares = {"test": 0.2, "validation": 0.1, "train": 0.7}
    parts = split_by_hash(sentences, shares)
    assert list(parts) == list(shares)
    assert sorted(s.text for part in parts.values() for s in part) == sorted(s.text for s in sentences)
    for name, share in shares.items():
        assert len(parts[name]) == pytest.approx(2000 * share, abs=4 * (2000 * share * (1 - share)) ** 0.5)  # 4 sigma
    for name, part in split_by_hash(sentences[::-2], shares).items():
        assert set(part) <= set(parts[name])  # another order and half the rows: nobody moves
    low = [stable_share(s.text) for s in parts["test"]]
    assert max(low) < 0.2 <= min(stable_share(s.text) for s in parts["validation"])


def fragments(text: str) -> set[str]:
    """Return every run of words of a normalized text, itself included: what a row must not share with one held out."""
    words = text.split()
    return {" ".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)} | {text}


def held_out_by_definition(sentences, share: float) -> dict[str, list[Sentence]]:
    """`hold_out_whole_sentences` from the sets of all fragments, which take memory with the square of the lengths."""
    texts = {normalize(sentence.text) for sentence in sentences}
    whole = {text for text in texts if not any(text != other and text in fragments(other) for other in texts)}
    held_out = {text for text in whole if stable_share(text) < share}
    trainable = set().union(*map(fragments, whole - held_out))
    return {
        "train": [sentence for sentence in sentences if normalize(sentence.text) in trainable],
        "validation": [sentence for sentence in sentences if normalize(sentence.text) in held_out],
    }


@pytest.mark.parametrize("seed", range(60))
def test_whole_sentences_are_held_out_as_defined(seed):
    source = random.Random(seed)
    words = ["a", "b", "ab", "ba", "a b", "abc", "\u00e9", "1", "_", "!"][: source.randint(1, 10)]  # words that begin others
    texts = [" ".join(source.choices(words, k=source.randint(1, 7))) for _ in range(source.randint(0, 40))]
    sentences = [Sentence(text, row % 2) for row, text in enumerate(texts)]
    share = source.choice([0.0, 0.3, 0.5, 1.0])
    parts = hold_out_whole_sentences(sentences, share)
    assert parts == held_out_by_definition(sentences, share)


def test_holding_out_long_texts_takes_memory_with_their_length_not_its_square():
    source = random.Random(0)
    sentences = [Sentence(" ".join(f"w{source.randrange(5000)}" for _ in range(230)), row % 2) for row in range(40)]
    beginnings = [Sentence(" ".join(s.text.split()[:30]), s.label) for s in sentences]
    tracemalloc.start()
    parts = hold_out_whole_sentences(sentences + beginnings, 0.3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6  # 55 kB of text; all of its runs of words take 1 GB
    held_out = [s for s in sentences if stable_share(s.text) < 0.3]
    assert 0 < len(held_out) < 40 and parts["validation"] == held_out
    assert parts["train"] == [s for s in sentences if s not in held_out] + [
        short for short, s in zip(beginnings, sentences, strict=True) if s not in held_out
    ]


# -------------------------------------------------------------------------------------------------------------- batches
def test_collate_pads_to_the_longest_row_of_the_batch(tokenizer):
    encoded = EncodedSentences(
        tokenizer, [Sentence("good", 1), Sentence("a bad film", 0), Sentence("the dull plot is long", 0)], 6
    )
    ids = dict(zip(helpers.VOCABULARY, range(len(helpers.VOCABULARY)), strict=True))
    cls, sep = ids["[CLS]"], ids["[SEP]"]
    batch = encoded.collate([2, 0])
    assert batch["input_ids"].tolist() == [
        [cls, ids["the"], ids["dull"], ids["plot"], ids["is"], sep],  # cut to max_length, the end marker kept
        [cls, ids["good"], sep, 0, 0, 0],
    ]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [0, 1]
    assert batch["rows"].tolist() == [2, 0]
    assert encoded.collate([0])["input_ids"].shape == (1, 3)


def test_what_is_cut_is_counted_and_said(tokenizer):
    lengths = [3] * 10 + [5] * 180 + [9] * 8 + [12, 30]  # with both markers
    sentences = [Sentence(" ".join(["good"] * (length - 2)), 1) for length in lengths]
    encoded = EncodedSentences(tokenizer, sentences, 8)
    assert encoded.cut == 10
    assert encoded.describe_cut() == "10 of 200 sentences (5.0%) are cut at 8 tokens; at 9 it would be 1%"
    assert max(map(len, encoded.input_ids)) == 8 and encoded.input_ids[-1][-1] == tokenizer.sep_token_id
    at_the_limit = EncodedSentences(tokenizer, sentences, 30)
    assert at_the_limit.cut == 0
    assert at_the_limit.describe_cut() == "none of 200 sentences is cut at 30 tokens"
    few = EncodedSentences(tokenizer, sentences, 12)
    assert few.cut == 1 and few.describe_cut() == "1 of 200 sentences (0.5%) is cut at 12 tokens"


def rows_of(batches) -> list[int]:
    return [row for batch in batches for row in batch["rows"].tolist()]


def test_evaluation_batches_hold_every_row_once_from_short_to_long(encoded):
    batches = list(encoded.evaluation_batches(7))
    assert sorted(rows_of(batches)) == list(range(len(encoded)))
    lengths = [length for batch in batches for length in batch["attention_mask"].sum(1).tolist()]
    assert lengths == sorted(lengths)
    assert [len(batch["rows"]) for batch in batches] == [7] * 8 + [4]
    for batch in batches:
        assert batch["labels"].tolist() == encoded.labels[batch["rows"]].tolist()


def test_training_batches_hold_every_row_once_in_an_order_the_seed_decides(encoded):
    first, same, other = (rows_of(encoded.training_batches(8, seed)) for seed in (1, 1, 2))
    assert sorted(first) == list(range(len(encoded)))
    assert first == same
    assert first != other


def test_training_batches_do_not_depend_on_the_global_random_state(encoded):
    torch.manual_seed(0)
    first = rows_of(encoded.training_batches(8, seed=1))
    torch.manual_seed(1)
    assert rows_of(encoded.training_batches(8, seed=1)) == first


def test_training_batches_waste_less_than_half_of_the_padding_of_a_plain_order(tokenizer):
    encoded = EncodedSentences(tokenizer, helpers.make_sentences(400), 64)

    def padding(batches) -> int:
        return sum(int((batch["attention_mask"] == 0).sum()) for batch in batches)

    plain = padding(encoded.collate(range(start, start + 8)) for start in range(0, 400, 8))
    assert 0 < padding(encoded.training_batches(8, seed=1)) < plain / 2


def test_some_of_many_are_spread_evenly():
    assert spread(10, 2) == [2, 7] and spread(3, 5) == [0, 1, 2] and spread(6, 6) == list(range(6))
    assert spread(4, 0) == spread(0, 3) == []
    for of, count in ((1000, 7), (21, 20), (512, 16)):
        places = spread(of, count)
        gaps = {after - before for before, after in zip(places, places[1:], strict=False)}
        assert len(places) == count and places[0] >= 0 and places[-1] < of and max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("of", [0, 1, 2, 3, 5, 16, 28, 100, 257])
def test_far_first_has_each_once_and_every_beginning_of_it_is_spread(of):
    order = far_first(of)
    assert sorted(order) == list(range(of))
    for count in range(2, of):
        places = [0, *sorted(order[:count]), of]
        assert max(after - before for before, after in zip(places, places[1:], strict=False)) <= 4 * of / count
    assert far_first(8) == [0, 4, 2, 6, 1, 5, 3, 7]
