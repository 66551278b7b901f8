"""A stage that reads models and data says when the models were trained on other classes, or on other sentences of the same ones."""

import contextlib
import io
from types import SimpleNamespace

import helpers
import pytest
import scripts

from compactmind.checkpoint import save_checkpoint
from compactmind.data import SPLITS, data_fingerprint, write_splits
from compactmind.errors import CompactMindError
from compactmind.evaluation import classifiers
from compactmind.task import Task
from compactmind.trained_on import check_trained_on, class_names_of, same_classes

OLD, NEW = ("negative", "positive"), ("ham", "spam")


def write_data(folder, labels, seed: int = 0):
    """Write 60 sentences of as many classes, in turn; negative and positive as download_model.py writes SST-2, without a task."""
    rows = [{"sentence": s.text, "label": number % len(labels)} for number, s in enumerate(helpers.make_sentences(60, seed))]
    splits = {name: rows[start::3] for start, name in enumerate(SPLITS)}
    task = {} if labels == OLD else {"task": {"labels": labels, "pairs": False, "name": "my.csv", "metric": "accuracy"}}
    write_splits(folder, splits, {"source": "made up"}, {name: {} for name in SPLITS}, **task)
    return folder


def save_model(models, name: str, tokenizer, labels, data_dir=None, script: str = "1_distill.py", named: bool = True, seed: int = 0):
    settings = Task(tuple(labels)).head_settings() if named else {"num_labels": len(labels)}
    save_checkpoint(
        models / name, helpers.make_distilbert(seed=seed, **settings), tokenizer, kind="dense", parent=None,
        stage={"script": script, "config": {}, "inputs": {}}, data_fingerprint=data_fingerprint(data_dir) if data_dir else None,
    )  # fmt: skip
    return models / name


@pytest.fixture
def trained(tmp_path, tokenizer):
    """A folder whose teacher and distilled student are of classes they have, trained on the data that lies there."""

    def make(labels=OLD, **changes):
        data = write_data(tmp_path / "sst2_data", labels)
        for seed, name in enumerate(("teacher", "student_distilled")):
            save_model(tmp_path / "models", name, tokenizer, labels, data, seed=seed, **changes)
        return tmp_path

    return make


# ------------------------------------------------------------------------------------------------------------ classes
@pytest.mark.parametrize(
    ("names", "labels", "same", "in_any_order"),
    [
        (NEW, NEW, True, True),
        (("spam", "ham"), NEW, False, True),
        (OLD, NEW, False, False),
        (NEW, OLD, False, False),
        (OLD, ("0", "1"), False, False),
        (("0", "1"), OLD, False, False),
        (("a", "b", "c"), ("a", "b"), False, False),
        (("LABEL_0", "LABEL_1"), NEW, True, True),
        (("LABEL_0", "LABEL_1"), OLD, True, True),
        (("LABEL_0", "LABEL_1"), ("a", "b", "c"), False, False),
        (("NEG", "POS"), OLD, True, True),
        (("POSITIVE", "NEGATIVE"), OLD, False, True),
    ],
)
def test_classes_are_the_same_by_their_names(names, labels, same, in_any_order):
    assert same_classes(names, labels) is same and same_classes(names, labels, in_order=False) is in_any_order


def test_the_names_of_classes_are_read_without_the_weights(tmp_path, tokenizer):
    many = tuple(f"class {number}" for number in range(12))  # "10" comes before "2" as text
    assert class_names_of(save_model(tmp_path, "many", tokenizer, many)) == many
    assert class_names_of(save_model(tmp_path, "two", tokenizer, NEW, named=False)) == ("LABEL_0", "LABEL_1")
    assert class_names_of(save_model(tmp_path, "three", tokenizer, "abc", named=False)) == ("LABEL_0", "LABEL_1", "LABEL_2")


def test_models_of_the_data_or_without_names_are_taken_without_a_word(trained, capsys):
    for labels, named in ((OLD, True), (NEW, True), (NEW, False)):
        folder = trained(labels, named=named)
        check_trained_on([folder / "models" / "teacher", folder / "models" / "student_distilled"], folder / "sst2_data")
    assert capsys.readouterr().out == ""


def test_a_model_of_other_classes_is_refused_with_both_and_the_command(trained, tokenizer):
    folder = trained()
    data = write_data(folder / "sst2_data", NEW)
    with pytest.raises(CompactMindError) as refused:
        check_trained_on([folder / "models" / "teacher"], data)
    line = str(refused.value)
    assert "teacher was trained for other classes (negative, positive) than those of" in line and "(ham, spam)" in line
    assert line.endswith("run `python 1_distill.py` again") and "\n" not in line
    own = save_model(folder / "models", "student_pruned_4x", tokenizer, OLD, script="2_prune_finetune.py")
    with pytest.raises(CompactMindError, match="run `python 2_prune_finetune.py` again, with the settings it was made with"):
        check_trained_on([own], data)


