"""How a hyper-parameter of distillation moves over training."""


def linear_anneal(start: float, end: float, progress: float) -> float:
    """Return the value on the straight line from `start` (progress 0) to `end` (progress 1); progress is clamped."""
    return start + (end - start) * min(max(progress, 0.0), 1.0)
