"""Splits on the disk: whole or absent, never those of somebody's own, and noticed when they have changed."""

import itertools
import json
import os
import pathlib

import helpers
import pytest
from sentence_files import write

from compactmind.data import (
    DESCRIPTION,
    SPLITS,
    data_fingerprint,
    load_split,
    read_dataset_description,
    split_by_hash,
    write_dataset,
    write_splits,
)
from compactmind.errors import CompactMindError
from compactmind.files import sha256_of
from compactmind.rows import BLANK, read_json_lines


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
