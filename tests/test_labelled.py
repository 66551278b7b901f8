"""Any labelled table: what is read of it, what is refused, how it is split, and that every stage knows its classes and its pairs."""

import copy
import csv
import json
import random
import tracemalloc
import types
from importlib.util import find_spec

import datasets
import helpers
import pandas
import pytest
import torch
from accelerate import Accelerator

import download_model
from common import DownloadConfig
from compactmind.checkpoint import load_checkpoint, save_checkpoint
from compactmind.data import SPLITS, EncodedSentences, Sentence, data_fingerprint, load_split, model_inputs, stable_share
from compactmind.errors import CompactMindError
from compactmind.evaluation import classifiers
from compactmind.evaluation.classifiers import columns_of_labels
from compactmind.forward import predict_logits
from compactmind.glue import GLUE
from compactmind.labelled import Columns, Part, key_of, names_of, parts_of, read_file, read_part, split, to_sentences
from compactmind.methods.distillation.teacher_logits import cached_teacher_logits
from compactmind.methods.pruning.masks import compact
from compactmind.methods.quantization.packed_model import quantize_model
from compactmind.methods.quantization.w8a8_encoder import quantize_encoder
from compactmind.onnx_export import OnnxClassifier, export_classifier
from compactmind.sources import hub
from compactmind.task import Task, read_task

TOPICS = {"food": ["bread", "soup"], "law": ["court", "judge"], "space": ["moon", "star"], "sport": ["goal", "team"]}
COLUMNS = Columns(("body",), ("topic",))


def topic_rows(count: int, seed: int = 0, topics=tuple(TOPICS)) -> list[dict]:
    """Return different rows with body, claim and topic, topics in turn."""
    source = random.Random(seed)
    rows = []
    for number in range(count):
        topic = topics[number % len(topics)]
        words = source.choices(helpers.NEUTRAL, k=6) + source.choices(TOPICS[topic], k=2)
        rows.append({"body": f"{' '.join(words)} {seed}x{number}", "claim": f"it is about {source.choice(words)}", "topic": topic})
    return rows


def write_table(path, rows: list[dict]):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pandas.DataFrame(rows).to_parquet(path)
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


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


# --------------------------------------------------------------------------------------------------------------- reading
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_kind_of_table_is_read_alike(tmp_path, suffix):
    rows = topic_rows(8)
    part = read_file(write_table(tmp_path / f"t{suffix}", rows), Columns(("body",), ("topic",), ("claim",)))
    assert part.rows == [(row["body"], row["claim"], row["topic"]) for row in rows]


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([3, 1, 10, 3], ("1", "3", "10")), (["b", "a", "B", "a"], ("B", "a", "b")), ([1.0, 0.0, 1.0, None], ("0", "1")),
        ([True, False, True, False], ("False", "True")), ([-1, 1, 1, -1], ("-1", "1")),
    ],
)  # fmt: skip
def test_labels_are_words_or_whole_numbers_in_their_order(tmp_path, values, names):
    rows = [{"text": f"row {index}", "label": value} for index, value in enumerate(values * 3)]
    part = read_file(write_table(tmp_path / "t.parquet", rows), Columns())
    assert names_of(part) == names
    assert [names[s.label] for s in to_sentences(part, names)] == [label for *_, label in part.rows]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "a", "topic": "x"}, "t.csv has no column body, only text, topic: choose one with --text_column"),
        ({"body": "a", "kind": "x"}, "t.csv has no column topic, only body, kind: choose one with --label_column"),
        ({"body": 5, "topic": "x"}, "row 1: the text is of type int: '5'"),
        ({"body": "a\ud83d", "topic": "x"}, "row 1: half a surrogate pair"),
        ({"body": "a", "topic": 2.5}, "row 1: the label 2.5 is a number with a fraction"),
        ({"body": "a", "topic": ["x", "y"]}, "row 1: the label is several values"),
        (["a"], "row 1: expected an object with columns, found list"),
    ],
)
def test_what_cannot_be_meant_is_one_line(row, expected):
    with pytest.raises(CompactMindError) as caught:
        read_part("t.csv", [row], COLUMNS)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_rows_that_say_nothing_are_counted_and_left_out():
    rows = topic_rows(6) + [{"body": " ", "topic": "law"}, {"body": None, "topic": "law"}, {"body": "a", "topic": ""}]
    part = read_part("t.csv", rows, COLUMNS)
    assert len(part.rows) == 6 and part.warnings() == [
        "2 rows of t.csv without a text are left out, the first is row 7",
        "1 row of t.csv without a label is left out, the first is row 9",
    ]
    pairs = read_part("t.csv", [{"body": "a", "claim": "", "topic": "x"}], Columns(("body",), ("topic",), ("claim",)))
    assert pairs.rows == [] and pairs.left_out == {"a second text": 1}


