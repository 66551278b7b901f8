"""A trial of the search: what is skipped and stopped before it costs time, and what is measured."""

import gc
import json
import math
from contextlib import suppress
from dataclasses import replace
from functools import partial

import helpers
import optuna
import pytest
import torch
import trial_runs
from optuna.pruners import NopPruner
from trial_runs import NF4, PRUNE, RETRAIN, W8A8, make_runner, skeleton

from compactmind.checkpoint import bytes_to_save
from compactmind.errors import CompactMindError
from compactmind.evaluation.divergence import divergence
from compactmind.evaluation.perplexity import perplexity
from compactmind.methods.pruning.sparse24 import Sparse24Recipe
from compactmind.methods.registry import METHODS, Method, Resources
from compactmind.search import trials
from compactmind.search.compressor import read_pipeline, run_pipeline, store_as_released
from compactmind.search.credit import MORE_TOKENS, OPTIMISM, PRIOR_CHANGES, Changes
from compactmind.search.engine import counted_trials, is_stopped, open_study, search
from compactmind.search.notes import Notes, Skipped, Stopped
from compactmind.search.space import make_space
from compactmind.search.trials import (
    HOPELESS,
    MARGIN,
    OUT_OF_REACH,
    TrialRunner,
    with_short_retraining,
)

windows = trial_runs.windows


def make_trial(best=None, ratio=99.0, objectives=("kl",)):
    """Return the notes of a trial; `best`: what a finished one of its study came to, so many times smaller."""
    study = optuna.create_study(directions=["minimize"] * len(objectives), pruner=NopPruner())
    if best is not None:
        finished = study.ask()
        finished.set_user_attr("measured", {"compression_ratio": ratio})
        finished.set_user_attr("pipeline", [NF4])
        finished.set_user_attr("steps", [{"method": "dense", "kl": best, "loss": best}])
        study.tell(finished, [best] * len(objectives))
    return Notes(study, study.ask().number)


BLOCK = {"method": "prune", "params": {"sparsity": 0.0, "blocks": 1}}


@pytest.mark.parametrize(
    "pipeline", [[PRUNE], [PRUNE, NF4], [PRUNE, W8A8], [W8A8], [BLOCK], [BLOCK, NF4]], ids=lambda steps: steps[-1]["method"]
)
def test_the_bytes_that_are_expected_are_about_those_that_come(windows, pipeline):
    wide = partial(helpers.make_llama, hidden_size=256, intermediate_size=512, head_dim=64)  # scales and padding weigh little
    runner, trial, steps = make_runner(windows, dense=wide, skeleton=None), make_trial(), read_pipeline(pipeline)
    (value,) = runner.evaluate(trial, steps)
    measured = trial.user_attrs["measured"]
    assert measured["compression_ratio"] == pytest.approx(runner.released_bytes / measured["bytes"])
    assert runner.expected_ratio(steps) == pytest.approx(measured["compression_ratio"], rel=0.05)
    result = run_pipeline(steps, runner.resources, runner.step_measure, show=False)
    assert measured["perplexity"] == pytest.approx(perplexity(result.model, windows, "x")["perplexity"], rel=1e-6)
    assert 0 < value == measured["kl"] == pytest.approx(divergence(wide(), result.model, windows)["mean"], rel=1e-4)
    assert [row["method"] for row in trial.user_attrs["steps"]] == ["dense", *(step.method.name for step in steps)]
    with store_as_released(result, torch.bfloat16):
        assert bytes_to_save(result.model) == measured["bytes"]
    assert trial.constraints == {"compression": pytest.approx(1.0 - measured["compression_ratio"])}


def test_what_cannot_be_small_enough_is_not_run(windows, monkeypatch):
    weights = sum(parameter.numel() for parameter in helpers.make_llama().parameters())
    resources = Resources(windows, windows, windows[:2], lambda: pytest.fail("the model was loaded"), torch.bfloat16)
    runner, trial = TrialRunner(resources, windows, 2, 2 * weights, 5.0, skeleton=skeleton), make_trial()
    assert runner.expected_ratio(read_pipeline([PRUNE])) == make_runner(windows, skeleton=None).expected_ratio(read_pipeline([PRUNE]))
    with pytest.raises(Skipped, match=r"not run: 1\.\d+ times smaller to expect, 5 wanted"):
        runner.evaluate(trial, read_pipeline([PRUNE]))
    assert trial.constraints["compression"] > 3
    assert "measured" not in trial.user_attrs  # what is expected is never given as measured


