"""Sentences: what is read, what is refused and by which row, how they are split and batched."""

import hashlib
import itertools
import json
import os
import pathlib
import random
import tracemalloc

import helpers
import pandas
import pyarrow.parquet
import pytest
import torch

from compactmind.data import (
    BLANK,
    DESCRIPTION,
    SPLITS,
    EncodedSentences,
    Sentence,
    data_fingerprint,
    deduplicate,
    load_split,
    normalize,
    read_dataset_description,
    read_json_lines,
    read_labelled_sentences,
    split_by_hash,
    stable_share,
    write_dataset,
    write_splits,
)
from compactmind.errors import CompactMindError
from compactmind.files import sha256_of
from compactmind.phrases import hold_out_whole_sentences

ROWS = [Sentence("a good film", 1), Sentence('the "best", they say', 0), Sentence("naïve — and long", 1)]


def write(path, text: str):
    path.write_text(text, encoding="utf-8")
    return path


def refused(path) -> str:
    """Return the message with which a file is refused; it names the file."""
    with pytest.raises(CompactMindError) as caught:
        read_labelled_sentences(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


# -------------------------------------------------------------------------------------------------------------- reading
def test_every_format_gives_the_same_sentences(tmp_path):
    frame = pandas.DataFrame({"sentence": [row.text for row in ROWS], "label": [row.label for row in ROWS]})
    frame.to_parquet(tmp_path / "a.parquet")
    frame.to_csv(tmp_path / "a.csv", index=False)
    write(tmp_path / "a.tsv", "sentence\tlabel\n" + "".join(f"{row.text}\t{row.label}\n" for row in ROWS))
    write(tmp_path / "a.jsonl", "".join(json.dumps({"sentence": row.text, "label": row.label}) + "\n" for row in ROWS))
    for suffix in ("parquet", "csv", "tsv", "jsonl"):
        assert read_labelled_sentences(tmp_path / f"a.{suffix}") == ROWS


def test_more_columns_and_another_order_are_fine(tmp_path):
    path = write(tmp_path / "a.tsv", "idx\tlabel\tsentence\n0\t1\ta good film \n1\t0\ta bad one\n")
    assert read_labelled_sentences(path) == [Sentence("a good film", 1), Sentence("a bad one", 0)]
    path = write(tmp_path / "a.jsonl", '{"idx": 0, "label": "1", "sentence": " a good film"}')
    assert read_labelled_sentences(path) == [Sentence("a good film", 1)]


@pytest.mark.parametrize("column", ["sentence", "text", "content"])
def test_the_names_other_datasets_give_the_sentence_are_understood(tmp_path, column):
    path = write(tmp_path / "a.tsv", f"{column}\tlabel\na good film\t1\n")
    assert read_labelled_sentences(path) == [Sentence("a good film", 1)]


def test_quotes_in_a_tsv_are_ordinary_characters(tmp_path):
    path = write(tmp_path / "a.tsv", 'sentence\tlabel\n"an open quote\t1\nits "own" idea\t0\n" " film\t1\n')
    assert [row.text for row in read_labelled_sentences(path)] == ['"an open quote', 'its "own" idea', '" " film']


def test_words_that_look_like_missing_values_are_words(tmp_path):
    path = write(tmp_path / "a.tsv", "sentence\tlabel\nnull\t0\nNA\t0\nnone\t1\n")
    assert [row.text for row in read_labelled_sentences(path)] == ["null", "NA", "none"]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c"])
def test_a_unicode_line_break_inside_a_json_string_does_not_end_the_row(tmp_path, character):
    rows = [Sentence(f"one{character}two", 1), Sentence("three", 0)]
    text = "".join(json.dumps({"sentence": row.text, "label": row.label}, ensure_ascii=False) + "\n" for row in rows)
    assert read_labelled_sentences(write(tmp_path / "a.jsonl", text)) == rows


def test_json_lines_are_any_values_and_blank_lines_keep_their_place(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"a": 1}\n\n[2, "three"]\n \t\nnull\n')
    assert read_json_lines(path) == [{"a": 1}, BLANK, [2, "three"], BLANK, None, BLANK]
    assert read_json_lines(write(path, "\n \n\n")) == []
    assert read_json_lines(write(path, "")) == []


def test_json_lines_that_cannot_be_read_are_named_by_file_and_row(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"a": 1}\n\n{"a": \n')
    with pytest.raises(CompactMindError) as caught:
        read_json_lines(path)
    assert f"{path}, row 3: not valid JSON" in str(caught.value)
    path.write_bytes(b'{"a": "caf\xe9"}\n')
    for file in (path, tmp_path / "nowhere.jsonl"):
        with pytest.raises(CompactMindError, match="cannot be read.*python download_model.py") as caught:
            read_json_lines(file)
        assert str(file) in str(caught.value)


CONTENTS = {"tsv": "sentence\tlabel\ngood\t1\nbad\t0\n", "csv": "sentence,label\ngood,1\nbad,0\n"}
CONTENTS["jsonl"] = '{"sentence": "good", "label": 1}\n{"sentence": "bad", "label": 0}\n'


@pytest.mark.parametrize("suffix", CONTENTS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"], ids=ascii)
def test_the_byte_order_mark_and_the_line_ends_of_windows_are_no_text(tmp_path, suffix, encoding, line_end):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(CONTENTS[suffix].replace("\n", line_end).encode(encoding))
    assert read_labelled_sentences(path) == [Sentence("good", 1), Sentence("bad", 0)]


@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl"])
def test_a_row_of_a_megabyte_is_a_row(tmp_path, suffix):
    text = "a good film " * 100_000
    path = write(tmp_path / f"a.{suffix}", CONTENTS[suffix].replace("good", text, 1))
    assert [len(row.text) for row in read_labelled_sentences(path)] == [len(text) - 1, 3]


# -------------------------------------------------------------------------------------------------------------- refusing
@pytest.mark.parametrize("suffix", CONTENTS)
def test_another_encoding_is_named_in_one_line(tmp_path, suffix):
    (tmp_path / f"a.{suffix}").write_bytes(CONTENTS[suffix].encode("utf-16"))
    message = refused(tmp_path / f"a.{suffix}")
    assert "utf-8" in message and "\n" not in message


@pytest.mark.parametrize("suffix", ["tsv", "csv"])
def test_a_nul_character_does_not_end_a_sentence_silently(tmp_path, suffix):
    assert "NUL" in refused(write(tmp_path / f"a.{suffix}", CONTENTS[suffix].replace("good", "go\0od")))


@pytest.mark.parametrize("column", ["sentence", "label"])
@pytest.mark.parametrize("suffix", ["tsv", "csv", "parquet"])
def test_two_columns_of_one_name_are_refused(tmp_path, suffix, column):
    columns = ["sentence", "label", column]
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.table([["good"], [1], ["0"]], names=columns), path)
    else:
        write(path, ("sentence\tlabel\t" + column + "\ngood\t1\t0\n").replace("\t", "," if suffix == "csv" else "\t"))
    message = refused(path)
    assert column in message and "\n" not in message


def test_columns_nobody_reads_may_share_a_name(tmp_path):
    path = write(tmp_path / "a.tsv", "id\tid\tsentence\tlabel\n1\t2\tgood\t1\n")
    assert read_labelled_sentences(path) == [Sentence("good", 1)]


def test_a_parquet_file_without_the_columns_or_with_other_types_is_refused(tmp_path):
    for name, column, value in (("none", "words", "good"), ("bytes", "sentence", b"good"), ("ndarray", "sentence", ["a", "b"])):
        pandas.DataFrame({column: [value], "label": [1]}).to_parquet(tmp_path / f"{name}.parquet")
    assert "expected the columns sentence and label, found ['label', 'words']" in refused(tmp_path / "none.parquet")
    for name in ("bytes", "ndarray"):
        assert f"row 1: the sentence is of type {name}" in refused(tmp_path / f"{name}.parquet")


@pytest.mark.parametrize("row", ["[" * 100_000, '{"sentence": "x", "label": ' + "1" * 5000 + "}"], ids=["deep", "digits"])
def test_json_that_python_itself_gives_up_on_is_named_by_row(tmp_path, row):
    message = refused(write(tmp_path / "a.jsonl", f'{{"sentence": "good", "label": 1}}\n{row}\n'))
    assert "row 2: not valid JSON" in message and len(message) < 400


def test_half_a_surrogate_pair_is_named_by_row(tmp_path):
    row = '{"sentence": "a \\ud83d film", "label": 1}\n'
    assert "row 2" in refused(write(tmp_path / "a.jsonl", row.replace(" \\ud83d", "") + row))


@pytest.mark.parametrize("label", ["2", "-1", "positive", "", "1.5", "nan"])
def test_other_labels_are_refused_by_row(tmp_path, label):
    path = write(tmp_path / "a.tsv", f"sentence\tlabel\ngood\t1\nbad film\t{label}\nodd\t7\n")
    message = refused(path)
    assert "row 2" in message and repr(label) in message and "0 (negative) or 1 (positive)" in message


@pytest.mark.parametrize("label", ["2", "null", "true", '"x"', "[1]", "NaN"])
def test_other_labels_in_jsonl_are_refused_by_row(tmp_path, label):
    path = write(tmp_path / "a.jsonl", f'{{"sentence": "good", "label": 1}}\n{{"sentence": "bad", "label": {label}}}\n')
    assert "row 2" in refused(path)


@pytest.mark.parametrize("row", ["only a sentence", "good\t1\t1", "\t1", "   \t1"])
def test_a_malformed_tsv_row_is_named(tmp_path, row):
    path = write(tmp_path / "a.tsv", f"sentence\tlabel\ngood\t1\nbad\t0\n{row}\nfine\t1\n")
    message = refused(path)
    assert "row 3" in message or "line 4" in message


@pytest.mark.parametrize(
    "row",
    [
        "{not json",
        '{"sentence": "x"}',
        '{"label": 1}',
        '["x", 1]',
        "3",
        '{"sentence": "", "label": 1}',
        '{"sentence": 5, "label": 1}',
    ],
)
def test_a_malformed_json_row_is_named(tmp_path, row):
    good = '{"sentence": "good", "label": 1}\n'
    assert "row 3" in refused(write(tmp_path / "a.jsonl", good + good + row + "\n" + good))


@pytest.mark.parametrize("row", ["{not json", '{"sentence": "x", "label": 2}'])
def test_row_numbers_count_blank_lines_of_jsonl_as_an_editor_does(tmp_path, row):
    good = '{"sentence": "good", "label": 1}\n'
    assert "row 4" in refused(write(tmp_path / "a.jsonl", good + "\n" + good + row + "\n"))


def test_a_missing_value_in_a_parquet_file_is_named_by_its_own_row(tmp_path):
    pandas.DataFrame({"sentence": ["good", "bad", "odd"], "label": [1, 0, None]}).to_parquet(tmp_path / "label.parquet")
    assert "row 3" in refused(tmp_path / "label.parquet")
    pandas.DataFrame({"sentence": ["good", None, "odd"], "label": [1, 0, 1]}).to_parquet(tmp_path / "text.parquet")
    assert "row 2" in refused(tmp_path / "text.parquet")


@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl", "parquet"])
def test_an_empty_file_is_refused(tmp_path, suffix):
    refused(write(tmp_path / f"a.{suffix}", ""))


@pytest.mark.parametrize(("suffix", "text"), [("tsv", "sentence\tlabel\n"), ("csv", "sentence,label\n"), ("jsonl", "\n\n")])
def test_a_file_without_rows_is_refused(tmp_path, suffix, text):
    assert "at least one row" in refused(write(tmp_path / f"a.{suffix}", text))


def test_a_file_without_the_columns_is_refused(tmp_path):
    message = refused(write(tmp_path / "a.tsv", "words\tlabel\ngood\t1\n"))
    assert "sentence and label" in message and "words" in message


def test_a_file_that_is_not_there_or_not_text_is_refused(tmp_path):
    assert "python download_model.py" in refused(tmp_path / "train.jsonl")
    (tmp_path / "a.tsv").write_bytes(b"sentence\tlabel\ncaf\xe9\t1\n")
    refused(tmp_path / "a.tsv")
    (tmp_path / "a.jsonl").write_bytes(b'{"sentence": "caf\xe9", "label": 1}\n')
    refused(tmp_path / "a.jsonl")
    assert ".tsv, .jsonl, .parquet, .csv" in refused(write(tmp_path / "a.xlsx", "x"))


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


# --------------------------------------------------------------------------------------------------------- on the disk
@pytest.fixture
def dataset(tmp_path):
    splits = split_by_hash(helpers.make_sentences(100), {"test": 0.3, "validation": 0.3, "train": 0.4})
    write_dataset(tmp_path, splits, {"source": "made up"})
    return tmp_path, splits


def test_a_dataset_comes_back_as_it_was_written(dataset):
    folder, splits = dataset
    description = read_dataset_description(folder)
    assert description["source"] == {"source": "made up"}
    for name in SPLITS:
        assert load_split(folder, name) == splits[name]
        assert description["splits"][name]["rows"] == len(splits[name])
        assert description["splits"][name]["positive"] == len([s for s in splits[name] if s.label == 1])
    with pytest.raises(ValueError, match="'dev'.*train, validation, test"):
        load_split(folder, "dev")


def test_splits_hold_rows_of_any_columns_and_the_description_counts_them(tmp_path):
    splits = {"test": [], "validation": [{"text": "a\u2028b"}], "train": [{"text": "naïve"}, {"text": "\n", "id": 7}]}
    counts = {name: {"words": 10 * len(rows)} for name, rows in splits.items()}
    description = write_splits(tmp_path, splits, {"source": "made up"}, counts)
    assert read_dataset_description(tmp_path) == description
    assert description["source"] == {"source": "made up"}
    for name, rows in splits.items():
        path = tmp_path / f"{name}.jsonl"
        assert [row for row in read_json_lines(path) if row is not BLANK] == rows
        assert description["splits"][name] == {"rows": len(rows), "words": 10 * len(rows), "sha256": sha256_of(path)}


def test_splits_that_could_not_be_written_leave_the_old_ones_whole(dataset):
    folder, splits = dataset
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(TypeError):
        write_splits(folder, {"train": [{"a": 1}], "validation": [{"a": object()}], "test": []}, "", dict.fromkeys(SPLITS, {}))
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


class Killed(BaseException):
    """What no `except Exception` holds back, as little as it would a signal."""


@pytest.mark.parametrize("unlinks", [True, False], ids=["raised", "killed"])  # a killed process tidies nothing up
@pytest.mark.parametrize("first", [True, False], ids=["first", "second"])
def test_a_run_stopped_at_any_step_leaves_one_dataset_or_a_gap_that_the_next_run_mends(tmp_path, monkeypatch, first, unlinks):
    old = split_by_hash(helpers.make_sentences(60, seed=1), {"test": 0.3, "validation": 0.3, "train": 0.4})
    new = split_by_hash(helpers.make_sentences(60, seed=2), {"test": 0.3, "validation": 0.3, "train": 0.4})
    outcomes = []
    for step in itertools.count():
        folder = tmp_path / str(step)
        if not first:
            write_dataset(folder, old, "old")
        done = []

        def stop_after(source, target, replace=os.replace, done=done, step=step):
            if len(done) == step:
                raise Killed
            replace(source, target)
            done.append(target)

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", stop_after)
            if not unlinks:
                patched.setattr(pathlib.Path, "unlink", lambda *_, **__: None)
            try:
                write_dataset(folder, new, "new")
                stopped = False
            except Killed:
                stopped = True
        try:
            source = read_dataset_description(folder)["source"]
            assert {name: load_split(folder, name) for name in SPLITS} == {"old": old, "new": new}[source]
            outcomes.append(source)
        except CompactMindError as error:
            assert "run `python download_model.py`" in str(error)
            outcomes.append("gap")
        write_dataset(folder, new, "new")
        description = read_dataset_description(folder)
        assert description["source"] == "new" and "replaces" not in description
        assert {name: load_split(folder, name) for name in SPLITS} == new
        left = {path.name for path in folder.iterdir() if path.is_file()} - {DESCRIPTION, *(f"{name}.jsonl" for name in SPLITS)}
        assert not left or (not unlinks and all(".tmp-" in name for name in left))
        if not stopped:
            break
    # three splits beside the old ones, the description, three splits into their place, the description
    assert outcomes == (["gap"] if first else ["old"]) * 4 + ["gap"] * 3 + ["new"] * 2


def test_a_dataset_that_is_half_replaced_says_so(dataset):
    folder, splits = dataset
    description = helpers.read_json(folder / DESCRIPTION)
    description["splits"]["train"]["sha256"] = "0" * 64
    (folder / DESCRIPTION).write_text(json.dumps(description | {"replaces": []}))
    with pytest.raises(
        CompactMindError, match="train.jsonl is being replaced, or that was interrupted: run `python download_model.py`"
    ):
        read_dataset_description(folder)


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("described", [True, False])
def test_a_split_of_somebodys_own_is_never_overwritten(tmp_path, name, described):
    splits = split_by_hash(helpers.make_sentences(60), {"test": 0.3, "validation": 0.3, "train": 0.4})
    if described:
        write_dataset(tmp_path, splits, "made up")
    path = write(tmp_path / f"{name}.jsonl", '{"sentence": "mine", "label": 1}\n')
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(
        CompactMindError, match=f"{name}.jsonl was not written by download_model.py, or was changed since.*move it away"
    ):
        write_dataset(tmp_path, splits, "made up")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    path.unlink()
    write_dataset(tmp_path, splits, "made up")
    assert load_split(tmp_path, name) == splits[name]


@pytest.mark.parametrize("name", SPLITS)
def test_a_changed_or_missing_split_is_noticed(dataset, name):
    folder, _ = dataset
    path = folder / f"{name}.jsonl"
    content = path.read_text(encoding="utf-8")
    path.write_text(content.replace('"label": 1', '"label": 0', 1), encoding="utf-8")
    with pytest.raises(CompactMindError, match=f"{name}.jsonl.*python download_model.py"):
        read_dataset_description(folder)
    path.write_text(content, encoding="utf-8")
    assert read_dataset_description(folder)["splits"][name]["rows"] > 0
    path.unlink()
    with pytest.raises(CompactMindError, match=f"{name}.jsonl.*python download_model.py"):
        data_fingerprint(folder)


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"splits": {"train": {}}}', '{"splits": null}'])
def test_a_damaged_description_is_noticed(dataset, content):
    folder, _ = dataset
    (folder / DESCRIPTION).write_text(content)
    with pytest.raises(CompactMindError, match="dataset.json is damaged.*python download_model.py"):
        read_dataset_description(folder)
    (folder / DESCRIPTION).unlink()
    with pytest.raises(CompactMindError, match="dataset.json not found.*python download_model.py"):
        read_dataset_description(folder)


def test_the_fingerprint_follows_the_sentences_and_nothing_else(dataset):
    folder, splits = dataset
    first = data_fingerprint(folder)
    write_dataset(folder, splits, {"source": "elsewhere"})
    assert data_fingerprint(folder) == first
    write_dataset(folder, {**splits, "train": splits["train"][:-1]}, {"source": "elsewhere"})
    assert data_fingerprint(folder) != first


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