@pytest.mark.parametrize(
    ("labels", "expected"),
    [(["x"] * 9, "one class only (x)"), ([str(number / 7) for number in range(9)], "9 different values in 9 rows")],
)
def test_what_is_no_column_of_classes_is_refused(labels, expected):
    with pytest.raises(CompactMindError) as caught:
        names_of(Part("t.csv", [(f"text {number}", None, label) for number, label in enumerate(labels)]))
    assert expected in str(caught.value)


# ------------------------------------------------------------------------------------------------------------- splitting
def parts(**rows) -> dict[str, Part]:
    return {name: read_part(f"{name}.csv", part, COLUMNS) for name, part in rows.items()}


def test_what_is_not_given_is_split_off_and_a_row_never_changes_its_split():
    rows = topic_rows(400)
    task, splits, said = split(parts(train=rows))
    assert task.labels == ("food", "law", "space", "sport") and not task.pairs and said == []
    assert sum(map(len, splits.values())) == 400 and 20 <= len(splits["test"]) <= 60 and 20 <= len(splits["validation"]) <= 60
    where = {sentence.text: name for name, part in splits.items() for sentence in part}
    again = split(parts(train=topic_rows(100, seed=5) + rows[::-1][:300]))[1]
    assert all(where.get(sentence.text, name) == name for name, part in again.items() for sentence in part)
    with_test = split(parts(train=rows, test=topic_rows(40, seed=9)))[1]
    assert [s.text for s in with_test["test"]] == [row["body"] for row in topic_rows(40, seed=9)]
    assert 20 <= len(with_test["validation"]) <= 60


def test_rows_that_share_their_first_text_stay_together():
    columns = Columns(("premise",), ("topic",), ("claim",))
    rows = [{"premise": f"premise {number // 4}", "claim": f"claim {number}", "topic": "ab"[number % 2]} for number in range(400)]
    task, splits, _ = split({"train": read_part("t.csv", rows, columns)})
    premises = [{sentence.text for sentence in part} for part in splits.values()]
    assert task.pairs and sum(map(len, premises)) == 100 and sum(map(len, splits.values())) == 400


def test_nothing_that_is_asked_is_trained_on_and_repeats_are_said():
    rows = topic_rows(80)
    train = rows + [rows[0], {**rows[1], "topic": "food"}, *topic_rows(3, seed=9)]
    _, splits, said = split(parts(train=train, validation=topic_rows(20, seed=8), test=topic_rows(20, seed=9)))
    assert len(splits["train"]) == 80 and len(splits["test"]) == 20
    assert said == [
        "1 row of train is left out, because an earlier row is the same",
        "1 row of train is left out, because an earlier row is the same with another label",
        "3 rows of train are left out, because a held-out row asks the same",
    ]
    assert key_of(Sentence(":-)", 0)) != key_of(Sentence(":-(", 0))  # texts without words are not all the same


def test_a_label_that_the_training_rows_lack_is_refused():
    test = topic_rows(8, seed=9) + [{"body": "new", "topic": "art"}] * 2
    with pytest.raises(CompactMindError) as caught:
        split(parts(train=topic_rows(80), test=test))
    assert str(caught.value) == (
        "test.csv has the label 'art' (2 rows, the first is row 9), which the training rows lack: they have 'food', 'law', 'space', 'sport'"
    )
    numbers = [{**row, "topic": str(1 + number % 2)} for number, row in enumerate(topic_rows(80))]
    with pytest.raises(CompactMindError, match="label '0'"):  # a name is no index
        split(parts(train=numbers, test=[{"body": "a", "topic": "0"}, {"body": "b", "topic": "1"}]))


