"""What whoever evaluates a pipeline says of it: notes while it is run, and why it ended early."""

import copy
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.trial import Trial


class Stopped(Exception):
    """Raised by what evaluates a pipeline: the trial ends early, for the reason in the message; `values` are what the objectives would have
    come to."""

    def __init__(self, reason: str, values: Sequence[float] = ()):
        super().__init__(reason)
        self.values = list(values)


class Skipped(Stopped):
    """Raised before anything is run: the trial does not count."""


class Notes:
    """What is said of a trial while it is run, as on an Optuna trial; it is written to the study when the trial has ended, in one place."""

    def __init__(self, study: optuna.Study, number: int):
        self.study, self.number = study, number
        self.user_attrs: dict[str, Any] = {}
        self.constraints: dict[str, float] = {}
        self.reported: dict[int, float] = {}

    def set_user_attr(self, name: str, value: Any) -> None:
        """Note an attribute."""
        self.user_attrs[name] = value

    def set_constraint(self, name: str, value: float) -> None:
        """Note a constraint: what is above 0 is too much."""
        self.constraints[name] = value

    def report(self, value: float, step: int) -> None:
        """Note what is minimised as it is seen so far, after `step` windows."""
        self.reported[step] = value

    def should_prune(self) -> bool:
        """Ask the study's pruner whether a trial with what was reported is worth going on with; never among several objectives."""
        if len(self.study.directions) > 1 or not self.reported:
            return False
        frozen = copy.copy(self.study.get_trials(deepcopy=False)[self.number])
        frozen.intermediate_values = dict(self.reported)
        return self.study.pruner.prune(self.study, frozen)

    def write(self, trial: Trial) -> None:
        """Put everything on a trial of the study."""
        for name, value in self.constraints.items():
            trial.set_constraint(name, value)
        for step, value in self.reported.items() if len(self.study.directions) == 1 else ():
            trial.report(value, step)
        for name, value in self.user_attrs.items():
            trial.set_user_attr(name, value)
