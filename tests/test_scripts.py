"""The stages as a user runs them: what they write and say, and what a second run does again."""

import math
import re

import finished_stages
import helpers
import matplotlib.image
import pytest
import torch
from finished_stages import digest, leftovers

from compactmind.checkpoint import load_checkpoint
from compactmind.data import load_split
from compactmind.manifest import read_manifest
from compactmind.methods.pruning.encoder import block_linears
from compactmind.methods.pruning.two_of_four import is_two_of_four

copy, finished = finished_stages.copy, finished_stages.finished

HISTORY_KEYS = {
    "epoch", "phase", "loss", "accuracy", "score", "standard_error", "sparsity", "lr", "temperature", "alpha", "seconds"
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- artefacts
def test_every_stage_writes_its_checkpoints_and_nothing_else(finished):
    folder, _ = finished
    names = {path.name for path in (folder / "models").iterdir() if not path.name.startswith(".")}
    assert names == {"teacher_base", "teacher", "student_finetuned", "student_distilled", "student_pruned"}
    assert {path.name for path in (folder / "results").iterdir()} == {"student_pruned_history.png"}
    assert leftovers(folder) == []


def test_manifests_say_what_each_model_is_and_where_it_came_from(finished):
    folder, _ = finished
    manifests = {
        name: read_manifest(folder / "models" / name)
        for name in ("teacher_base", "teacher", "student_finetuned", "student_distilled", "student_pruned")
    }
    whole = {"num_heads": 4, "head_dim": 8, "intermediate_size": 64}
    for name, kind, parent, layers in (
        ("teacher_base", "dense", None, [whole] * 4),
        ("teacher", "dense", "teacher_base", [whole] * 4),
        ("student_finetuned", "dense", "teacher", [whole]),
        ("student_distilled", "dense", "teacher", [whole]),
    ):
        assert (manifests[name]["kind"], manifests[name]["parent"], manifests[name]["layers"]) == (kind, parent, layers)
    pruned = manifests["student_pruned"]
    assert (pruned["kind"], pruned["parent"]) == ("pruned", "student_distilled")
    assert pruned["architecture"] == "PrunedDistilBertForSequenceClassification"
    (layer,) = pruned["layers"]
    assert layer["head_dim"] == 8 and layer["intermediate_size"] % 8 == 0
    removed = (4 - layer["num_heads"]) * 8 * (4 * 32 + 3) + (64 - layer["intermediate_size"]) * (2 * 32 + 1)
    total = 4 * 8 * (4 * 32 + 3) + 64 * (2 * 32 + 1)
    assert pruned["metrics"]["sparsity"] == pytest.approx(removed / total)
    assert pruned["metrics"]["sparsity"] >= 0.4
    assert 0 <= pruned["metrics"]["masked_against_compacted"] <= 1e-5
    assert manifests["student_distilled"]["parameters"] - pruned["parameters"] == removed
    assert re.fullmatch(r"student_pruned_taylor_0\.4_\d{8}-\d{6}", pruned["experiment_name"])
    assert pruned["stage"]["inputs"] == {name: digest(folder, name) for name in ("student_distilled", "teacher")}
    assert len({manifest["data_fingerprint"] for name, manifest in manifests.items() if name != "teacher_base"}) == 1
    assert len({digest(folder, name) for name in manifests}) == len(manifests)


def test_saved_models_load_and_answer(finished):
    folder, _ = finished
    for name in ("teacher", "student_finetuned", "student_distilled", "student_pruned"):
        checkpoint = load_checkpoint(folder / "models" / name)
        assert checkpoint.model.config.id2label == {0: "negative", 1: "positive"}
        batch = checkpoint.tokenizer(
            ["a good film", "a bad and boring plot"], padding=True, return_tensors="pt", return_token_type_ids=False
        )
        with torch.no_grad():
            logits = checkpoint.model(**batch).logits
        assert logits.shape == (2, 2) and not torch.equal(logits[0], logits[1])


def test_histories_have_a_row_per_epoch(finished):
    folder, _ = finished
    history = {
        name: helpers.read_json(folder / "models" / name / "training_history.json")
        for name in ("teacher", "student_finetuned", "student_distilled", "student_pruned")
    }
    for name, rows in history.items():
        assert [row["epoch"] for row in rows] == list(range(1, len(rows) + 1)), name
        for row in rows:
            assert set(row) == HISTORY_KEYS and row["score"] == row["accuracy"] and 0 < row["standard_error"] < 0.5
            assert 0 <= row["accuracy"] <= 1 and row["seconds"] > 0 and 0 < row["loss"] < 10
    assert [row["phase"] for row in history["teacher"]] == ["finetune"]
    assert [(row["phase"], row["alpha"], row["temperature"]) for row in history["student_finetuned"]] == [
        ("finetune", None, None)
    ] * 2
    distilled = history["student_distilled"]
    assert [row["phase"] for row in distilled] == ["distill"] * 2
    # 8 steps an epoch, the last one at 7/16 and 15/16 of the way.
    assert [row["temperature"] for row in distilled] == pytest.approx([10 - 8 * 7 / 16, 10 - 8 * 15 / 16])
    assert [row["alpha"] for row in distilled] == pytest.approx([0.9 - 0.7 * 7 / 16, 0.9 - 0.7 * 15 / 16])
    assert distilled[-1]["lr"] == 0.0
    pruned = history["student_pruned"]
    assert [row["phase"] for row in pruned] == ["pruning", "pruning", "recovery"]
    # Of 16 pruning steps every third tightens the masks: the last time in epoch 1 at step 6 of 15, then up to the target.
    # At least what is due is removed, and at most one head (the largest structure) more.
    head = 8 * (4 * 32 + 3) / (4 * 8 * (4 * 32 + 3) + 64 * (2 * 32 + 1))
    for row, due in ((pruned[0], 0.4 * (1 - (1 - 6 / 15) ** 3)), (pruned[1], 0.4)):
        assert due <= row["sparsity"] < due + head
    assert pruned[0]["sparsity"] <= pruned[1]["sparsity"] == pruned[2]["sparsity"]
    assert pruned[1]["sparsity"] >= 0.4
    assert pruned[1]["lr"] == 5e-5 and pruned[2]["lr"] == 0.0  # recovery starts at its own rate and decays


def test_the_checkpoint_is_the_last_epoch_not_worse_than_the_best(finished):
    folder, _ = finished
    validation = len(load_split(folder / "sst2_data", "validation"))
    for name in ("teacher", "student_finetuned", "student_distilled"):
        rows = helpers.read_json(folder / "models" / name / "training_history.json")
        metrics = read_manifest(folder / "models" / name)["metrics"]
        best, kept = 0.0, None
        for row in rows:
            best = max(best, row["accuracy"])
            if row["accuracy"] >= best - math.sqrt(best * (1 - best) / validation):
                kept = row
        assert (metrics["kept_epoch"], metrics["validation_accuracy"]) == (kept["epoch"], kept["accuracy"])
    rows = helpers.read_json(folder / "models" / "student_pruned" / "training_history.json")
    metrics = read_manifest(folder / "models" / "student_pruned")["metrics"]
    assert metrics["validation_accuracy"] == rows[metrics["kept_epoch"] - 1]["accuracy"]
    assert metrics["kept_epoch"] >= 2  # no epoch before the target sparsity was reached
    for name, rule in (("teacher", "last epoch within one standard error"), ("student_pruned", "better than by more than 0.001")):
        assert rule in read_manifest(folder / "models" / name)["stage"]["config"]["selection"]


def test_the_plot_is_a_picture(finished):
    path = finished[0] / "results" / "student_pruned_history.png"
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    picture = matplotlib.image.imread(path)
    assert picture.shape[0] > 300 and picture.shape[1] > 600
    assert len({tuple(pixel) for pixel in picture[::7, ::7].reshape(-1, picture.shape[2]).tolist()}) > 5  # not blank


def test_a_plot_that_a_killed_run_has_not_drawn_is_drawn_by_the_next(copy, run_here):
    plot, before = copy / "results" / "student_pruned_history.png", digest(copy, "student_pruned")
    plot.unlink()
    status, output = run_here("2_prune_finetune.py", cwd=copy)
    assert status == 0 and "is up to date" in output and "plot results/student_pruned_history.png" in output, output
    assert matplotlib.image.imread(plot).shape[0] > 300 and digest(copy, "student_pruned") == before


def test_training_learns_what_the_words_say(copy, run_here):
    assert run_here("download_model.py", "--max_rows", 400, cwd=copy)[0] == 0
    learning = ("--freeze_word_embeddings", False, "--log_every", 50)  # the words of the tiny BERT are random numbers
    arguments = ("--teacher_lr", 1e-3, "--student_lr", 1e-3, "--teacher_epochs", 5, *learning)
    status, output = run_here("1_distill.py", *arguments, cwd=copy)
    assert status == 0, output
    for name in ("teacher", "student_finetuned", "student_distilled"):
        assert read_manifest(copy / "models" / name)["metrics"]["validation_accuracy"] > 0.9, output
    assert "no better than chance" not in output
    status, output = run_here("2_prune_finetune.py", *learning, cwd=copy)
    assert status == 0, output
    metrics = read_manifest(copy / "models" / "student_pruned")["metrics"]
    assert metrics["validation_accuracy"] > 0.9 and metrics["sparsity"] >= 0.4, output
    assert 0 < metrics["masked_against_compacted"] <= 1e-5


def test_scripts_print_their_settings_their_progress_and_where_the_result_is(finished):
    _, outputs = finished
    assert outputs["1_distill.py"].startswith("# 1_distill.py, profile smoke\n# ")
    assert "student_epochs=2" in outputs["1_distill.py"].splitlines()[1]
    assert outputs["1_distill.py"].count("computing the teacher's logits of 64 sentences once") == 1
    assert "computing the teacher's logits" not in outputs["2_prune_finetune.py"]  # they are read from the cache
    for name in ("teacher", "student_finetuned", "student_distilled"):
        assert f"{name}: saved to models/{name}" in outputs["1_distill.py"]
    assert re.search(r"student_distilled +step +16/16 \| loss .* \| lr .* sentences/s \| left 0:00", outputs["1_distill.py"])
    assert re.search(r"student_pruned +compacted: .* heads \[\d\], FFN \[\d+\]", outputs["2_prune_finetune.py"])
    assert "student_pruned: saved to models/student_pruned (" in outputs["2_prune_finetune.py"]
    assert outputs["2_prune_finetune.py"].endswith("plot results/student_pruned_history.png\n")


# --------------------------------------------------------------------------------------------------- up to date or again
def test_a_second_run_skips_everything_and_says_so(copy, run_here):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()}
    for name, times in (("download_model.py", 2), ("1_distill.py", 3), ("2_prune_finetune.py", 1)):
        status, output = run_here(name, cwd=copy)
        assert status == 0
        assert output.count("up to date") == times
        assert "epoch" not in output.split("\n", 2)[2]
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()} == before


