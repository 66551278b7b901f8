"""What a search found, as tables, plots and one summary: all of it read off the study, so that it can be drawn again.

trials.csv               a row per trial: pipeline, parameters, what was measured, why it was stopped
best_pipeline.json       the best pipeline that reaches the target, ready for --strategy fixed --pipeline
summary.json             the best trials on all windows, what orders and parameters mattered, errors of hybrids, retraining's gain and cost
convergence.png          best perplexity so far, over trials; importance.png: what explains the differences between pipelines
pareto.png               perplexity against compression ratio of everything that was run
error_accumulation.png   loss of hybrids: the sum of their parts' losses against the measured one
retraining_gain.png      nats won by retraining against its seconds
"""

import csv
import io
import json
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import optuna  # noqa: E402
from optuna.trial import FrozenTrial, TrialState  # noqa: E402

from compactmind.files import write_json_atomically, write_text_atomically  # noqa: E402
from compactmind.methods.registry import METHODS  # noqa: E402
from compactmind.search.engine import counted_trials  # noqa: E402
from compactmind.search.space import SEPARATOR, is_hybrid  # noqa: E402

BLUE, RED, GREY = "#1f5fa8", "#b03a2e", "#8a8a8a"


# ------------------------------------------------------------------------------------------------------------- reading
def methods_of(trial: FrozenTrial) -> list[str]:
    """Return the names of the methods of a trial's pipeline, in order."""
    return [step["method"] for step in trial.user_attrs.get("pipeline", [])]


def measured_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials that ran to their end."""
    return [trial for trial in counted_trials(study) if trial.state == TrialState.COMPLETE and "measured" in trial.user_attrs]


def best_trials(study: optuna.Study, target: float, count: int) -> list[FrozenTrial]:
    """Return the trials of lowest perplexity among those that reach the target, the best first."""
    reached = [trial for trial in measured_trials(study) if trial.user_attrs["measured"]["compression_ratio"] >= target]
    return sorted(reached, key=lambda trial: trial.user_attrs["measured"]["perplexity"])[:count]


def shown(params: dict[str, Any]) -> str:
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
            found = f"{measured['perplexity']:>9.3f} {measured['compression_ratio']:>5.2f}x"
            found += "" if measured["compression_ratio"] >= self.target else " too large"
        else:
            found = f"{trial.state.name.lower()}: {trial.user_attrs.get('reason', '')[:70]}"
        so_far = f"best {best[0].user_attrs['measured']['perplexity']:.3f} (trial {best[0].number})" if best else "best -"
        print(
            f"trial {trial.number:>3} ({done}/{self.n_trials}) {SEPARATOR.join(methods_of(trial)):<34}{found:<28} "
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
    """Return the share of the variance of log perplexity that each parameter all pipelines have, and each method's presence, explains.

    fANOVA (Hutter et al. 2014) over the trials that ran to their end; empty if these are too few or all alike.
    """
    import math

    rows = measured_trials(study)
    if len(rows) < 8:
        return {}
    inner = optuna.create_study()
    names = sorted({name for trial in rows for name in methods_of(trial)})
    sparsities = lambda trial: sum(step["params"].get("sparsity", 0.0) for step in trial.user_attrs["pipeline"])  # noqa: E731
    for trial in rows:
        params = {f"with {name}": name in methods_of(trial) for name in names} | {"sparsity": sparsities(trial)}
        distributions = {f"with {name}": optuna.distributions.CategoricalDistribution([False, True]) for name in names}
        distributions["sparsity"] = optuna.distributions.FloatDistribution(0, 1)
        value = math.log(trial.user_attrs["measured"]["perplexity"])
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
            "trial": trial.number, "state": trial.state.name, "pipeline": SEPARATOR.join(methods_of(trial)),
            "reason": trial.user_attrs.get("reason", ""), "seconds": trial.user_attrs.get("seconds"),
            "expected_ratio": trial.user_attrs.get("expected_ratio"), **trial.user_attrs.get("measured", {}), **trial.params,
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
    lines = [f"\n{'trial':>5} {'pipeline':<34}{'perplexity':>11}{'all windows':>12}{'ratio':>8}  parameters"]
    for trial in best_trials(study, target, count):
        measured, again = trial.user_attrs["measured"], confirmed.get(trial.number)
        lines.append(
            f"{trial.number:>5} {SEPARATOR.join(methods_of(trial)):<34}{measured['perplexity']:>11.3f}"
            f"{again['perplexity'] if again else float('nan'):>12.3f}{measured['compression_ratio']:>7.2f}x  {shown(trial.params)}"
        )
    return "\n".join(lines)


def write_findings(study: optuna.Study, folder: Path, target: float, confirmed: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Write tables, plots and the summary, which is returned; `confirmed`: trial -> what it gave on all windows."""
    folder.mkdir(parents=True, exist_ok=True)
    trials = {trial.number: trial for trial in counted_trials(study)}
    hybrids, singles = [], []
    for trial in best_trials(study, target, len(trials)):
        (hybrids if is_hybrid([METHODS[name] for name in methods_of(trial)]) else singles).append(trial)
    summary: dict[str, Any] = {
        "study": study.study_name, "target_compression": target, "trials": len(trials),
        "states": {state.name: sum(trial.state == state for trial in trials.values()) for state in TrialState},
        "best": None, "confirmed": confirmed, "importances": importances(study), "retraining": retraining_gains(study),
        "best_hybrid": _row(hybrids[0]) if hybrids else None, "best_single": _row(singles[0]) if singles else None,
    }  # fmt: skip
    if confirmed:
        number = min(confirmed, key=lambda each: confirmed[each]["perplexity"])
        summary["best"] = {**_row(trials[number]), "confirmed": {k: v for k, v in confirmed[number].items() if k != "steps"}}
        write_json_atomically(folder / "best_pipeline.json", summary["best"]["pipeline"])
    write_text_atomically(folder / "trials.csv", trials_csv(study))
    write_json_atomically(folder / "summary.json", json.loads(json.dumps(summary)))
    draw(study, folder, target, confirmed, summary)
    return summary