def test_what_a_method_that_prunes_leaves_is_its_own_word(windows, monkeypatch):
    mine = Method("mine", "prune", Sparse24Recipe, lambda model, resources, recipe: (model, {}), {})
    monkeypatch.setitem(METHODS, "mine", mine)
    runner, steps = make_runner(windows), [{"method": "mine"}, {"method": "w8a8"}]
    assert runner.expected_ratio(read_pipeline(steps)) == math.inf  # nobody can tell: it is run
    monkeypatch.setitem(METHODS, "mine", replace(mine, left=lambda recipe, blocks: 1.0))
    assert runner.expected_ratio(read_pipeline(steps)) == runner.expected_ratio(read_pipeline(steps[1:]))
    hidden = [{"method": "prune", "params": {"hidden_sparsity": 0.25}}]
    assert runner.expected_ratio(read_pipeline(hidden)) == math.inf


@pytest.mark.parametrize("objectives", [("kl",), ("bytes", "kl")])
def test_a_hopeless_pipeline_is_stopped_after_the_step_that_shows_it_but_retraining_has_its_chance(windows, objectives):
    runner, credit = make_runner(windows, objectives=objectives), -PRIOR_CHANGES["retrain"] * (1 + OPTIMISM)  # none has been seen yet
    cases = (([PRUNE, RETRAIN, NF4], 1, credit + OUT_OF_REACH), ([PRUNE, RETRAIN, NF4], 2, OUT_OF_REACH), ([NF4], 1, HOPELESS))
    for pipeline, number, allowed in cases:
        steps = read_pipeline(pipeline)
        row = run_pipeline(steps, runner.resources, runner.step_measure, show=False).steps[number]
        trial = make_trial(row["kl"] - allowed - 0.01, objectives=objectives)
        with pytest.raises(Stopped, match=f"stopped after {row['method']}: ") as stop:
            runner.evaluate(trial, steps)
        quality = runner.extrapolated(row["kl"], runner.coming(steps, number))
        text = {"kl": quality, "bytes": pytest.approx(runner.released_bytes / runner.expected_ratio(steps))}
        assert stop.value.values == [text[name] for name in objectives] and quality >= runner.best
        assert len(trial.user_attrs["steps"]) == number + 1
        again = make_trial(row["kl"] - allowed + 0.01, objectives=objectives)  # a little nearer, and it goes on
        with suppress(Stopped):
            runner.evaluate(again, steps)
        assert "measured" in again.user_attrs or len(again.user_attrs["steps"]) > number + 1


def test_what_would_be_smaller_than_all_that_are_better_is_not_stopped(windows):
    steps, objectives = read_pipeline([PRUNE, NF4]), ("kl", "bytes")
    runner = make_runner(windows, objectives=objectives)
    ratio, one = runner.expected_ratio(steps), make_runner(windows)
    with pytest.raises(Stopped):
        runner.evaluate(make_trial(-100.0, ratio, objectives), steps)
    trial = make_trial(-100.0, ratio * (1 - 2 * MARGIN), objectives)
    values = runner.evaluate(trial, steps)
    assert values == [trial.user_attrs["measured"]["kl"], trial.user_attrs["measured"]["bytes"]]
    with pytest.raises(Stopped):  # by one objective, whatever is small enough is compared
        one.evaluate(make_trial(-100.0, ratio * (1 - 2 * MARGIN)), steps)


def test_bytes_count_in_the_sizes_that_are_asked_for(windows):
    runner, steps = make_runner(windows, objectives=("kl", "bytes"), target=1.0), read_pipeline([NF4])
    ratio = runner.released_bytes / runner.evaluate(make_trial(), steps)[1]
    for ratios, expected in (((ratio * 0.8, ratio * 1.1), ratio * 0.8), ((ratio * 0.5, ratio * 0.9), ratio * 0.9), ((ratio * 2,), ratio)):
        runner.ratios, trial = ratios, make_trial()
        _, size = runner.evaluate(trial, steps)
        assert size == pytest.approx(runner.released_bytes / expected)
        assert trial.user_attrs["measured"]["compression_ratio"] == pytest.approx(ratio)  # what is reported is what it has
    with pytest.raises(Stopped) as stopped:
        runner.ratios = (1.1,)
        runner.evaluate(make_trial(-100.0, 1.2, ("kl", "bytes")), steps)
    assert stopped.value.values[1] == pytest.approx(runner.released_bytes / 1.1)


