"""What the training loops share: optimizer, schedule, resuming, progress lines."""

import math
import os
import re
import socket
import subprocess
import sys
import types

import helpers
import pytest
import torch
from accelerate import Accelerator

import compactmind.training
from compactmind.errors import CompactMindError
from compactmind.files import replace_file
from compactmind.forward import predict_logits
from compactmind.training import (
    Progress,
    TrainingState,
    WeightAverage,
    accelerator_record,
    clock,
    cpu_copy,
    freeze_word_embeddings,
    linear_decay_with_warmup,
    make_accelerator,
    make_optimizer,
    mean_loss,
    prepare_for_training,
    validation_logits,
    warn_of_chance,
)

STAGE = {"script": "1_distill.py", "config": {"lr": 1e-4}, "inputs": {}}


# --------------------------------------------------------------------------------------------------------------- devices
@pytest.mark.parametrize(
    ("capabilities", "asked", "given"),
    [
        ({"avx512_bf16": False}, None, "no"), ({"avx512_bf16": True}, None, "bf16"), ({"amx_tile": True}, None, "bf16"), ({}, None, "no"),
        ({"avx512_bf16": True}, "no", "no"), ({}, "bf16", "bf16"), ({}, "BF16", "bf16"),
    ],
)  # fmt: skip
def test_the_precision_is_the_one_that_was_asked_for_and_bf16_on_a_cpu_that_multiplies_it(
    fresh_accelerator, monkeypatch, capabilities, asked, given
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if asked:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    accelerator = make_accelerator()
    assert (accelerator.mixed_precision, accelerator.device.type) == (given, "cpu")
    record = {"num_processes": 1, "effective_batch": 24, "mixed_precision": given}
    assert accelerator_record(accelerator, 24) == record


@pytest.mark.parametrize("asked", ["fp16", "fp8", "half"])
def test_a_precision_that_would_be_ignored_is_refused(monkeypatch, asked):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    with pytest.raises(CompactMindError, match=f"mixed precision '{asked}' .* is not one of no, bf16 on this CPU"):
        make_accelerator()


def test_a_prepared_model_trains_in_mixed_precision_and_is_measured_without(fresh_accelerator, distilbert):
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    expected = helpers.logits_of(distilbert)
    wrapped, _ = prepare_for_training(accelerator, distilbert, make_optimizer(distilbert, 1e-3, 0.0))
    assert torch.equal(helpers.logits_of(distilbert), expected)
    with accelerator.autocast():
        logits = wrapped(**helpers.example_batch()).logits
    assert logits.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in distilbert.parameters()} == {torch.float32}


# ------------------------------------------------------------------------------------------------------ what was learned
def test_the_loss_of_an_epoch_is_the_mean_and_one_that_is_no_number_is_named():
    accelerator = Accelerator(cpu=True)
    losses = [torch.tensor(value) for value in (1.0, 2.0, 6.0)]
    assert mean_loss(losses, accelerator, 5, "teacher, epoch 2", "teacher_lr 5e-05") == 3.0
    for bad in (math.nan, math.inf):
        with pytest.raises(
            CompactMindError,
            match=f"teacher, epoch 2: the loss became {bad} at step 7, nothing was saved: "
            "teacher_lr 0.1 is probably too high, use a smaller --teacher_lr",
        ):
            spoilt = [*losses[:2], torch.tensor(bad), torch.tensor(math.nan)]
            mean_loss(spoilt, accelerator, 5, "teacher, epoch 2", "teacher_lr 0.1")


def test_validation_logits_are_those_of_the_model_and_must_be_numbers(distilbert, encoded):
    arguments = (encoded, 8, Accelerator(cpu=True), "student, epoch 1", "lr 0.1")
    assert torch.equal(validation_logits(distilbert, *arguments), predict_logits(distilbert, encoded, 8))
    unused = distilbert.distilbert.embeddings.position_embeddings.weight[-1]
    for spoilt in (unused, distilbert.classifier.bias):  # a weight that no sentence reaches counts too
        with torch.no_grad():
            before = spoilt.clone()
            spoilt.fill_(math.nan)
        with pytest.raises(CompactMindError, match="student, epoch 1: logits or weights are not finite.*use a smaller --lr"):
            validation_logits(distilbert, *arguments)
        with torch.no_grad():
            spoilt.copy_(before)


