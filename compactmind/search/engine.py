"""The engine asks Optuna for a pipeline, runs it, and tells what came of it; several processes may do so on one study at once.

A trial is counted if it was really run: completed, stopped early, or failed with its reason. Set aside, and not counted, are trials that
ask for what has been run already (the sampler is told what is known of it), pipelines that cannot reach the target, trials another
worker was faster with, and trials whose process died; these are asked for once more. Before each trial the sampler is seeded with the
number of trials so far, so that an interrupted search goes on as an unbroken one would.

Optuna: Akiba et al. 2019 (https://arxiv.org/abs/1907.10902). TPE with constraints: Watanabe & Hutter 2023
(https://arxiv.org/abs/2211.14411).
"""

import os
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import optuna
import psutil
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, Trial, TrialState

from compactmind.errors import CompactMindError
from compactmind.search.compressor import Step, read_pipeline
from compactmind.search.space import Space

SAMPLERS = ("tpe", "gp")
HEARTBEAT_SECONDS = 20
DEAD_AFTER_SECONDS = 300
"""Without a sign of life for so long a worker on another machine counts as dead; on this one its process is looked up."""
STARTUP_TRIALS = 8
"""Random trials before the sampler begins to learn."""
REPEATS = 100
"""Trials in a row that are set aside before the search ends: there is nothing new to find."""


class Stopped(Exception):
    """Raised by what evaluates a pipeline: the trial ends early, for the reason in the message; `values` if they are known so far."""

    def __init__(self, reason: str, value: float | None = None):
        super().__init__(reason)
        self.value = value


class Skipped(Stopped):
    """Raised before anything is run: the trial does not count."""


# -------------------------------------------------------------------------------------------------------------------- study
def open_study(name: str, storage: str, described: dict[str, Any], directions: Sequence[str] = ("minimize",)) -> optuna.Study:
    """Return a new study or the one of that name, whose model, text, space and objectives must be the same ones.

    `storage` is an Optuna URL (sqlite:///study.db, postgresql://...) or the path of a journal file (*.log). Raises CompactMindError if it
    cannot be reached or the study was made for something else.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        place = storage
        if storage.endswith(".log"):
            from optuna.storages import JournalStorage
            from optuna.storages.journal import JournalFileBackend

            place = JournalStorage(JournalFileBackend(storage))
        study = optuna.create_study(study_name=name, storage=place, directions=list(directions), load_if_exists=True)
        known = study.user_attrs.get("described")
    except Exception as error:  # noqa: BLE001  every database driver has its own way to say "not there"
        raise CompactMindError(
            f"the study's storage {storage!r} cannot be opened: {str(error).strip().splitlines()[0]}; for example sqlite:///study.db, a "
            "journal file study.log, or postgresql://user:password@host/database"
        ) from None
    if known is None:
        study.set_user_attr("described", described)
    elif known != described:
        different = sorted(key for key in described.keys() | known.keys() if described.get(key) != known.get(key))
        details = "; ".join(
            f"{key}: {str(known.get(key))[:200]} there, {str(described.get(key))[:200]} here" for key in different
        )
        raise CompactMindError(
            f"the study {name!r} in {storage} was made for something else ({details}): choose another --study_name, or delete it"
        )
    return study


def make_sampler(strategy: str, sampler: str, seed: int) -> BaseSampler:
    """Return what chooses the next pipeline; grid needs none, its points are queued."""
    if strategy in ("random", "grid"):
        return RandomSampler(seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # what Optuna calls every setting here
        if sampler == "gp":
            return GPSampler(seed=seed, n_startup_trials=STARTUP_TRIALS)
        return TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS, multivariate=True, group=True, constant_liar=True)


def is_counted(trial: FrozenTrial) -> bool:
    """Tell whether a trial was really run, or is being run."""
    return trial.state != TrialState.WAITING and "set_aside" not in trial.user_attrs


def counted_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials that were run or are being run, in the order of their numbers."""
    return [trial for trial in study.get_trials(deepcopy=False) if is_counted(trial)]


# ------------------------------------------------------------------------------------------------------------------ workers
def this_worker() -> dict[str, Any]:
    """Return what tells this process from every other one, on any machine and at any time."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}


def is_alive(trial: FrozenTrial) -> bool:
    """Tell whether the worker of a running trial is still there."""
    worker = trial.user_attrs.get("worker")
    if worker is None:  # killed, or about to say who it is
        return trial.datetime_start is None or time.time() - trial.datetime_start.timestamp() < HEARTBEAT_SECONDS
    if worker["host"] != socket.gethostname():
        return time.time() - trial.user_attrs.get("alive_at", 0) < DEAD_AFTER_SECONDS
    with suppress(psutil.Error):
        return abs(psutil.Process(worker["pid"]).create_time() - worker["started"]) < 1
    return False


def retry_interrupted(study: optuna.Study) -> int:
    """Set trials aside whose worker is gone and queue each once more; return how many."""
    count = 0
    for frozen in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        if is_alive(frozen):
            continue
        trial, again = Trial(study, frozen._trial_id), "retry_of" not in frozen.user_attrs
        try:
            trial.set_user_attr("reason", "interrupted: its process is gone")
            if again:
                trial.set_user_attr("set_aside", "asked for once more")
            study.tell(frozen.number, state=TrialState.FAIL)
        except (ValueError, RuntimeError, optuna.exceptions.OptunaError):
            continue  # another worker was faster
        if again:
            study.enqueue_trial(frozen.params, user_attrs={"retry_of": frozen.number})
        count += 1
    return count


@contextmanager
def sign_of_life(trial: Trial) -> Iterator[None]:
    """Inside the `with` block the trial is told every so often that its worker lives."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(HEARTBEAT_SECONDS):
            with suppress(Exception):  # a storage that is away for a moment must not end the trial
                trial.set_user_attr("alive_at", time.time())

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


