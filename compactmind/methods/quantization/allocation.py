"""Which tensor gets how many bits, so that a file keeps to a size and the model loses least: an integer program.

Every tensor takes one of its choices; the sum of the costs (sensitivity.py) is to be least while the bits stay within the budget. The
program is exact (`scipy.optimize.milp`, HiGHS): AutoQuantize of Model-Optimizer and llama.cpp's target size do the same with other costs.
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
    """One way to store a tensor."""

    what: Any
    bits: int
    """All its bits in the file."""
    cost: float
    """Nats of KL a token."""


def allocate(choices: dict[Hashable, list[Choice]], budget_bits: int) -> dict[Hashable, Choice]:
    """Return the choice for every tensor with the least sum of costs whose bits are at most `budget_bits`.

    Raises CompactMindError if even the smallest choices take more.
    """
    smallest = sum(min(choice.bits for choice in each) for each in choices.values())
    if smallest > budget_bits:
        raise CompactMindError(
            f"the smallest that these widths can make of the weights is {smallest / 8e6:.2f} MB, more than the "
            f"{max(budget_bits, 0) / 8e6:.2f} MB that the target leaves them: choose a smaller target_compression, allow "
            "embeddings of fewer bits, or prune before"
        )
    flat = [(name, choice) for name, each in choices.items() for choice in each]
    number = {name: index for index, name in enumerate(choices)}
    one_each = coo_matrix((np.ones(len(flat)), ([number[name] for name, _ in flat], range(len(flat)))))
    costs, bits = (np.array([getattr(choice, field) for _, choice in flat], dtype=float) for field in ("cost", "bits"))
    unit = max(budget_bits, 1) / 1e4  # HiGHS wants numbers near 1
    solution = milp(
        costs / max(np.median(costs[costs > 0], axis=None) if (costs > 0).any() else 1.0, 1e-30),
        constraints=[LinearConstraint(one_each.tocsr(), 1, 1), LinearConstraint(bits[None] / unit, -np.inf, budget_bits / unit)],
        integrality=np.ones(len(flat)), bounds=Bounds(0, 1), options={"time_limit": SECONDS, "mip_rel_gap": 1e-4},
    )  # fmt: skip
    if solution.x is None:
        raise CompactMindError(f"no allocation was found in {SECONDS} s ({solution.message}): this is a bug, please report it")
    return {name: choice for (name, choice), taken in zip(flat, solution.x, strict=True) if taken > 0.5}
