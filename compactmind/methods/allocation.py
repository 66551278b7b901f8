"""Which part of a model gets how much, so that all together keep to a size and the model loses least: an integer program.

Every part takes one of its choices; the sum of the costs, nats of KL, is to be least while the sizes stay within the budget: bits of a
tensor in a file, or parameters that a layer keeps. The program is exact (`scipy.optimize.milp`, HiGHS): AutoQuantize of Model-Optimizer and
llama.cpp's target size do the same with bits and other costs.
"""

from collections.abc import Hashable
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_matrix

from compactmind.errors import CompactMindError

SECONDS = 20
"""How long the program may search for the very best; what it has then is within a fraction of a percent of it."""


class Choice(NamedTuple):
    """One way to make a part of a model."""

    what: Any
    size: int
    """What it takes of the budget."""
    cost: float
    """Nats of KL a token."""


def allocate(choices: dict[Hashable, list[Choice]], budget: int) -> dict[Hashable, Choice]:
    """Return the choice for every part with the least sum of costs whose sizes are at most `budget`.

    Raises ValueError if even the smallest choices take more, see `least_size`.
    """
    if least_size(choices) > budget:
        raise ValueError(f"the smallest choices take {least_size(choices)}, more than {budget}")
    flat = [(name, choice) for name, each in choices.items() for choice in each]
    number = {name: index for index, name in enumerate(choices)}
    one_each = coo_matrix((np.ones(len(flat)), ([number[name] for name, _ in flat], range(len(flat)))))
    costs, sizes = (np.array([getattr(choice, field) for _, choice in flat], dtype=float) for field in ("cost", "size"))
    unit = max(budget, 1) / 1e4  # HiGHS wants numbers near 1
    solution = milp(
        costs / max(np.median(costs[costs > 0], axis=None) if (costs > 0).any() else 1.0, 1e-30),
        constraints=[LinearConstraint(one_each.tocsr(), 1, 1), LinearConstraint(sizes[None] / unit, -np.inf, budget / unit)],
        integrality=np.ones(len(flat)), bounds=Bounds(0, 1), options={"time_limit": SECONDS, "mip_rel_gap": 1e-4},
    )  # fmt: skip
    if solution.x is None:
        raise CompactMindError(f"no allocation was found in {SECONDS} s ({solution.message}): this is a bug, please report it")
    return {name: choice for (name, choice), taken in zip(flat, solution.x, strict=True) if taken > 0.5}


def least_size(choices: dict[Hashable, list[Choice]]) -> int:
    """Return the size of the smallest choices together."""
    return sum(min(choice.size for choice in each) for each in choices.values())