@pytest.mark.parametrize("lowest", [0.0, 0.1, 0.2], ids=["as_test", "as_validation", "as_train"])
def test_a_class_of_one_row_is_trained_on_and_said_to_be_rare(lowest):
    text = next(text for number in range(999) if lowest <= stable_share(text := f"the only one {number}") < lowest + 0.1)
    rows = [*topic_rows(200, topics=("food", "law")), {"body": text, "topic": "space"}]
    task, splits, said = split(parts(train=rows))
    assert [s.label for s in splits["train"]].count(2) == 1
    assert not any(s.label == 2 for name in ("validation", "test") for s in splits[name])
    assert "few training rows: space 1: hardly enough to learn from" in said
    assert "validation has no row of space" in said and "test has no row of space" in said


def test_a_large_majority_is_said():
    rows = topic_rows(400, topics=("food",)) + topic_rows(60, seed=1, topics=("law",))
    assert any(line.endswith("of train is food: always saying that is as accurate, so look at macro-F1 beside accuracy")
               for line in split(parts(train=rows))[2])  # fmt: skip


def test_too_few_rows_to_hold_out_ask_for_more_or_a_file():
    with pytest.raises(CompactMindError, match="more rows are needed, or a file of its own"):
        split(parts(train=topic_rows(8)))