def test_where_time_or_memory_count_no_pipeline_is_stopped_for_its_quality(windows):
    for others in (("latency",), ("bytes", "memory")):
        runner = make_runner(windows, objectives=("kl", *others), best=-100.0)
        assert not runner.may_stop(make_trial())
    assert make_runner(windows, objectives=("kl", "bytes"), best=-100.0).may_stop(make_trial())


def test_what_may_still_be_won_is_what_such_steps_have_won_in_this_study_and_a_quarter_more(windows):
    runner, steps = make_runner(windows), [("retrain", 1.0), ("smooth", 1.0), ("nf4", 3.0)]
    assert runner.optimistic_quality(4.0, steps) == pytest.approx(4.0 + (1 + OPTIMISM) * PRIOR_CHANGES["retrain"])
    seen = {"retrain": [(1.0, -0.2), (1.0, -0.1)], "smooth": [(1.0, 0.0), (1.0, 0.1)], "nf4": [(3.0, 0.3), (3.0, 0.2)]}
    runner.changes = Changes(seen)
    assert runner.optimistic_quality(4.0, steps) == pytest.approx(4.0 - 0.25 + 0.15)
    assert runner.optimistic_quality(4.0, steps[1:]) == pytest.approx(4.15) and runner.optimistic_quality(4.0, []) == 4.0
    assert runner.extrapolated(4.0, steps) == pytest.approx(4.0 - 0.15 + 0.05 + 0.25)  # what they usually do
    runner.best = 3.99
    assert runner.extrapolated(4.0, steps[:1]) == 3.99  # what was stopped is not told as the best
    assert make_runner(windows, objectives=("perplexity",)).extrapolated(2.0, []) == pytest.approx(math.exp(2.0))
    seen["nf4"] = [(3.0, 0.3)]  # one is not enough to go by
    assert runner.optimistic_quality(4.0, steps) == pytest.approx(3.75)


def test_a_step_is_credited_with_what_steps_of_its_size_have_done(windows):
    changes = Changes({"gptq": [(2.5, 0.0), (3.0, 0.02), (4.0, 0.4), (4.0, 0.3), (3.5, 0.9)]})
    expected = {4.0: (0.3, 0.35), 5.0: (0.3, 0.35), 3.5: (0.3, 0.35), 3.25: (0.16, 0.185), 2.5: (0.0, 0.0), 2.0: (0.0, 0.0)}
    for times_smaller, (best, usual) in expected.items():
        step = [("gptq", times_smaller)]  # at 3.5 times one was seen that did worse than others at 4
        assert changes.best(step) == pytest.approx(best * (1 - OPTIMISM)) and changes.usual(step) == pytest.approx(usual), times_smaller
    changes = Changes({"gptq": [(4.0, 0.4), (4.0, 0.3)], "retrain": [(1.0, -0.2), (1.0, -0.4)]})
    assert changes.best([("gptq", 3.8)]) == changes.usual([("gptq", 3.8)]) == 0.0  # nobody knows how little harm less does
    assert changes.best([("retrain", 1.0), ("gptq", 4.0)]) == pytest.approx(-0.5 + 0.225)

    runner = make_runner(windows)
    at_four = {"method": "gptq", "params": {"target_compression": 3.0}}
    (prune, pruned), (gptq, rounded) = runner.coming(read_pipeline([PRUNE, at_four]))
    assert (prune, gptq) == ("prune", "gptq") and pruned > 1 and pruned * rounded == pytest.approx(3.0)
    assert runner.coming(read_pipeline([PRUNE, at_four]), 1) == [("gptq", pytest.approx(rounded))]
    assert runner.coming(read_pipeline([PRUNE, RETRAIN, NF4]))[1] == ("retrain", 1.0)


