"""Files of sentences: what is read of every format."""

import json

import pandas
import pytest
from sentence_files import CONTENTS, ROWS, write

from compactmind.data import Sentence, all_texts, read_labelled_sentences
from compactmind.errors import CompactMindError
from compactmind.rows import BLANK, read_json_lines


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


@pytest.mark.parametrize("suffix", ["tsv", "csv"])
def test_a_whole_number_may_be_written_with_a_point(tmp_path, suffix):
    path = write(tmp_path / f"a.{suffix}", CONTENTS[suffix].replace("0\n", "0.0\n").replace("1\n", "1.0\n"))
    assert read_labelled_sentences(path) == [Sentence("good", 1), Sentence("bad", 0)]


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


@pytest.mark.parametrize("row", [1, 2])
@pytest.mark.parametrize(("suffix", "separator"), [("csv", ","), ("tsv", "\t")])
def test_what_a_row_has_too_much_is_not_left_out(tmp_path, suffix, separator, row):
    lines = [separator.join(["sentence", "label"]), separator.join(["good", "1"]), separator.join(["bad", "0"])]
    lines[row] = separator.join(["good", " but long", "1"])
    write(tmp_path / f"a.{suffix}", "\n".join(lines) + "\n")
    with pytest.raises(CompactMindError, match="row 1 has more columns than the 2 of the header" if row == 1 else "Expected 2 fields"):
        read_labelled_sentences(tmp_path / f"a.{suffix}")


def test_all_texts_are_those_of_pairs_too():
    assert all_texts([Sentence("a", 0), Sentence("b", 1, "c")]) == ["a", "b", "c"]


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
