"""What the members of a family of pruned classifiers are to cost, and what they do cost: time, measured, or operations, counted."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from compactmind.errors import CompactMindError
from compactmind.evaluation import cost
from compactmind.evaluation.cost_table import gflops_table, latency_table
from compactmind.methods.pruning.importance import ImportanceScorer
from compactmind.methods.pruning.masks import full_masks
from compactmind.methods.pruning.targets import CostTarget, SparsityTarget

MEASURED_BATCH, MEASURED_ROUNDS = 32, 9
"""Sentences per batch of a family's speed-ups, and rounds whose median ratio a speed-up is."""


@dataclass(frozen=True)
class Goal:
    """What a member of a family is to cost."""

    name: str
    """What its directory is called after the family's."""
    measured: bool
    """Whether the cost is time, measured, or operations, counted."""
    share: float
    """Cost as a share of the parent's."""


def goals_of(speedups: Sequence[float], gflops: Sequence[float]) -> list[Goal]:
    """Return the goals of a family from the gentlest to the strongest: times as fast as the parent, shares of its GFLOPs."""
    goals = [Goal(f"{each:g}x", True, 1 / each) for each in speedups]
    goals += [Goal(f"gflops{each:g}", False, each) for each in gflops]
    return sorted(goals, key=lambda goal: -goal.share)


def share_of_cost(goal: Goal, smaller: PreTrainedModel, dense: PreTrainedModel, length: int) -> float:
    """Return what a model costs as a share of what the family's parent does: median ratio of times in turns, or GFLOPs."""
    if not goal.measured:
        return cost.gflops(smaller, length) / cost.gflops(dense, length)
    both = {"dense": dense.eval(), "smaller": smaller.eval()}
    return 1 / cost.measure_latency(both, MEASURED_BATCH, length, MEASURED_ROUNDS, "dense")["smaller"]["speedup"]


def target_of(
    goal: Goal | None, sparsity: float, round_to: int, model: PreTrainedModel, dense: PreTrainedModel, length: int, models_dir: Path
) -> SparsityTarget | CostTarget:
    """Return where pruning is to end: at a goal, without one at a sparsity. Raises CompactMindError if that cannot be reached.

    `length`: tokens at which costs are measured; `models_dir`: where a table that was measured is kept.
    """
    if goal is None:
        target = SparsityTarget(sparsity, round_to)
    else:
        protocol = (MEASURED_BATCH, length, MEASURED_ROUNDS, models_dir)
        table = latency_table(dense, *protocol) if goal.measured else gflops_table(dense, length)
        target = CostTarget(table, goal.share, round_to, model, dense)
    try:  # with any scores: what can be reached does not depend on the ranking
        target.tightened(model, ImportanceScorer(model, "l2").scores(), full_masks(model), target.end)
    except ValueError as error:
        easier = "a gentler target" if goal else "a smaller --target_sparsity"
        raise CompactMindError(f"{error}: use {easier} or --round_to") from None
    return target