def test_what_is_hopeless_is_learnt_from_the_trials_of_the_study(windows):
    study, runner = optuna.create_study(), make_runner(windows, target=1.3)
    for ratio, loss in ((1.5, 3.0), (1.2, 1.0), (1.4, 4.0)):
        trial = study.ask()
        trial.set_user_attr("measured", {"compression_ratio": ratio})
        trial.set_user_attr("pipeline", [PRUNE, RETRAIN, NF4])
        changes = {"dense": 0.0, "prune": loss - 2, "retrain": loss - 2.5, "nf4": loss - 2}
        trial.set_user_attr("steps", [{"method": name, "kl": kl} for name, kl in changes.items()])
        trial.set_user_attr("short", loss - 0.5)  # of the retraining, not of the rounding behind it
        study.tell(trial, loss)
    stopped = study.ask()
    stopped.set_user_attr("pipeline", [PRUNE, NF4])
    stopped.set_user_attr(
        "steps", [{"method": "dense", "kl": 0.0}, {"method": "prune", "kl": 7.0}, {"method": "nf4", "kl": 7.5}]
    )
    stopped.set_user_attr("estimated", [7.5])
    study.tell(stopped, 7.5)
    for _ in range(2):  # learning again is not learning twice
        runner.learn(study)
    assert runner.best == 1.0 and runner.measured == 3  # the lower one misses the target
    runner.learn(study, 1.45)
    assert runner.best == 1.0  # by quality alone size is a matter of the target
    runner.objectives = ("kl", "bytes")
    for ratio, best in ((1.0, 1.0), (1.42, 1.0), (1.45, 1.0), (1.6, math.inf)):
        runner.learn(study, ratio)
        assert runner.best == best, ratio
    runner.ratios = (1.3, 1.45)
    for ratio, best in ((1.4, 1.0), (1.6, 1.0), (9.0, 1.0)):  # nobody has asked for less
        runner.learn(study, ratio)
        assert runner.best == best, ratio
    (_, pruned), (_, rounded) = runner.coming(read_pipeline([PRUNE, NF4]))
    assert runner.changes.seen == {
        "prune": [(pruned, change) for change in (1.0, -1.0, 2.0, 7.0)], "retrain": [(1.0, -0.5)] * 3, "nf4": [(rounded, 0.5)] * 4,
        MORE_TOKENS: [(1.0, -2.0)] * 3,
    }  # fmt: skip


def test_a_pipeline_is_retrained_a_little_before_it_is_retrained_in_full(windows, monkeypatch):
    monkeypatch.setattr(trials, "SHORTEST", 24)
    pipeline = [PRUNE, {"method": "retrain", "params": {"tokens": 96}}, NF4]
    runner, steps = make_runner(windows), read_pipeline(pipeline)
    assert [step.recipe.tokens for step in with_short_retraining(steps) if step.method.kind == "retrain"] == [24]
    assert with_short_retraining(read_pipeline([PRUNE, NF4])) is None
    assert with_short_retraining(read_pipeline([PRUNE, RETRAIN, NF4])) is not None
    monkeypatch.setattr(trials, "SHORTEST", 25)
    assert with_short_retraining(steps) is None
    monkeypatch.setattr(trials, "SHORTEST", 24)
    short = with_short_retraining(steps)
    assert [step.method.name for step in short] == ["prune", "retrain"]  # rounding is the same after more tokens, and dear
    result = run_pipeline(short, runner.resources, runner.step_measure, show=False).steps[-1]["kl"]
    (rounding,) = runner.coming(steps, 2)
    harm = 0.3 * (1 - OPTIMISM)  # that rounding has done in this study is ahead of it
    for beyond in (0.01, -0.01):
        trial, runner.best = make_trial(), result + harm - OUT_OF_REACH - beyond
        monkeypatch.setattr(runner, "learn", lambda *_: None)
        monkeypatch.setattr(trials, "HOPELESS", 100.0)
        changes = {"prune": [(1.0, -100.0)] * 2, "retrain": [(1.0, -100.0)] * 2, "nf4": [(rounding[1], 0.3)] * 2}
        runner.changes = Changes({**changes, MORE_TOKENS: [(1.0, 0.0)] * 2})  # nothing else stops it
        if beyond > 0:
            with pytest.raises(Stopped, match="stopped after 25% of the retraining"):
                runner.evaluate(trial, steps)
            assert "measured" not in trial.user_attrs
        else:
            runner.evaluate(trial, steps)
            assert trial.user_attrs["measured"]["kl"] > 0
        assert trial.user_attrs["short"] == result


