"""What a search found, as tables, plots and one summary: all of it read off the study, so that it can be drawn again.

trials.csv               a row per trial: pipeline, parameters, what was measured, why it was stopped
best_pipeline.json       the best pipeline that reaches the target, ready for --strategy fixed --pipeline
summary.json             the best trials on all windows, the front and its knee, what is saved and its final training, what each step of
                         it is worth, what orders and parameters mattered, errors of hybrids, retraining's gain and cost
convergence.png          best KL so far, over trials; importance.png: what explains the differences between pipelines
pareto.png               KL against compression ratio of everything that was run, the front and its knee
                         (KL, or perplexity where that is the objective)
error_accumulation.png   loss of hybrids: the sum of their parts' losses against the measured one
retraining_gain.png      nats won by retraining against its seconds
"""

import csv
import io
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from compactmind.files import write_json_atomically, write_text_atomically
from compactmind.methods.registry import METHODS
from compactmind.report.figures import save_figure
from compactmind.report.search_figures import SEARCH_FIGURES
from compactmind.search import ablation, front
from compactmind.search.engine import counted_trials, is_stopped
from compactmind.search.front import SMALLEST_KL, candidates, described
from compactmind.search.space import SEPARATOR, is_hybrid
from compactmind.search.trials import quality_of


# ------------------------------------------------------------------------------------------------------------- reading
def methods_of(trial: FrozenTrial) -> list[str]:
    """Return the names of the methods of a trial's pipeline, in order."""
    return [step["method"] for step in trial.user_attrs.get("pipeline", [])]


def measured_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials that ran to their end."""
    return [trial for trial in counted_trials(study) if trial.state == TrialState.COMPLETE and "measured" in trial.user_attrs]


def quality_of_study(study: optuna.Study) -> str:
    """Return what the pipelines of a study are compared by: kl or perplexity."""
    return quality_of(study.user_attrs.get("described", {}).get("objectives", ()))


def best_trials(study: optuna.Study, target: float, count: int) -> list[FrozenTrial]:
    """Return the best trials by KL, or perplexity, among those that reach the target, the best first."""
    return candidates(measured_trials(study), target, quality_of_study(study), count)


def format_params(params: dict[str, Any]) -> str:
    """Return the parameters of a trial on one line."""
    return ", ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in params.items()
        if name != "order"
    )


class SearchProgress:
    """One aligned line per finished trial: what it was, what it gave, the best so far and the time to come."""

    def __init__(self, study: optuna.Study, n_trials: int, target: float):
        self.study, self.n_trials, self.target = study, n_trials, target
        self.first, self.started = len(counted_trials(study)), time.perf_counter()

    def update(self, trial: FrozenTrial) -> None:
        """Print the line of a trial that has just finished."""
        done = len(counted_trials(self.study))
        each = (time.perf_counter() - self.started) / max(1, done - self.first)
        best = best_trials(self.study, self.target, 1)
        measured = trial.user_attrs.get("measured")
        if measured:
            result = f"KL {measured['kl']:<9.4g}{measured['perplexity']:>8.3f}{measured['compression_ratio']:>6.2f}x"
            result += "" if measured["compression_ratio"] >= self.target else " too large"
        else:
            result = f"{state_of(trial).lower()}: {(trial.user_attrs.get('reason') or '')[:70]}"
        so_far = f"best {best[0].user_attrs['measured'][quality_of_study(self.study)]:.4g} (trial {best[0].number})" if best else "best -"
        print(
            f"trial {trial.number:>3} ({done}/{self.n_trials}) {SEPARATOR.join(methods_of(trial)):<34}{result:<28} "
            f"{trial.user_attrs['seconds']:>5.0f} s | {so_far} | {each * max(0, self.n_trials - done) / 60:.1f} min to go",
            flush=True,
        )  # fmt: skip


def retraining_gains(study: optuna.Study) -> list[dict[str, float]]:
    """Return, per retraining that was run (not taken from the cache), the nats it won on the first windows and its seconds."""
    gains = []
    for trial in counted_trials(study):
        rows = trial.user_attrs.get("steps", [])
        for before, after in zip(rows, rows[1:], strict=False):
            if after["method"] == "retrain" and not after.get("cached"):
                gains.append({"trial": trial.number, "nats": before["loss"] - after["loss"], "seconds": after["seconds"]})
    return gains


def importances(study: optuna.Study) -> dict[str, float]:
    """Return the share of the variance of log KL, or log perplexity, that the order and each parameter explain, the largest first.

    fANOVA (Hutter et al. 2014) over the trials that ran to their end; a parameter that a pipeline does not have counts as one more
    choice, what is the same in all is left out. Empty if there are too few trials or all are alike.
    """
    rows = measured_trials(study)
    if len(rows) < 8:
        return {}
    values = {name: [str(trial.params.get(name, "absent")) for trial in rows] for trial in rows for name in trial.params}
    values = {name: chosen for name, chosen in values.items() if len(set(chosen)) > 1}
    inner = optuna.create_study()
    distributions = {name: optuna.distributions.CategoricalDistribution(sorted(set(chosen))) for name, chosen in values.items()}
    for index, trial in enumerate(rows):
        params = {name: chosen[index] for name, chosen in values.items()}
        value = math.log(max(trial.user_attrs["measured"][quality_of_study(study)], SMALLEST_KL))
        inner.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=value))
    try:
        return {name: float(share) for name, share in optuna.importance.get_param_importances(inner).items()}
    except (ValueError, RuntimeError):
        return {}


# -------------------------------------------------------------------------------------------------------------- tables
def trials_csv(study: optuna.Study) -> str:
    """Return all trials that count as CSV text."""
    rows, names = [], {}
    for trial in counted_trials(study):
        row = {
            "trial": trial.number, "state": state_of(trial), "pipeline": SEPARATOR.join(methods_of(trial)),
            **{name: trial.user_attrs.get(name) for name in ("reason", "seconds", "memory_mb", "expected_ratio")},
            **trial.user_attrs.get("measured", {}), **trial.params,
        }  # fmt: skip
        names |= dict.fromkeys(row)
        rows.append(row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(names) or ["trial"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def trials_table(study: optuna.Study, target: float, confirmed: dict[int, dict[str, Any]], count: int = 10) -> str:
    """Return the best trials as aligned text, with the command that makes each of them again."""
    quality = quality_of_study(study)
    lines = [f"\n{'trial':>5} {'pipeline':<34}{quality:>11}{'all windows':>12}{'perplexity':>12}{'ratio':>8}  parameters"]
    for trial in best_trials(study, target, count):
        measured, again = trial.user_attrs["measured"], confirmed.get(trial.number)
        lines.append(
            f"{trial.number:>5} {SEPARATOR.join(methods_of(trial)):<34}{measured[quality]:>11.4g}"
            f"{again[quality] if again else math.nan:>12.4g}{(again or measured)['perplexity']:>12.3f}"
            f"{measured['compression_ratio']:>7.2f}x  {format_params(trial.params)}"
        )
    return "\n".join(lines)


def state_of(trial: FrozenTrial) -> str:
    """Return the state of a trial: STOPPED for one whose values are an estimate, else Optuna's."""
    return "STOPPED" if is_stopped(trial) else trial.state.name


