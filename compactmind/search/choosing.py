"""From trials to what is saved: the best few on all windows, one of them for every size, retrained long, and what its steps are worth."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from compactmind.errors import CompactMindError, first_line
from compactmind.precision import is_small
from compactmind.search.ablation import ablation
from compactmind.search.compressor import Step, interaction, measure_or_none, pipeline_name, read_pipeline
from compactmind.search.findings import measured_trials, quality_of_study
from compactmind.search.front import contenders
from compactmind.search.trials import TrialRunner, summarize_rows

AS_GOOD = 0.01
"""Nats of KL to the dense model up to which integers are saved as the search made them: there is next to nothing to win."""
CONFIRMED = "confirmed"
"""With the number of a trial behind it the attribute of a study that says what that trial gives on all windows: one for each, as machines
that end at the same time would overwrite what they share."""


def best_trials_at(study: optuna.Study, ratios: Sequence[float], count: int) -> list[FrozenTrial]:
    """Return the best trials that are so many times smaller and may be the best, at most `count` for each of `ratios`, each once."""
    trials, quality = measured_trials(study), quality_of_study(study)
    by_number = {trial.number: trial for ratio in ratios for trial in contenders(trials, ratio, quality, count)}
    return list(by_number.values())


def choose_for_ratios(
    study: optuna.Study, trials: Sequence[FrozenTrial], runner: TrialRunner, ratios: Sequence[float], tokens: int
) -> tuple[dict[int, dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Return what trials give on all of the runner's windows by number, what is saved at every ratio (see `choose`), and what each step
    of the first of these is worth (None: that could not be measured)."""
    confirmed = confirm(study, trials, runner)
    chosen = [choose(ratio, trials, confirmed, runner, tokens) for ratio in ratios]
    found = [read_pipeline(each["pipeline"]) for each in chosen if "trial" in each]
    return confirmed, chosen, measure_or_none("what each step is worth", lambda: step_effects(found[0], runner)) if found else None


def confirm(study: optuna.Study, trials: Sequence[FrozenTrial], runner: TrialRunner) -> dict[int, dict[str, Any]]:
    """Run trials again and measure them on all of the runner's windows, unless the study knows what they give; return that by number.

    One that fails is left out with a printed line. Raises CompactMindError if that leaves none.
    """
    why = ""
    for trial in trials:
        if trial.number in confirmed_trials(study):
            continue
        steps = read_pipeline(trial.user_attrs["pipeline"])
        print(f"confirming trial {trial.number} on {len(runner.windows)} windows: {pipeline_name(steps)} ...", flush=True)
        try:
            known = on_all_windows(steps, trial, runner)
        except Exception as error:  # noqa: BLE001  out of memory, NaN on other text: one trial, not what the search has found
            why = f"{type(error).__name__}: {first_line(error)}"
            print(f"trial {trial.number} is left out, it could not be confirmed: {why}", flush=True)
        else:
            study.set_user_attr(f"{CONFIRMED} {trial.number}", known)
    known_trials = confirmed_trials(study)
    if not any(trial.number in known_trials for trial in trials):
        raise CompactMindError(
            f"none of the best trials could be confirmed on {len(runner.windows)} windows ({why}): the study is kept; make room for one, "
            "then run the same command again"
        )
    return known_trials


def on_all_windows(steps: list[Step], trial: FrozenTrial, runner: TrialRunner) -> dict[str, Any]:
    """Return what the pipeline of a trial, run again, gives on all of the runner's windows, what its steps cost and how they interact."""
    compressed = runner.run(steps)
    together = measure_or_none(
        "the interaction", lambda: interaction(steps, runner.resources, runner.step_measure, compressed.steps, runner.cache)
    )
    measured = runner.measure(compressed, known=trial.user_attrs.get("by_window"))
    return {**measured, "steps": summarize_rows(compressed.steps), "interaction": together}


def confirmed_trials(study: optuna.Study) -> dict[int, dict[str, Any]]:
    """Return by number what trials of a study give on all windows, as far as it is known."""
    attributes = study.user_attrs
    together = attributes.get(CONFIRMED, {})  # as earlier versions wrote it
    single = {name.removeprefix(f"{CONFIRMED} "): known for name, known in attributes.items() if name.startswith(f"{CONFIRMED} ")}
    return {int(number): known for number, known in (together | single).items()}