def test_a_short_retraining_that_could_stop_nothing_is_left_out(windows, tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "SHORTEST", 24)
    pipeline = [PRUNE, {"method": "retrain", "params": {"tokens": 96}}, NF4]
    runner, steps = make_runner(windows, tmp_path, objectives=("perplexity",)), read_pipeline(pipeline)
    pruned = run_pipeline(steps[:1], runner.resources, runner.step_measure, show=False).steps[-1]["loss"]
    monkeypatch.setattr(runner, "learn", lambda *_: None)
    monkeypatch.setattr(trials, "HOPELESS", 100.0)
    harmless = {name: [(1.0, 0.0)] * 2 for name in ("prune", "nf4", MORE_TOKENS)}
    runner.changes = Changes({**harmless, "retrain": [(1.0, -100.0)] * 2})
    for best, is_short in ((pruned, False), (pruned - 2 * OUT_OF_REACH, True)):
        trial, runner.best = make_trial(objectives=("perplexity",)), best
        with suppress(Stopped):
            runner.try_short_retraining(steps, trial)
        assert ("short" in trial.user_attrs) == is_short


def test_what_falls_behind_is_looked_at_on_few_windows_and_told_as_what_they_say(windows, monkeypatch):
    monkeypatch.setattr(trials, "HOPELESS", 1000.0)  # nothing else stops them
    pipelines = [[{"method": "gptq", "params": {"bits": bits, "embeddings": "int8"}}] for bits in (8, 6, 5, 4, 3, 2)]
    runner, looks = make_runner(windows, few=1, target=0.1), []
    original = runner._measure_windows
    runner._measure_windows = lambda model, start, end: looks.append((start, end)) or original(model, start, end)
    study = optuna.create_study(pruner=runner.pruner())
    for pipeline in pipelines:
        trial = study.ask()
        notes, steps = Notes(study, trial.number), read_pipeline(pipeline)
        looks.clear()
        try:
            values = runner.evaluate(notes, steps)
        except Stopped as stop:
            values = stop.values
            notes.set_user_attr("estimated", values)
        notes.write(trial)
        trial.set_user_attr("pipeline", pipeline)
        study.tell(trial, values)
    whole = [(0, 1), (1, 2), (2, 4), (4, 6)]
    stopped = [is_stopped(trial) for trial in study.trials]
    assert stopped == [False] * 4 + [True] * 2  # the first few are not, whatever they give
    assert looks == [(0, 1), (0, 1)]  # after the step, and again when it is measured
    assert study.trials[-1].intermediate_values.keys() == {1} and study.trials[0].intermediate_values.keys() == {1, 2, 4, 6}
    assert study.trials[-1].value == study.trials[-1].user_attrs["steps"][-1]["kl"]
    looks.clear()
    result = runner.measure(runner.run(read_pipeline(pipelines[0])))
    assert looks[-4:] == whole and result["kl"] == pytest.approx(study.trials[0].value)


def test_the_dense_model_reads_the_windows_once(windows, monkeypatch):
    runner, read = make_runner(windows), []
    original = runner.resources.dense
    runner.resources.dense = lambda: original()
    teacher = runner.resources.teacher()
    teacher.register_forward_hook(lambda *_: read.append(1))
    for pipeline in ([NF4], [W8A8]):
        runner.evaluate(make_trial(), read_pipeline(pipeline))
    assert len(read) <= len(windows) + 2  # beside the first look at itself
    read.clear()
    runner.windows = torch.cat([windows, windows[:3].flip(0)])
    dense = runner.logits()
    assert len(read) == 3 and len(dense) == len(windows) + 3 and torch.equal(dense[-1], dense[0])  # only what was added


