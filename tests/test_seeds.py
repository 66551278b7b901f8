"""Several seeds of one training: names, manifests, and the row that stands for all of them in the report."""

import helpers
import pytest

from compactmind.checkpoint import load_checkpoint, save_checkpoint
from compactmind.data import write_dataset
from compactmind.evaluation import seeds as measuring
from compactmind.evaluation.classifiers import measure_accuracy
from compactmind.evaluation.seeds import add_seeds, is_repeat
from compactmind.manifest import MADE_BY, read_manifest
from compactmind.report.seeds import seeds_cell, seeds_sentences, seeds_warnings
from compactmind.seeds import format_spread, repeats_record, runs_of


def stage_of(seed: int, **settings) -> dict:
    return {"script": "1_distill.py", "config": {"seed": seed, **settings}, "inputs": {}}


def test_the_first_seed_keeps_the_name_and_the_others_say_whose_they_are():
    assert runs_of("teacher", 42, 1) == {"teacher": 42}
    runs = runs_of("teacher", 42, 3)
    assert runs == {"teacher": 42, "teacher_seed43": 43, "teacher_seed44": 44}
    assert [repeats_record("teacher", run) for run in runs] == [{}, {"repeats": "teacher"}, {"repeats": "teacher"}]
    assert runs_of("m", 2**32 - 1, 2) == {"m": 2**32 - 1, "m_seed0": 0}
    assert format_spread([0.842, 0.831, 0.849, 0.84]) == "median 84.1%, 83.1% to 84.9%"


@pytest.fixture
def models(tmp_path, tokenizer):
    """A model with four other seeds: two of the same training, one of another, one that is damaged."""
    sentences = helpers.make_sentences(60)
    write_dataset(
        tmp_path / "sst2_data", {"train": sentences[:20], "validation": sentences[20:30], "test": sentences[30:]}, {"source": "made up"}
    )
    folder = tmp_path / "models"
    for run, seed in runs_of("student", 8, 5).items():
        save_checkpoint(
            folder / run, helpers.make_distilbert(seed=seed), tokenizer, kind="dense", parent=None,
            stage=stage_of(seed, lr=2 if seed == 11 else 1), metrics={"validation_accuracy": seed / 100},
            extra=repeats_record("student", run),
        )  # fmt: skip
    (folder / "student_seed12" / "model.safetensors").write_bytes(b"")
    save_checkpoint(
        folder / "alone_seed3", helpers.make_distilbert(), tokenizer, kind="dense", parent=None, stage=stage_of(3),
        extra={"repeats": "alone"},
    )  # fmt: skip
    return folder


def measured_row(models, name: str = "student") -> dict:
    row = {"name": name, "track": "encoder", "status": "measured", "directory": str(models / name)}
    row["measured_with"] = {"data": "d", "machine": "m", "versions": {}, "max_length": 64, "eval_batch_size": 8, "weights": "w"}
    return row | {"accuracy": accuracy_of(models / name)}


def accuracy_of(directory) -> float:
    row = {"directory": str(directory)}
    measure_accuracy(row, load_checkpoint(directory), helpers.make_sentences(60)[30:], measuring.read_task(directory), 64, 8)
    return row["accuracy"]


def test_a_row_stands_for_its_seeds_and_says_who_could_not_take_part(models, monkeypatch):
    row = measured_row(models)
    add_seeds([row], {}, models.parent / "sst2_data", 64, 8)
    result = row["seeds"]
    assert [(run["name"], run["seed"]) for run in result["runs"]] == [("student", 8), ("student_seed9", 9), ("student_seed10", 10)]
    accuracies = [accuracy_of(models / run["name"]) for run in result["runs"]]
    assert [run["accuracy"] for run in result["runs"]] == accuracies and len(set(accuracies)) > 1
    assert (result["lowest"], result["median"], result["highest"]) == tuple(sorted(accuracies))
    assert result["runs"][1]["validation_accuracy"] == 0.09
    assert [run["name"] for run in result["left_out"]] == ["student_seed11", "student_seed12"]
    assert "more than its seed: run `python 1_distill.py --seeds N` again" in result["left_out"][0]["error"]
    assert seeds_cell(row) == f"{format_spread(accuracies)} (3)" and seeds_cell({}) == "-"
    (sentence,) = seeds_sentences({"student": row})
    assert sentence.startswith(f"student, trained with 3 seeds: accuracy {format_spread(accuracies)}; the row is the run of seed 8")
    assert [line.split(" is left")[0] for line in seeds_warnings({"student": row})] == [
        "student: student_seed11", "student: student_seed12"
    ]  # fmt: skip

    monkeypatch.setattr(measuring, "measure_accuracy", None)  # measured once
    again = measured_row(models)
    add_seeds([again], {"student": row}, models.parent / "sst2_data", 64, 8)
    assert again["seeds"]["runs"] == result["runs"] and len(again["seeds"]["left_out"]) == 2
    other = measured_row(models)
    other["measured_with"]["max_length"] = 5
    add_seeds([other], {"student": row}, models.parent / "sst2_data", 5, 8)
    assert len(other["seeds"]["runs"]) == 1 and seeds_cell(other) == "-"  # nothing of the earlier ones holds


def test_only_what_lies_beside_its_model_is_no_row(models):
    assert is_repeat(models / "student_seed9")
    assert not is_repeat(models / "student") and not is_repeat(models / "alone_seed3") and not is_repeat(models / "nothing")


def test_models_with_a_cut_vocabulary_name_the_command_that_makes_them(tmp_path, tokenizer):
    for name in ("student_pruned_small", "student_distilled_small_nf4", "student_pruned_small_w8a8"):
        with pytest.raises(Exception, match=r"run `python 3_quantize.py --vocabulary_coverage 0.999` first"):
            read_manifest(tmp_path / name)
    assert {name for name in MADE_BY if "_small" in name} == {
        f"{name}_small{end}" for name, ends in {"student_distilled": ("", "_nf4"), "student_pruned": ("", "_nf4", "_w8a8")}.items()
        for end in ends
    }  # fmt: skip