def states_of(study: optuna.Study) -> dict[str, int]:
    """Return how many of the trials that count are in which state."""
    states = [state_of(trial) for trial in counted_trials(study)]
    return {name: states.count(name) for name in (*(state.name for state in TrialState), "STOPPED")}


def write_findings(
    study: optuna.Study,
    folder: Path,
    target: float,
    confirmed: dict[int, dict[str, Any]],
    depends_on: dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write tables, plots and the summary, which is returned; `confirmed`: trial -> what it gave on all windows; `extra`: more for it.

    `depends_on` is what else the findings depend on, beside the trials: `known_findings` compares it. A plot that cannot be drawn costs a
    line, not the search.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trials = {trial.number: trial for trial in counted_trials(study)}
    hybrids, singles, quality = [], [], quality_of_study(study)
    for trial in best_trials(study, target, len(trials)):
        (hybrids if is_hybrid([METHODS[name] for name in methods_of(trial)]) else singles).append(trial)
    summary: dict[str, Any] = {
        "study": study.study_name, "target_compression": target, "depends_on": depends_on, "trials": len(trials),
        "states": states_of(study),
        "quality": quality, "best": None, "confirmed": confirmed, "front": described(measured_trials(study), quality, confirmed),
        **(extra or {}), "importances": importances(study), "retraining": retraining_gains(study),
        "best_hybrid": _row(hybrids[0]) if hybrids else None, "best_single": _row(singles[0]) if singles else None,
        "points": [_point(trial, target) for trial in trials.values()],
    }  # fmt: skip
    reached = [number for number, measured in confirmed.items() if measured["compression_ratio"] >= target]
    if reached:
        number = min(reached, key=lambda each: confirmed[each][quality])
        summary["best"] = {**_row(trials[number]), "confirmed": {k: v for k, v in confirmed[number].items() if k != "steps"}}
        saved = next((each for each in (extra or {}).get("chosen", ()) if each.get("trial") == number), summary["best"])
        write_json_atomically(folder / "best_pipeline.json", saved["pipeline"])
    write_text_atomically(folder / "trials.csv", trials_csv(study))
    summary = json.loads(json.dumps(summary))
    write_json_atomically(folder / "summary.json", summary)
    for name, draw in SEARCH_FIGURES.items():
        try:
            save_figure(draw(summary), folder / f"{name}.png")
        except Exception as error:  # noqa: BLE001  whatever a plot stumbles over: what it shows is in the summary
            print(f"{folder / name}.png could not be drawn: {type(error).__name__}: {error}", flush=True)
    return summary


def why_none_reached(study: optuna.Study, target: float, folder: Path, ratios: Sequence[float] = ()) -> str:
    """Return why a search has found nothing, and what to do; `ratios`: the sizes of a front, the least of which is the target."""
    setting = "--save_front" if ratios else "--target_compression"
    everything = study.get_trials(deepcopy=False)
    measured = [trial.user_attrs["measured"]["compression_ratio"] for trial in everything if "measured" in trial.user_attrs]
    expected = [trial.user_attrs["expected_ratio"] for trial in everything if "expected_ratio" in trial.user_attrs]
    if measured:
        return (
            f"none of {len(everything)} trials is {target:g} times smaller: the highest ratio measured is {max(measured):.2f}, the "
            f"highest expected {max(expected):.2f}; choose a smaller {setting}, more trials or other --methods"
        )
    run = counted_trials(study)
    failed = [trial for trial in run if trial.state == TrialState.FAIL]
    if failed:
        last = failed[-1]
        return (
            f"no trial ran to its end, {len(failed)} failed; the last one, trial {last.number} ({SEPARATOR.join(methods_of(last))}): "
            f"{last.user_attrs.get('reason')}; all of them: {folder / 'trials.csv'}. Mend that, then try them again with another "
            "--study_name, or others with a larger --n_trials"
        )
    if run:
        return f"no trial ran to its end ({folder / 'trials.csv'} says why): run the same command with a larger --n_trials"
    return (
        f"nothing was run: no pipeline is expected to be {target:g} times smaller, the highest expected is "
        f"{max(expected, default=math.nan):.2f}; choose a smaller {setting} or other --methods"
    )


def why_none_so_small(study: optuna.Study, ratio: float) -> str:
    """Return why nothing was chosen at a ratio: no trial is as small, and how small the smallest is, or none that is could be confirmed."""
    largest = max(trial.user_attrs["measured"]["compression_ratio"] for trial in measured_trials(study))
    if largest >= ratio:
        return "of the trials that are so many times smaller none could be confirmed (see above)"
    return f"no trial is so many times smaller: the smallest is {largest:.2f}"


def known_findings(study: optuna.Study, folder: Path, depends_on: dict[str, Any]) -> dict[str, Any] | None:
    """Return the summary in a folder if it is of this study as it is now and of nothing else, and names a best pipeline; else None."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        known = {name: summary[name] for name in ("study", "depends_on", "states", "best")}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    wanted = {"study": study.study_name, "depends_on": json.loads(json.dumps(depends_on)), "states": states_of(study)}
    running = known["states"].get("RUNNING")
    return summary if known == wanted | {"best": known["best"]} and known["best"] and not running else None


def _row(trial: FrozenTrial) -> dict[str, Any]:
    return {
        "trial": trial.number, "methods": methods_of(trial), "pipeline": trial.user_attrs["pipeline"],
        "measured": trial.user_attrs["measured"], "seconds": trial.user_attrs["seconds"],
    }  # fmt: skip


def _point(trial: FrozenTrial, target: float) -> dict[str, Any]:
    """Return what a plot needs of a trial that counts; KL, perplexity and ratio None if it did not run to its end."""
    measured = trial.user_attrs.get("measured") if trial.state == TrialState.COMPLETE else None  # an estimate is none
    return {
        "trial": trial.number, "hybrid": is_hybrid([METHODS[name] for name in methods_of(trial)]),
        "kl": measured["kl"] if measured else None, "perplexity": measured["perplexity"] if measured else None,
        "compression_ratio": measured["compression_ratio"] if measured else None,
        "reached": bool(measured and measured["compression_ratio"] >= target),
    }  # fmt: skip


def steps_table(record: dict[str, Any]) -> str:
    """Return the steps of a pipeline as aligned text: perplexity against the dense model (95%, paired), KL, seconds; and `interaction`."""
    lines = [f"\n{'step':<12}{'perplexity':>12}{'against dense [95%, paired]':>32}{'KL, nats':>12}{'same top':>10}{'seconds':>10}"]
    for row in record["pipeline"]:
        low, high = (bound - 1 for bound in row["against_dense"]["interval"])
        against = f"{row['against_dense']['ratio'] - 1:+.2%} [{low:+.2%}, {high:+.2%}]"
        far = f"{row['divergence']['mean']:>12.4f}{row['divergence']['same_top']:>10.1%}"
        lines.append(f"{row['method']:<12}{row['perplexity']:>12.3f}{against:>32}{far}{row['seconds']:>10.0f}")
    if record["interaction"] is not None:
        lines.append(f"interaction of quantization with the rest: {record['interaction']:+.4f} nats")
    return "\n".join(lines)


def summary_table(study: optuna.Study, target: float, summary: dict[str, Any], unit: str) -> str:
    """Return what a study has found as aligned text: its trials, its front, and what every step of the best is worth in `unit`."""
    parts = [trials_table(study, target, {int(number): each for number, each in summary["confirmed"].items()})]
    if len(study.directions) > 1:
        parts.append(front.table(summary["front"]))
        if problem := front.front_problem(len(summary["front"]["points"])):
            parts.append(problem)
    if summary.get("ablation"):
        parts.append(ablation.table(summary["ablation"], unit))
    return "\n".join(parts)
