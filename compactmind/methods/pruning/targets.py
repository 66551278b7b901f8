"""Where gradual pruning is to end: at a sparsity, or at a share of what another model costs."""

from collections.abc import Callable

from transformers import PreTrainedModel

from compactmind.methods.pruning.budget import CostTable, choose_masks_within
from compactmind.methods.pruning.importance import LayerScores, prunable_parameters
from compactmind.methods.pruning.masks import LayerMask, apply_masks, choose_masks, full_masks, sparsity_of

ATTEMPTS = 4
"""How often what is not fast enough when measured is made smaller before that is accepted."""


class SparsityTarget:
    """Remove a share of the prunable parameters; every layer keeps a head and a group of neurons. Raises as `choose_masks`."""

    def __init__(self, sparsity: float, round_to: int):
        self.end, self.round_to = sparsity, round_to

    def tightened(self, model: PreTrainedModel, scores: list[LayerScores], masks: list[LayerMask], share: float) -> list[LayerMask]:
        """Return smaller masks that remove a share of all; `end` is what it comes to when pruning ends."""
        return choose_masks(model, scores, masks, share, self.round_to)

    def removed(self, model: PreTrainedModel, masks: list[LayerMask]) -> float:
        """Return the sparsity of a masked model."""
        return sparsity_of(model, masks)


class CostTarget:
    """Cut what a model costs down to a share of what `dense` costs by a table; layers may lose all heads or neurons.

    `model`, which is pruned, may be a smaller one than `dense`, of which it came. Raises ValueError as `choose_masks_within`.
    """

    def __init__(self, table: CostTable, share: float, round_to: int, model: PreTrainedModel, dense: PreTrainedModel):
        self.table, self.share, self.round_to = table, share, round_to
        self.dense_parameters = prunable_parameters(dense)
        self.start, self.budget = table.of_masks(full_masks(model)), share * table.of_masks(full_masks(dense))

    @property
    def end(self) -> float:
        """Share of the model's cost that is to go."""
        return max(0.0, 1 - self.budget / self.start)

    def tightened(self, model: PreTrainedModel, scores: list[LayerScores], masks: list[LayerMask], share: float) -> list[LayerMask]:
        """Return smaller masks that remove a share of the cost; `end` is what it comes to when pruning ends."""
        return choose_masks_within(model, scores, masks, self.table, self.start * (1 - share), self.round_to)

    def removed(self, model: PreTrainedModel, masks: list[LayerMask]) -> float:
        """Return the sparsity of a masked model as a share of what `dense` has."""
        return 1 - (1 - sparsity_of(model, masks)) * prunable_parameters(model) / self.dense_parameters

    def settled(
        self,
        model: PreTrainedModel,
        scores: list[LayerScores],
        masks: list[LayerMask],
        measure: Callable[[list[LayerMask]], float],
        attempts: int = ATTEMPTS,
    ) -> tuple[list[LayerMask], float]:
        """Return masks whose cost is the share when it is really measured, not by the table, and the share measured.

        `measure(masks)` gives it. What is not small enough is made smaller, `attempts` times in all, and `model` is masked accordingly, in
        place; the last one stands whatever it came to.
        """
        reached = measure(masks)
        for _ in range(attempts - 1):
            if reached <= self.share:
                break
            before, self.budget = self.budget, self.budget * 0.99 * self.share / reached
            try:
                masks = self.tightened(model, scores, masks, self.end)
            except ValueError:  # nothing is left to remove
                self.budget = before
                break
            apply_masks(model, masks)
            reached = measure(masks)
        return masks, reached
