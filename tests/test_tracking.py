"""A tracker is told settings, losses, rates and accuracies of every training, changes nothing, and is refused where it is missing."""

import importlib
import json
import sys

import helpers
import pytest
import test_loop
import torch
from tiny_retraining import make_recipe, pattern_windows

from common import DistillConfig, PruneConfig, SearchConfig
from compactmind.command_line import shown_settings
from compactmind.errors import CompactMindError
from compactmind.methods.retraining.causal_lm import retrain_causal_lm
from compactmind.tracking import TRACKERS, begin_run, tracking
from compactmind.training import Progress

FAKE = """
import json, random, torch
class Config:
    def update(self, values, **options): note("settings", values)
class Run:
    def log(self, values, step): note("log", values, step)
    def finish(self): note("finish")
def note(*what):
    random.random(), torch.rand(3)
    with open("told.jsonl", "a") as file:
        file.write(json.dumps(what) + chr(10))
def init(**what):
    note("init", what)
    return Run()
config = Config()
"""
"""The part of trackio that accelerate uses; it draws random numbers, as a library may."""

TOLD = ("epoch", "loss", "accuracy", "score", "standard_error", "sparsity", "lr", "seconds")
"""Of an epoch, by its number."""


@pytest.fixture
def trackio(tmp_path, monkeypatch):
    """Put a trackio where it is imported from, and return what reads what it was told."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "trackio.py").write_text(FAKE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    importlib.invalidate_caches()
    yield lambda: [json.loads(line) for line in (tmp_path / "told.jsonl").read_text(encoding="utf-8").splitlines()]
    sys.modules.pop("trackio", None)


parts = test_loop.parts


def test_a_classifier_is_told_by_step_and_by_epoch_and_comes_out_the_same(trackio, tmp_path, parts):
    alone = test_loop.make_loop(tmp_path / "alone", parts)
    plain = test_loop.run(alone).state_dict()
    with tracking("trackio", "1_distill", {"seed": 3, "students": ("a", "b")}, tmp_path):
        loop = test_loop.make_loop(tmp_path / "tracked", parts)
        weights = test_loop.run(loop).state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in plain.items())
    assert test_loop.without_times(loop.history) == test_loop.without_times(alone.history)

    (_, begun), (_, settings), *text, end = trackio()
    assert begun == {"project": "compactmind", "name": "1_distill-student"} and settings == {"seed": 3, "students": "a b"}
    assert end == ["finish"]
    steps, epochs = ([(each[2], each[1]) for each in text if next(iter(each[1])).startswith(kind)] for kind in ("step/", "epoch/"))
    assert [step for step, _ in steps] == list(range(4, 21, 4)) and all({"step/loss", "step/lr"} == set(row) for _, row in steps)
    assert [step for step, _ in epochs] == [5, 10, 15, 20]
    for (_, row), wanted in zip(epochs, loop.history, strict=True):
        assert row == {f"epoch/{name}": wanted[name] for name in TOLD}


def test_retraining_is_told_at_every_evaluation_and_its_runs_are_numbered(trackio, tmp_path):
    with tracking("trackio", "5_bayesian_search", {}, tmp_path):
        for _ in range(2):
            recipe = make_recipe(4, evaluations=2)
            result = retrain_causal_lm(helpers.make_llama(), pattern_windows(), pattern_windows(4, first=3), recipe, log_every=2)
    text = trackio()
    assert [each[1]["name"] for each in text if each[0] == "init"] == ["5_bayesian_search-retrain", "5_bayesian_search-retrain-2"]
    rows = [each for each in text if each[0] == "log" and "evaluation/held_out_loss" in each[1]][2:]
    assert [(row[2], row[1]["evaluation/held_out_loss"]) for row in rows] == [
        (row["step"], row["held_out_loss"]) for row in result["history"]
    ]
    assert text.count(["finish"]) == 2


def test_only_the_main_process_tells_and_outside_nothing_is_told(trackio, tmp_path):
    with tracking("trackio", "stage", {}, tmp_path):
        Progress("x", total_steps=1, log_every=1, enabled=False).update(1.0, 0.1, 1)
    assert begin_run("x") is None
    with tracking("", "stage", {}, tmp_path):
        assert begin_run("x") is None
    assert not (tmp_path / "told.jsonl").exists()


def test_a_run_is_closed_by_an_error_and_none_follows(trackio, tmp_path):
    with pytest.raises(ZeroDivisionError), tracking("trackio", "stage", {}, tmp_path):
        begin_run("x")
        1 / 0  # noqa: B018
    assert trackio()[-1] == ["finish"] and begin_run("x") is None


def test_a_tracker_that_fails_does_not_stop_the_training(trackio, tmp_path, monkeypatch, capsys):
    with tracking("trackio", "stage", {}, tmp_path):
        progress = Progress("x", total_steps=2, log_every=1)
        monkeypatch.setattr("trackio.note", lambda *_: 1 / 0)
        progress.update(1.0, 0.1, 1)
        progress.update(1.0, 0.1, 1)
    assert capsys.readouterr().out.count("warning: stage-x is tracked no further: ZeroDivisionError") == 1
    refusal = "trackio could not begin the run stage-x .ZeroDivisionError.*--track out"
    with pytest.raises(CompactMindError, match=refusal), tracking("trackio", "stage", {}, tmp_path):
        begin_run("x")


@pytest.mark.parametrize("script", ["1_distill.py", "2_prune_finetune.py", "5_bayesian_search.py"])
def test_a_tracker_that_is_not_installed_is_refused_before_any_work(script, tmp_path, run_here, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    status, output = run_here(script, "--track", "wandb", cwd=tmp_path)
    (line,) = (line for line in output.splitlines() if not line.startswith("#"))
    assert status == 1 and line == "error: --track wandb needs a package that is not installed: run `pip install wandb`"
    assert list(tmp_path.iterdir()) == []


def test_the_script_names_and_starts_what_it_is_told_to(trackio, tmp_path, run_here):
    helpers.make_workspace(tmp_path, train_rows=64)
    assert run_here("download_model.py", cwd=tmp_path)[0] == 0
    options = ("--students", "student_finetuned", "--log_every", "1")
    status, output = run_here("1_distill.py", "--track", "trackio", *options, cwd=tmp_path)
    assert status == 0, output
    text = trackio()
    assert [each[1]["name"] for each in text if each[0] == "init"] == ["1_distill-teacher", "1_distill-student_finetuned"]
    assert all(each[1]["log_every"] == 1 for each in text if each[0] == "settings") and text.count(["finish"]) == 2
    status, output = run_here("1_distill.py", *options, cwd=tmp_path)  # a record that knows nothing of the tracker
    assert status == 0 and output.count("up to date: skipped") == 2


def test_the_choices_are_the_trackers_and_no_password_is_told():
    from compactmind.settings import setting_problem

    for kind in (DistillConfig, PruneConfig, SearchConfig):
        assert kind().track == "" and all(setting_problem(kind(track=name)) is None for name in TRACKERS)
        assert "choose from" in setting_problem(kind(track="other"))
    secret = shown_settings(SearchConfig(storage="postgresql+pg8000://me:word@host/db"))
    assert secret["storage"] == "postgresql+pg8000://me:***@host/db"
