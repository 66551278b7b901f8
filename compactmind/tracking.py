"""What a training run does, sent to a tracker: trackio, wandb, mlflow or tensorboard, through accelerate's interface to them.

Off unless a stage is told `--track NAME`, and then only watched: no number depends on it, and a tracker that fails while a model is
trained is left alone from there on. A run of the tracker is one training of one model, so it is opened and closed by its progress
lines (training.Progress). accelerate's trackers are used without its Accelerator, of which a stage has one for several models, and whose
`end_training` ends the process group too.
"""

from __future__ import annotations

import importlib.util
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch

from compactmind.errors import CompactMindError

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

TRACKERS = ("trackio", "wandb", "mlflow", "tensorboard")
"""Trackers that can be asked for; each is also the name of its package."""

PROJECT = "compactmind"


class Run:
    """One training of one model in a tracker; of values that are no numbers (a phase, None) it takes no note."""

    def __init__(self, tracker: GeneralTracker, name: str):
        self.tracker, self.name = tracker, name

    def log(self, values: dict[str, Any], step: int) -> None:
        """Note values at an optimizer step."""
        self._do("log", {key: value for key, value in values.items() if type(value) in (int, float)}, step=step)

    def finish(self) -> None:
        """Close the run; once more does nothing."""
        self._do("finish")
        self.tracker = None

    def _do(self, what: str, *arguments: Any, **options: Any) -> None:
        if self.tracker is None:
            return
        try:
            with _same_random_numbers():
                getattr(self.tracker, what)(*arguments, **options)
        except Exception as error:  # noqa: BLE001  a server that is gone, a full disk: the training is worth more
            print(f"warning: {self.name} is tracked no further: {type(error).__name__}: {error}")
            self.tracker = None


class Tracking:
    """The runs of one stage in one tracker; the first of a model is named <stage>-<model>, more of that name are numbered."""

    def __init__(self, tracker: str, stage: str, settings: dict[str, Any], directory: Path):
        self.tracker, self.stage, self.settings, self.directory = tracker, stage, settings, directory
        self.runs: list[Run] = []
        self.names: Counter[str] = Counter()

    def begin(self, model: str) -> Run:
        """Open the run of a model. Raises CompactMindError with what the tracker says if it cannot."""
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS  # here, because who tracks nothing needs none of it

        name = f"{self.stage}-{model}"
        self.names[name] += 1
        name += f"-{self.names[name]}" if self.names[name] > 1 else ""
        make, folder = LOGGER_TYPE_TO_CLASS[self.tracker], self.directory / "tracking"
        try:
            with _same_random_numbers():
                if self.tracker == "tensorboard":
                    tracker = make(name, str(folder))
                elif self.tracker == "mlflow":
                    tracker = make(PROJECT, run_name=name)
                else:
                    tracker = make(PROJECT, name=name)
                tracker.start()
                tracker.store_init_configuration(self.settings)
        except Exception as error:
            raise CompactMindError(
                f"{self.tracker} could not begin the run {name} ({type(error).__name__}: {error}): set it up, or leave --track out"
            ) from error
        self.runs.append(Run(tracker, name))
        return self.runs[-1]


_current: ContextVar[Tracking | None] = ContextVar("tracking", default=None)


@contextmanager
def tracking(tracker: str, stage: str, settings: dict[str, Any], directory: Path) -> Iterator[None]:
    """Inside the `with` block every model that is trained is a run of `tracker`, one of TRACKERS; with "" nothing is tracked.

    `settings` are noted with every run; tensorboard's files go to `directory`/tracking, the others' where they are set up to.
    Raises CompactMindError if the package of the tracker is not installed.
    """
    if tracker and importlib.util.find_spec(tracker) is None:
        raise CompactMindError(f"--track {tracker} needs a package that is not installed: run `pip install {tracker}`")
    plain = {key: value if type(value) in (bool, int, float, str) else _words(value) for key, value in settings.items()}
    now = Tracking(tracker, stage, plain, directory) if tracker else None
    before = _current.set(now)
    try:
        yield
    finally:
        _current.reset(before)
        for run in now.runs if now else ():  # those that an error left open
            run.finish()


def begin_run(model: str) -> Run | None:
    """Open the run of a model that is about to be trained, None outside of `tracking`; by the main process alone."""
    now = _current.get()
    return now.begin(model) if now else None


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """What is drawn inside the `with` block, to name a run for example, takes nothing from what is drawn after it."""
    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        for restore, state in zip((random.setstate, numpy.random.set_state, torch.set_rng_state), states, strict=True):
            restore(state)


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
