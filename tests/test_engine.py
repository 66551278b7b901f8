"""The engine: what counts as a trial, what is never run twice, and how an interrupted search goes on."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter

import helpers
import made_up_search
import optuna
import psutil
import pytest
from made_up_search import DESCRIBED, abandoned, cost, cost_of, fresh, run
from optuna.trial import TrialState

from compactmind.errors import CompactMindError
from compactmind.search.described import require_described
from compactmind.search.engine import counted_trials, is_counted, is_stopped, open_study, retry_interrupted
from compactmind.search.machine import require_kind, this_worker
from compactmind.search.notes import Skipped, Stopped
from compactmind.search.space import make_space

space = made_up_search.space


# ---------------------------------------------------------------------------------------------------------------- counting
@pytest.mark.parametrize(
    ("strategy", "sampler"), [("bayesian", "tpe"), ("bayesian", "gp"), ("evolution", "tpe"), ("random", "tpe"), ("grid", "tpe")]
)
def test_a_search_runs_as_many_different_pipelines_as_it_was_asked_for(tmp_path, space, strategy, sampler):
    seen = []
    trials = run(
        fresh(tmp_path), space, 12, lambda _, steps: [seen.append(str(steps)) or cost(steps)], strategy, sampler=sampler
    )
    assert len(trials) == len(seen) == len(set(seen)) == 12
    assert all(trial.state == TrialState.COMPLETE and trial.value == cost_of(trial) for trial in trials)


def test_going_on_reaches_the_number_and_the_best_is_found(tmp_path, space):
    run(fresh(tmp_path), space, 5)
    trials = run(fresh(tmp_path), space, 20)
    assert len(trials) == 20
    assert min(trial.value for trial in trials) == 10 + 20 * 0.1 - 4


def test_the_same_seed_asks_for_the_same_trials_even_if_it_was_interrupted(tmp_path, space):
    pipelines = lambda trials: [trial.user_attrs["key"] for trial in trials]  # noqa: E731
    whole = pipelines(run(fresh(tmp_path, "whole"), space, 14, seed=3))
    run(fresh(tmp_path, "parts"), space, 9, seed=3)
    assert pipelines(run(fresh(tmp_path, "parts"), space, 14, seed=3)) == whole
    assert pipelines(run(fresh(tmp_path, "other"), space, 14, seed=4)) != whole


def test_a_space_that_is_used_up_ends_the_search(tmp_path):
    space = make_space(("nf4",), choices={"nf4.embeddings": ["int8"], "nf4.compensation": [True]})
    assert len(run(fresh(tmp_path), space, 10)) == space.size() == 2
    assert len(run(fresh(tmp_path, "grid"), space, 10, strategy="grid")) == 2


# ---------------------------------------------------------------------------------------------------------------- failures
def test_failed_and_stopped_trials_are_kept_with_their_reason_and_the_search_goes_on(tmp_path, space):
    def evaluate(trial, steps):
        if trial.number == 1:
            raise MemoryError
        if trial.number == 2:
            raise Stopped("stopped after prune: +3.00 nats", [99.0])
        if trial.number == 3:
            return [float("nan")]
        trial.set_constraint("compression", -1.0)
        return [cost(steps)]

    trials = {trial.number: trial for trial in run(fresh(tmp_path), space, 8, evaluate)}
    assert len(trials) == 8
    assert trials[1].state == TrialState.FAIL and trials[1].user_attrs["reason"].startswith("MemoryError")
    assert trials[2].state == TrialState.COMPLETE and "+3.00 nats" in trials[2].user_attrs["reason"]
    assert trials[2].value == 99.0 and is_stopped(trials[2]) and not is_stopped(trials[4])  # told as what it would have come to
    assert trials[3].state == TrialState.FAIL and "nan" in trials[3].user_attrs["reason"]
    assert trials[4].state == TrialState.COMPLETE and trials[4].user_attrs["seconds"] >= 0


def test_pipelines_that_are_not_run_do_not_count_and_the_sampler_learns_of_them(tmp_path, space):
    def evaluate(trial, steps):
        small = steps[-1].method.name == "nf4"
        trial.set_constraint("compression", 0.0 if small else 1.0)
        if not small:
            raise Skipped("not run: too large")
        return [cost(steps)]

    study = fresh(tmp_path)
    trials = run(study, space, 12, evaluate)
    assert len(trials) == 12 and all(trial.params["order"].endswith("nf4") for trial in trials)
    skipped = [trial for trial in study.trials if trial.user_attrs.get("skipped") == "not run: too large"]
    assert skipped and all(trial.state == TrialState.PRUNED and "nf4" not in trial.params["order"] for trial in skipped)
    known = fresh(tmp_path, "told")
    asked = run(known, space, 12, evaluate, excess=lambda steps: 0.0 if steps[-1].method.name == "nf4" else 1.0)
    assert len(asked) == len(known.trials) == 12  # what is known beforehand not to be small enough is not even asked for
    few = make_space(("prune",), choices={"prune.sparsity": [0.1], "prune.blocks": [0]})
    assert run(fresh(tmp_path, "none"), few, 5, evaluate) == []  # it ends, with nothing


def test_several_objectives_give_a_front_and_a_stopped_trial_a_reason(tmp_path, space):
    study = open_study("two", f"sqlite:///{tmp_path / 'study.db'}", DESCRIBED, ("minimize", "minimize"))

    def evaluate(trial, steps):
        if trial.number == 0:
            raise Stopped("hopeless")
        if trial.number == 1:
            raise Stopped("behind", [99.0, 7.0])
        return [cost(steps), 1 / cost(steps)]

    trials = run(study, space, 12, evaluate)
    assert len(trials) == 12 and trials[0].state == TrialState.FAIL and trials[0].user_attrs["reason"] == "hopeless"
    assert trials[1].values == [99.0, 7.0] and is_stopped(trials[1])  # told as what it would have come to
    assert study.best_trials


def test_an_infeasible_trial_is_not_the_best_one(tmp_path, space):
    def evaluate(trial, steps):
        small = any(step.method.name == "nf4" for step in steps)
        trial.set_constraint("compression", 0.0 if small else 1.0)
        return [cost(steps)]

    study = fresh(tmp_path)
    run(study, space, 15, evaluate)
    assert "nf4" in study.best_trial.params["order"]


# ------------------------------------------------------------------------------------------------------------- interruptions
def test_a_trial_whose_process_is_gone_is_run_once_more_and_only_once(tmp_path, space):
    study, point = fresh(tmp_path), next(space.points())
    gone = this_worker() | {"started": this_worker()["started"] - 1000}  # the number was given to another process since
    first = abandoned(study, space, point, gone)
    trials = run(study, space, 4)
    assert len(trials) == 4 and trials[0].user_attrs["retry_of"] == first
    assert study.trials[first].state == TrialState.FAIL and not is_counted(study.trials[first])
    assert trials[0].params == pytest.approx(study.trials[first].params)

    study = fresh(tmp_path, "twice")
    abandoned(study, space, point, gone)
    assert retry_interrupted(study) == 1
    trial = study.ask()
    space.suggest(trial)
    trial.set_user_attr("worker", gone)
    trial.set_user_attr("runs", True)
    trials = run(study, space, 3)
    assert (
        trials[0].state == TrialState.FAIL and "interrupted" in trials[0].user_attrs["reason"]
    )  # counted: it was given two chances
    assert len(trials) == 3 and not any("retry_of" in trial.user_attrs for trial in trials[1:])


def test_a_trial_that_another_process_is_running_is_left_alone(tmp_path, space):
    study = fresh(tmp_path)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        worker = this_worker() | {"pid": other.pid, "started": psutil.Process(other.pid).create_time()}
        number = abandoned(study, space, next(space.points()), worker)
        assert len(run(study, space, 3, patience=0)) == 3
        assert study.trials[number].state == TrialState.RUNNING
        elsewhere = abandoned(study, space, list(space.points())[1], worker | {"host": "far away"})
        optuna.trial.Trial(study, study.trials[elsewhere]._trial_id).set_user_attr("alive_at", time.time())
        run(study, space, 6, patience=0)
        assert study.trials[elsewhere].state == TrialState.RUNNING
        optuna.trial.Trial(study, study.trials[elsewhere]._trial_id).set_user_attr("alive_at", time.time() - 1000)
        run(study, space, 7, patience=0)
        assert study.trials[elsewhere].state == TrialState.FAIL
        other.kill()


WORKER = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import made_up_search as t
from compactmind.search.space import make_space
space = make_space(("prune", "retrain", "nf4"), choices={{"prune.sparsity": [0.1, 0.2, 0.3, 0.4], "prune.criterion": ["taylor"]}})
def evaluate(trial, steps):
    print("running", flush=True)
    Path({folder!r}, str(os.getpid())).touch()
    while len(list(Path({folder!r}).iterdir())) < {workers}:
        time.sleep(0.01)  # none goes on before all are in a trial
    time.sleep({seconds})
    return [t.cost(steps)]
t.run(t.open_study("shared", {storage!r}, t.DESCRIBED), space, {n_trials}, evaluate, seed=int(sys.argv[1]))
"""


