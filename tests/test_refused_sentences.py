"""Files of sentences: what is refused, and by which row."""

import pandas
import pyarrow.parquet
import pytest
from sentence_files import CONTENTS, refused, write

from compactmind.data import Sentence, read_labelled_sentences


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
