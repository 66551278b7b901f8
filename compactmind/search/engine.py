"""The engine asks Optuna for a pipeline, runs it, and tells it the result; several processes may do so on one study at once.

A trial is counted if it was really run: completed, stopped early, or failed with its reason. A trial that was stopped is told to the
sampler as what it would have come to, and marked `estimated`. What is asked for has not been run and can reach the target (strategies.py);
where two workers ask for the same all the same, a first guess turns out too large, or a process died, the trial is skipped and does not
count; that of a process that died is queued once more. Before each trial the sampler is seeded with the number of trials so far, so
that an interrupted search goes on as an unbroken one would.

Who runs a pipeline that two workers ask for? A storage has no lock to offer, but the numbers of its trials are one order for all. So a
worker writes down which pipeline its trial is (`key`), then waits until every trial before it that is running has done so too, which takes
milliseconds, then looks: what runs or has run is not run again, and of those that have not begun the lowest number begins (`runs`). Whoever
comes later finds what was written. This is Lamport's bakery (1974, https://doi.org/10.1145/361082.361093).

Whether a worker of another machine is dead can only be guessed (machine.py). A trial that is taken from one that lives after all ends once,
as the storage sees to; what that worker has measured then goes to the trial that was queued instead, if nobody has begun it.

Optuna: Akiba et al. 2019 (https://arxiv.org/abs/1907.10902). TPE with constraints: Watanabe & Hutter 2023
(https://arxiv.org/abs/2211.14411).
"""

import math
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import optuna
import psutil
from optuna.exceptions import UpdateFinishedTrialError
from optuna.pruners import BasePruner, NopPruner
from optuna.trial import FixedTrial, FrozenTrial, Trial, TrialState

from compactmind.errors import CompactMindError
from compactmind.search.compressor import Step, read_pipeline
from compactmind.search.described import describe
from compactmind.search.machine import HEARTBEAT_SECONDS, heartbeat, this_worker, worker_is_alive
from compactmind.search.notes import Notes, Skipped, Stopped
from compactmind.search.space import Space
from compactmind.search.storage import open_storage
from compactmind.search.strategies import Proposer, key_of, make_sampler
from compactmind.search.workers import signals_as_interrupts

REPEATS = 100
"""Trials in a row that are skipped before the search ends: there is nothing new to find."""
WAY_OUT = "more --methods, other --choices or a smaller --target_compression leave more to try"
"""What to do where a search has nothing left to ask for."""
POLL_SECONDS = 1.0
"""Between two looks at what another worker does; shorter at first."""
PATIENCE_SECONDS = 6 * 3600
"""So long the end of a search waits for the trials that other workers are still running."""


# -------------------------------------------------------------------------------------------------------------------- study
def open_study(
    name: str, storage: str, described: dict[str, Any], directions: Sequence[str] = ("minimize",), code: str = ""
) -> optuna.Study:
    """Return a new study or the one of that name, whose model, text, space and objectives must be the same ones if it has trials.

    `code`: version of the code that measures; that it is another one than the study was begun by is printed.

    `storage` is an Optuna URL (sqlite:///study.db, postgresql://...) or the path of a journal file (*.log). Raises CompactMindError if it
    cannot be reached or the study was made for something else.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    place = open_storage(storage)
    new = lambda: optuna.create_study(study_name=name, storage=place, directions=list(directions), load_if_exists=True)  # noqa: E731
    study = new()
    if [each.name.lower() for each in study.directions] != list(directions) and not study.get_trials(deepcopy=False):
        optuna.delete_study(study_name=name, storage=place)
        study = new()
    describe(study, described, code, storage)
    return study


def is_counted(trial: FrozenTrial) -> bool:
    """Tell whether a trial was really run, or is being run."""
    interrupted = trial.state == TrialState.FAIL and "queued_again" in trial.user_attrs
    return trial.state != TrialState.WAITING and "skipped" not in trial.user_attrs and not interrupted


def is_stopped(trial: FrozenTrial) -> bool:
    """Tell whether a trial was stopped early: its values are estimates then."""
    return "estimated" in trial.user_attrs


def counted_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials that were run or are being run, in the order of their numbers."""
    return [trial for trial in study.get_trials(deepcopy=False) if is_counted(trial)]


# ------------------------------------------------------------------------------------------------------------------ workers
def is_alive(trial: FrozenTrial) -> bool:
    """Tell whether the worker of a running trial is still there."""
    worker = trial.user_attrs.get("worker")
    if worker is None:  # killed, or about to say who it is
        return trial.datetime_start is None or time.time() - trial.datetime_start.timestamp() < HEARTBEAT_SECONDS
    return worker_is_alive(worker, trial.user_attrs.get("alive_at", 0))


