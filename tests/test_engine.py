"""The engine: what counts as a trial, what is never run twice, and how an interrupted search goes on."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import helpers
import optuna
import psutil
import pytest
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from compactmind.errors import CompactMindError
from compactmind.search import engine
from compactmind.search import storage as storage_module
from compactmind.search.compressor import read_pipeline
from compactmind.search.engine import counted_trials, is_counted, is_stopped, open_study, search
from compactmind.search.machine import this_worker
from compactmind.search.notes import Skipped, Stopped
from compactmind.search.space import make_space

DESCRIBED = {"model": "abc", "space": {"orders": ["prune"]}}


@pytest.fixture
def space():
    choices = {
        "prune.sparsity": [0.1, 0.2, 0.3, 0.4], "prune.criterion": ["taylor", "l2"], "prune.scope": ["global"],
        "prune.structures": [["channels"]], "prune.blocks": [0], "nf4.compensation": [True], "nf4.embeddings": ["as_released", "int8"],
    }  # fmt: skip
    return make_space(("prune", "retrain", "nf4"), choices=choices)


def fresh(tmp_path, name="made up"):
    return open_study(name, f"sqlite:///{tmp_path / 'study.db'}", DESCRIBED)


def cost(steps) -> float:
    """Return a made-up perplexity: more sparsity is worse, retraining helps, 4 bits cost."""
    methods = [step.method.name for step in steps]
    sparsity = sum(getattr(step.recipe, "sparsity", 0) for step in steps)
    return 10 + 20 * sparsity - 4 * ("retrain" in methods) + 3 * ("nf4" in methods)


def run(study, space, n_trials, evaluate=lambda _, steps: [cost(steps)], strategy="bayesian", **options):
    search(study, space, n_trials, evaluate, strategy=strategy, **options)
    return counted_trials(study)


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


def cost_of(trial) -> float:
    return cost(read_pipeline(trial.user_attrs["pipeline"]))


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
    skipped = [trial for trial in study.trials if trial.user_attrs.get("set_aside") == "not run: too large"]
    assert skipped and all(trial.state == TrialState.PRUNED and "nf4" not in trial.params["order"] for trial in skipped)
    told = fresh(tmp_path, "told")
    asked = run(told, space, 12, evaluate, excess=lambda steps: 0.0 if steps[-1].method.name == "nf4" else 1.0)
    assert len(asked) == len(told.trials) == 12  # what is known beforehand not to be small enough is not even asked for
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
def abandoned(study, space, point, worker):
    """Leave a trial running as a worker that is gone would."""
    study.enqueue_trial(point)
    trial = study.ask()
    space.suggest(trial)
    trial.set_user_attr("worker", worker)
    trial.set_user_attr("key", f"what trial {trial.number} runs")
    trial.set_user_attr("runs", True)
    return trial.number


def test_a_trial_whose_process_is_gone_is_run_once_more_and_only_once(tmp_path, space):
    study, point = fresh(tmp_path), next(space.points())
    gone = this_worker() | {"started": this_worker()["started"] - 1000}  # the number was given to another process since
    first = abandoned(study, space, point, gone)
    trials = run(study, space, 4)
    assert len(trials) == 4 and trials[0].user_attrs["retry_of"] == first
    assert study.trials[first].state == TrialState.FAIL and not is_counted(study.trials[first])
    assert trials[0].params == pytest.approx(study.trials[first].params)

    study = fresh(tmp_path, "twice")
    study.enqueue_trial(point, user_attrs={"retry_of": 0})
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
import test_engine as t
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
    assert [trial.user_attrs.get("set_aside") for trial in open_study("shared", storage, DESCRIBED).trials][:2] == [
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
            later.set_user_attr("set_aside", "the same pipeline as trial 0")
            study.tell(later, state=TrialState.FAIL)

    monkeypatch.setattr(engine, "_pause", decide)
    trial = study.ask()
    assert trial.number == 0
    steps = engine._prepare(study, space, trial, 10)
    assert pauses == [TrialState.RUNNING]
    assert (steps is None) == runs_it == ("set_aside" in study.trials[0].user_attrs)


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
    study.enqueue_trial(POINT, user_attrs={"retry_of": 99})

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


# ------------------------------------------------------------------------------------------------------------------- hiccups
def failing(monkeypatch, name, error, times):
    """Let a method of the database fail so many times; return the list of the moments when it did."""
    original, failed = getattr(RDBStorage, name), []

    def method(self, *arguments, **options):
        if len(failed) < times:
            failed.append(arguments)
            raise error
        return original(self, *arguments, **options)

    monkeypatch.setattr(RDBStorage, name, method)
    return failed


AWAY = optuna.exceptions.StorageInternalError("the database system is starting up\nand more")


@pytest.mark.parametrize(
    "name",
    ["_create_new_trial", "set_trial_user_attr", "set_trial_state_values", "_get_trials", "_set_trial_param", "get_trial"],
)
def test_a_hiccup_of_the_storage_costs_nothing(tmp_path, space, monkeypatch, name):
    study, evaluated = fresh(tmp_path), []
    monkeypatch.setattr(storage_module, "WAITS", (0, 0, 0))
    hiccups = []

    def evaluate(notes, steps):
        evaluated.append(steps)
        if len(evaluated) == 2:  # a result is about to be told
            hiccups.append(failing(monkeypatch, name, AWAY, 3))
        return [cost(steps)]

    trials = run(study, space, 4, evaluate)
    assert len(trials) == len(study.trials) == len(evaluated) == 4 and len(hiccups[0]) == 3
    assert [trial.value for trial in trials] == [cost(steps) for steps in evaluated]


def test_a_result_that_was_written_before_the_connection_broke_is_not_told_twice(tmp_path, space, monkeypatch):
    study, original, broken = fresh(tmp_path), RDBStorage.set_trial_state_values, []
    monkeypatch.setattr(storage_module, "WAITS", (0, 0))

    def done_but_not_answered(self, trial_id, state, values=None):
        found = original(self, trial_id, state, values)
        if state == TrialState.COMPLETE and not broken:
            broken.append(trial_id)
            raise AWAY
        return found

    monkeypatch.setattr(RDBStorage, "set_trial_state_values", done_but_not_answered)
    trials = run(study, space, 3)
    assert broken and len(study.trials) == 3 and all(trial.state == TrialState.COMPLETE for trial in trials)


def test_a_storage_that_stays_away_ends_the_search_in_one_line(tmp_path, space, monkeypatch):
    study = fresh(tmp_path)
    monkeypatch.setattr(storage_module, "WAITS", (0, 0))
    failing(monkeypatch, "set_trial_state_values", AWAY, 10**6)
    with pytest.raises(CompactMindError, match="has not answered for .*starting up.*the same command goes on") as error:
        run(study, space, 3)
    assert "\n" not in str(error.value)


def test_the_waits_of_the_storage_grow_and_last_for_minutes():
    assert list(storage_module.WAITS) == sorted(storage_module.WAITS) and 120 < sum(storage_module.WAITS) < 600


# ------------------------------------------------------------------------------------------------------------------ bad input
def test_a_study_made_for_something_else_is_refused_and_both_are_named(tmp_path):
    fresh(tmp_path)
    with pytest.raises(CompactMindError, match="made for something else.*model: abc there, xyz here"):
        open_study("made up", f"sqlite:///{tmp_path / 'study.db'}", DESCRIBED | {"model": "xyz"})


@pytest.mark.parametrize(
    "storage", ["sqlite:////nowhere/at/all/study.db", "postgresql://nobody@127.0.0.1:1/none", "no such thing"]
)
def test_a_storage_that_cannot_be_reached_is_named(storage):
    with pytest.raises(CompactMindError, match="cannot be opened.*for example sqlite|needs a driver"):  # of PostgreSQL: an extra
        open_study("x", storage, DESCRIBED)


def test_no_trials_is_no_search(tmp_path, space):
    with pytest.raises(CompactMindError, match="n_trials 0 is not at least 1"):
        run(fresh(tmp_path), space, 0)
