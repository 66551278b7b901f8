"""Several workers on one study, step by step: none runs what another does, is lost when taken for dead, or ends before the others."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import made_up_search
import optuna
import psutil
import pytest
from made_up_search import DESCRIBED, abandoned, cost, cost_of, fresh, run
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from compactmind.search import engine
from compactmind.search.compressor import read_pipeline
from compactmind.search.engine import is_counted, open_study
from compactmind.search.machine import this_worker

space = made_up_search.space


# ----------------------------------------------------------------------------------------------- several workers, step by step
STORAGES = pytest.mark.parametrize("kind", ["sqlite:///{}/study.db", "{}/study.log"])
POINT = {"order": "prune", "prune.sparsity": 0.2, "prune.criterion": "l2"}


class Hooked:
    """A space that calls `hook` before it says which pipeline a trial is: the moment between its number and its key."""

    def __init__(self, space, hook):
        self.space, self.hook = space, hook

    def suggest(self, trial):
        if "worker" in trial.user_attrs:  # a trial of the study, not a draft of one
            hook, self.hook = self.hook, lambda: None
            hook()
        return self.space.suggest(trial)

    def __getattr__(self, name):
        return getattr(self.space, name)


def in_thread(work):
    """Start `work` in a thread and return it with the errors it ends with."""
    errors = []

    def guarded():
        try:
            work()
        except BaseException as error:  # noqa: BLE001  it is looked at by the test
            errors.append(error)

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    return thread, errors


@STORAGES
def test_a_worker_that_is_slow_to_say_what_it_runs_and_a_fast_one_run_it_once(tmp_path, space, kind, monkeypatch):
    storage, run_by, threads = kind.format(tmp_path), [], []
    open_study("shared", storage, DESCRIBED)
    fast_waits_or_ran = threading.Event()
    monkeypatch.setattr(engine, "_pause", lambda _: (fast_waits_or_ran.set(), time.sleep(0.01)))

    def work(name, own_space):
        def evaluate(notes, steps):
            run_by.append((name, " ".join(step.identity() for step in steps)))
            fast_waits_or_ran.set()
            return [cost(steps)]

        study = open_study("shared", storage, DESCRIBED)
        study.enqueue_trial(POINT)
        engine.search(study, own_space, 2, evaluate, strategy="random")

    def let_the_fast_one_pass():
        threads.append(in_thread(lambda: work("fast", space)))
        fast_waits_or_ran.wait()

    slow, errors = in_thread(lambda: work("slow", Hooked(space, let_the_fast_one_pass)))
    slow.join()
    threads[0][0].join()
    assert errors == threads[0][1] == []
    assert [name for name, key in run_by if key == key_of(space, POINT)] == ["slow"] and len(run_by) == 2
    assert [trial.user_attrs.get("skipped") for trial in open_study("shared", storage, DESCRIBED).trials][:2] == [
        None, "the same pipeline as trial 0",
    ]  # fmt: skip


def given(study, **attributes):
    """Return a trial of this process that is running POINT, with these attributes."""
    trial = optuna.trial.Trial(study, study._storage.create_new_trial(study._study_id))
    for name, value in {"worker": this_worker(), **attributes}.items():
        trial.set_user_attr(name, value)
    return trial


def key_of(space, point) -> str:
    steps = read_pipeline(space.suggest(optuna.trial.FixedTrial(point)))
    return " ".join(step.identity() for step in steps)


@pytest.mark.parametrize("runs_it", [True, False])
def test_a_queued_trial_waits_for_a_later_one_to_decide(tmp_path, space, monkeypatch, runs_it):
    study = fresh(tmp_path)
    study.enqueue_trial(POINT)  # trial 0 is still in the queue when trial 1 is made and asks for the same
    later, pauses = given(study, key=key_of(space, POINT)), []

    def decide(_):
        pauses.append(study.trials[0].state)
        if runs_it:
            later.set_user_attr("runs", True)
        else:
            later.set_user_attr("skipped", "the same pipeline as trial 0")
            study.tell(later, state=TrialState.FAIL)

    monkeypatch.setattr(engine, "_pause", decide)
    trial = study.ask()
    assert trial.number == 0
    steps = engine._prepare(study, space, trial, 10)
    assert pauses == [TrialState.RUNNING]
    assert (steps is None) == runs_it == ("skipped" in study.trials[0].user_attrs)


def test_a_trial_without_a_key_whose_worker_is_gone_holds_nobody_up(tmp_path, space, monkeypatch):
    study = fresh(tmp_path)
    gone = this_worker() | {"started": this_worker()["started"] - 1000}
    given(study, worker=gone)
    monkeypatch.setattr(engine, "_pause", lambda _: None)
    trial = study.ask()
    assert trial.number == 1 and engine._prepare(study, space, trial, 10) is not None
    assert study.trials[0].state == TrialState.FAIL and not is_counted(study.trials[0])


def test_two_workers_cannot_take_one_queued_trial(tmp_path, space, monkeypatch):
    first, second = fresh(tmp_path), fresh(tmp_path)
    first.enqueue_trial(POINT)
    numbers, threads = [], []
    original = RDBStorage.check_trial_is_updatable

    def between_reading_and_writing(storage, trial_id, state):
        if not threads:  # the first worker has read that the trial waits: the second one has a second to take it too
            threads.append(in_thread(lambda: numbers.append(second.ask().number)))
            threads[0][0].join(timeout=1)
        original(storage, trial_id, state)

    monkeypatch.setattr(RDBStorage, "check_trial_is_updatable", between_reading_and_writing)
    numbers.append(first.ask().number)
    threads[0][0].join()
    assert threads[0][1] == [] and sorted(numbers) == [0, 1]


# ------------------------------------------------------------------------------------------------------------ taken for dead
@STORAGES
@pytest.mark.parametrize("retry", ["waits", "is running", "was done"])
def test_a_worker_that_was_taken_for_dead_goes_on_and_its_result_is_kept(tmp_path, space, kind, retry, monkeypatch, capsys):
    storage, evaluated = kind.format(tmp_path), []
    study, other = (open_study("shared", storage, DESCRIBED) for _ in range(2))

    def taken(notes, steps):
        evaluated.append(steps)
        notes.set_user_attr("measured", {"perplexity": cost(steps)})
        notes.set_constraint("compression", -1.0)
        if len(evaluated) == 1:  # another worker thinks that this one is gone
            monkeypatch.setattr(engine, "is_alive", lambda _: False)
            assert engine.retry_interrupted(other) == 1
            monkeypatch.setattr(engine, "is_alive", lambda _: True)
            if retry != "waits":
                trial = other.ask()
                assert engine._prepare(other, space, trial, 10) is not None
            if retry == "was done":
                other.tell(trial, 1.0)
        return [cost(steps)]

    trials = run(study, space, 3, taken, patience=0)
    assert len(trials) == 3 and max(Counter(trial.user_attrs["key"] for trial in trials).values()) == 1
    assert study.trials[0].state == TrialState.FAIL and not is_counted(study.trials[0])
    again = study.trials[1]
    assert again.user_attrs["retry_of"] == 0 and "taken for dead" in capsys.readouterr().out
    if retry == "waits":
        assert len(evaluated) == 3 and again.state == TrialState.COMPLETE and again.value == cost_of(again)
        assert again.user_attrs["measured"] == {"perplexity": again.value} and again.constraints == {"compression": -1.0}
    else:
        assert again.state == (TrialState.RUNNING if retry == "is running" else TrialState.COMPLETE)
        assert "measured" not in again.user_attrs


def test_a_result_of_a_second_chance_that_was_taken_away_is_kept_too(tmp_path, space, monkeypatch):
    study, evaluated = fresh(tmp_path), []
    abandoned(study, space, POINT, this_worker() | {"started": 0.0})

    def taken(notes, steps):
        evaluated.append(steps)
        if len(evaluated) == 1:
            monkeypatch.setattr(engine, "is_alive", lambda _: False)
            engine.retry_interrupted(fresh(tmp_path))
            monkeypatch.setattr(engine, "is_alive", lambda _: True)
        return [cost(steps)]

    trials = run(study, space, 2, taken)
    assert [trial.state for trial in trials] == [TrialState.FAIL, TrialState.COMPLETE]  # nobody queued it a third time
    assert trials[1].value == cost_of(trials[1]) == cost(evaluated[0]) and len(evaluated) == 1


def test_a_worker_taken_for_dead_before_it_began_asks_again(tmp_path, space, monkeypatch):
    study = fresh(tmp_path)

    def take():
        monkeypatch.setattr(engine, "is_alive", lambda _: False)
        engine.retry_interrupted(fresh(tmp_path))
        monkeypatch.setattr(engine, "is_alive", lambda _: True)

    hooked = Hooked(space, take)
    trials = run(study, hooked, 3)
    assert len(trials) == 3 and all(trial.state == TrialState.COMPLETE for trial in trials)
    assert study.trials[0].state == TrialState.FAIL and trials[0].user_attrs["retry_of"] == 0


def test_a_second_chance_that_is_killed_before_it_asks_for_parameters_keeps_its_pipeline(tmp_path, space, monkeypatch):
    study = fresh(tmp_path)
    abandoned(study, space, POINT, this_worker())
    monkeypatch.setattr(engine, "is_alive", lambda _: False)
    assert engine.retry_interrupted(study) == 1
    study.ask()  # and gone, before space.suggest
    assert engine.retry_interrupted(study) == 1
    last = study.trials[-1]
    assert (last.state, last.user_attrs["retry_of"]) == (TrialState.WAITING, 1) and last.system_attrs["fixed_params"] == POINT


def test_a_second_chance_that_is_one_too_many_waits_for_whoever_goes_on(tmp_path, space, monkeypatch):
    study, alive, ran = fresh(tmp_path), {"others": False}, []
    monkeypatch.setattr(engine, "is_alive", lambda trial: alive["others"])
    points = list(space.points())[:2]
    for point in points:
        abandoned(study, space, point, this_worker())
    assert engine.retry_interrupted(study) == 2
    alive["others"] = True
    first, second = study.ask(), study.ask()  # two workers that both saw that one trial is missing
    assert engine._prepare(study, space, first, 1) is not None and engine._prepare(study, space, second, 1) is None
    study.tell(first, 1.0)
    skipped = study.trials[second.number]
    assert skipped.user_attrs["skipped"] == "1 trials are enough" and not is_counted(skipped)

    trials = run(study, space, 2, lambda _, steps: (ran.append(key_of(space, points[1])), [cost(steps)])[1])
    assert ran == [trials[1].user_attrs["key"]] and trials[1].params == points[1] and not study.get_trials(states=[TrialState.WAITING])


def test_a_fresh_trial_on_another_machine_is_alive(tmp_path, space, monkeypatch):
    study = fresh(tmp_path)
    monkeypatch.setattr(engine, "this_worker", lambda: {"host": "far away", "pid": 1, "started": 0.0})
    trial = study.ask()
    engine._prepare(study, space, trial, 10)
    assert engine.is_alive(study.trials[0]) and engine.retry_interrupted(study) == 0


def test_an_interrupted_trial_is_queued_at_once(tmp_path, space):
    def interrupted(notes, steps):
        raise KeyboardInterrupt

    study = fresh(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(study, space, 3, interrupted)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.WAITING]
    assert len(run(study, space, 3)) == 3


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM"])
def test_a_trial_whose_search_was_told_to_end_is_run_once_more_however_often_that_was(tmp_path, space, how):
    study, asked = fresh(tmp_path), []
    study.enqueue_trial(POINT)

    def interrupted(notes, steps):
        asked.append(steps)
        if how == "SIGTERM":  # what a batch system ends its jobs with
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run(study, space, 1, interrupted)
    abandoned(study, space, None, this_worker() | {"started": 0.0})  # the first time that it ends its process
    with pytest.raises(KeyboardInterrupt):
        run(study, space, 1, interrupted)
    (trial,) = run(study, space, 1)
    assert trial.params == POINT and trial.state == TrialState.COMPLETE and len(asked) == 4
    assert not study.get_trials(states=[TrialState.WAITING])


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP")
def test_what_nohup_has_started_does_not_hear_that_its_terminal_is_gone(tmp_path, space):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        trials = run(fresh(tmp_path), space, 2, lambda _, steps: (os.kill(os.getpid(), signal.SIGHUP), [cost(steps)])[1])
    finally:
        signal.signal(signal.SIGHUP, before)
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 2


# ------------------------------------------------------------------------------------------------------------ the last trials
def test_the_end_waits_for_the_trials_of_other_workers(tmp_path, space, monkeypatch, capsys):
    study, pauses = fresh(tmp_path), []
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        worker = this_worker() | {"pid": other.pid, "started": psutil.Process(other.pid).create_time()}
        number = abandoned(study, space, next(space.points()), worker)

        def end_after_three(_):
            pauses.append(study.trials[number].state)
            if len(pauses) == 3:
                study.tell(number, 1.0)

        monkeypatch.setattr(engine, "_pause", end_after_three)
        trials = run(study, space, 3)
        assert pauses == [TrialState.RUNNING] * 3 and all(trial.state == TrialState.COMPLETE for trial in trials)
        assert f"waiting for trials [{number}] of other workers" in capsys.readouterr().out
        tried = {trial.user_attrs["key"] for trial in trials}  # beside other workers the draws differ from run to run
        new = (point for point in space.points() if key_of(space, point) not in tried)
        number = abandoned(study, space, next(new), worker)
        monkeypatch.setattr(engine, "_pause", lambda _: other.kill() or other.wait())
        trials = run(study, space, 4)  # it dies while it is waited for: its trial is run here
        assert len(trials) == 4 and trials[-1].user_attrs["retry_of"] == number
        assert all(trial.state == TrialState.COMPLETE for trial in trials)


def test_waiting_has_an_end_and_says_so(tmp_path, space, monkeypatch, capsys):
    study = fresh(tmp_path)
    trial = given(study, key="x", runs=True)
    monkeypatch.setattr(engine, "_pause", lambda _: pytest.fail("it waits"))
    run(study, space, 2, patience=0)
    assert f"trials [{trial.number}] of other workers are still running: going on without them" in capsys.readouterr().out