def retry_interrupted(study: optuna.Study) -> int:
    """End trials whose worker is gone and queue each once more; return how many.

    So are those whose worker was found to be gone by one that then went itself, between the two.
    """
    trials = study.get_trials(deepcopy=False)
    queued_again = sum(_interrupt(study, frozen) for frozen in trials if frozen.state == TrialState.RUNNING and not is_alive(frozen))
    queued = {trial.user_attrs.get("retry_of") for trial in trials}
    for trial in trials:
        by = trial.user_attrs.get("queued_again")
        if isinstance(by, dict) and trial.state == TrialState.FAIL and trial.number not in queued and not worker_is_alive(by, by["at"]):
            _queue_again(study, trial)
            queued_again += 1
    return queued_again


def _interrupt(study: optuna.Study, frozen: FrozenTrial, told_to_end: bool = False) -> bool:
    """Let a trial end that nobody runs any more and queue it once more; tell whether it had not ended yet.

    What was run twice and ended its process both times is not queued again; a search that was told to end says nothing against its trial.
    """
    trial = Trial(study, frozen._trial_id)
    again = told_to_end or _times_run(study, frozen) < 2
    try:
        trial.set_user_attr("reason", f"interrupted: its process {'was told to end' if told_to_end else 'is gone'}")
        if told_to_end:
            trial.set_user_attr("told_to_end", True)
        if again:
            trial.set_user_attr("queued_again", {**this_worker(), "at": time.time()})  # means nothing unless the trial ends here
        study.tell(frozen.number, state=TrialState.FAIL)
    except (ValueError, UpdateFinishedTrialError):
        return False  # another worker was faster
    if again:
        _queue_again(study, frozen)
    return True


def _queue_again(study: optuna.Study, trial: FrozenTrial) -> None:
    """Queue the pipeline of a trial once more; one that was killed before it asked for parameters has only those it was queued with."""
    point = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
    study.enqueue_trial(point, user_attrs={"retry_of": trial.number})


def _times_run(study: optuna.Study, trial: FrozenTrial) -> int:
    """Return how often a trial and those it was queued again for have begun to run their pipeline and not been told to end."""
    before = trial.user_attrs.get("retry_of")
    earlier = 0 if before is None else _times_run(study, study.get_trials(deepcopy=False)[before])
    return earlier + ("runs" in trial.user_attrs and "told_to_end" not in trial.user_attrs)


def asked_keys(space: Space, trials: Sequence[FrozenTrial]) -> set[str]:
    """Return the keys of all pipelines that were ever asked for, those included that are queued or have not said their key yet."""
    keys = {trial.user_attrs["key"] for trial in trials if "key" in trial.user_attrs}
    for trial in trials:
        if "key" not in trial.user_attrs and (point := trial.system_attrs.get("fixed_params")):
            with suppress(ValueError, KeyError, CompactMindError):  # queued by hand: a part of a point, or of another space
                keys.add(key_of(read_pipeline(space.suggest(FixedTrial(point)))))
    return keys


def sampler_seed(seed: int, trials: Sequence[FrozenTrial]) -> int:
    """Return the seed of the sampler for the next trial: of a worker that is alone that of an unbroken search, else one of its own."""
    alone = all(trial.state != TrialState.RUNNING for trial in trials)
    return seed + len(trials) + (0 if alone else zlib.crc32(repr(this_worker()).encode()) >> 2)