def test_what_a_trial_has_seen_of_the_windows_is_confirmed_by_the_first_one(windows):
    steps, runner = read_pipeline([NF4]), make_runner(windows[:4])
    trial = make_trial()
    runner.evaluate(trial, steps)
    known, measured = trial.user_attrs["by_window"], trial.user_attrs["measured"]
    assert measured["kl"] == pytest.approx(sum(known["kl"]) / 4) and measured["loss"] == pytest.approx(sum(known["loss"]) / 4)
    looks, compressed, original = [], runner.run(steps), runner._measure_windows
    runner._measure_windows = lambda model, start, end: looks.append((start, end)) or original(model, start, end)
    runner.windows = windows
    whole = runner.measure(compressed)
    looks.clear()
    assert runner.measure(compressed, known=json.loads(json.dumps(known))) == whole and looks == [(0, 1), (4, 6)]
    other = {name: [1.01 * values[0], *values[1:]] for name, values in known.items()}  # of other code, or of another machine
    looks.clear()
    assert runner.measure(compressed, known=other) == whole and looks[0] == (0, 1) and looks[1][0] == 0


def test_a_simulated_kernel_has_no_latency(windows, monkeypatch):
    monkeypatch.setattr(trials, "kernel_of", lambda *_: "simulated")
    runner = make_runner(windows, objectives=("perplexity", "latency"))
    with pytest.raises(CompactMindError, match="simulated"):
        runner.evaluate(make_trial(), read_pipeline([W8A8]))


def tensor_bytes() -> int:
    """Return the bytes of all tensors that are alive, each memory once."""
    gc.collect()
    storages = {}
    for result in gc.get_objects():
        if type(result) in (torch.Tensor, torch.nn.Parameter) and result.device.type == "cpu":
            storages[result.untyped_storage().data_ptr()] = result.untyped_storage().nbytes()
    return sum(storages.values())


def test_memory_does_not_grow_with_the_trials(windows, tmp_path):
    choices = {"prune.round_to": [8], "prune.sparsity": [0.2, 0.3, 0.4], "retrain.tokens": [48]}
    space = make_space(("prune", "retrain", "smooth", "w8a8", "nf4"), choices=choices)
    runner, kept = make_runner(windows, tmp_path, target=0.1), []
    study = open_study("memory", f"sqlite:///{tmp_path / 'study.db'}", {})
    search(study, space, 12, runner.evaluate, strategy="random", seed=3, finished=lambda _: kept.append(tensor_bytes()))
    assert len(kept) == 12 and len({trial.user_attrs["key"] for trial in counted_trials(study)}) == 12
    model = sum(weight.numel() * 4 for weight in helpers.make_llama().parameters())
    assert max(kept[7:]) < max(kept[:7]) + model  # what is remembered of the dense model comes early; no trial leaves its own behind
    assert all(trial.user_attrs["memory_mb"] > 0 for trial in counted_trials(study))


def gptq_at(target, *before, **params):
    return read_pipeline([*before, {"method": "gptq", "params": {"target_compression": target, **params}}])


def test_what_rounding_cannot_reach_is_not_run_and_what_it_can_is(windows):
    wide = partial(helpers.make_llama, hidden_size=256, intermediate_size=512, head_dim=64)
    runner = make_runner(windows, dense=wide, skeleton=None, target=12.0)
    most = runner.expected_ratio(gptq_at(12.0))
    assert 5 < most < 12 and runner.excess(gptq_at(12.0)) > 0  # two bits and a bit for scales in the blocks, four in the tables
    with pytest.raises(Skipped, match=r"not run: \d\.\d+ times smaller to expect, 12 wanted"):
        runner.evaluate(make_trial(), gptq_at(12.0, PRUNE))
    assert runner.expected_ratio(gptq_at(12.0, embeddings="int8")) < most < runner.expected_ratio(gptq_at(12.0, PRUNE))
    runner.resources.released_bytes, runner.target = runner.released_bytes, 2.0  # of a front: each has to reach what it aims at
    assert runner.excess(gptq_at(12.0)) > 0 >= runner.excess(gptq_at(2.0))
    with pytest.raises(Skipped, match="12 wanted"):
        runner.evaluate(make_trial(), gptq_at(12.0))
    for before in ((), (PRUNE,), (BLOCK,)):  # a bound: nothing that can be made is refused
        bound = runner.expected_ratio(gptq_at(15.9, *before))
        runner.target, trial = bound * 0.9, make_trial()
        runner.evaluate(trial, gptq_at(runner.target, *before))
        assert trial.user_attrs["measured"]["compression_ratio"] >= runner.target
        with pytest.raises(CompactMindError, match="the smallest that these widths can make"):
            run_pipeline(gptq_at(bound * 1.03, *before), runner.resources, runner.step_measure, show=False)