def _row(trial: FrozenTrial) -> dict[str, Any]:
    return {
        "trial": trial.number, "methods": methods_of(trial), "pipeline": trial.user_attrs["pipeline"],
        "measured": trial.user_attrs["measured"], "seconds": trial.user_attrs["seconds"],
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- plots
def draw(study: optuna.Study, folder: Path, target: float, confirmed: dict, summary: dict[str, Any]) -> None:
    """Draw the five plots."""
    for name, plot in {
        "convergence": lambda axes: _convergence(axes, study, target),
        "importance": lambda axes: _importance(axes, summary["importances"]),
        "pareto": lambda axes: _pareto(axes, study, target),
        "error_accumulation": lambda axes: _error_accumulation(axes, confirmed),
        "retraining_gain": lambda axes: _retraining(axes, summary["retraining"]),
    }.items():
        figure, axes = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
        plot(axes)
        axes.spines[["top", "right"]].set_visible(False)
        temporary = folder / f".{name}.tmp.png"
        figure.savefig(temporary, dpi=130)
        temporary.replace(folder / f"{name}.png")
        plt.close(figure)


def _empty(axes, why: str) -> None:
    axes.text(0.5, 0.5, why, ha="center", va="center", transform=axes.transAxes, color=GREY)
    axes.set(xticks=[], yticks=[])


def _convergence(axes, study: optuna.Study, target: float) -> None:
    axes.set(
        title=f"Best perplexity so far, of pipelines at least {target:g} times smaller",
        xlabel="trials that count",
        ylabel="perplexity, validation text",
    )
    trials = counted_trials(study)
    best, best_so_far, points = None, [], {True: [], False: []}
    for index, trial in enumerate(trials, start=1):
        measured = trial.user_attrs.get("measured")
        if measured and trial.state == TrialState.COMPLETE:
            reached = measured["compression_ratio"] >= target
            points[reached].append((index, measured["perplexity"]))
            if reached:
                best = min(best or measured["perplexity"], measured["perplexity"])
        best_so_far.append(best)
    if best is None:
        return _empty(axes, "no pipeline reached the target")
    for reached, colour, label in ((True, BLUE, "reaches the target"), (False, GREY, "too large")):
        if points[reached]:
            axes.scatter(*zip(*points[reached], strict=True), color=colour, s=22, label=label, zorder=3)
    axes.step(
        range(1, len(trials) + 1),
        [value if value is not None else float("nan") for value in best_so_far],
        where="post",
        color=RED,
        label="best so far",
    )
    axes.set_yscale("log")
    axes.legend(frameon=False)


def _importance(axes, shares: dict[str, float]) -> None:
    axes.set(title="What explains the differences between pipelines (fANOVA of log perplexity)", xlabel="share of the variance")
    if not shares:
        return _empty(axes, "too few finished trials")
    names = sorted(shares, key=shares.get)
    axes.barh(names, [shares[name] for name in names], color=BLUE)


def _pareto(axes, study: optuna.Study, target: float) -> None:
    axes.set(title="Everything that was run", xlabel="compression ratio", ylabel="perplexity, validation text")
    rows = [
        trial.user_attrs["measured"] | {"hybrid": is_hybrid([METHODS[n] for n in methods_of(trial)])}
        for trial in measured_trials(study)
    ]
    if not rows:
        return _empty(axes, "no trial ran to its end")
    for hybrid, colour, label in ((True, BLUE, "hybrid"), (False, GREY, "one method")):
        each = [(row["compression_ratio"], row["perplexity"]) for row in rows if row["hybrid"] == hybrid]
        if each:
            axes.scatter(*zip(*each, strict=True), color=colour, s=26, label=label, zorder=3)
    front, lowest = [], float("inf")
    for row in sorted(rows, key=lambda row: -row["compression_ratio"]):
        if row["perplexity"] < lowest:
            lowest = row["perplexity"]
            front.append((row["compression_ratio"], lowest))
    axes.step(*zip(*front, strict=True), where="pre", color=RED, label="nothing is better in both")
    axes.axvline(target, color=GREY, ls=":", label=f"target {target:g}")
    axes.set_yscale("log")
    axes.legend(frameon=False)


def _error_accumulation(axes, confirmed: dict[int, dict[str, Any]]) -> None:
    axes.set(title="Do the errors of the parts add up? Best hybrids, first windows", xlabel="nats above dense")
    rows = {number: found for number, found in confirmed.items() if found.get("interaction") is not None}
    if not rows:
        return _empty(axes, "no hybrid with a quantization among the best")
    for position, found in enumerate(rows.values()):
        losses = [row["loss"] for row in found["steps"]]
        whole, before = losses[-1] - losses[0], losses[-2] - losses[0]
        axes.barh(position + 0.2, before, height=0.36, color=GREY, label="before quantization" if not position else None)
        axes.barh(position + 0.2, whole - found["interaction"] - before, left=before, height=0.36, color=BLUE,
                  label="quantization alone" if not position else None)  # fmt: skip
        axes.barh(position - 0.2, whole, height=0.36, color=RED, label="measured together" if not position else None)
    axes.set_yticks(
        range(len(rows)),
        [f"trial {number}\n{SEPARATOR.join(row['method'] for row in found['steps'][1:])}" for number, found in rows.items()],
    )
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=3)


def _retraining(axes, gains: list[dict[str, float]]) -> None:
    axes.set(title="What retraining won and what it cost", xlabel="seconds of retraining", ylabel="nats per token won")
    if not gains:
        return _empty(axes, "nothing was retrained")
    axes.scatter([gain["seconds"] for gain in gains], [gain["nats"] for gain in gains], color=BLUE)
    axes.axhline(0, color=GREY, lw=0.8)
