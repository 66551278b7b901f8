"""How much is pruned when."""


def cubic_sparsity(step: int, begin_step: int, end_step: int, target_sparsity: float) -> float:
    """Return the sparsity due at `step`: 0 up to `begin_step`, the target from `end_step` on, a cubic between them.

    It removes much early, while plenty is redundant, and little late. Zhu & Gupta 2017 (https://arxiv.org/abs/1710.01878):
    s(t) = target * (1 - (1 - progress)^3). Raises ValueError unless 0 <= target_sparsity < 1 and begin_step < end_step.
    """
    if not 0 <= target_sparsity < 1:
        raise ValueError(f"target_sparsity must be in [0, 1), not {target_sparsity}")
    if begin_step >= end_step:
        raise ValueError(f"pruning must begin before it ends: begin_step {begin_step}, end_step {end_step}")
    progress = min(max((step - begin_step) / (end_step - begin_step), 0.0), 1.0)
    return target_sparsity * (1 - (1 - progress) ** 3)