def start(folder, storage, n_trials, seed, workers=1, seconds=0.0):
    """Start a worker that waits in its first trial until `workers` of them are in one."""
    (folder / "running").mkdir(exist_ok=True)
    code = WORKER.format(
        tests=str(helpers.REPOSITORY / "tests"), storage=storage, n_trials=n_trials, seconds=seconds, workers=workers,
        folder=str(folder / "running"),
    )  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(helpers.REPOSITORY)}
    return subprocess.Popen([sys.executable, "-c", code, str(seed)], env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("kind", ["sqlite:///{}/study.db", "{}/study.log"])
def test_two_processes_on_one_study_run_no_pipeline_twice_and_lose_none(tmp_path, kind):
    storage = kind.format(tmp_path)
    open_study("shared", storage, DESCRIBED)
    workers = [start(tmp_path, storage, 14, seed, workers=2) for seed in (1, 1)]  # one seed: they would ask for the same
    lines = [line for worker in workers for line in worker.communicate()[0].splitlines()]
    assert [worker.returncode for worker in workers] == [0, 0] and lines.count("running") == 14
    trials = counted_trials(open_study("shared", storage, DESCRIBED))
    assert len(trials) == 14 and all(trial.state == TrialState.COMPLETE for trial in trials)
    assert max(Counter(trial.user_attrs["key"] for trial in trials).values()) == 1
    assert len({trial.user_attrs["worker"]["pid"] for trial in trials}) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_after_a_kill_in_a_trial_the_next_run_goes_on_to_the_number(tmp_path):
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    worker = start(tmp_path, storage, 2, 1)
    assert worker.wait() == 0
    worker = start(tmp_path, storage, 6, 1, seconds=600)
    worker.stdout.readline()  # it is in its first trial, the third of the study
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    before = counted_trials(open_study("shared", storage, DESCRIBED))
    assert [trial.state.name for trial in before] == ["COMPLETE", "COMPLETE", "RUNNING"]
    assert start(tmp_path, storage, 6, 1).wait() == 0
    trials = counted_trials(open_study("shared", storage, DESCRIBED))
    assert len(trials) == 6 and all(trial.state == TrialState.COMPLETE for trial in trials)
    assert [trial.number for trial in trials[:2]] == [trial.number for trial in before[:2]]  # kept
    assert trials[2].user_attrs["retry_of"] == before[2].number and trials[2].params == pytest.approx(before[2].params)


# ------------------------------------------------------------------------------------------------------------------ bad input
def test_a_study_made_for_something_else_is_refused_and_both_are_named(tmp_path, space):
    run(fresh(tmp_path), space, 1)
    with pytest.raises(CompactMindError, match="made for something else.*model: abc there, xyz here"):
        open_study("made up", f"sqlite:///{tmp_path / 'study.db'}", DESCRIBED | {"model": "xyz"})


def test_a_study_without_trials_becomes_what_the_next_command_asks_for(tmp_path, space):
    place, other = f"sqlite:///{tmp_path / 'study.db'}", DESCRIBED | {"model": "xyz", "sizes": (1, 2)}
    first = open_study("made up", place, DESCRIBED | {"more": 1}, code="old")
    require_kind(first, ("latency",), "CPU A")  # and then memory is short, say
    study = open_study("made up", place, other, code="new")
    assert study.user_attrs["described"] == other | {"sizes": [1, 2]} and study.user_attrs["code"] == "new"
    require_kind(study, ("latency",), "CPU B")
    two = open_study("made up", place, other | {"objectives": ["kl", "latency"]}, ("minimize", "minimize"))
    assert len(two.directions) == 2 and len(open_study("made up", place, other).directions) == 1
    run(fresh(tmp_path), space, 1)
    with pytest.raises(CompactMindError, match="made for something else"):
        open_study("made up", place, other)


def test_who_opened_a_study_that_another_command_has_taken_since_does_not_begin(tmp_path):
    place = f"sqlite:///{tmp_path / 'study.db'}"
    study = open_study("made up", place, DESCRIBED)
    require_described(study, DESCRIBED, place)
    open_study("made up", place, DESCRIBED | {"model": "xyz"})
    with pytest.raises(CompactMindError, match="model: xyz there, abc here"):
        require_described(study, DESCRIBED, place)


@pytest.mark.parametrize(
    "storage", ["sqlite:////nowhere/at/all/study.db", "postgresql://nobody@127.0.0.1:1/none", "no such thing"]
)
def test_a_storage_that_cannot_be_reached_is_named(storage):
    with pytest.raises(CompactMindError, match="cannot be opened.*for example sqlite|needs a driver"):  # of PostgreSQL: an extra
        open_study("x", storage, DESCRIBED)


def test_no_trials_is_no_search(tmp_path, space):
    with pytest.raises(CompactMindError, match="n_trials 0 is not at least 1"):
        run(fresh(tmp_path), space, 0)
