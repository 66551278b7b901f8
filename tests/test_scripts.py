"""The stages as a user runs them: what they write, that they resume, and what they say when something is wrong."""

import collections
import contextlib
import math
import re
import runpy
import shutil
import signal

import helpers
import matplotlib.image
import pytest
import torch
from safetensors.torch import load_file

import compactmind.loop
import compactmind.room
import compactmind.training
from compactmind.checkpoint import load_checkpoint
from compactmind.data import EncodedSentences, load_split
from compactmind.errors import CompactMindError
from compactmind.evaluation.accuracy import accuracy_of
from compactmind.forward import predict_logits
from compactmind.manifest import read_manifest
from compactmind.methods.pruning.encoder import block_linears
from compactmind.methods.pruning.importance import CRITERIA
from compactmind.methods.pruning.masks import apply_masks
from compactmind.methods.pruning.two_of_four import is_two_of_four
from compactmind.methods.retraining.loss import RetrainingLoss

HISTORY_KEYS = {"epoch", "phase", "loss", "accuracy", "sparsity", "lr", "temperature", "alpha", "seconds"}
LONG_DISTILL = ("--student_epochs", 12)
LONG_PRUNE = ("--epochs", 9, "--prune_end_epoch", 5, "--patience", 9)
"""Enough epochs for a signal to arrive before the end."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A directory in which download_model.py, 1_distill.py and 2_prune_finetune.py have run, and what each printed."""
    folder = helpers.make_workspace(tmp_path_factory.mktemp("finished"))
    names = ("download_model.py", "1_distill.py", "2_prune_finetune.py")
    outputs = dict(zip(names, helpers.run_scripts(*((name,) for name in names), cwd=folder), strict=True))
    return folder, outputs


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of that directory to run something else in."""
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder, ignore=shutil.ignore_patterns("hf_home"))
    return folder


def digest(folder, name: str) -> str:
    """Return the recorded SHA-256 of a checkpoint's weights, after checking that its files are whole."""
    return read_manifest(folder / "models" / name)["files"]["model.safetensors"]["sha256"]


def leftovers(folder) -> list[str]:
    """Return what a finished run must not leave behind."""
    return sorted(path.name for path in (folder / "models").iterdir() if re.search(r"\.tmp|\.old$|\.training\.", path.name))


def temporary_directories(folder) -> list[str]:
    return sorted(path.name for path in folder.rglob(".*") if re.search(r"\.tmp-|\.old$", path.name))


def history_without_times(folder, name: str) -> list[dict]:
    return [row | {"seconds": None} for row in helpers.read_json(folder / "models" / name / "training_history.json")]


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
            assert set(row) == HISTORY_KEYS
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


# ------------------------------------------------------------------------------------------- mixed precision, processes
@pytest.fixture
def measured(monkeypatch):
    """All validation logits that training was judged by, in order."""
    seen, original = [], compactmind.loop.validation_logits
    monkeypatch.setattr(compactmind.loop, "validation_logits", lambda *them: seen.append(original(*them)) or seen[-1])
    return seen


def check_what_was_measured(folder, name: str, measured) -> None:
    """A saved model is float32, and its logits are those of the epoch whose accuracy is recorded."""
    assert {tensor.dtype for tensor in load_file(folder / "models" / name / "model.safetensors").values()} == {torch.float32}
    checkpoint = load_checkpoint(folder / "models" / name)
    validation = EncodedSentences(checkpoint.tokenizer, load_split(folder / "sst2_data", "validation"), 64)
    logits = predict_logits(checkpoint.model, validation, 64)
    assert min((logits - each).abs().max().item() for each in measured) < 1e-5, name
    assert checkpoint.manifest["metrics"]["validation_accuracy"] == accuracy_of(logits, validation.labels)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains_float32_models_that_are_what_was_measured(
    copy, run_here, monkeypatch, fresh_accelerator, measured, precision
):
    if precision == "bf16":
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    else:
        monkeypatch.setattr(compactmind.training, "make_accelerator", helpers.fp16_on_a_cpu)
    before = {name: digest(copy, name) for name in ("teacher", "student_finetuned", "student_distilled", "student_pruned")}
    for script, arguments in (("1_distill.py", ("--hidden_loss_weight", 0.1)), ("2_prune_finetune.py", ())):
        status, output = run_here(script, *arguments, cwd=copy)
        assert status == 0 and "up to date" not in output, output
    for name, old in before.items():
        assert digest(copy, name) != old
        assert read_manifest(copy / "models" / name)["stage"]["config"]["mixed_precision"] == precision
        check_what_was_measured(copy, name, measured)
    metrics = read_manifest(copy / "models" / "student_pruned")["metrics"]
    assert metrics["sparsity"] >= 0.4 and metrics["masked_against_compacted"] <= 1e-5