def test_a_changed_setting_runs_only_what_depends_on_it(copy, run_here):
    before = {name: digest(copy, name) for name in ("teacher", "student_finetuned", "student_distilled")}
    status, output = run_here("1_distill.py", "--temperature_start", 5, cwd=copy)
    assert status == 0
    assert "models/teacher is up to date" in output and "models/student_finetuned is up to date" in output
    assert "student_distilled  epoch 2/2" in output
    assert {name: digest(copy, name) == old for name, old in before.items()} == {
        "teacher": True,
        "student_finetuned": True,
        "student_distilled": False,
    }
    status, output = run_here("2_prune_finetune.py", cwd=copy)  # its input is another one now
    assert status == 0 and "up to date" not in output and "epoch 3/3 recovery" in output
    assert leftovers(copy) == []


def test_experiments_stand_side_by_side(copy, run_here):
    before = digest(copy, "student_pruned")
    arguments = ("--criterion", "l2", "--output_dir", "student_l2", "--experiment_name", "mine", "--alpha", 0, "--round_to", 1)
    status, output = run_here("2_prune_finetune.py", *arguments, cwd=copy)
    assert status == 0, output
    assert digest(copy, "student_pruned") == before != digest(copy, "student_l2")
    manifest = read_manifest(copy / "models" / "student_l2")
    assert (manifest["experiment_name"], manifest["stage"]["config"]["criterion"]) == ("mine", "l2")
    assert (copy / "results" / "student_l2_history.png").is_file()
    rows = helpers.read_json(copy / "models" / "student_l2" / "training_history.json")
    assert {(row["alpha"], row["temperature"]) for row in rows} == {(None, None)}  # labels only


