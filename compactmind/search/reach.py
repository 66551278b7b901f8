"""Whether any pipeline of a space can be as small as is wanted: told from shapes and bits, before anything is run."""

import itertools
import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from compactmind.errors import CompactMindError
from compactmind.methods.registry import METHODS
from compactmind.search.compressor import Step, pipeline_name
from compactmind.search.space import COMPRESSING, Space
from compactmind.search.trials import TrialRunner


def check_reach(space: Space, runner: TrialRunner) -> None:
    """Raise CompactMindError if no pipeline of the space is expected to reach the target."""
    known: dict[str, list[Step]] = {}
    nearest, ratio = None, -math.inf
    for order in space.orders:
        steps_of = []
        for name, choices in zip(order, space.choices_per_step(order), strict=True):
            if METHODS[name].kind in COMPRESSING:
                key = f"{name} {choices}"
                known[key] = known.get(key) or _steps_of_all_sizes(name, choices, runner)
                steps_of.append(known[key])
        for steps in itertools.product(*steps_of):
            if runner.excess(steps) <= 0:
                return
            if runner.expected_ratio(steps) > ratio:
                nearest, ratio = steps, runner.expected_ratio(steps)
    setting = "--save_front" if runner.ratios else "--target_compression"
    raise CompactMindError(
        f"no pipeline of these methods is expected to be {runner.target:g} times smaller: {pipeline_name(nearest)} comes nearest, "
        f"{ratio:.2f} times; choose a smaller {setting} or other --methods"
    )


def _steps_of_all_sizes(name: str, choices: dict[str, Sequence[Any]], runner: TrialRunner) -> list[Step]:
    """Return one step of a method for everything that its choices may do to the bytes of a model."""
    method, blocks, steps = METHODS[name], runner.known_sizes()[2], {}
    for values in itertools.product(*choices.values()):
        with suppress(ValueError):  # two values that do not go together
            step = Step(method, method.parameters(dict(zip(choices, values, strict=True))))
            left, bits = method.left and method.left(step.recipe, blocks), method.bits and method.bits(step.recipe)
            ratio = method.ratio and method.ratio(step.recipe)
            largest = [runner.largest_ratio(step, share) for share in (1.0, 0.5)] if ratio else []  # of blocks and of all else
            steps.setdefault((left, bits, ratio, *largest), step)
    return list(steps.values())
