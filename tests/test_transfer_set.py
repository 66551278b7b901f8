"""Texts that nobody has labelled: which of them are read, what they are taken for, and by which models."""

import json

import helpers
import pandas
import pytest
import torch

from compactmind.checkpoint import save_checkpoint
from compactmind.data import Sentence
from compactmind.errors import CompactMindError
from compactmind.methods.distillation.transfer_set import label_by_teacher, read_unlabelled, unlabelled_record
from compactmind.task import Task

KNOWN = [Sentence("A good film.", 1), Sentence("no", 0)]
ROWS = [{"text": text} for text in ("A fine plot", "a FINE plot!", "a good film", "  ", None, " Dull. ", "cut \ud83d")]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_text_is_read_once_and_not_where_it_is_labelled(tmp_path):
    texts, left_out = read_unlabelled(write_lines(tmp_path / "more.jsonl", ROWS), Task(), KNOWN)
    assert texts == [Sentence("A fine plot", 0), Sentence("Dull.", 0)] and left_out == 5


@pytest.mark.parametrize("name", ["more.csv", "more.tsv", "more.parquet"])
def test_every_table_is_read_whatever_its_other_columns(tmp_path, name):
    table = pandas.DataFrame({"id": ["1", "2"], "content": ["one text", "another"], "label": ["x", ""]})
    if name.endswith("parquet"):
        table.to_parquet(tmp_path / name)
    else:
        table.to_csv(tmp_path / name, index=False, sep="\t" if name.endswith("tsv") else ",")
    assert read_unlabelled(tmp_path / name, Task(), KNOWN) == ([Sentence("one text", 0), Sentence("another", 0)], 0)


def test_the_only_column_is_the_text_whatever_it_is_called(tmp_path):
    (tmp_path / "mail.csv").write_text("complaint\nit broke\nit never came\n")
    texts, left_out = read_unlabelled(tmp_path / "mail.csv", Task(), [])
    assert ([each.text for each in texts], left_out) == (["it broke", "it never came"], 0)


def test_a_task_of_pairs_takes_pairs(tmp_path):
    task, rows = Task(("no", "yes"), True), [{"text": "a", "pair": "b"}, {"text": "a", "pair": "c"}, {"text": "a", "pair": ""}]
    texts, left_out = read_unlabelled(write_lines(tmp_path / "more.jsonl", rows), task, [Sentence("A", 1, "C.")])
    assert texts == [Sentence("a", 0, "b")] and left_out == 2
    with pytest.raises(CompactMindError, match="row 1: expected a column .* and a column pair, found text"):
        read_unlabelled(write_lines(tmp_path / "more.jsonl", [{"text": "a"}]), task, [])


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"review": "a", "stars": 5}], "row 1: expected a column sentence, text or content, found review, stars"),
        (["a"], "row 1: expected a column sentence, text or content, found str"),
        ([{"text": "no"}, {"text": ""}], "has 2 rows and no text that is not among the labelled ones"),
        ([], "has 0 rows and no text"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path, rows, message):
    with pytest.raises(CompactMindError, match=message):
        read_unlabelled(write_lines(tmp_path / "more.jsonl", rows), Task(), KNOWN)


def test_a_model_depends_on_what_the_file_holds(tmp_path):
    first = unlabelled_record(str(write_lines(tmp_path / "more.jsonl", ROWS)))
    assert first != unlabelled_record(str(write_lines(tmp_path / "more.jsonl", ROWS[:1]))) and unlabelled_record("") == {}
    with pytest.raises(CompactMindError, match="none.csv not found"):
        unlabelled_record(str(tmp_path / "none.csv"))


def test_what_has_no_label_is_what_the_teacher_takes_it_for():
    logits = torch.tensor([[0.0, 9.0], [9.0, 0.0], [1.0, 2.0], [2.0, 1.0]])
    assert label_by_teacher(torch.tensor([0, 1, 0, 0]), logits, 2).tolist() == [0, 1, 1, 0]


def test_the_distilled_student_and_what_is_pruned_read_them(tmp_path, run_here):
    helpers.make_workspace(tmp_path, train_rows=60, dev_rows=20)
    assert run_here("download_model.py", cwd=tmp_path)[0] == 0
    tokenizer, models = helpers.make_tokenizer(tmp_path / "vocabulary"), tmp_path / "models"
    made = {"script": "download_model.py"}
    save_checkpoint(models / "teacher_base", helpers.make_bert(), tokenizer, kind="dense", parent=None, stage=made)
    parts = {name: (tmp_path / "sst2_data" / f"{name}.jsonl").read_text().splitlines() for name in ("train", "validation", "test")}
    labelled = [json.loads(line)["sentence"] for lines in parts.values() for line in lines]  # held-out texts too, which nobody may learn
    rows = len(parts["train"])
    texts = labelled + [f"{text} {text}" for text in labelled[:rows]]
    more = write_lines(tmp_path / "more.jsonl", [{"text": text} for text in texts])
    given = ("--unlabelled", more)

    status, output = run_here("1_distill.py", *given, "--students", "student_finetuned", cwd=tmp_path)
    assert status == 1 and "is for student_distilled" in output and "--unlabelled" in output
    status, output = run_here("1_distill.py", "--unlabelled", "none.csv", cwd=tmp_path)
    assert status == 1 and "none.csv not found" in output and not (models / "teacher").exists()

    assert run_here("1_distill.py", cwd=tmp_path)[0] == 0
    before = {name: helpers.read_json(models / name / "manifest.json") for name in ("student_finetuned", "student_distilled")}
    assert "unlabelled" not in before["student_distilled"]["stage"]["config"]
    status, output = run_here("1_distill.py", *given, cwd=tmp_path)
    left_out = len(texts) - rows
    assert status == 0 and f"{rows} texts without labels" in output and f"; {left_out} rows are left out" in output
    assert "student_finetuned is up to date" in output and "teacher is up to date" in output
    after = {name: helpers.read_json(models / name / "manifest.json") for name in before}
    assert after["student_finetuned"] == before["student_finetuned"]
    assert after["student_distilled"]["files"] != before["student_distilled"]["files"]
    assert after["student_distilled"]["stage"]["config"]["unlabelled"] == unlabelled_record(str(more))["unlabelled"]

    status, output = run_here("2_prune_finetune.py", *given, "--alpha", 0, cwd=tmp_path)
    assert status == 1 and "alpha is 0: raise --alpha" in output
    with helpers.training_batches() as seen:
        status, output = run_here("2_prune_finetune.py", *given, "--epochs", 2, "--prune_end_epoch", 1, cwd=tmp_path)
    assert status == 0, output
    assert sum(map(len, seen)) == 2 * 2 * rows  # two epochs
    assert helpers.read_json(models / "student_pruned" / "manifest.json")["stage"]["config"]["unlabelled"]