def comparable(folder, name: str) -> tuple[list[dict], dict[str, torch.Tensor], dict]:
    """Return history, weights and manifest of a checkpoint."""
    weights = load_file(folder / "models" / name / "model.safetensors")
    return history_without_times(folder, name), weights, read_manifest(folder / "models" / name)


def assert_one_training(together: tuple, alone: tuple, start: dict[str, torch.Tensor]) -> None:
    """Two trainings from the weights `start` are the same up to rounding, and did learn."""
    for ours, theirs in zip(together[0], alone[0], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert (ours["epoch"], ours["lr"], ours["sparsity"]) == (theirs["epoch"], theirs["lr"], theirs["sparsity"])
    assert together[2]["layers"] == alone[2]["layers"]
    for name, weight in alone[1].items():
        if name in start and start[name].shape == weight.shape and not torch.equal(start[name], weight):
            assert (together[1][name] - weight).norm() < 0.1 * (start[name] - weight).norm(), name


def test_two_processes_with_half_the_sentences_each_are_one_with_all(copy, run_here):
    one, two = ("--batch_size", 16), ("--batch_size", 8)
    teacher = ("--teacher_dropout", 0)  # each process drops its own
    with helpers.training_batches() as seen:
        status, output = run_here("1_distill.py", *one, *teacher, cwd=copy)
    assert status == 0, output
    names = ("teacher", "student_finetuned", "student_distilled")
    alone = {name: comparable(copy, name) for name in names}
    distilled, seen_together = helpers.run_script_watched("1_distill.py", *two, *teacher, cwd=copy)
    helpers.assert_shared_out(seen_together, seen)
    assert distilled.stdout.count("saved to models/student_distilled") == 1
    assert "up to date" not in distilled.stdout  # what two processes made is another result, and says so
    together = {name: comparable(copy, name) for name in names}
    assert_one_training(
        together["teacher"], alone["teacher"], load_file(copy / "models" / "teacher_base" / "model.safetensors")
    )
    for name in names:
        config = {key: each[name][2]["stage"]["config"] for key, each in (("alone", alone), ("together", together))}
        assert config["alone"] | {"num_processes": 2, "batch_size": 8} == config["together"]
        assert (config["together"]["effective_batch"], config["alone"]["num_processes"]) == (16, 1)
        for ours, theirs in zip(together[name][0], alone[name][0], strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)  # the students' start, the teacher, is rounded too

    arguments = ("--prune_every", 2, "--lr", 1e-3)
    with helpers.training_batches() as seen:
        status, output = run_here("2_prune_finetune.py", *one, *arguments, "--output_dir", "alone", cwd=copy)
    assert status == 0, output
    pruned, seen_together = helpers.run_script_watched("2_prune_finetune.py", *two, *arguments, cwd=copy)
    helpers.assert_shared_out(seen_together, seen)
    assert re.search(r"student_pruned +step +12/12 ", pruned.stdout)
    together, alone = comparable(copy, "student_pruned"), comparable(copy, "alone")
    assert_one_training(together, alone, load_file(copy / "models" / "student_distilled" / "model.safetensors"))
    assert together[2]["metrics"]["masked_against_compacted"] <= 1e-5
    assert leftovers(copy) == []


def test_a_run_killed_as_one_process_starts_anew_as_two(copy):
    epochs = ("--student_epochs", 12, "--students", "student_finetuned", "--force", True)
    status, output = helpers.run_script_until("student_finetuned  epoch 3/12", signal.SIGKILL, "1_distill.py", *epochs, cwd=copy)
    assert status == -signal.SIGKILL, output
    ended = helpers.run_script("1_distill.py", *epochs[:-2], cwd=copy, processes=2)  # the teacher is of one process, too
    assert ended.returncode == 0, ended.stderr
    assert "models/teacher is made again: it was made with another config.effective_batch, config.num_processes" in ended.stdout
    assert ".student_finetuned.training.pt is of another run (effective_batch " in ended.stdout
    assert "num_processes 1 instead of 2" in ended.stdout and "going on after" not in ended.stdout
    rows = helpers.read_json(copy / "models" / "student_finetuned" / "training_history.json")
    assert [row["epoch"] for row in rows] == list(range(1, 13)) and all(row["lr"] > 0 for row in rows[:-1])
    assert read_manifest(copy / "models" / "student_finetuned")["stage"]["config"]["num_processes"] == 2


@pytest.mark.parametrize("name", ["3_quantize.py", "4_smoothquant_llama.py", "6_evaluate_report.py", "download_model.py"])
def test_what_is_for_one_process_refuses_several_in_one_line(tmp_path, run_here, monkeypatch, name):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        status, output = run_here(name, cwd=tmp_path)
        if rank == "0":
            assert status == 1 and f"error: {name} is for one process and was started as 2: run `python {name}`" in output
        else:
            assert (status, output) == (0, "")  # the first one speaks, and fails
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------------- training that diverges
@pytest.mark.parametrize(
    ("script", "arguments", "parts"),
    [
        ("1_distill.py", ("--teacher_lr", 1e25), ("teacher, epoch 1 (finetune): ", "teacher_lr 1e+25", "--teacher_lr")),
        ("1_distill.py", ("--student_lr", 1e25), ("student_finetuned, epoch 1 (finetune): ", "student_lr 1e+25", "--student_lr")),
        ("2_prune_finetune.py", ("--lr", 1e25), ("student_pruned, epoch 1 (pruning): ", "lr 1e+25", "--lr")),
        ("2_prune_finetune.py", ("--recovery_lr", 1e25), ("student_pruned, epoch 3 (recovery): ", "--recovery_lr")),
    ],
    ids=str,
)
@pytest.mark.parametrize("log_every", [2, 1000])
def test_training_to_no_number_ends_with_the_setting_to_lower_and_saves_nothing(
    copy, run_here, script, arguments, parts, log_every
):
    before = {path.name: digest(copy, path.name) for path in (copy / "models").glob("[!.]*")}
    expected = (*parts, "the loss became nan at step", "nothing was saved")
    expect_error(run_here, script, *arguments, "--log_every", log_every, cwd=copy, parts=expected)
    assert {path.name: digest(copy, path.name) for path in (copy / "models").glob("[!.]*")} == before


def test_a_model_no_better_than_chance_is_warned_of(finished):
    for script, names in (
        ("1_distill.py", ("teacher", "student_finetuned", "student_distilled")),
        ("2_prune_finetune.py", ("student_pruned",)),
    ):
        for name in names:
            assert f"warning: {name} may be no better than chance" in finished[1][script]


def test_only_a_wrong_compaction_is_called_a_bug(encoded, monkeypatch):
    compact_and_compare = runpy.run_path(str(helpers.REPOSITORY / "2_prune_finetune.py"), run_name="stage")[
        "compact_and_compare"
    ]
    model = helpers.make_distilbert()
    masks = helpers.uneven_masks(model)
    with pytest.raises(CompactMindError, match="this is a bug"):
        compact_and_compare(model, masks, encoded, 8)  # what the masks prune is not zero
    apply_masks(model, masks)
    assert compact_and_compare(model, masks, encoded, 8)[1] <= 1e-5
    with torch.no_grad():
        model.classifier.weight *= 1e5
    for share, fine in ((5e-6, True), (5e-5, False)):  # rounding grows with the logits

        def rounded(each, *arguments, share=share):
            return predict_logits(each, *arguments) * (1 + share * (each is not model))

        monkeypatch.setitem(compact_and_compare.__globals__, "predict_logits", rounded)
        with contextlib.nullcontext() if fine else pytest.raises(CompactMindError, match="this is a bug"):
            assert 1e-2 < compact_and_compare(model, masks, encoded, 8)[1] < 10
    with torch.no_grad():
        model.classifier.weight *= math.inf
    with pytest.raises(CompactMindError, match="not finite: training diverged, use a smaller --lr"):
        compact_and_compare(model, masks, encoded, 8)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_pipeline_with_retraining_runs_in_the_precision_asked_for(
    tmp_path, run_here, monkeypatch, fresh_accelerator, precision
):
    helpers.add_llama(tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    seen, original = set(), RetrainingLoss.forward

    def spy(self, windows):
        seen.add(self.student(input_ids=windows, use_cache=False).logits.dtype)
        return original(self, windows)

    monkeypatch.setattr(RetrainingLoss, "forward", spy)
    status, output = run_here("5_bayesian_search.py", "--strategy", "fixed", cwd=tmp_path)
    assert status == 0, output
    assert seen == {{"no": torch.float32, "bf16": torch.bfloat16}[precision]}
    load_checkpoint(tmp_path / "models" / "llama_pruned")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            ("--hidden_loss_weight", 0.5, "--students", "student_finetuned"),
            ("hidden_loss_weight 0.5 is for student_distilled", "--hidden_loss_weight 0"),
        ),
        (("--alpha_start", 0, "--alpha_end", 0), ("learn nothing from its teacher", "--students student_finetuned")),
    ],
    ids=str,
)
def test_settings_that_switch_each_other_off_are_refused(copy, run_here, arguments, parts):
    expect_error(run_here, "1_distill.py", *arguments, cwd=copy, parts=parts)


