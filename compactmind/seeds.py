"""The same training with several seeds: what its runs are called, and how far apart they end.

The model that keeps the usual name is that of the stage's own seed, whatever the others reach: nothing is chosen.
The others stand beside it as checkpoints, `<name>_seed43`, made from the same inputs with the same settings; their manifests say whose
training they repeat (`repeats`). So the spread is that of one stage's training, its inputs as they are.
"""

import statistics
from collections.abc import Sequence

REPEATS = "repeats"
"""Key of a manifest: the name of the model whose training this one repeats with another seed."""


def runs_of(name: str, seed: int, seeds: int) -> dict[str, int]:
    """Return the checkpoints of a training with `seeds` seeds from `seed` on, name -> seed; the first has the usual name."""
    return {name: seed} | {f"{name}_seed{(seed + more) % 2**32}": (seed + more) % 2**32 for more in range(1, seeds)}


def with_seed(stage: dict, seed: int) -> dict:
    """Return what a checkpoint depends on where another seed is all that differs."""
    return {**stage, "config": {**stage["config"], "seed": seed}}


def repeats_record(name: str, run: str) -> dict[str, str]:
    """Return what the manifest of a run says beside the rest: nothing for the one that has the usual name."""
    return {} if run == name else {REPEATS: name}


def spread(accuracies: Sequence[float]) -> dict[str, float]:
    """Return the median, the lowest and the highest of accuracies."""
    return {"median": statistics.median(accuracies), "lowest": min(accuracies), "highest": max(accuracies)}


def format_spread(accuracies: Sequence[float]) -> str:
    """Return the spread in words: `median 84.2%, 83.1% to 84.9%`."""
    values = spread(accuracies)
    return f"median {values['median']:.1%}, {values['lowest']:.1%} to {values['highest']:.1%}"