def test_long_rows_cost_little():
    rows = [{"body": " ".join(random.Random(row).choices("abcdefgh", k=50_000)), "topic": "xy"[row % 2]} for row in range(12)]
    tracemalloc.start()
    split(parts(train=rows, test=rows[:4], validation=rows[4:8]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6  # 4 MB of text


# --------------------------------------------------------------------------------------------------------- download_model
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
    found = read_task(workspace / "sst2_data")
    assert found == Task(task.labels, bool(task.columns.pair), f"GLUE {name}", task.metric)
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
    assert read_task(workspace / "sst2_data") == found


def test_cola_in_its_own_files_has_no_header(workspace):
    folder = workspace / "sst2_data" / "glue" / "cola"
    folder.mkdir(parents=True)
    (folder / "train.tsv").write_text("".join(f"gj04\t{n % 2}\t{'*' * (n % 2 == 0)}\tSentence number {n}.\n" for n in range(90)))
    (folder / "dev.tsv").write_text("".join(f"gj04\t{n % 2}\t\tDev number {n}.\n" for n in range(10)))
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
    found, names = parts_of(dataset, "x/news", Columns())
    assert names == ("world", "sports", "business") and set(found) == {"train", "test"}
    assert found["test"].rows[0] == ("val row 0", None, "0")
    assert [s.label for s in to_sentences(found["test"], names, numbers=True)][:4] == [0, 1, 2, 0]


# ----------------------------------------------------------------------------------------------------------------- pairs
PAIRS = [Sentence("a good film", 0, "the plot is bad"), Sentence("a long and boring story with a plot", 1, "dull"), Sentence("a", 2, "the")]


@pytest.fixture
def pairs(tokenizer) -> EncodedSentences:
    return EncodedSentences(tokenizer, PAIRS, max_length=64)


def test_pairs_are_encoded_with_token_types(tokenizer, pairs):
    batch = pairs.collate([0, 1, 2])
    for row, sentence in enumerate(PAIRS):
        alone = tokenizer(sentence.text, sentence.pair)
        length = len(alone["input_ids"])
        for name in ("input_ids", "token_type_ids", "attention_mask"):
            assert batch[name][row, :length].tolist() == alone[name] and not batch[name][row, length:].any()
    assert pairs.pairs and "token_type_ids" not in EncodedSentences(tokenizer, [Sentence("a", 0)], 64).collate([0])
    with pytest.raises(CompactMindError, match="1 of 2 texts have no second text"):
        EncodedSentences(tokenizer, [Sentence("a", 0), Sentence("a", 0, "b")], 64)


def test_what_is_cut_of_pairs_is_counted_whole(tokenizer):
    encoded = EncodedSentences(tokenizer, PAIRS, max_length=8)
    assert [len(ids) for ids in encoded.input_ids] == [8, 8, 5] and encoded.whole_lengths == [10, 12, 5]
    assert encoded.cut == 2 and "at 12 it would be 1%" in encoded.describe_cut()


def test_a_model_gets_the_token_types_it_has(pairs):
    batch = pairs.collate([0, 1])
    bert, distilbert = helpers.make_bert(num_labels=3), helpers.make_distilbert(num_labels=3)
    assert set(model_inputs(batch, bert)) == {"input_ids", "attention_mask", "token_type_ids"}
    assert set(model_inputs(batch, distilbert)) == {"input_ids", "attention_mask"}
    assert set(model_inputs(batch, helpers.make_bert(type_vocab_size=1))) == {"input_ids", "attention_mask"}  # as RoBERTa's
    wrapped = torch.nn.Module()
    wrapped.module = bert
    assert "token_type_ids" in model_inputs(batch, wrapped)
    alone = torch.cat([helpers.logits_of(bert, model_inputs(pairs.collate([row]), bert)) for row in range(3)])
    assert torch.allclose(predict_logits(bert, pairs, 2), alone, atol=1e-5)
    batch.pop("token_type_ids")
    assert not torch.allclose(helpers.logits_of(bert, model_inputs(batch, bert)), alone[:2], atol=1e-3)


def test_a_model_of_pairs_and_one_of_texts_take_their_own_only(tokenizer, pairs):
    single, task = EncodedSentences(tokenizer, [Sentence("a good film", 0)], 64), Task(("a", "b", "c"), True, "x")
    model = helpers.make_distilbert(num_labels=3)
    task.mark(model.config)
    smaller = compact(model, helpers.uneven_masks(model))
    for each in (model, smaller):  # what is made of a model keeps the note
        assert predict_logits(each, pairs, 2).shape == (3, 3)
        with pytest.raises(CompactMindError, match="trained on pairs of texts and was given single ones"):
            predict_logits(each, single, 2)
    Task(("a", "b", "c"), False, "x").mark(model.config)
    with pytest.raises(CompactMindError, match="trained on single texts and was given pairs"):
        predict_logits(model, pairs, 2)
    sentiment = helpers.make_distilbert()
    Task().mark(sentiment.config)
    assert not hasattr(sentiment.config, "sentence_pairs")


def test_head_settings_name_every_class():
    settings = Task(("a", "b", "c")).head_settings()
    assert settings == {"num_labels": 3, "id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}


# ---------------------------------------------------------------------------------------------------------- measuring it
def named(*names: str, **changes):
    return helpers.make_distilbert(**Task(names).head_settings() | changes)


def test_the_model_s_classes_are_found_by_their_names():
    mnli = ("entailment", "neutral", "contradiction")
    assert columns_of_labels(named("CONTRADICTION", "NEUTRAL", "ENTAILMENT"), mnli) == [2, 1, 0]
    assert columns_of_labels(named("a", "A"), ("a", "A")) == [0, 1]
    assert columns_of_labels(named("LABEL_0", "LABEL_1", "LABEL_2"), mnli) == [0, 1, 2]  # a model without names
    assert columns_of_labels(named("ham", "spam"), ("0", "1")) == [0, 1]  # data without names
    assert columns_of_labels(named("POSITIVE", "NEGATIVE"), ("negative", "positive")) == [1, 0]
    assert columns_of_labels(named("possible", "no"), ("no", "possible")) == [1, 0]
    for model, labels in ((named("a", "b"), mnli), (named("a", "b", "c"), mnli), (named("1", "2"), ("0", "2"))):
        with pytest.raises(CompactMindError, match="classes apart"):
            columns_of_labels(model, labels)


def test_a_row_of_the_report_counts_what_is_right_by_name_and_what_was_cut(tmp_path, tokenizer):
    task = Task(("a", "b", "c"), True, "x")
    models = {"as_is": named(*task.labels, scale=0.6), "turned": named("c", "a", "b", scale=0.6)}
    with torch.no_grad():  # the same function, its classes in another order
        models["turned"].load_state_dict(models["as_is"].state_dict())
        for name in ("weight", "bias"):
            getattr(models["turned"].classifier, name).copy_(getattr(models["as_is"].classifier, name)[[2, 0, 1]])
    source, rows = random.Random(0), {}
    texts = [" ".join(source.choices(helpers.NEUTRAL, k=9)) for _ in range(40)]
    asked = [Sentence(text, source.randrange(3), source.choice(helpers.POSITIVE)) for text in texts]
    for name, model in models.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"1234")
        rows[name] = {"name": name, "directory": str(tmp_path / name)}
        checkpoint = types.SimpleNamespace(model=model, tokenizer=tokenizer)
        classifiers.measure_accuracy(rows[name], checkpoint, asked, task, 12, 8)
    right = predict_logits(models["as_is"], EncodedSentences(tokenizer, asked, 12), 8).argmax(-1) == torch.tensor([s.label for s in asked])
    for row in rows.values():
        assert row["accuracy"] == right.double().mean().item() and classifiers.correct_rows(row).tolist() == right.tolist()
        assert row["cut"] == {"rows": 40, "share": 1.0, "length_of_99": 13}
    assert rows["as_is"]["confusion_matrix"] == rows["turned"]["confusion_matrix"]


@pytest.mark.parametrize("kind", ["dense", "w8a8", "nf4"])
@pytest.mark.parametrize("maker", ["bert", "distilbert"])
def test_four_classes_of_pairs_quantize_and_reload(tmp_path, tokenizer, pairs, kind, maker):
    task = Task(("food", "law", "space", "sport"), True, "x")
    model = helpers.MAKERS[maker](seed=3, scale=0.6, **task.head_settings())
    task.mark(model.config)
    before, quantization = predict_logits(model, pairs, 2), None
    if kind == "w8a8":
        quantization = quantize_encoder(model)
    elif kind == "nf4":
        quantization = quantize_model(model, "nf4", calibration=pairs.evaluation_batches(2))
    after = predict_logits(model, pairs, 2)
    save_checkpoint(tmp_path / "m", model, tokenizer, kind=kind, parent=None, stage={}, quantization=quantization)
    loaded = load_checkpoint(tmp_path / "m").model
    assert after.shape == (3, 4) and torch.allclose(predict_logits(loaded, pairs, 2), after, atol=1e-5)
    assert (after - before).norm() < 0.6 * before.norm()
    assert list(loaded.config.id2label.values()) == list(task.labels) and loaded.config.sentence_pairs
    with pytest.raises(CompactMindError, match="trained on pairs"):
        predict_logits(loaded, EncodedSentences(tokenizer, [Sentence("a", 0)], 64), 2)


@pytest.mark.skipif(any(find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxscript")), reason="requirements-export.txt")
def test_a_model_of_pairs_as_onnx_takes_token_types(tmp_path, pairs):
    task = Task(("a", "b", "c", "d"), True, "x")
    model = helpers.make_bert(scale=0.6, num_hidden_layers=1, **task.head_settings())
    task.mark(model.config)
    export_classifier(model, tmp_path / "model.onnx")
    exported = OnnxClassifier(tmp_path / "model.onnx")
    assert len(exported.session.get_inputs()) == 3
    for rows in ([0], [0, 1, 2]):
        given = model_inputs(pairs.collate(rows), model)
        assert torch.allclose(exported(**given), helpers.logits_of(model, given), atol=1e-4)
    ids = torch.ones(2, 5, dtype=torch.long)
    assert exported(input_ids=ids, attention_mask=ids).shape == (2, 4)  # as latency is measured


def test_logits_that_are_kept_are_of_the_same_token_types(tmp_path, pairs):
    bert, accelerator = helpers.make_bert(num_labels=3), Accelerator(cpu=True)
    others = copy.copy(pairs)
    others.token_type_ids = [[0] * len(types) for types in pairs.token_type_ids]
    for sentences in (pairs, others, pairs):
        kept = cached_teacher_logits(bert, "weights", sentences, 2, tmp_path, accelerator)
        assert torch.allclose(kept, predict_logits(bert, sentences, 2), atol=1e-5)
    assert len(list(tmp_path.glob(".teacher_logits_*"))) == 2