# ------------------------------------------------------------------------------------------------------- killed, resumed
@pytest.mark.slow
def test_a_killed_distillation_goes_on_and_ends_as_an_uninterrupted_one(copy, tmp_path, run_here):
    whole = tmp_path / "whole"
    shutil.copytree(copy, whole)
    status, output = run_here("1_distill.py", *LONG_DISTILL, cwd=whole)
    assert status == 0, output

    old = {name: digest(copy, name) for name in ("student_finetuned", "student_distilled")}
    status, output = helpers.run_script_until(
        "student_finetuned  epoch 3/12", signal.SIGKILL, "1_distill.py", *LONG_DISTILL, "--force", True, cwd=copy
    )
    assert status == -signal.SIGKILL, output
    assert {name: digest(copy, name) for name in old} == old  # what stood there before is whole, and still what it was
    load_checkpoint(copy / "models" / "student_finetuned")
    status, output = run_here("1_distill.py", cwd=copy)
    assert status == 0 and output.count("up to date") == 3

    status, output = helpers.run_script_until(
        "student_distilled  epoch 5/12", signal.SIGKILL, "1_distill.py", *LONG_DISTILL, cwd=copy
    )
    assert status == -signal.SIGKILL, output
    assert "models/teacher is up to date" in output
    assert re.search(r"student_finetuned: going on after epoch [23] of 12", output)
    assert "student_finetuned  epoch 1/12" not in output

    status, output = run_here("1_distill.py", *LONG_DISTILL, cwd=copy)
    assert status == 0, output
    assert "models/student_finetuned is up to date" in output
    assert re.search(r"student_distilled: going on after epoch [45] of 12", output)
    for name in old:
        assert digest(copy, name) == digest(whole, name) != old[name]
        assert history_without_times(copy, name) == history_without_times(whole, name)
    assert leftovers(copy) == []