# --------------------------------------------------------------------------------------------------------------------- loop
@signals_as_interrupts()
def search(
    study: optuna.Study,
    space: Space,
    n_trials: int,
    evaluate: Callable[[Notes, list[Step]], Sequence[float]],
    *,
    strategy: str,
    sampler: str = "tpe",
    seed: int = 0,
    first: Sequence[dict[str, Any]] = (),
    excess: Callable[[Sequence[Step]], float] = lambda _: 0.0,
    pruner: BasePruner | None = None,
    finished: Callable[[FrozenTrial], None] = lambda _: None,
    patience: float = PATIENCE_SECONDS,
    aim: str = "the target",
) -> None:
    """Run trials until the study has `n_trials` of them that count, those of other workers and earlier runs included.

    `evaluate` gets the notes of the trial, on which it may set attributes and constraints, and the checked pipeline, and returns the values
    of the objectives. It may raise Stopped; any other error but an interrupt is the trial's reason to have failed, and the search goes on.
    SIGTERM and SIGHUP interrupt it as Ctrl-C does.
    `first` are the parameters of trials that a study begins with, whatever the strategy, and that one which goes on has what is left of;
    they are at most the first two thirds of `n_trials`. `excess` tells by how much a pipeline is expected to miss the target: what is
    above 0 is not asked for. `pruner` decides what `should_prune` of the notes says.
    `finished` is called with every trial that counts. At the end the trials that other workers are still running are waited for, as long
    as these live and at most `patience` seconds. If nothing is left that reaches the target, `aim` in words, that is printed. Raises
    CompactMindError if the storage does not answer for minutes.
    """
    if n_trials < 1:
        raise CompactMindError(f"n_trials {n_trials} is not at least 1: for example --n_trials 30")
    possible = [point for point in first if excess(read_pipeline(space.pipeline(point))) <= 0]
    proposer = Proposer(space, strategy, sampler, excess, possible[: n_trials - n_trials // 3], seed)
    study.pruner = pruner or NopPruner()
    repeats, waiting_since = 0, None
    while True:
        if retry_interrupted(study):
            repeats = 0
        trials = study.get_trials(deepcopy=False)
        waiting = any(trial.state == TrialState.WAITING for trial in trials)
        if sum(map(is_counted, trials)) >= n_trials or repeats >= REPEATS:
            running = [trial.number for trial in trials if trial.state == TrialState.RUNNING]
            waiting_since = waiting_since or _say_waiting(running)
            if not running or time.monotonic() - waiting_since >= patience:
                if running:
                    print(f"trials {running} of other workers are still running: going on without them", flush=True)
                if 0 < (count := sum(map(is_counted, trials))) < n_trials:  # of none at all whoever asked says why
                    print(f"{count} of {n_trials} trials: nothing else that was drawn reaches {aim}; {WAY_OUT}", flush=True)
                return
            _pause(POLL_SECONDS)
            continue
        own_seed = sampler_seed(seed, trials)
        study.sampler = make_sampler(strategy, sampler, own_seed)
        if not waiting:
            point = proposer.propose(study, asked_keys(space, trials), own_seed)
            if point is None:
                repeats = REPEATS  # nothing is left, unless another worker's trial is to be run again
                continue
            study.enqueue_trial(point)
        trial, steps, waiting_since = study.ask(), None, None
        try:
            steps = _prepare(study, space, trial, n_trials)
            number = None if steps is None else _run(study, space, trial, steps, evaluate)
        except UpdateFinishedTrialError:
            number = None  # this worker was taken for dead before it had begun: the trial is queued once more
        except (KeyboardInterrupt, SystemExit):
            _interrupt(study, study.get_trials(deepcopy=False)[trial.number], told_to_end=True)
            raise
        ended = None if number is None else study.get_trials(deepcopy=False)[number]
        repeats = 0 if ended is not None and is_counted(ended) else repeats + 1
        if ended is not None and is_counted(ended):
            finished(ended)


def _say_waiting(running: list[int]) -> float:
    if running:
        print(f"waiting for trials {running} of other workers ...", flush=True)
    return time.monotonic()


def _pause(seconds: float) -> None:
    time.sleep(seconds)


def _prepare(study: optuna.Study, space: Space, trial: Trial, n_trials: int) -> list[Step] | None:
    """Say who runs a trial and which pipeline it is; return its steps, or None if it is redundant and was skipped.

    Raises UpdateFinishedTrialError if another worker has taken this one for dead.
    """
    trial.set_user_attr("alive_at", time.time())  # before the worker: of one elsewhere nothing else tells that it lives
    trial.set_user_attr("worker", this_worker())
    pipeline = space.suggest(trial)
    steps = read_pipeline(pipeline)
    trial.set_user_attr("pipeline", [step.described() for step in steps])
    trial.set_user_attr("key", key_of(steps))
    if _skip_redundant(study, trial, n_trials):
        return None
    trial.set_user_attr("runs", True)
    return steps


def _settled_trials(study: optuna.Study, trial: Trial) -> list[FrozenTrial]:
    """Return the other trials that count, once it is settled which of them run the pipeline of this one: see the top of this file."""
    key, pause, left_out = trial.user_attrs["key"], 0.01, (trial.number, trial.user_attrs.get("retry_of"))
    while True:
        others = [other for other in counted_trials(study) if other.number not in left_out]
        undecided = [
            other
            for other in others
            if other.state == TrialState.RUNNING
            and ("key" not in other.user_attrs if other.number < trial.number else
                 other.user_attrs.get("key") == key and "runs" not in other.user_attrs)
        ]  # fmt: skip
        if not undecided:
            return others
        _pause(pause)
        pause = min(2 * pause, POLL_SECONDS)
        retry_interrupted(study)


def _skip_redundant(study: optuna.Study, trial: Trial, n_trials: int) -> bool:
    """Skip a trial that need not be run; return whether it was. The sampler is not told again what it knows.

    What is one too many waits in the queue for whoever goes on: it may be the second chance of what another worker has begun.
    """
    key, reason = trial.user_attrs["key"], None
    others = _settled_trials(study, trial)
    for other in others:
        same = other.user_attrs.get("key") == key
        if same and (other.state.is_finished() or other.number < trial.number or "runs" in other.user_attrs):
            reason = f"the same pipeline as trial {other.number}"
    notes = Notes(study, trial.number)
    if enough := reason is None and sum(other.number < trial.number for other in others) >= n_trials:  # two asked for the last one
        reason = f"{n_trials} trials are enough"
        notes.set_user_attr("queued_again", {**this_worker(), "at": time.time()})
    if reason is None:
        return False
    notes.set_user_attr("skipped", reason)
    _tell(study, trial, notes, None, TrialState.FAIL)
    if enough:
        _queue_again(study, study.get_trials(deepcopy=False)[trial.number])
    return True


def _run(study: optuna.Study, space: Space, trial: Trial, steps: list[Step], evaluate) -> int | None:
    """Run a trial and write down what came of it; return its number, or that of the trial its result went to, None if it is not needed."""
    started = time.perf_counter()
    values, state, reason, notes = None, TrialState.COMPLETE, None, Notes(study, trial.number)
    try:
        with heartbeat(trial):
            values = list(evaluate(notes, steps))
            if not all(value == value for value in values):
                raise CompactMindError(f"the objectives are {values}")
    except Skipped as stop:
        reason, state = str(stop), TrialState.FAIL if len(study.directions) > 1 else TrialState.PRUNED
        notes.set_user_attr("skipped", reason)
    except Stopped as stop:
        reason, known = str(stop), len(stop.values) == len(study.directions)
        values, state = (stop.values, TrialState.COMPLETE) if known else (None, TrialState.FAIL)
        notes.set_user_attr("estimated", values)
    except Exception as error:  # noqa: BLE001  out of memory, NaN, a recipe that does not fit: one trial, not the search
        reason, state = f"{type(error).__name__}: {str(error).strip() or 'no message'}"[:500], TrialState.FAIL
    notes.set_user_attr("seconds", time.perf_counter() - started)
    memory = psutil.Process().memory_info().rss / 1e6  # of the worker: it must not grow with the trials
    notes.set_user_attr("memory_mb", memory)
    notes.set_user_attr("reason", reason)
    values = values if state == TrialState.COMPLETE else None
    if _tell(study, trial, notes, values, state):
        return trial.number
    return _transfer_result(study, space, trial, notes, values, state)


def _tell(study: optuna.Study, trial: Trial, notes: Notes, values: Sequence[float] | None, state: TrialState) -> bool:
    """Tell the study how a trial ended; return whether it ended like that, and not before because its worker was taken for dead."""
    try:
        notes.write(trial)
        study.tell(trial, values if state == TrialState.COMPLETE else None, state=state)
    except (ValueError, UpdateFinishedTrialError):
        ended = study.get_trials(deepcopy=False)[trial.number].state
        if not ended.is_finished():
            raise
        return ended == state
    return True


def _transfer_result(
    study: optuna.Study, space: Space, trial: Trial, notes: Notes, values: Sequence[float] | None, state: TrialState
) -> int | None:
    """Transfer the result of a trial that was taken away to the one queued instead; return its number, None if it is being run."""
    while True:
        for other in study.get_trials(deepcopy=False, states=[TrialState.WAITING]):
            if other.user_attrs.get("retry_of") == trial.number and _claim(study, other):
                again = Trial(study, other._trial_id)
                if _prepare(study, space, again, math.inf) is None:
                    return None
                print(f"trial {trial.number} was taken for dead: what it measured is trial {again.number} now", flush=True)
                return again.number if _tell(study, again, notes, values, state) else None
        others = [other for other in counted_trials(study) if other.number != trial.number and other.state != TrialState.FAIL]
        same = ((other.user_attrs.get("key"), other.user_attrs.get("retry_of")) for other in others)
        if any(key == trial.user_attrs["key"] or retry_of == trial.number for key, retry_of in same):
            print(f"trial {trial.number} was taken for dead: another worker runs it, and this result is not needed", flush=True)
            return None
        study.enqueue_trial(trial.params, user_attrs={"retry_of": trial.number})  # it had its second chance, and has a result


def _claim(study: optuna.Study, waiting: FrozenTrial) -> bool:
    """Claim a waiting trial, as `ask` does; return whether no other worker did."""
    try:
        return study._storage.set_trial_state_values(waiting._trial_id, state=TrialState.RUNNING)
    except UpdateFinishedTrialError:
        return False
