"""The front of a search: what no other pipeline beats in both bytes and quality, and which of it to keep for a size.

The knee is where a front bends most: the point farthest below the straight line between its ends, bytes and the logarithm of quality, as it
is drawn, each scaled to [0, 1] (Kneedle, Satopaa et al. 2011, https://doi.org/10.1109/ICDCSW.2011.20). A front that lies on that line or
above it has none.
"""

import math
from collections.abc import Sequence
from typing import Any

from optuna.trial import FrozenTrial

QUALITIES = ("kl", "perplexity")
"""Objectives that say how good a model is: one of them is what pipelines are compared by."""

CLEARLY_WORSE = 2.0
"""Times the KL (or the perplexity) of another pipeline on the same windows at which no further windows turn their order round."""

SMALLEST_KL = 1e-7
"""What a KL of 0 counts as where its logarithm is taken."""

BEND = 1e-6
"""Distance below the line from which a front counts as bent: less is rounding."""


def objectives_problem(strategy: str, objectives: Sequence[str], ratios: Sequence[float]) -> str | None:
    """Return what is wrong with the objectives of a search and the `ratios` at which models are to be saved, None if nothing."""
    named, wanted = " ".join(objectives), " ".join(f"{ratio:g}" for ratio in ratios)
    if len(set(objectives)) < len(objectives):
        return f"objectives {named}: name each once, for example --objectives kl bytes"
    if sum(name in QUALITIES for name in objectives) != 1:
        return f"objectives {named}: name one of {' and '.join(QUALITIES)}, which say how good a model is: for example kl bytes"
    if strategy == "fixed" and (len(objectives) > 1 or ratios):
        return "strategy fixed runs one pipeline and has no front: leave --objectives and --save_front out, or choose --strategy bayesian"
    if ratios and "bytes" not in objectives:
        return f"save_front {wanted} wants models of several sizes: say --objectives {named} bytes"
    if len(set(ratios)) < len(ratios):
        return f"save_front {wanted}: name each ratio once"
    return None


def value_of(trial: FrozenTrial, quality: str, confirmed: dict[int, dict[str, Any]] | None = None) -> float:
    """Return the quality of a measured trial: on all windows where it is `confirmed`, else on those of the search."""
    return ((confirmed or {}).get(trial.number) or trial.user_attrs["measured"])[quality]


def front(trials: Sequence[FrozenTrial], quality: str) -> list[FrozenTrial]:
    """Return the measured trials that nothing beats in both bytes and `quality`, the largest model first; of equals the first one."""
    points: list[FrozenTrial] = []
    for trial in sorted(trials, key=lambda trial: (trial.user_attrs["measured"]["bytes"], value_of(trial, quality), trial.number)):
        if not points or value_of(trial, quality) < value_of(points[-1], quality):
            points.append(trial)
    return points[::-1]


def knee(trials: Sequence[FrozenTrial], quality: str) -> FrozenTrial | None:
    """Return the trial of a front at which it bends most; None of fewer than three, and where none is better than the line."""
    if len(trials) < 3:
        return None
    sizes = [trial.user_attrs["measured"]["bytes"] for trial in trials]
    values = [math.log(max(value_of(trial, quality), SMALLEST_KL)) for trial in trials]
    if min(values) == max(values):
        return None

    def scaled(numbers: list[float]) -> list[float]:
        low, high = min(numbers), max(numbers)
        return [(number - low) / (high - low) for number in numbers]

    # from (0, 1) to (1, 0), whichever end is first: below that line by 1 - x - y
    below = [1 - x - y for x, y in zip(scaled(sizes), scaled(values), strict=True)]
    farthest = max(range(len(trials)), key=below.__getitem__)
    return trials[farthest] if below[farthest] > BEND else None


def candidates(trials: Sequence[FrozenTrial], ratio: float, quality: str, count: int) -> list[FrozenTrial]:
    """Return the best measured trials that are at least `ratio` times smaller than the dense model, the best first."""
    small = [trial for trial in trials if trial.user_attrs["measured"]["compression_ratio"] >= ratio]
    return sorted(small, key=lambda trial: value_of(trial, quality))[:count]


def contenders(trials: Sequence[FrozenTrial], ratio: float, quality: str, count: int) -> list[FrozenTrial]:
    """Return those of the `candidates` that more windows may show to be the best: no more than CLEARLY_WORSE times as bad as the first."""
    best = candidates(trials, ratio, quality, count)
    return [trial for trial in best if value_of(trial, quality) <= CLEARLY_WORSE * value_of(best[0], quality)]


def hypervolume(points: Sequence[tuple[float, float]], reference: tuple[float, float]) -> float:
    """Return the area between a front of (x, y), both minimised, and a reference point that is worse in both; 0 beyond it."""
    area, height = 0.0, reference[1]
    for x, y in sorted(points):
        if x < reference[0] and y < height:
            area += (reference[0] - x) * (height - y)
            height = y
    return area


def described(trials: Sequence[FrozenTrial], quality: str, confirmed: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Return the front of the measured trials as the summary has it: its points, the largest model first, and the knee's trial."""
    corners = front(trials, quality)
    bend = knee(corners, quality)
    points = [
        {
            "trial": trial.number, "compression_ratio": trial.user_attrs["measured"]["compression_ratio"],
            "bytes": trial.user_attrs["measured"]["bytes"], quality: value_of(trial, quality),
            "on_all_windows": confirmed.get(trial.number, {}).get(quality),
            "pipeline": trial.user_attrs["pipeline"],
        }
        for trial in corners
    ]  # fmt: skip
    return {"quality": quality, "points": points, "knee": bend.number if bend else None}


def front_problem(count: int) -> str | None:
    """Return what to say of a front of so many points, None if it is one."""
    if count > 1:
        return None
    return f"the front has {count} point(s), no pipeline is larger and better than another: use more --n_trials or other --methods"


def table(summary: dict[str, Any]) -> str:
    """Return a front as aligned text."""
    quality, lines = summary["quality"], []
    lines.append(f"\n{'trial':>5} {'times smaller':>14}{'MB':>9}{quality:>12}{'all windows':>13}  the front")
    for point in summary["points"]:
        again = point["on_all_windows"]
        lines.append(
            f"{point['trial']:>5} {point['compression_ratio']:>14.2f}{point['bytes'] / 1e6:>9.1f}{point[quality]:>12.5g}"
            f"{math.nan if again is None else again:>13.5g}  {' > '.join(step['method'] for step in point['pipeline'])}"
            f"{'  <- the knee' if point['trial'] == summary['knee'] else ''}"
        )
    return "\n".join(lines)
