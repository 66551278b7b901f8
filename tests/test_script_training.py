"""Training as the stages do it: in mixed precision, by several processes, and what is said when it diverges or learns nothing."""

import contextlib
import math
import re
import runpy
import signal

import finished_stages
import helpers
import pytest
import scripts
import torch
from finished_stages import digest, expect_error, history_without_times, leftovers
from safetensors.torch import load_file

import compactmind.loop
import compactmind.training
from compactmind.checkpoint import load_checkpoint
from compactmind.data import EncodedSentences, load_split
from compactmind.errors import CompactMindError
from compactmind.evaluation.accuracy import accuracy_of
from compactmind.forward import predict_logits
from compactmind.manifest import read_manifest
from compactmind.methods.pruning.masks import apply_masks
from compactmind.methods.retraining.loss import RetrainingLoss

copy, finished = finished_stages.copy, finished_stages.finished


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
    distilled, seen_together = scripts.run_script_watched("1_distill.py", *two, *teacher, cwd=copy)
    scripts.assert_shared_out(seen_together, seen)
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
    pruned, seen_together = scripts.run_script_watched("2_prune_finetune.py", *two, *arguments, cwd=copy)
    scripts.assert_shared_out(seen_together, seen)
    assert re.search(r"student_pruned +step +12/12 ", pruned.stdout)
    together, alone = comparable(copy, "student_pruned"), comparable(copy, "alone")
    assert_one_training(together, alone, load_file(copy / "models" / "student_distilled" / "model.safetensors"))
    assert together[2]["metrics"]["masked_against_compacted"] <= 1e-5
    assert leftovers(copy) == []


def test_a_run_killed_as_one_process_starts_anew_as_two(copy):
    epochs = ("--student_epochs", 12, "--students", "student_finetuned", "--force", True)
    status, output = scripts.run_script_until("student_finetuned  epoch 3/12", signal.SIGKILL, "1_distill.py", *epochs, cwd=copy)
    assert status == -signal.SIGKILL, output
    ended = scripts.run_script("1_distill.py", *epochs[:-2], cwd=copy, processes=2)  # the teacher is of one process, too
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
