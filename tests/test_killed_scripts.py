"""Stages that are killed, interrupted or out of disk space keep what stood there and the work done, and go on where they were."""

import collections
import re
import shutil
import signal

import finished_stages
import pytest
import scripts
from finished_stages import digest, history_without_times, leftovers

import compactmind.room
from compactmind.checkpoint import load_checkpoint

copy, finished = finished_stages.copy, finished_stages.finished

LONG_DISTILL = ("--student_epochs", 12)
LONG_PRUNE = ("--epochs", 9, "--prune_end_epoch", 5, "--patience", 9)
"""Enough epochs for a signal to arrive before the end."""


def temporary_directories(folder) -> list[str]:
    return sorted(path.name for path in folder.rglob(".*") if re.search(r"\.tmp-|\.old$", path.name))


@pytest.mark.slow
def test_a_killed_distillation_goes_on_and_ends_as_an_uninterrupted_one(copy, tmp_path, run_here):
    whole = tmp_path / "whole"
    shutil.copytree(copy, whole)
    status, output = run_here("1_distill.py", *LONG_DISTILL, cwd=whole)
    assert status == 0, output

    old = {name: digest(copy, name) for name in ("student_finetuned", "student_distilled")}
    status, output = scripts.run_script_until(
        "student_finetuned  epoch 3/12", signal.SIGKILL, "1_distill.py", *LONG_DISTILL, "--force", True, cwd=copy
    )
    assert status == -signal.SIGKILL, output
    assert {name: digest(copy, name) for name in old} == old  # what stood there before is whole, and still what it was
    load_checkpoint(copy / "models" / "student_finetuned")
    status, output = run_here("1_distill.py", cwd=copy)
    assert status == 0 and output.count("up to date") == 3

    status, output = scripts.run_script_until(
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
    status, output = scripts.run_script_until(
        "epoch 2/9 pruning", signal.SIGKILL, "2_prune_finetune.py", *LONG_PRUNE, "--force", True, cwd=copy
    )
    assert status == -signal.SIGKILL, output
    assert digest(copy, "student_pruned") == old
    load_checkpoint(copy / "models" / "student_pruned")

    status, output = scripts.run_script_until(
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
    status, output = scripts.run_script_until("epoch 2/9 pruning", signal.SIGINT, "2_prune_finetune.py", *LONG_PRUNE, cwd=copy)
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