@pytest.mark.slow
def test_a_killed_pruning_goes_on_and_ends_as_an_uninterrupted_one(copy, tmp_path, run_here):
    whole = tmp_path / "whole"
    shutil.copytree(copy, whole)
    status, output = run_here("2_prune_finetune.py", *LONG_PRUNE, cwd=whole)
    assert status == 0, output

    old = digest(copy, "student_pruned")
    status, output = helpers.run_script_until(
        "epoch 2/9 pruning", signal.SIGKILL, "2_prune_finetune.py", *LONG_PRUNE, "--force", True, cwd=copy
    )
    assert status == -signal.SIGKILL, output
    assert digest(copy, "student_pruned") == old
    load_checkpoint(copy / "models" / "student_pruned")

    status, output = helpers.run_script_until(
        "epoch 7/9 recovery", signal.SIGKILL, "2_prune_finetune.py", *LONG_PRUNE, cwd=copy
    )
    assert status == -signal.SIGKILL, output
    assert re.search(r"student_pruned: going on after epoch [12] of 9", output)
    assert digest(copy, "student_pruned") == old

    status, output = run_here("2_prune_finetune.py", *LONG_PRUNE, cwd=copy)
    assert status == 0, output
    assert re.search(r"student_pruned: going on after epoch [67] of 9", output)
    assert history_without_times(copy, "student_pruned") == history_without_times(whole, "student_pruned")
    assert digest(copy, "student_pruned") == digest(whole, "student_pruned") != old
    assert leftovers(copy) == []