def test_other_sentences_of_the_same_classes_are_one_line(trained, tokenizer, capsys):
    folder = trained()
    data = write_data(folder / "sst2_data", OLD, seed=1)
    unknown = save_model(folder / "models", "unknown", tokenizer, OLD)  # nothing is recorded of what it was trained on
    check_trained_on([folder / "models" / "teacher", folder / "models" / "student_distilled", unknown], data)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: teacher, student_distilled were trained on other sentences than those in ")
    assert line.endswith("`python 1_distill.py`")
    check_trained_on([folder / "models" / "teacher"], data)
    assert "warning: teacher was trained on other sentences" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------- stages
@pytest.mark.parametrize("new", [(*NEW, "other"), NEW], ids=["another number", "another meaning"])
@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("2_prune_finetune.py", ()),
        ("3_quantize.py", ("--parents", "student_distilled", "--w8a8_parents")),
        ("3_quantize.py", ("--parents", "--w8a8_parents", "student_distilled")),
    ],
    ids=["prune", "nf4", "w8a8"],
)
def test_stages_refuse_a_parent_of_other_classes(trained, run_here, script, arguments, new):
    folder = trained()
    write_data(folder / "sst2_data", new)
    status, output = run_here(script, *arguments, cwd=folder)
    classes = f"for other classes (negative, positive) than those of sst2_data ({', '.join(new)}): run `python 1_distill.py` again"
    assert status == 1 and f"models/student_distilled was trained {classes}" in output
    assert sorted(path.name for path in (folder / "models").glob("[!.]*")) == ["student_distilled", "teacher"]


def test_pruning_refuses_a_teacher_of_other_classes(trained, tokenizer, run_here):
    folder = trained()
    data = write_data(folder / "sst2_data", NEW)
    save_model(folder / "models", "student_distilled", tokenizer, NEW, data)
    status, output = run_here("2_prune_finetune.py", cwd=folder)
    assert status == 1 and "models/teacher was trained for other classes" in output


def test_stages_go_on_with_other_sentences_and_say_so(trained, run_here):
    folder = trained()
    write_data(folder / "sst2_data", OLD, seed=1)
    status, output = run_here("3_quantize.py", "--parents", "--w8a8_parents", "student_distilled", cwd=folder)
    assert status == 0, output
    assert output.count("student_distilled was trained on other sentences than those in sst2_data") == 1
    assert (folder / "models" / "student_distilled_w8a8").is_dir()


# ------------------------------------------------------------------------------------------------------------- report
def report_rows(folder, *arguments) -> tuple[str, dict]:
    """Run the report in this process, memory not really measured: (output, rows by name)."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(classifiers, "peak_memory", lambda *_: 1.0)
        quiet = SimpleNamespace(readouterr=lambda: SimpleNamespace(out="", err=""))
        status, message = scripts.run_script_here("6_evaluate_report.py", *arguments, cwd=folder, monkeypatch=patch, capfd=quiet)
    assert status == 0, printed.getvalue() + message
    return printed.getvalue(), {row["name"]: row for row in helpers.read_json(folder / "results" / "final_report.json")["models"]}


@pytest.mark.parametrize(("old", "new"), [(OLD, ("0", "1")), (NEW, OLD), (NEW, ("0", "1"))], ids=str)
def test_a_row_of_other_classes_is_unusable_and_costs_no_other(trained, tokenizer, old, new):
    folder = trained(old)
    data = write_data(folder / "sst2_data", new)
    save_model(folder / "models", "student_finetuned", tokenizer, new, data, seed=3)
    helpers.make_distilbert(**Task(NEW).head_settings()).save_pretrained(folder / "theirs")
    tokenizer.save_pretrained(folder / "theirs")
    output, rows = report_rows(folder, "--models", "theirs=theirs")
    for name in ("teacher", "student_distilled"):
        assert (rows[name]["status"], rows[name]["command"]) == ("broken", "python 1_distill.py") and "accuracy" not in rows[name]
        assert f"for other classes ({', '.join(old)}) than those of sst2_data ({', '.join(new)})" in rows[name]["error"]
        assert f"{name}: {rows[name]['error']}" in output
    for name in ("student_finetuned", "theirs"):  # what others call classes may be their own words for those of the data
        assert rows[name]["status"] == "measured" and rows[name]["mcnemar_against_reference"] is None
    assert "were trained on other sentences" not in output


def test_rows_of_other_sentences_are_measured_and_said_in_one_line(trained, tokenizer):
    folder = trained()
    data = write_data(folder / "sst2_data", OLD, seed=1)
    save_model(folder / "models", "student_finetuned", tokenizer, OLD, data)
    output, rows = report_rows(folder)
    assert all(rows[name]["status"] == "measured" for name in ("teacher", "student_distilled", "student_finetuned"))
    (line,) = [line for line in output.splitlines() if "trained on other sentences" in line]
    assert line.startswith("warning: teacher, student_distilled were trained on other sentences than those in sst2_data")