@pytest.mark.parametrize(
    ("accuracy", "positive", "warned"),
    [(0.5, 50, True), (0.58, 50, True), (0.62, 50, False), (0.8, 80, True), (1.0, 50, False)],
)
def test_an_accuracy_that_may_be_chance_is_warned_of(capsys, accuracy, positive, warned):
    labels = torch.tensor([1] * positive + [0] * (100 - positive))
    warn_of_chance("student", accuracy, labels, Accelerator(cpu=True))
    printed = capsys.readouterr().out
    assert ("warning: student may be no better than chance" in printed) == warned
    if warned:
        assert f"validation accuracy {accuracy:.2%}" in printed and f"right in {positive}.00%" in printed


# ------------------------------------------------------------------------------------------------------------- resuming
def test_a_training_state_comes_back_as_it_was(tmp_path, distilbert):
    optimizer = make_optimizer(distilbert, 1e-3, 0.01)
    distilbert(**helpers.example_batch(), labels=torch.tensor([0, 1, 0, 1, 0])).loss.backward()
    optimizer.step()
    state = TrainingState(tmp_path / "models" / "student", STAGE)
    assert state.load() is None
    state.save(model=distilbert.state_dict(), optimizer=optimizer.state_dict(), history=[{"epoch": 1, "alpha": None}])
    saved = TrainingState(tmp_path / "models" / "student", STAGE).load()
    assert saved["history"] == [{"epoch": 1, "alpha": None}]
    fresh = helpers.make_distilbert(seed=1)
    fresh.load_state_dict(saved["model"])
    assert torch.equal(helpers.logits_of(fresh), helpers.logits_of(distilbert))
    again = make_optimizer(fresh, 1e-3, 0.01)
    again.load_state_dict(saved["optimizer"])
    ours, theirs = again.state_dict()["state"], optimizer.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key]["exp_avg"], theirs[key]["exp_avg"]) for key in ours)
    state.clear()
    state.clear()  # nothing there: fine
    assert list((tmp_path / "models").iterdir()) == []


def test_the_state_of_another_stage_is_ignored(tmp_path):
    TrainingState(tmp_path / "student", STAGE).save(history=[1])
    assert TrainingState(tmp_path / "student", STAGE | {"config": {"lr": 2e-4}}).load() is None
    assert TrainingState(tmp_path / "student_distilled", STAGE).load() is None
    assert TrainingState(tmp_path / "student", STAGE).load() == {"history": [1]}


def test_a_state_of_another_number_of_processes_is_not_used_and_a_line_says_so(tmp_path, capsys):
    def stage(processes: int) -> dict:
        config = {"lr": 1e-4, "num_processes": processes, "effective_batch": 32 * processes, "students": ("a", "b")}
        return STAGE | {"config": config}

    state = TrainingState(tmp_path / "student", stage(2))
    state.save(history=[1])
    assert TrainingState(tmp_path / "student", stage(2)).load() == {"history": [1]}
    assert capsys.readouterr().out == ""
    assert TrainingState(tmp_path / "student", stage(1)).load() is None
    assert capsys.readouterr().out == (
        f"{state.path} is of another run (effective_batch 64 instead of 32, num_processes 2 instead of 1): "
        "starting this model from the beginning\n"
    )


def test_a_state_of_an_earlier_version_is_not_used(tmp_path, capsys):
    state = TrainingState(tmp_path / "student", STAGE)
    torch.save({"stage": repr(STAGE), "state": {}}, state.path)
    assert state.load() is None
    assert "is of another run (of an earlier version)" in capsys.readouterr().out


def test_two_that_write_one_file_at_once_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "file.bin"
    with replace_file(path) as first, replace_file(path) as second:
        assert first != second
        first.write_bytes(b"first")
        second.write_bytes(b"second")
    assert path.read_bytes() == b"first"  # its block ended last
    with pytest.raises(KeyError), replace_file(path) as temporary:
        temporary.write_bytes(b"half")
        raise KeyError
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_it_gets_its_name_and_the_name_after_it(tmp_path, monkeypatch):
    events, fsync, rename = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: events.append(os.path.realpath(f"/proc/self/fd/{handle}")) or fsync(handle))
    for name in ("replace", "rename"):
        monkeypatch.setattr(os, name, lambda *paths: events.append("renamed") or rename(*paths))
    TrainingState(tmp_path / "student", STAGE).save(history=[1])
    assert len(events) == 3 and events[0].startswith(f"{tmp_path}/.student.training.pt.tmp-")
    assert events[1:] == ["renamed", str(tmp_path)]


