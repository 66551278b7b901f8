"""download_model.py and labelled data: tables of one's own, tasks of GLUE and data sets of the hub."""

import datasets
import helpers
import pyarrow
import pytest
from labelled_tables import topic_rows, write_table

import download_model
from common import DownloadConfig
from compactmind.data import SPLITS, data_fingerprint, load_split
from compactmind.errors import CompactMindError
from compactmind.glue import GLUE
from compactmind.labelled import Columns, parts_of, split, to_sentences
from compactmind.sources import hub
from compactmind.task import Task, read_task


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(helpers.make_workspace(tmp_path, train_rows=4, dev_rows=4))
    return tmp_path


def config(**changes) -> DownloadConfig:
    return DownloadConfig.for_profile("smoke", **{"max_rows": 0, **changes})


def download(**changes) -> None:
    """Run download_model.py in this process, for the rows alone."""
    settings = config(**changes)
    download_model.check_labelled(settings)
    record = download_model.choose_labelled(settings, lambda: False)
    download_model.download_labelled(settings, record)


def test_a_table_of_ones_own(workspace, capsys):
    write_table(workspace / "my.csv", topic_rows(120) + [{"body": "", "claim": "", "topic": "law"}])
    write_table(workspace / "mine.jsonl", topic_rows(40, seed=9))
    settings = {"train": "my.csv", "test": "mine.jsonl", "text_column": "body", "label_column": "topic"}
    download(**settings)
    said = capsys.readouterr().out
    assert "test 40 rows: food 10 (25.0%), law 10 (25.0%)" in said and "warning: 1 row of my.csv without a text" in said
    folder = workspace / "sst2_data"
    assert read_task(folder) == Task(("food", "law", "space", "sport"), False, "my.csv")
    assert [(s.text, s.pair) for s in load_split(folder, "test")] == [(row["body"], None) for row in topic_rows(40, seed=9)]
    assert sum(helpers.read_json(folder / "dataset.json")["splits"]["train"]["classes"].values()) == len(load_split(folder, "train"))
    before = data_fingerprint(folder)
    download(**settings)
    assert "is up to date" in capsys.readouterr().out
    download(**settings, pair_column="claim")
    assert read_task(folder).pairs and all(s.pair for name in SPLITS for s in load_split(folder, name))
    assert data_fingerprint(folder) != before


def test_other_names_of_the_same_classes_are_other_data(workspace):
    rows = topic_rows(120, topics=("food", "law"))
    for names in (("food", "law"), ("essen", "recht")):
        write_table(workspace / "my.csv", [{**row, "topic": names[number % 2]} for number, row in enumerate(rows)])
        download(train="my.csv", text_column="body", label_column="topic")
        if names[0] == "food":
            before = data_fingerprint(workspace / "sst2_data")
    assert data_fingerprint(workspace / "sst2_data") != before


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"train": "none.csv"}, "none.csv not found"),
        ({"train": "my.csv", "text_column": "txt"}, "my.csv has no column txt, only body, claim, topic"),
        ({"train": "my.csv", "text_column": "body", "pair_column": "other"}, "choose one with --pair_column"),
        ({"train": "my.csv", "dataset": "rte"}, "give one of them"),
        ({"test": "my.csv"}, "--test my.csv needs the table to train on"),
        ({"dataset": "stsb"}, "stsb is no classification"),
        ({"dataset": "rte", "source": "pypi"}, "PyPI ships none"),
        ({"dataset": "a/b", "source": "local"}, "a/b is not in local_assets/a/b"),
        ({"dataset": "rte", "text_column": "x"}, "--text_column is for a table"),
        ({"dataset": "a/b"}, "did not answer"),
    ],
)
def test_bad_settings_leave_nothing_behind(workspace, settings, expected):
    write_table(workspace / "my.csv", topic_rows(60))
    before = sorted(path.name for path in (workspace / "sst2_data").iterdir())
    with pytest.raises(CompactMindError) as caught:
        download(**{"label_column": "topic", **settings})
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(path.name for path in (workspace / "sst2_data").iterdir()) == before


def glue_rows(name: str, count: int, words: bool = False) -> list[dict]:
    task = GLUE[name]
    rows = []
    for number in range(count):
        label = number % len(task.labels)
        row = {"idx": number, task.columns.text[0]: f"{name} first {number} {count}"}
        if task.columns.pair:
            row[task.columns.pair[0]] = f"second {number}"
        rows.append(row | {"label": task.labels[label] if words else label})
    return rows