def test_several_seeds_leave_the_first_as_it_is_and_the_pattern_is_exact(copy, run_here):
    names = ("teacher", "student_finetuned", "student_distilled")
    before = {name: digest(copy, name) for name in names}
    status, output = run_here("1_distill.py", "--seeds", 2, cwd=copy)
    assert status == 0 and output.count("is up to date") == 3 and output.count("2 seeds: validation accuracy median") == 3, output
    for name in names:
        other = read_manifest(copy / "models" / f"{name}_seed43")
        assert digest(copy, name) == before[name] != other["files"]["model.safetensors"]["sha256"]
        assert other["repeats"] == name and other["stage"]["config"]["seed"] == 43
        assert other["stage"]["inputs"] == read_manifest(copy / "models" / name)["stage"]["inputs"]
    status, output = run_here("2_prune_finetune.py", "--pattern", "2:4", "--seeds", 2, "--epochs", 1, cwd=copy)
    assert status == 0, output
    for name, repeats in (("student_pruned_2to4", None), ("student_pruned_2to4_seed43", "student_pruned_2to4")):
        checkpoint = load_checkpoint(copy / "models" / name)
        assert all(is_two_of_four(linear.weight) for linear in block_linears(checkpoint.model).values())
        manifest = checkpoint.manifest
        assert (manifest["kind"], manifest["sparsity_pattern"], manifest.get("repeats")) == ("dense", "2:4", repeats)
        assert manifest["metrics"]["sparsity"] == 0.5 and "criterion" not in manifest["stage"]["config"]
    status, output = run_here("2_prune_finetune.py", "--pattern", "2:4", "--target_gflops", 0.5, cwd=copy)
    assert status == 1 and "no family can be made by it" in output


def test_recovery_stops_early_and_keeps_the_best_epoch(copy, run_here):
    status, output = run_here("2_prune_finetune.py", "--epochs", 9, "--patience", 2, "--min_delta", 1, cwd=copy)
    assert status == 0, output
    assert "stopped early: no better validation accuracy for 2 epochs" in output
    rows = helpers.read_json(copy / "models" / "student_pruned" / "training_history.json")
    assert len(rows) == 4  # nothing is better by 200 points: epochs 3 and 4 use up the patience
    assert read_manifest(copy / "models" / "student_pruned")["metrics"]["kept_epoch"] == 2
