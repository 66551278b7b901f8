"""What the steps of a study did to its pipelines, in nats, and so what a pipeline that is half way may hope for.

A step is known by its method and by how many times smaller it makes the model that comes in: rounding to a quarter does more harm than
rounding to a half, and what is pruned already need not be rounded as far. Between two sizes that were seen the change is interpolated; a
step does no more harm than a larger one of the same method did; what is smaller than all that were seen is given credit for no harm at all.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy

MORE_TOKENS = "the rest of retraining"
"""What the step from a short retraining to the whole of it is called among the changes."""
PRIOR_CHANGES = {"retrain": -1.0, MORE_TOKENS: -0.5}
"""Change in nats that a method is given credit for while fewer than FEW_STEPS of its steps have been seen, 0 for the others."""
FEW_STEPS = 2
OPTIMISM = 0.25
"""A step may still be better than the best one by this share: a loss that falls by so much more, or rises by so much less."""

Coming = Sequence[tuple[str, float]]
"""The steps ahead: the name of each one's method, and how many times smaller it makes the model."""


@dataclass
class Changes:
    """By how much each step of a study changed KL, or the loss, by method."""

    seen: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """Method -> (times smaller, change in nats) of every step of it."""

    def add(self, name: str, times_smaller: float, nats: float) -> None:
        """Take note of a step."""
        self.seen.setdefault(name, []).append((times_smaller, nats))

    def best(self, coming: Coming) -> float:
        """Return the change that the steps `coming` can come to at the best: each does what the best of its size did, and OPTIMISM more."""
        changes = [self._change(*step, min) for step in coming]
        return sum(change - OPTIMISM * abs(change) for change in changes)

    def usual(self, coming: Coming) -> float:
        """Return the change that the steps `coming` usually come to."""
        return sum(self._change(*step, statistics.median) for step in coming)

    def _change(self, name: str, times_smaller: float, choose: Callable[[list[float]], float]) -> float:
        seen = self.seen.get(name, [])
        if len(seen) < FEW_STEPS:
            return PRIOR_CHANGES.get(name, 0.0)
        by_size: dict[float, list[float]] = {}
        for size, change in seen:
            by_size.setdefault(round(size, 3), []).append(change)
        sizes = sorted(by_size)
        changes = [choose(by_size[size]) for size in sizes]
        changes = [min(changes[index:]) for index in range(len(changes))]
        if round(times_smaller, 3) < sizes[0]:
            return min(changes[0], 0.0)
        return float(numpy.interp(times_smaller, sizes, changes))
