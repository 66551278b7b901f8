"""The sentences of SST-2: which files are read, how they are split, and what leaves the old ones whole."""

import downloads
import helpers
import pytest
from downloads import smoke, written

import download_model
from compactmind.data import SPLITS, Sentence, load_split, normalize, read_dataset_description
from compactmind.errors import CompactMindError
from compactmind.sources.sentences import split_sst2, sst2_files

workspace = downloads.workspace


def test_sst2_keeps_dev_for_the_test_and_selects_on_a_slice_of_train():
    sentences = helpers.make_sentences(1100)
    train, dev = sentences[100:], sentences[:100]
    copies = [Sentence(s.text.upper() + " .", 1 - s.label) for s in dev[:20]] + train[:5]
    parts = split_sst2(train + copies, dev)
    assert parts["test"] == dev
    assert 0.05 * len(train) < len(parts["validation"]) < 0.11 * len(train)
    assert sorted(s.text for s in parts["train"] + parts["validation"]) == sorted(s.text for s in train)
    keys = {name: {normalize(s.text) for s in part} for name, part in parts.items()}
    assert not keys["train"] & keys["validation"] and not (keys["train"] | keys["validation"]) & keys["test"]
    assert split_sst2(train[::-1] + copies, dev)["validation"] == parts["validation"][::-1]  # whatever the order of the file


def test_sst2_validation_asks_about_sentences_of_which_no_fragment_was_trained_on():
    sentences = helpers.make_sentences(600)
    fragments = [Sentence(" ".join(s.text.split()[:3]), s.label) for s in sentences]
    parts = split_sst2(sentences + fragments, [])
    assert {s.text for s in parts["validation"]} < {s.text for s in sentences}
    trained = [f" {normalize(s.text)} " for s in parts["train"]]
    whole = [f" {normalize(s.text)} " for s in sentences if s in parts["train"]]
    for fragment in {normalize(s.text) for s in fragments}:
        shared = any(f" {fragment} " in text for text in whole)
        assert (f" {fragment} " in trained) == shared, fragment
    assert len(parts["train"]) + len(parts["validation"]) < len({normalize(s.text) for s in sentences + fragments})


def test_sst2_files_are_found_in_every_format(tmp_path):
    assert sst2_files(tmp_path / "nowhere") is None
    assert sst2_files(tmp_path) is None
    (tmp_path / "train.tsv.md").touch()  # no data file
    for names in (
        ("train.tsv", "dev.tsv"),
        ("train.jsonl", "validation.jsonl"),
        ("train-00000-of-00001.parquet", "validation-00000-of-00001.parquet"),
    ):
        folder = tmp_path / names[0].replace(".", "_")
        folder.mkdir()
        for name in names:
            (folder / name).touch()
        assert {split: path.name for split, path in sst2_files(folder).items()} == {"train": names[0], "dev": names[1]}


def test_of_several_files_for_one_part_none_is_chosen_by_its_name(tmp_path):
    for name in ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "dev.tsv"):
        (tmp_path / name).touch()
    with pytest.raises(
        CompactMindError, match="several files for train.*00000-of-00002.parquet, train-00001.*join them, or leave one"
    ):
        sst2_files(tmp_path)
    (tmp_path / "train.tsv").touch()
    (tmp_path / "dev-old.tsv").touch()
    assert {split: path.name for split, path in sst2_files(tmp_path).items()} == {"train": "train.tsv", "dev": "dev.tsv"}
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(CompactMindError, match="several files for train"):
        sst2_files(tmp_path)


@pytest.mark.parametrize(("there", "missing"), [("train.tsv", "dev.tsv"), ("dev.tsv", "train.tsv")])
def test_half_an_sst2_says_which_half_is_missing(workspace, there, missing):
    (workspace / "sst2_data" / "glue" / "sst2" / missing).unlink()
    with pytest.raises(CompactMindError, match=f"only half of SST-2: add {missing}"):
        download_model.main(smoke())
    assert written(workspace) == set()


def test_a_malformed_row_of_sst2_is_named_and_nothing_is_written(workspace):
    path = workspace / "sst2_data" / "glue" / "sst2" / "train.tsv"
    lines = path.read_text().splitlines()
    lines[7] = "a good film\t3"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(CompactMindError, match="train.tsv, row 7: label '3'"):
        download_model.main(smoke())
    assert written(workspace) == set()


def test_a_split_without_one_of_the_labels_is_refused(workspace):
    path = workspace / "sst2_data" / "glue" / "sst2" / "dev.tsv"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.endswith("\t0\n")))
    with pytest.raises(CompactMindError, match="the test split from local folder.*both labels, found 30 rows"):
        download_model.main(smoke())
    assert written(workspace) == set()


def test_a_bad_new_source_leaves_the_old_sentences_whole(workspace):
    download_model.main(smoke())
    before = read_dataset_description(workspace / "sst2_data")
    (workspace / "sst2_data" / "glue" / "sst2" / "dev.tsv").write_text("sentence\tlabel\n")
    with pytest.raises(CompactMindError, match="at least one row"):
        download_model.main(smoke())
    assert read_dataset_description(workspace / "sst2_data") == before


def test_sentences_that_are_missing_or_were_replaced_by_half_are_written_anew(workspace, capsys):
    download_model.main(smoke())
    before = read_dataset_description(workspace / "sst2_data")
    (workspace / "sst2_data" / "train.jsonl").unlink()
    capsys.readouterr()
    download_model.main(smoke())
    assert "train.jsonl is missing or was changed" in capsys.readouterr().out
    assert read_dataset_description(workspace / "sst2_data") == before


def test_max_rows_limits_every_split(workspace):
    download_model.main(smoke(max_rows=10))
    assert [len(load_split(workspace / "sst2_data", name)) for name in SPLITS] == [10, 10, 10]