@pytest.mark.parametrize("name", GLUE)
def test_glue_by_name_from_a_folder_and_from_the_hub(workspace, monkeypatch, capsys, name):
    folder, task = workspace / "sst2_data" / "glue" / name, GLUE[name]
    write_table(folder / "train.tsv", glue_rows(name, 120, words=True))
    write_table(folder / f"{task.dev[-1]}.tsv", glue_rows(name, 24))
    write_table(folder / "test.tsv", [row | {"label": -1} for row in glue_rows(name, 5)])
    download(dataset=name)
    result = read_task(workspace / "sst2_data")
    assert result == Task(task.labels, bool(task.columns.pair), f"GLUE {name}", task.metric)
    local = {split_name: load_split(workspace / "sst2_data", split_name) for split_name in SPLITS}
    assert [s.label for s in local["test"]] == [row["label"] for row in glue_rows(name, 24)]

    parts = {"train": glue_rows(name, 120), task.dev[0]: glue_rows(name, 24), "test": [r | {"label": -1} for r in glue_rows(name, 5)]}
    features = {"label": datasets.ClassLabel(names=list(task.labels))}
    on_hub = datasets.DatasetDict({part: datasets.Dataset.from_list(rows) for part, rows in parts.items()})
    on_hub = on_hub.cast_column("label", features["label"])
    asked = []
    monkeypatch.setattr(hub, "load_hub_dataset", lambda record, *which: (asked.append((record, *which)), (on_hub, "c0ffee"))[1])
    for path in folder.iterdir():
        path.unlink()
    settings = config(dataset=name)
    record = download_model.choose_labelled(settings, lambda: True)
    download_model.download_labelled(settings, record)
    assert asked[0][0]["source"] == f"hub nyu-mll/glue {name}" and asked[0][1] == name
    assert {split_name: load_split(workspace / "sst2_data", split_name) for split_name in SPLITS} == local
    assert read_task(workspace / "sst2_data") == result


@pytest.mark.parametrize("suffix", ["tsv", "TSV"])
def test_cola_in_its_own_files_has_no_header(workspace, suffix):
    folder = workspace / "sst2_data" / "glue" / "cola"
    folder.mkdir(parents=True)
    (folder / f"train.{suffix}").write_text("".join(f"gj04\t{n % 2}\t{'*' * (n % 2 == 0)}\tSentence number {n}.\n" for n in range(90)))
    (folder / f"dev.{suffix}").write_text("".join(f"gj04\t{n % 2}\t\tDev number {n}.\n" for n in range(10)))
    download(dataset="cola")
    assert [s.text for s in load_split(workspace / "sst2_data", "test")][:2] == ["Dev number 0.", "Dev number 1."]


def test_half_of_a_glue_task_is_said(workspace):
    write_table(workspace / "sst2_data" / "glue" / "rte" / "train.tsv", glue_rows("rte", 30))
    with pytest.raises(CompactMindError, match="holds only half of rte: add dev.tsv"):
        download(dataset="rte")


def test_a_folder_laid_out_like_the_hub_s_is_read_as_the_hub_is(workspace, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", workspace / "cache")
    folder = workspace / "local_assets" / "owner" / "news"
    for part, rows in {"train": topic_rows(120), "test": topic_rows(16, seed=9)}.items():
        write_table(folder / "topics" / f"{part}-00000-of-00001.parquet", rows)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: topics\n  data_files:\n"
        "  - {split: train, path: topics/train-*}\n  - {split: test, path: topics/test-*}\n---\n"
    )
    download(dataset="owner/news", dataset_config="topics", text_column="body", label_column="topic")
    assert read_task(workspace / "sst2_data") == Task(("food", "law", "space", "sport"), False, "owner/news")
    assert [s.text for s in load_split(workspace / "sst2_data", "test")] == [row["body"] for row in topic_rows(16, seed=9)]


def test_names_of_the_hub_s_classes_are_kept_and_a_hidden_test_is_not_used():
    rows = [{"text": f"row {number}", "label": number % 3} for number in range(90)]
    label = datasets.ClassLabel(names=["world", "sports", "business"])
    hidden = [{"text": f"hidden {number}", "label": -1} for number in range(9)]
    parts = {"train": rows, "validation": [row | {"text": f"val {row['text']}"} for row in rows[:30]], "test": hidden}
    dataset = datasets.DatasetDict({name: datasets.Dataset.from_list(part).cast_column("label", label) for name, part in parts.items()})
    result, names = parts_of(dataset, "x/news", Columns())
    assert names == ("world", "sports", "business") and set(result) == {"train", "test"}
    assert result["test"].rows[0] == ("val row 0", None, "0")
    assert [s.label for s in to_sentences(result["test"], names, numbers=True)][:4] == [0, 1, 2, 0]


@pytest.mark.parametrize("count", [3, 2])
def test_classes_of_the_hub_that_are_called_by_digits_are_told_by_index(count):
    stars = [{"text": f"row {number}", "label": str(1 + number % count)} for number in range(240)]
    dataset = datasets.DatasetDict({"train": datasets.Dataset.from_list(stars).class_encode_column("label")})
    parts, names = parts_of(dataset, "x/stars", Columns())
    assert names == ("1", "2", "3")[:count] and parts["train"].by_index
    task, splits, _ = split(parts, names)
    read = {s.text: task.labels[s.label] for part in splits.values() for s in part}
    assert read == {row["text"]: row["label"] for row in stars}


def test_an_index_past_the_classes_of_the_hub_is_refused_though_a_class_is_called_so():
    label = datasets.ClassLabel(names=["1", "2", "3"])
    rows = [{"text": f"row {number}", "label": number % 4} for number in range(40)]
    table = pyarrow.Table.from_pylist(rows)
    dataset = datasets.Dataset(table, info=datasets.DatasetInfo(features=datasets.Features(text=datasets.Value("string"), label=label)))
    with pytest.raises(CompactMindError, match=r"has the label '3' \(10 rows, the first is row 4\), .*: it has '0' to '2'"):
        split(*parts_of({"train": dataset}, "x/stars", Columns()))