def test_what_a_killed_process_left_is_swept_and_what_a_running_one_writes_is_not(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    state, host = TrainingState(tmp_path / "student", STAGE), socket.gethostname()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as running:
        left = {pid: tmp_path / f"{state.path.name}.tmp-{host}-{pid}-abc" for pid in (ended.pid, running.pid)}
        reused = tmp_path / f"{state.path.name}.tmp-{host}-{os.getpid()}-abc"
        elsewhere = tmp_path / f"{state.path.name}.tmp-{host}x-{ended.pid}-abc"
        other = tmp_path / f".other.training.pt.tmp-{host}-{ended.pid}-abc"
        for path in (*left.values(), reused, elsewhere, other):
            path.write_bytes(b"half")
        os.utime(reused, (1e9, 1e9))  # of the process that had this number in an earlier life of the machine
        assert state.load() is None
        assert set(tmp_path.iterdir()) == {left[running.pid], elsewhere, other}
        running.stdin.close()


@pytest.mark.parametrize("content", [b"", b"not a zip file", b"PK\x03\x04 half"])
def test_a_damaged_state_is_ignored_with_a_message(tmp_path, capsys, content):
    state = TrainingState(tmp_path / "student", STAGE)
    state.path.write_bytes(content)
    assert state.load() is None
    assert f"{state.path} is damaged" in capsys.readouterr().out


def test_a_state_that_would_run_code_is_not_loaded(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return print, ("code was run",)

    state = TrainingState(tmp_path / "student", STAGE)
    torch.save({"stage": repr(STAGE), "state": Evil()}, state.path)
    assert state.load() is None
    assert "code was run" not in capsys.readouterr().out


def test_a_failed_save_keeps_the_previous_state(tmp_path):
    state = TrainingState(tmp_path / "student", STAGE)
    state.save(history=[1])
    with pytest.raises((AttributeError, TypeError)):
        state.save(history=lambda: None)
    assert state.load() == {"history": [1]}
    assert [path.name for path in tmp_path.iterdir()] == [state.path.name]


def test_a_copy_does_not_follow_the_model(distilbert):
    copy = cpu_copy(distilbert.state_dict())
    before = {name: tensor.clone() for name, tensor in distilbert.state_dict().items()}
    helpers.randomize(distilbert, seed=5)
    assert all(torch.equal(copy[name], before[name]) for name in before)
    assert not torch.equal(distilbert.classifier.weight, copy["classifier.weight"])


# ------------------------------------------------------------------------------------------------ optimizer and schedule
def test_weight_decay_reaches_matrices_only(distilbert):
    freeze_word_embeddings(distilbert)
    optimizer = make_optimizer(distilbert, 1e-3, 0.01)
    names = {parameter: name for name, parameter in distilbert.named_parameters()}
    decayed, plain = ([names[p] for p in group["params"]] for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
    assert all(name.endswith("bias") or "norm" in name.lower() for name in plain)
    assert all(name.endswith("weight") and "norm" not in name.lower() for name in decayed)
    word_embeddings = "distilbert.embeddings.word_embeddings.weight"
    assert sorted(decayed + plain) == sorted(set(names.values()) - {word_embeddings})
    table = distilbert.distilbert.embeddings.word_embeddings.weight.clone()
    distilbert(**helpers.example_batch(), labels=torch.tensor([0, 1, 0, 1, 0])).loss.backward()
    optimizer.step()
    assert torch.equal(distilbert.distilbert.embeddings.word_embeddings.weight, table)


def rates(warmup_steps: int, total_steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = linear_decay_with_warmup(optimizer, warmup_steps, total_steps)
    seen = []
    for _ in range(total_steps):
        seen.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return [*seen, scheduler.get_last_lr()[0]]


def test_the_rate_rises_to_the_peak_and_falls_to_zero():
    seen = rates(4, 20)
    assert seen[:4] == pytest.approx([0.4, 0.8, 1.2, 1.6])  # no step is wasted at rate 0
    assert seen[4] == max(seen) == 2.0
    falls = [before - after for before, after in zip(seen[4:-1], seen[5:], strict=True)]
    assert falls == pytest.approx([2.0 / 16] * 16)
    assert seen[-1] == 0.0


def test_a_schedule_without_warm_up_starts_at_the_peak():
    assert rates(0, 4) == pytest.approx([2.0, 1.5, 1.0, 0.5, 0.0])


# ------------------------------------------------------------------------------------------------------------- progress
def test_one_aligned_line_per_interval(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(compactmind.training, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    progress = Progress("student_distilled", total_steps=1010, log_every=4, start_step=1000)
    for step in range(10):
        now[0] += 2.0
        progress.update(loss=float(step), lr=1e-4 / (step + 1), items=8, sparsity=0.25)
    progress.write("an own line")
    progress.close()
    *lines, own = capsys.readouterr().out.splitlines()
    assert own == "an own line"
    assert [re.search(r"step +(\d+)/1010", line).group(1) for line in lines] == ["1004", "1008", "1010"]
    assert len({tuple(match.start() for match in re.finditer(r"\|", line)) for line in lines}) == 1
    assert [float(re.search(r"loss +([\d.]+)", line).group(1)) for line in lines] == [1.5, 5.5, 8.5]  # mean since the last line
    for line in lines:
        assert line.startswith("student_distilled ")
        assert "sparsity  0.250" in line and " 4 sentences/s" in line  # 8 sentences in 2 s
    assert [line.rsplit("left ", 1)[1] for line in lines] == ["0:12", "0:04", "0:00"]  # 6, 2 and 0 steps of 2 s
    assert [float(re.search(r"lr ([\d.e-]+)", line).group(1)) for line in lines] == [2.5e-5, 1.25e-5, 1e-5]


def test_losses_on_a_device_are_fetched_when_a_line_is_due_only(capsys, monkeypatch):
    fetched, original = [], torch.Tensor.__float__
    monkeypatch.setattr(torch.Tensor, "__float__", lambda tensor: fetched.append(1) or original(tensor))
    monkeypatch.setattr(torch.Tensor, "item", lambda _: pytest.fail("a step waited for the device"))
    progress = Progress("student", total_steps=4, log_every=4)
    for step in range(4):
        assert fetched == []
        progress.update(loss=torch.tensor(float(step)), lr=1.0, items=8)
    assert "loss  1.5000" in capsys.readouterr().out and len(fetched) == 1


def test_a_process_that_is_not_the_main_one_is_silent(capsys):
    progress = Progress("student", total_steps=2, log_every=1, enabled=False)
    progress.update(loss=1.0, lr=1.0, items=8)
    assert progress.losses == []  # nobody would ever empty it
    progress.write("nothing")
    progress.close()
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == ""


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (9.9, "0:09"), (75, "1:15"), (3600, "1:00:00"), (7384, "2:03:04")])
def test_clock(seconds, shown):
    assert clock(seconds) == shown


# ------------------------------------------------------------------------------------------------------- averaged weights
def linear_with_weight(value: float) -> torch.nn.Linear:
    layer = torch.nn.Linear(3, 2)
    torch.nn.init.constant_(layer.weight, value)
    return layer


def test_the_average_follows_the_exponential_formula_after_a_faster_start():
    layer = linear_with_weight(0.0)
    average, expected = WeightAverage(layer, decay=0.2), 0.0
    for step, value in enumerate((1.0, 5.0, -2.0, 4.0, 8.0), start=1):
        torch.nn.init.constant_(layer.weight, value)
        average.update(layer)
        decay = min(0.2, step / (step + 10))
        expected = decay * expected + (1 - decay) * value
    assert average.weights["weight"].unique().item() == pytest.approx(expected)


def test_averaged_weights_are_there_inside_the_block_and_gone_after_it_also_after_an_error():
    layer = linear_with_weight(2.0)
    average = WeightAverage(layer, decay=0.9)
    torch.nn.init.constant_(layer.weight, 6.0)
    with pytest.raises(KeyError), average.applied_to(layer):
        assert layer.weight.unique().item() == 2.0
        raise KeyError
    assert layer.weight.unique().item() == 6.0
    assert average.weights["weight"].unique().item() == 2.0


def test_without_decay_the_average_is_the_model_itself():
    layer = linear_with_weight(0.0)
    average = WeightAverage(layer, decay=0.0)
    torch.nn.init.constant_(layer.weight, 3.0)
    average.update(layer)
    assert torch.equal(average.weights["weight"], layer.weight)


def test_frozen_weights_are_left_out_of_the_average():
    layer = linear_with_weight(1.0)
    layer.bias.requires_grad_(False)
    assert set(WeightAverage(layer, decay=0.9).weights) == {"weight"}


def test_a_restored_average_goes_on_as_if_never_interrupted():
    layer = linear_with_weight(0.0)
    whole, first = WeightAverage(layer, decay=0.5), WeightAverage(layer, decay=0.5)
    torch.nn.init.constant_(layer.weight, 1.0)
    whole.update(layer)
    first.update(layer)
    second = WeightAverage(linear_with_weight(7.0), decay=0.5)
    second.load_state_dict(first.state_dict())
    torch.nn.init.constant_(layer.weight, 4.0)
    whole.update(layer)
    second.update(layer)
    assert torch.equal(whole.weights["weight"], second.weights["weight"])