def test_ctrl_c_says_that_nothing_is_lost(copy):
    old = digest(copy, "student_pruned")
    status, output = helpers.run_script_until("epoch 2/9 pruning", signal.SIGINT, "2_prune_finetune.py", *LONG_PRUNE, cwd=copy)
    assert status == 1, output
    assert "stopped. Finished checkpoints are whole; `python 2_prune_finetune.py` goes on where this run was." in output
    assert "Traceback" not in output
    assert digest(copy, "student_pruned") == old
    assert temporary_directories(copy / "models") == []


def test_a_full_disk_keeps_the_old_model_and_the_work_done(copy, run_here, monkeypatch):
    old = digest(copy, "student_pruned")
    usage = collections.namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 0))
        status, output = run_here("2_prune_finetune.py", "--seed", 7, cwd=copy)
        assert status == 1 and "epoch 1/" not in output  # a disk that is full from the start: no work begins
        assert re.search(r"error: what is written takes \d\.\d MB, and 0.0 MB are free on the disk of models", output), output

        patch.setattr(compactmind.room, "free_space", lambda _: 10**9)  # one that fills while the stage works
        status, output = run_here("2_prune_finetune.py", "--seed", 7, cwd=copy)
    assert status == 1
    assert "error: not enough disk space to write models/student_pruned" in output
    assert digest(copy, "student_pruned") == old
    status, output = run_here("2_prune_finetune.py", "--seed", 7, cwd=copy)
    assert status == 0 and "going on after epoch 3 of 3" in output
    assert digest(copy, "student_pruned") != old
    assert leftovers(copy) == []


# ------------------------------------------------------------------------------------------------------------- bad input
def expect_error(run_here, name: str, *arguments, cwd, parts: tuple) -> None:
    """Run a stage that cannot work: it ends with status 1 and a message, no traceback."""
    status, output = run_here(name, *arguments, cwd=cwd)
    assert status == 1, output
    message = output[output.index("error: ") :]
    for part in parts:
        assert part in message


def test_stages_without_their_input_name_it_and_the_command_that_makes_it(copy, run_here):
    models = copy / "models"
    shutil.rmtree(models / "student_distilled")
    expect_error(
        run_here, "2_prune_finetune.py", cwd=copy, parts=("models/student_distilled not found", "`python 1_distill.py`")
    )
    expect_error(
        run_here,
        "2_prune_finetune.py",
        "--parent",
        "student_finetuned",
        "--output_dir",
        "other",
        "--models_dir",
        "nowhere",
        cwd=copy,
        parts=("nowhere/student_finetuned not found", "`python 1_distill.py`"),
    )
    (copy / "sst2_data").rename(copy / "elsewhere")
    expect_error(run_here, "1_distill.py", cwd=copy, parts=("sst2_data/dataset.json not found", "`python download_model.py`"))
    shutil.rmtree(models / "teacher_base")
    expect_error(run_here, "1_distill.py", cwd=copy, parts=("models/teacher_base not found", "`python download_model.py`"))