# --------------------------------------------------------------------------------------------------------------------- loop
def search(
    study: optuna.Study,
    space: Space,
    n_trials: int,
    evaluate: Callable[[Trial, list[Step]], Sequence[float]],
    *,
    strategy: str,
    sampler: str = "tpe",
    seed: int = 0,
    first: Sequence[dict[str, Any]] = (),
    finished: Callable[[FrozenTrial], None] = lambda _: None,
) -> None:
    """Run trials until the study has `n_trials` of them that count, those of other workers and earlier runs included.

    `evaluate` gets the running trial, on which it may set attributes and constraints, and the checked pipeline, and returns the values of
    the objectives. It may raise Stopped; any other error but an interrupt is the trial's reason to have failed, and the search goes on.
    `first` are the parameters of trials a new study begins with; the last third of the trials is the sampler's in any case.
    `finished` is called with every trial that counts.
    """
    if n_trials < 1:
        raise CompactMindError(f"n_trials {n_trials} is not at least 1: for example --n_trials 30")
    if not study.get_trials(deepcopy=False):
        for point in shuffled_points(space, seed)[:n_trials] if strategy == "grid" else first[: n_trials - n_trials // 3]:
            study.enqueue_trial(point)
    repeats, how = 0, strategy
    while True:
        retry_interrupted(study)
        trials = study.get_trials(deepcopy=False)
        waiting = any(trial.state == TrialState.WAITING for trial in trials)
        if sum(map(is_counted, trials)) >= n_trials or repeats >= REPEATS or (strategy == "grid" and not waiting):
            return
        study.sampler = make_sampler(how, sampler, seed + len(trials))
        trial = study.ask()
        trial.set_user_attr("worker", this_worker())
        pipeline = space.suggest(trial)
        steps = read_pipeline(pipeline)
        trial.set_user_attr("key", " ".join(step.identity() for step in steps))
        trial.set_user_attr("pipeline", [step.described() for step in steps])
        if _set_aside(study, trial, n_trials):
            repeats, how = repeats + 1, "random"  # who proposes what is known is not asked again at once
            continue
        _run(study, trial, steps, evaluate)
        how, ended = strategy, study.get_trials(deepcopy=False)[trial.number]
        repeats = 0 if is_counted(ended) else repeats + 1
        if is_counted(ended):
            finished(ended)


def shuffled_points(space: Space, seed: int) -> list[dict[str, Any]]:
    """Return the points of a space in random order, so that the first ones are a fair sample."""
    import random

    points = list(space.points())
    random.Random(seed).shuffle(points)
    return points


def _set_aside(study: optuna.Study, trial: Trial, n_trials: int) -> bool:
    """Set a trial aside that need not be run, telling the sampler what is known of its pipeline; tell whether it was."""
    key, reason, twin = trial.user_attrs["key"], None, None
    others = [other for other in counted_trials(study) if other.number != trial.number]
    for other in others:
        same = other.user_attrs.get("key") == key
        if same and other.state in (TrialState.COMPLETE, TrialState.PRUNED):
            reason, twin = f"the same pipeline as trial {other.number}", other
        elif same and (other.state == TrialState.FAIL or other.number < trial.number):
            reason = f"the same pipeline as trial {other.number}"
    if sum(other.number < trial.number for other in others) >= n_trials:  # two workers asked for the last one
        reason = reason or f"{n_trials} trials are enough"
    if reason is None:
        return False
    trial.set_user_attr("set_aside", reason)
    if twin is None:
        study.tell(trial, state=TrialState.FAIL)
        return True
    for name, value in twin.constraints.items():
        trial.set_constraint(name, value)
    if twin.state == TrialState.PRUNED:
        for step, value in twin.intermediate_values.items():
            trial.report(value, step)
        study.tell(trial, state=TrialState.PRUNED)
    else:
        study.tell(trial, twin.values)
    return True


def _run(study: optuna.Study, trial: Trial, steps: list[Step], evaluate) -> None:
    started = time.perf_counter()
    values, state, reason = None, TrialState.COMPLETE, None
    try:
        with sign_of_life(trial):
            values = list(evaluate(trial, steps))
            if not all(value == value for value in values):
                raise CompactMindError(f"the objectives are {values}")
    except Stopped as stop:
        reason, state = str(stop), TrialState.FAIL if len(study.directions) > 1 else TrialState.PRUNED
        if state == TrialState.PRUNED and stop.value is not None:
            trial.report(stop.value, 0)
        if isinstance(stop, Skipped):
            trial.set_user_attr("set_aside", reason)
    except Exception as error:  # noqa: BLE001  out of memory, NaN, a recipe that does not fit: one trial, not the search
        reason, state = f"{type(error).__name__}: {str(error).strip() or 'no message'}"[:500], TrialState.FAIL
    trial.set_user_attr("seconds", time.perf_counter() - started)
    trial.set_user_attr(
        "memory_mb", psutil.Process().memory_info().rss / 1e6
    )  # of the worker: it must not grow with the trials
    if reason is not None:
        trial.set_user_attr("reason", reason)
    study.tell(trial, values if state == TrialState.COMPLETE else None, state=state)
