"""What each step of a pipeline is worth: the pipeline without it, and the step without the others.

    change        measure of the whole - of the whole without the step: below 0 where the step helps
    alone         measure of the step alone on the dense model - of the dense model
    interaction   change - alone: 0 where the errors of steps add up, above 0 where they make each other worse

A step that the others need (a quantization that was smoothed for, a pruning of which a retraining makes up) cannot be left out, and says
why.
"""

from collections.abc import Callable, Sequence
from typing import Any

from compactmind.search.compressor import Compressed, Step, idle_problem, order_problem


def ablation(
    steps: Sequence[Step], run: Callable[[Sequence[Step]], Compressed], unit: str, rows: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return a row per step of a pipeline of several; `run` makes a pipeline and measures after every step, `unit` is what is looked at.

    `rows` are those of the whole. Keys: left_out, without (the measure), change, alone, interaction; None where it is not known, and why
    in `reason`. Empty for a pipeline of one step.
    """
    if len(steps) < 2:
        return []
    dense, whole, effects = rows[0][unit], rows[-1][unit], []

    def last(some: Sequence[Step]) -> tuple[float | None, str | None]:
        problem = order_problem([step.method for step in some]) or idle_problem(some)
        return (None, problem) if problem else (run(some).steps[-1][unit], None)

    for index, step in enumerate(steps):
        without, reason = last([*steps[:index], *steps[index + 1 :]])
        single, _ = last([step])
        change = None if without is None else whole - without
        alone = None if single is None else single - dense
        together = None if change is None or alone is None else change - alone
        effects.append({
            "left_out": step.method.name, "without": without, "change": change, "alone": alone, "interaction": together, "reason": reason,
        })  # fmt: skip
    return effects


def table(effects: Sequence[dict[str, Any]], unit: str) -> str:
    """Return an ablation as aligned text."""
    name = "KL" if unit == "kl" else unit
    lines = [f"\n{'left out':<12}{name + ' without':>14}{'change by it':>14}{'alone':>12}{'interaction':>13}   nats, first windows"]
    for row in effects:
        numbers = "".join(
            f"{'-' if row[key] is None else format(row[key], f'{sign}.4f'):>{width}}"
            for key, width, sign in (("without", 14, ""), ("change", 14, "+"), ("alone", 12, "+"), ("interaction", 13, "+"))
        )
        lines.append(f"{row['left_out']:<12}{numbers}   {row['reason'] or ''}".rstrip())
    return "\n".join(lines)