def choose(
    ratio: float, trials: Sequence[FrozenTrial], confirmed: dict[int, dict[str, Any]], runner: TrialRunner, tokens: int
) -> dict[str, Any]:
    """Return the ratio, and of the best trial on all windows that is so many times smaller its number, what was measured and the pipeline
    to save; the ratio alone if there is none. A pipeline that learns does so on `tokens` first, see `retrain_longer`."""
    small = [trial for trial in trials if confirmed.get(trial.number, {}).get("compression_ratio", 0) >= ratio]
    if not small:
        return {"ratio": ratio}
    best = min(small, key=lambda trial: confirmed[trial.number][runner.quality])
    steps = read_pipeline(best.user_attrs["pipeline"])
    long, training = retrain_longer(steps, confirmed[best.number], runner, tokens)
    return {
        "ratio": ratio, "trial": best.number, "measured": best.user_attrs["measured"],
        "confirmed": {name: value for name, value in confirmed[best.number].items() if name != "steps"},
        "pipeline": [step.described() for step in long], "final_training": training,
    }  # fmt: skip


def with_more_tokens(steps: Sequence[Step], tokens: int, tune: bool) -> list[Step]:
    """Return the pipeline whose retraining sees at least `tokens` tokens; with `tune`, integers learn on as many after rounding."""

    def long(step: Step) -> Step:
        name = step.method.trains
        if name is None or not (tune or step.method.kind == "retrain"):
            return step
        return Step(step.method, replace(step.recipe, **{name: max(tokens, getattr(step.recipe, name))}))

    return [long(step) for step in steps]


def retrain_longer(
    steps: list[Step], confirmed: dict[str, Any], runner: TrialRunner, tokens: int
) -> tuple[list[Step], dict[str, Any] | None]:
    """Return the pipeline unchanged or trained on `tokens`, whichever is better on all windows, and the record of that training.

    That is its retraining; and where rounding cost more than AS_GOOD and the model is small enough to have gradients of all its weights,
    scales and norms learn from the dense model after it. The record: tokens, seconds of the steps that learn, the measure as in the search
    and afterwards, and whether the long one was kept, or the error it failed with; None if the pipeline has nothing to learn, or learns on
    as many tokens already.
    """
    quality = runner.quality
    taught = quality == "perplexity" and any(step.method.kind == "retrain" for step in steps)  # of text: the dense model would undo it
    learns = confirmed["kl"] > AS_GOOD and any(step.method.trains for step in steps) and not taught
    final = with_more_tokens(steps, tokens, tune=learns and is_small(runner.resources.teacher()))
    if [step.identity() for step in final] == [step.identity() for step in steps]:
        return steps, None
    print(f"final training on {tokens} tokens: {pipeline_name(final)} ...", flush=True)
    record = {"tokens": tokens, "searched": confirmed[quality], "final": None, "kept": False}
    try:
        compressed, learning = runner.run(final), [step.method.name for step in final if step.method.trains]
        final_quality = runner.measure(compressed)[quality]
    except Exception as error:  # noqa: BLE001  out of memory, a model it has damaged: the search is worth more
        why = f"{type(error).__name__}: {first_line(error)}"
        print(f"final training failed ({why}): the pipeline of the search is kept", flush=True)
        return steps, record | {"error": why}
    record |= {
        "seconds": sum(row["seconds"] for row in compressed.steps if row["method"] in learning),
        "final": final_quality, "kept": final_quality <= confirmed[quality],
    }  # fmt: skip
    print(f"search: {quality} {confirmed[quality]:.4g} on all windows\nfinal training: {quality} {final_quality:.4g}", end="")
    print("" if record["kept"] else "; the pipeline of the search is kept", flush=True)
    return (final if record["kept"] else steps), record


def step_effects(steps: list[Step], runner: TrialRunner) -> list[dict[str, Any]]:
    """Return what each step of a pipeline is worth on the first windows; nothing for a single one."""
    return ablation(steps, runner.run, runner.unit, runner.run(steps).steps) if len(steps) > 1 else []
