"""Running text: raw lines as the hub has them, parts that vouch for themselves, windows of tokens without overlap."""

import json

import helpers
import pandas
import pytest
import torch

from compactmind.data import DESCRIPTION, SPLITS, data_fingerprint, read_dataset_description
from compactmind.errors import CompactMindError
from compactmind.search.inputs import windows_of_folder
from compactmind.sources.text import split_wikitext, wikitext_files
from compactmind.text import (
    JOIN,
    WINDOW_CHOICES,
    calibration_of,
    calibration_windows,
    load_documents,
    read_documents,
    token_windows,
    write_text,
)

WIKITEXT = " \n = A Title = \n \n First line , with a @-@ sign . \n Second line . \n\n \t\n = = Another = = \n"
DOCUMENTS = [
    "",
    " = A Title = \n",
    "",
    " First line , with a @-@ sign . \n",
    " Second line . \n",
    "",
    "",
    " = = Another = = \n",
]
LINE_BREAKS = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"]


def write(path, text: str):
    path.write_text(text, encoding="utf-8")
    return path


def refused(path) -> str:
    """Return the message with which a file is refused; it names the file."""
    with pytest.raises(CompactMindError) as caught:
        read_documents(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


# -------------------------------------------------------------------------------------------------------------- reading
@pytest.mark.parametrize("suffix", ["raw", "txt", "tokens"])
def test_raw_lines_become_the_rows_of_the_hub(tmp_path, suffix):
    path = write(tmp_path / f"wiki.test.{suffix}", WIKITEXT)
    assert read_documents(path) == DOCUMENTS
    with open(path, encoding="utf-8") as lines:
        assert read_documents(path) == [line if line.strip() else "" for line in lines]


def test_the_newline_that_ends_the_file_begins_no_row(tmp_path):
    path = tmp_path / "a.raw"
    assert read_documents(write(path, "one\ntwo\n")) == ["one\n", "two\n"]
    assert read_documents(write(path, "one\ntwo")) == ["one\n", "two\n"]
    assert read_documents(write(path, "one\ntwo\n\n")) == ["one\n", "two\n", ""]


def test_the_line_ends_of_windows_are_line_ends(tmp_path):
    (tmp_path / "a.raw").write_bytes(b"one\r\n\r\ntwo\r\n")
    assert read_documents(tmp_path / "a.raw") == ["one\n", "", "two\n"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.raw").write_bytes("one\ntwo\n".encode("utf-8-sig"))
    (tmp_path / "a.jsonl").write_bytes('{"text": "one"}\n'.encode("utf-8-sig"))
    assert read_documents(tmp_path / "a.raw") == ["one\n", "two\n"]
    assert read_documents(tmp_path / "a.jsonl") == ["one"]


@pytest.mark.parametrize("character", LINE_BREAKS, ids=ascii)
def test_a_unicode_line_break_does_not_end_a_raw_line(tmp_path, character):
    assert read_documents(write(tmp_path / "a.raw", f"one{character}two\nthree\n")) == [f"one{character}two\n", "three\n"]


def test_parquet_and_jsonl_give_their_column_text_as_it_is(tmp_path):
    frame = pandas.DataFrame({"id": range(len(DOCUMENTS)), "text": DOCUMENTS})
    frame.to_parquet(tmp_path / "a.parquet")
    write(tmp_path / "a.jsonl", "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in DOCUMENTS))
    assert read_documents(tmp_path / "a.parquet") == DOCUMENTS
    assert read_documents(tmp_path / "a.jsonl") == DOCUMENTS


def test_blank_lines_of_jsonl_are_no_documents(tmp_path):
    assert read_documents(write(tmp_path / "a.jsonl", '{"text": ""}\n\n{"text": "two"}\n \n')) == ["", "two"]


# ------------------------------------------------------------------------------------------------------------- refusing
@pytest.mark.parametrize("row", ["{not json", '{"sentence": "x"}', '{"text": 3}', '{"text": null}', '["x"]', '"x"', "null"])
def test_a_malformed_row_of_jsonl_is_named_as_an_editor_counts_it(tmp_path, row):
    assert "row 3" in refused(write(tmp_path / "a.jsonl", '{"text": "good"}\n\n' + row + '\n{"text": 5}\n'))


@pytest.mark.parametrize("suffix", ["raw", "txt", "tokens", "jsonl", "parquet"])
def test_a_file_that_is_not_there_names_the_command_that_makes_it(tmp_path, suffix):
    assert "not found: run `python download_model.py` first" in refused(tmp_path / f"test.{suffix}")


@pytest.mark.parametrize("suffix", ["raw", "jsonl", "parquet"])
def test_a_file_of_another_encoding_or_format_is_refused(tmp_path, suffix):
    (tmp_path / f"a.{suffix}").write_bytes(b'{"text": "caf\xe9"}\n')
    assert "python download_model.py" in refused(tmp_path / f"a.{suffix}")


def test_a_parquet_file_without_the_column_text_is_refused(tmp_path):
    pandas.DataFrame({"sentence": ["one"]}).to_parquet(tmp_path / "a.parquet")
    assert "text" in refused(tmp_path / "a.parquet") and "\n" not in refused(tmp_path / "a.parquet")


def test_half_a_surrogate_pair_is_named_by_row(tmp_path):
    assert "row 2" in refused(write(tmp_path / "a.jsonl", '{"text": "one"}\n{"text": "a \\ud83d film"}\n'))


# --------------------------------------------------------------------------------------------------------- on the disk
@pytest.fixture
def text_dir(tmp_path):
    write_text(tmp_path, {"train": DOCUMENTS, "validation": ["naïve — \U0001f600"], "test": ["a", "bc"]}, {"source": "made up"})
    return tmp_path


@pytest.mark.parametrize("character", [*LINE_BREAKS, "\r", "\r\n", "\t", '"', "\\", "\x00", "\ufeff", "\U0001f600"], ids=ascii)
def test_documents_come_back_character_by_character(tmp_path, character):
    documents = [f"one{character}two\n", character, "", f" \n{character}"]
    write_text(tmp_path, {"train": documents, "validation": [], "test": documents[::-1]}, {})
    assert load_documents(tmp_path, "train") == documents
    assert load_documents(tmp_path, "validation") == []
    assert load_documents(tmp_path, "test") == documents[::-1]


def test_the_description_says_where_the_text_is_from_and_how_much_there_is(text_dir):
    description = read_dataset_description(text_dir)
    assert description["source"] == {"source": "made up"}
    sizes = {name: (split["rows"], split["characters"]) for name, split in description["splits"].items()}
    assert sizes == {"train": (8, sum(map(len, DOCUMENTS))), "validation": (1, 9), "test": (2, 3)}
    assert write_text(text_dir, {name: ["x"] for name in SPLITS}, {"source": 2}) == read_dataset_description(text_dir)


@pytest.mark.parametrize("name", SPLITS)
def test_a_changed_text_is_noticed(text_dir, name):
    before = data_fingerprint(text_dir)
    path = text_dir / f"{name}.jsonl"
    content = path.read_text(encoding="utf-8")
    write(path, content.replace("a", "b", 1))
    with pytest.raises(CompactMindError, match=f"{name}.jsonl is missing or was changed.*python download_model.py"):
        read_dataset_description(text_dir)
    write(path, content)
    assert data_fingerprint(text_dir) == before


def test_an_unknown_split_is_refused_with_the_ones_there_are(text_dir):
    with pytest.raises(ValueError, match="'valid'.*train, validation, test"):
        load_documents(text_dir, "valid")
    (text_dir / "test.jsonl").unlink()
    (text_dir / DESCRIPTION).unlink()
    with pytest.raises(CompactMindError, match="test.jsonl not found.*python download_model.py"):
        load_documents(text_dir, "test")


# -------------------------------------------------------------------------------------------------------------- windows
@pytest.fixture(scope="module")
def byte_tokenizer():
    return helpers.make_byte_tokenizer()


@pytest.fixture(params=["bytes", "words"])
def any_tokenizer(request, byte_tokenizer, tokenizer):
    return byte_tokenizer if request.param == "bytes" else tokenizer


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return [text for sentence in helpers.make_sentences(400) for text in (f" {sentence.text} \n", "")]


@pytest.mark.parametrize("seq_len", [1, 2, 7, 64, 1000])
def test_windows_are_the_text_tokenized_once_and_cut_without_overlap(any_tokenizer, documents, seq_len):
    ids = any_tokenizer("\n\n".join(documents), verbose=False)["input_ids"]
    windows = token_windows(any_tokenizer, documents, seq_len)
    assert windows.dtype == torch.int64
    assert windows.shape == (len(ids) // seq_len, seq_len)
    assert windows.flatten().tolist() == ids[: windows.numel()]
    assert 0 <= len(ids) - windows.numel() < seq_len


def test_windows_read_the_documents_in_order_with_a_blank_line_between(byte_tokenizer):
    windows = token_windows(byte_tokenizer, ["ab\n", "", "cdef"], 6)
    assert windows[:, 0].tolist()[0] == byte_tokenizer.bos_token_id
    assert [byte_tokenizer.decode(window, skip_special_tokens=True) for window in windows] == ["ab\n\n\n", "\n\ncdef"]
    assert JOIN == "\n\n"


def test_an_incomplete_last_window_is_dropped(byte_tokenizer):
    assert len(token_windows(byte_tokenizer, ["x" * 18], 10)) == 1
    assert len(token_windows(byte_tokenizer, ["x" * 19], 10)) == 2


@pytest.mark.parametrize("seq_len", [4, 33])
@pytest.mark.parametrize("max_windows", [1, 2, 5, 40, 10_000])
def test_a_limit_gives_the_first_windows_of_the_whole_text(any_tokenizer, documents, seq_len, max_windows):
    whole = token_windows(any_tokenizer, documents, seq_len)
    assert torch.equal(token_windows(any_tokenizer, documents, seq_len, max_windows), whole[:max_windows])


def test_a_limit_spares_tokenizing_the_rest(byte_tokenizer, documents):
    lengths = []

    def counting_tokenizer(text, **options):
        lengths.append(len(text))
        return byte_tokenizer(text, **options)

    token_windows(counting_tokenizer, documents, seq_len=4, max_windows=2)
    token_windows(counting_tokenizer, documents, seq_len=4)
    assert lengths[0] < lengths[1] / 10


@pytest.mark.parametrize("max_windows", [1, 2, 5, 7, 40])
def test_spread_windows_are_evenly_spaced_windows_of_the_whole_text(any_tokenizer, documents, max_windows):
    whole = token_windows(any_tokenizer, documents, 33)
    chosen = token_windows(any_tokenizer, documents, 33, max_windows, "spread")
    places = [next(i for i, window in enumerate(whole) if torch.equal(window, each)) for each in chosen]
    assert len(places) == max_windows and places == sorted(set(places))
    part = len(whole) / max_windows
    for number, place in enumerate(places):  # the window in the middle of its part
        assert place <= (number + 0.5) * part < place + 1


@pytest.mark.parametrize("max_windows", [0, 10_000])
def test_all_windows_are_all_windows_however_they_are_chosen(any_tokenizer, documents, max_windows):
    whole = token_windows(any_tokenizer, documents, 33)
    assert torch.equal(token_windows(any_tokenizer, documents, 33, max_windows, "spread"), whole)
    assert torch.equal(token_windows(any_tokenizer, documents, 33, len(whole), "spread"), whole)


def test_another_choice_of_windows_is_refused_with_those_there_are(any_tokenizer, documents):
    with pytest.raises(ValueError, match="unknown choice of windows 'random', expected one of spread, first"):
        token_windows(any_tokenizer, documents, 33, 2, "random")


@pytest.mark.parametrize("max_windows", [0, 3])
def test_a_text_shorter_than_a_window_says_how_many_tokens_it_has(byte_tokenizer, max_windows):
    with pytest.raises(CompactMindError, match="has 9 tokens, less than one window of 10.*--seq_len"):
        token_windows(byte_tokenizer, ["abc", "def"], 10, max_windows)
    assert token_windows(byte_tokenizer, ["abc", "def"], 9, max_windows).shape == (1, 9)


# ------------------------------------------------------------------------------------------------------------- wikitext
NAMINGS = {
    "raw": ("wiki.train.raw", "wiki.valid.raw", "wiki.test.raw"),
    "tokens": ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),
    "plain": ("train.txt", "valid.txt", "test.txt"),
    "hub": ("train-00000-of-00001.parquet", "validation-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
}


@pytest.mark.parametrize("names", NAMINGS.values(), ids=NAMINGS)
def test_wikitext_is_found_under_every_name_it_is_published_with(tmp_path, names):
    for name in names:
        (tmp_path / name).touch()
    result = wikitext_files(tmp_path)
    assert {part: path.name for part, path in result.items()} == dict(zip(("train", "valid", "test"), names, strict=True))


def test_what_the_script_itself_wrote_is_not_taken_for_wikitext(text_dir):
    assert wikitext_files(text_dir) == {}
    assert wikitext_files(text_dir / "nowhere") == {}


def test_wikitext_without_a_test_file_is_none(tmp_path):
    (tmp_path / "wiki.train.raw").touch()
    (tmp_path / "wiki.valid.raw").touch()
    assert wikitext_files(tmp_path) == {}
    (tmp_path / "wiki.test.raw").touch()
    (tmp_path / "wiki.train.raw").unlink()
    assert set(wikitext_files(tmp_path)) == {"valid", "test"}


def test_a_whole_wikitext_keeps_its_own_parts():
    parts = {"train": ["a", "b"], "valid": ["c"], "test": ["d"]}
    assert split_wikitext(parts) == {"train": ["a", "b"], "validation": ["c"], "test": ["d"]}


@pytest.mark.parametrize("part", ["train", "valid"])
def test_a_wikitext_of_two_parts_divides_the_one_that_is_not_the_test(part):
    known = [str(number) for number in range(25)]
    splits = split_wikitext({part: known, "test": ["d", "e"]})
    assert splits == {"train": known[:22], "validation": known[22:], "test": ["d", "e"]}


@pytest.mark.parametrize("windows", [1, 3, 40])
def test_the_first_windows_are_those_of_the_whole_text_however_long_its_tokens_are(tmp_path, windows):
    tokenizer = helpers.make_tokenizer(tmp_path)
    for document in ("the film is good " * 40, "good                    " * 40, "goodgoodgoodgoodgoodgood " * 40):
        whole = token_windows(tokenizer, [document] * 20, 16)
        assert len(whole) > 40
        assert torch.equal(token_windows(tokenizer, [document] * 20, 16, windows), whole[:windows])


def test_calibration_text_is_spread_and_does_not_depend_on_how_much_there_is_beyond_what_it_is_spread_over(byte_tokenizer):
    documents = [f"{number:05d}" * 4 for number in range(200)]
    whole = token_windows(byte_tokenizer, documents, 22)  # a document and what joins it to the next
    chosen = calibration_windows(byte_tokenizer, documents, 22, 4)
    assert torch.equal(chosen, whole[[8, 40, 24, 56]]) and torch.equal(chosen, calibration_of(whole, 4))  # its first half is spread too
    assert torch.equal(chosen, calibration_windows(byte_tokenizer, documents[:70], 22, 4))
    assert torch.equal(calibration_of(whole[:6], 3), whole[[1, 5, 3]])
    assert torch.equal(calibration_of(whole[:3], 4), whole[[0, 2, 1]]) and len(calibration_of(whole, 0)) == 0


@pytest.mark.parametrize("choice", WINDOW_CHOICES)
def test_what_a_search_looks_at_first_is_not_one_place_of_the_validation_text(byte_tokenizer, tmp_path, choice):
    documents = {name: [f"{name[0]}{number:04d}" * 4 for number in range(64)] for name in ("train", "validation", "test")}
    write_text(tmp_path, documents, {})
    counts = {"train_windows": 8, "held_out_windows": 4, "confirm_windows": 28, "eval_windows": 8}
    windows = windows_of_folder(byte_tokenizer, tmp_path, 22, choice, **counts)
    whole = token_windows(byte_tokenizer, documents["validation"], 22, 32, choice)
    held_out, choose = ([whole.eq(window).all(dim=1).nonzero().item() for window in windows[name]] for name in ("held_out", "choose"))
    assert held_out == [0, 16, 8, 24] and choose[:8] == [4, 20, 12, 28, 2, 18, 10, 26] and sorted(held_out + choose) == list(range(32))
    assert torch.equal(windows["test"], token_windows(byte_tokenizer, documents["test"], 22, 8, choice))