def test_half_written_stages_are_noticed(copy, run_here):
    (copy / "models" / "student_distilled" / "manifest.json").unlink()
    expect_error(
        run_here,
        "2_prune_finetune.py",
        cwd=copy,
        parts=("models/student_distilled has no manifest.json", "`python 1_distill.py`"),
    )
    shutil.rmtree(copy / "models" / "student_distilled")
    weights = copy / "models" / "teacher_base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    expect_error(
        run_here,
        "1_distill.py",
        cwd=copy,
        parts=("models/teacher_base/model.safetensors has 1000 bytes", "`python download_model.py`"),
    )


def test_a_damaged_output_is_made_again(copy, run_here):
    old = digest(copy, "student_distilled")
    (copy / "models" / "student_distilled" / "manifest.json").write_text("{")
    (copy / "models" / ".student_distilled.tmp-killed").mkdir()
    status, output = run_here("1_distill.py", cwd=copy)
    assert status == 0, output
    assert digest(copy, "student_distilled") == old
    assert leftovers(copy) == []


def test_sentences_that_were_changed_are_noticed(copy, run_here):
    path = copy / "sst2_data" / "train.jsonl"
    path.write_text(path.read_text().replace('"label": 1', '"label": 2', 1))
    for name in ("1_distill.py", "2_prune_finetune.py"):
        expect_error(
            run_here, name, cwd=copy, parts=("sst2_data/train.jsonl is missing or was changed", "`python download_model.py`")
        )


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--target_sparsity", 1.2), ("1.2", "[0, 1)")),
        (("--target_sparsity", 0.97), ("0.97", "cannot be reached")),
        (("--prune_start_epoch", 3, "--prune_end_epoch", 2), ("prune_start_epoch 3", "prune_end_epoch 2")),
        (("--prune_end_epoch", 4), ("prune_end_epoch 4", "epochs 3")),
        (("--prune_every", 500), ("prune_every 500", "--prune_every")),
        (("--output_dir", "../x"), ("'../x'", "plain name")),
        (("--output_dir", "student_distilled"), ("student_distilled", "the model that is read")),
        (("--output_dir", "teacher"), ("teacher", "the model that is read")),
        (("--output_dir", "teacher_base"), ("teacher_base", "the name of what `python download_model.py` makes")),
        (("--parent", "nobody"), ("models/nobody not found",)),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused_by_the_pruning_stage(copy, run_here, arguments, parts):
    before = {path.name for path in (copy / "models").iterdir()}
    expect_error(run_here, "2_prune_finetune.py", "--force", True, *arguments, cwd=copy, parts=parts)
    assert {path.name for path in (copy / "models").iterdir()} == before
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


@pytest.fixture(scope="module")
def wrong_parents(finished, tmp_path_factory):
    """The finished directory with the models beside it that a stage may be pointed to by mistake."""
    folder = tmp_path_factory.mktemp("wrong") / "copy"
    shutil.copytree(finished[0], folder, ignore=shutil.ignore_patterns("hf_home"))
    helpers.add_llama(folder)
    helpers.run_script_once("3_quantize.py", cwd=folder)
    return folder


@pytest.mark.parametrize(
    ("script", "arguments", "parts"),
    [
        (
            "2_prune_finetune.py",
            ("--parent", "student_distilled_nf4"),
            ("quantized already (nf4)", "for example student_distilled"),
        ),
        (
            "2_prune_finetune.py",
            ("--parent", "student_pruned_w8a8"),
            ("quantized already (w8a8)", "for example student_pruned"),
        ),
        ("2_prune_finetune.py", ("--parent", "llama"), ("llama is a language model", "--parent takes a classifier")),
        ("2_prune_finetune.py", ("--parent", "teacher_base"), ("teacher_base is a BertModel, a model without a head",)),
        ("3_quantize.py", ("--parents", "llama"), ("llama is a language model", "--parents takes a classifier")),
        ("3_quantize.py", ("--parents", "teacher_base"), ("teacher_base is a BertModel, a model without a head",)),
        ("3_quantize.py", ("--w8a8_parents", "student_pruned_nf4"), ("student_pruned_nf4 is quantized already (nf4)",)),
        ("4_smoothquant_llama.py", ("--model_path", "models/teacher"), ("teacher is a classifier", "takes a language model")),
        ("5_bayesian_search.py", ("--model_path", "models/student_pruned_w8a8"), ("is a classifier", "takes a language model")),
    ],
    ids=str,
)
def test_what_a_stage_is_given_is_checked_before_any_work(wrong_parents, run_here, script, arguments, parts):
    before = sorted((wrong_parents / "models").rglob("*"))
    expect_error(run_here, script, *arguments, cwd=wrong_parents, parts=parts)
    assert sorted((wrong_parents / "models").rglob("*")) == before


@pytest.mark.parametrize(
    ("script", "arguments", "part"),
    [
        ("4_smoothquant_llama.py", ("--output_dir=.",), "plain name"),
        ("4_smoothquant_llama.py", ("--output_dir", "q", "--nf4_dir", "q"), "models/q and models/q are one place"),
        ("4_smoothquant_llama.py", ("--output_dir", "llama"), "it is the model that is read"),
        ("4_smoothquant_llama.py", ("--output_dir", "student_pruned"), "what `python 2_prune_finetune.py` makes"),
        ("5_bayesian_search.py", ("--strategy", "fixed", "--output", "models"), "inside the other"),
        ("5_bayesian_search.py", ("--strategy", "fixed", "--output", "models/llama"), "it is the model that is read"),
        ("5_bayesian_search.py", ("--strategy", "fixed", "--output", "."), "inside the other"),
        ("5_bayesian_search.py", ("--strategy", "fixed", "--output", ".."), "inside the other"),
        ("5_bayesian_search.py", ("--strategy", "fixed", "--output", "sst2_data"), "no checkpoint of this project"),
        ("5_bayesian_search.py", ("--output", "models/teacher"), "what `python 1_distill.py` makes"),
    ],
    ids=str,
)
def test_no_stage_replaces_what_it_has_not_made(wrong_parents, run_here, script, arguments, part):
    before = {path: path.stat().st_mtime_ns for path in wrong_parents.rglob("*") if path.is_file()}
    expect_error(run_here, script, *arguments, cwd=wrong_parents, parts=(part,))
    assert {path: path.stat().st_mtime_ns for path in wrong_parents.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--student_layers", 9), ("student_layers 9", "1 to 4")),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused_by_the_distilling_stage(copy, run_here, arguments, parts):
    expect_error(run_here, "1_distill.py", "--force", True, *arguments, cwd=copy, parts=parts)


def test_an_unknown_criterion_names_the_known_ones(copy, run_here):
    status, output = run_here("2_prune_finetune.py", "--criterion", "magic", cwd=copy)
    assert status == 2
    assert all(word in output for word in ("magic", *CRITERIA))


def test_a_shell_sees_the_message_and_nothing_else(copy):
    result = helpers.run_script("2_prune_finetune.py", "--target_sparsity", "1.2", cwd=copy)
    assert result.returncode == 1
    assert result.stderr == "error: target_sparsity 1.2 is not in [0, 1): for example --target_sparsity 0.42\n"


@pytest.mark.parametrize("name", ["download_model.py", "1_distill.py", "2_prune_finetune.py"])
def test_unknown_profiles_and_flags_are_refused_by_every_stage(copy, run_here, name):
    status, output = run_here(name, "--profile", "huge", cwd=copy)
    assert status == 1 and "unknown profile 'huge'" in output and "embedded, sst2, paper, smoke" in output
    status, output = run_here(name, "--no_such_flag", 1, cwd=copy)
    assert status == 2 and "no_such_flag" in output
