"""A trial of the search: what is skipped and stopped before it costs time, what is measured, and what the cache gives back."""

import gc
import json
import math
from contextlib import suppress
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import helpers
import optuna
import pytest
import torch
from optuna.pruners import NopPruner
from transformers import LlamaConfig, LlamaForCausalLM

from compactmind.checkpoint import bytes_to_save
from compactmind.errors import CompactMindError
from compactmind.evaluation.divergence import divergence
from compactmind.evaluation.perplexity import perplexity
from compactmind.methods.pruning.sparse24 import Sparse24Recipe
from compactmind.methods.registry import METHODS, Method, Resources
from compactmind.search import trials
from compactmind.search.cache import PrefixCache
from compactmind.search.compressor import Measure, read_pipeline, run_pipeline, store_as_released, stored_bytes
from compactmind.search.engine import counted_trials, is_stopped, open_study, search
from compactmind.search.notes import Notes, Skipped, Stopped
from compactmind.search.space import make_space
from compactmind.search.trials import (
    HOPELESS,
    MARGIN,
    MORE_TOKENS,
    OPTIMISM,
    OUT_OF_REACH,
    PRIOR_CHANGES,
    TrialRunner,
    with_short_retraining,
)

PRUNE = {"method": "prune", "params": {"sparsity": 0.3, "round_to": 8}}
RETRAIN = {"method": "retrain", "params": {"tokens": 96}}
NF4, W8A8 = {"method": "nf4"}, {"method": "w8a8", "params": {"embeddings": "int8"}}


@pytest.fixture
def windows():
    return helpers.example_windows(count=6, length=24)


def make_runner(windows, tmp_path=None, dense=helpers.make_llama, **changes):
    resources = Resources(windows, windows, windows[:2], dense, torch.bfloat16)
    cache = PrefixCache(tmp_path / "cache", {"model": "x"}, 10**9) if tmp_path else None
    weights = sum(parameter.numel() for parameter in dense().parameters())
    settings = {"few": 2, "released_bytes": 2 * weights, "target": 1.0, "cache": cache, "skeleton": skeleton} | changes
    return TrialRunner(resources, windows, **settings)


def skeleton():
    """Return the model of make_llama without its weights."""
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**helpers.llama_settings()))


def make_trial(best=None, ratio=99.0, objectives=("kl",)):
    """Return the notes of a trial; `best`: what a finished one of its study came to, so many times smaller."""
    study = optuna.create_study(directions=["minimize"] * len(objectives), pruner=NopPruner())
    if best is not None:
        finished = study.ask()
        finished.set_user_attr("measured", {"compression_ratio": ratio})
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
    found = run_pipeline(steps, runner.resources, runner.step_measure, show=False)
    assert measured["perplexity"] == pytest.approx(perplexity(found.model, windows, "x")["perplexity"], rel=1e-6)
    assert 0 < value == measured["kl"] == pytest.approx(divergence(wide(), found.model, windows)["mean"], rel=1e-4)
    assert [row["method"] for row in trial.user_attrs["steps"]] == ["dense", *(step.method.name for step in steps)]
    with store_as_released(found, torch.bfloat16):
        assert bytes_to_save(found.model) == measured["bytes"]
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
        quality = runner.extrapolated(row["kl"], [step.method.name for step in steps[number:]])
        told = {"kl": quality, "bytes": pytest.approx(runner.released_bytes / runner.expected_ratio(steps))}
        assert stop.value.values == [told[name] for name in objectives] and quality >= runner.best
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


def test_where_time_or_memory_count_no_pipeline_is_stopped_for_its_quality(windows):
    for others in (("latency",), ("bytes", "memory")):
        runner = make_runner(windows, objectives=("kl", *others), best=-100.0)
        assert not runner.may_stop(make_trial())
    assert make_runner(windows, objectives=("kl", "bytes"), best=-100.0).may_stop(make_trial())


def test_what_may_still_be_won_is_what_such_steps_have_won_in_this_study_and_a_quarter_more(windows):
    runner, steps = make_runner(windows), ["retrain", "smooth", "nf4"]
    assert runner.optimistic_quality(4.0, steps) == pytest.approx(4.0 + (1 + OPTIMISM) * PRIOR_CHANGES["retrain"])
    runner.changes = {"retrain": [-0.2, -0.1], "smooth": [0.0, 0.1], "nf4": [0.3, 0.2]}
    assert runner.optimistic_quality(4.0, steps) == pytest.approx(4.0 - 0.25 + 0.15)
    assert runner.optimistic_quality(4.0, steps[1:]) == pytest.approx(4.15) and runner.optimistic_quality(4.0, []) == 4.0
    assert runner.extrapolated(4.0, steps) == pytest.approx(4.0 - 0.15 + 0.05 + 0.25)  # what they usually do
    runner.best = 3.99
    assert runner.extrapolated(4.0, ["retrain"]) == 3.99  # what was stopped is not told as the best
    assert make_runner(windows, objectives=("perplexity",)).extrapolated(2.0, []) == pytest.approx(math.exp(2.0))
    runner.changes["nf4"] = [0.3]  # one is not enough to go by
    assert runner.optimistic_quality(4.0, steps) == pytest.approx(3.75)


def test_what_is_hopeless_is_learnt_from_the_trials_of_the_study(windows):
    study, runner = optuna.create_study(), make_runner(windows, target=1.3)
    for ratio, loss in ((1.5, 3.0), (1.2, 1.0), (1.4, 4.0)):
        trial = study.ask()
        trial.set_user_attr("measured", {"compression_ratio": ratio})
        trial.set_user_attr("steps", [{"method": "dense", "kl": 0.0}, {"method": "prune", "kl": loss - 2}])
        trial.set_user_attr("short", loss)
        study.tell(trial, loss)
    stopped = study.ask()
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
    assert runner.changes == {"prune": [1.0, -1.0, 2.0, 7.0], "nf4": [0.5], MORE_TOKENS: [-2.0] * 3}


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
    found = run_pipeline(with_short_retraining(steps), runner.resources, runner.step_measure, show=False).steps[-1]["kl"]
    credit = -PRIOR_CHANGES[MORE_TOKENS] * (1 + OPTIMISM)
    for beyond in (0.01, -0.01):
        trial, runner.best = make_trial(), found - credit - OUT_OF_REACH - beyond
        monkeypatch.setattr(runner, "learn", lambda *_: None)
        monkeypatch.setattr(trials, "HOPELESS", 100.0)
        runner.changes = {"prune": [-100.0, -100.0], "retrain": [-100.0, -100.0], "nf4": [-100.0, -100.0]}  # nothing else stops it
        if beyond > 0:
            with pytest.raises(Stopped, match="stopped after 25% of the retraining"):
                runner.evaluate(trial, steps)
            assert "measured" not in trial.user_attrs
        else:
            runner.evaluate(trial, steps)
            assert trial.user_attrs["measured"]["kl"] > 0
        assert trial.user_attrs["short"] == found


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
        study.tell(trial, values)
    whole = [(0, 1), (1, 2), (2, 4), (4, 6)]
    stopped = [is_stopped(trial) for trial in study.trials]
    assert stopped == [False] * 4 + [True] * 2  # the first few are not, whatever they give
    assert looks == [(0, 1), (0, 1)]  # after the step, and again when it is measured
    assert study.trials[-1].intermediate_values.keys() == {1} and study.trials[0].intermediate_values.keys() == {1, 2, 4, 6}
    assert study.trials[-1].value == study.trials[-1].user_attrs["steps"][-1]["kl"]
    looks.clear()
    found = runner.measure(runner.run(read_pipeline(pipelines[0])))
    assert looks[-4:] == whole and found["kl"] == pytest.approx(study.trials[0].value)


def test_the_dense_model_reads_the_windows_once(windows, monkeypatch):
    runner, read = make_runner(windows), []
    original = runner.resources.dense
    runner.resources.dense = lambda: original()
    teacher = runner.resources.teacher()
    teacher.register_forward_hook(lambda *_: read.append(1))
    for pipeline in ([NF4], [W8A8]):
        runner.evaluate(make_trial(), read_pipeline(pipeline))
    assert len(read) <= len(windows) + 2  # beside the first look at itself
    runner.windows = windows[:3]  # others
    runner.logits()
    assert len(runner.dense) == 3


def test_a_simulated_kernel_has_no_latency(windows, monkeypatch):
    monkeypatch.setattr(trials, "kernel_of", lambda *_: "simulated")
    runner = make_runner(windows, objectives=("perplexity", "latency"))
    with pytest.raises(CompactMindError, match="simulated"):
        runner.evaluate(make_trial(), read_pipeline([W8A8]))


# ------------------------------------------------------------------------------------------------------------------- cache
@pytest.fixture
def calls(monkeypatch):
    """A list that grows by the name of every method that really runs."""
    found = []
    for method in (METHODS["prune"], METHODS["retrain"]):

        def apply(*arguments, method=method):
            found.append(method.name)
            return method.apply(*arguments)

        monkeypatch.setitem(METHODS, method.name, replace(method, apply=apply))
    return found


@pytest.mark.parametrize("scope", ["uniform", "global"])
def test_pipelines_that_begin_alike_share_that_beginning(windows, tmp_path, calls, scope):
    prune = {"method": "prune", "params": {"sparsity": 0.3, "round_to": 8, "scope": scope}}
    runner = make_runner(windows, tmp_path)
    first = runner.run(read_pipeline([prune, RETRAIN, NF4]))
    assert calls == ["prune", "retrain"]
    second = runner.run(read_pipeline([prune, RETRAIN, W8A8]))
    assert calls == ["prune", "retrain"]
    assert [row.get("cached", False) for row in second.steps] == [False, True, True, False]
    assert [row["loss"] for row in second.steps[:3]] == [row["loss"] for row in first.steps[:3]]
    fresh = make_runner(windows).run(read_pipeline([prune, RETRAIN, W8A8]))
    assert second.steps[-1]["loss"] == fresh.steps[-1]["loss"] and second.kind == fresh.kind
    runner.run(read_pipeline([prune, {"method": "retrain", "params": {"tokens": 48}}]))
    assert calls[2:] == ["prune", "retrain", "retrain"]  # of the run without a cache, then the other retraining alone


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "last",
    [
        {"method": "nf4", "params": {"embeddings": "int8"}},
        {"method": "nf4", "params": {"embeddings": "as_released"}},
        {"method": "w8a8"},
        W8A8,
        {"method": "w8a8", "params": {"stream_rotation": True}},
        {"method": "gptq", "params": {"bits": 3, "embeddings": "int8"}},
        {"method": "gptq", "params": {"bits": 3, "embeddings": "as_released"}},
        RETRAIN,
    ],
    ids=lambda step: " ".join([step["method"], *map(str, step.get("params", {}).values())]),
)
def test_a_whole_pipeline_comes_back_as_it_was(windows, tmp_path, last, tied):
    dense = partial(helpers.make_llama, tie_word_embeddings=tied)
    runner, steps = make_runner(windows, tmp_path, dense=dense), read_pipeline([PRUNE, last])
    first = runner.run(steps)
    for step in steps:
        step.method = replace(step.method, apply=lambda *_: pytest.fail("it was done again"))
    again = run_pipeline(steps, runner.resources, runner.step_measure, cache=runner.cache, show=False)
    assert [row.get("cached", False) for row in again.steps] == [False, True, True] and again.kind == first.kind
    assert json.loads(json.dumps(first.quantization)) == again.quantization
    assert stored_bytes(again, torch.bfloat16) == stored_bytes(first, torch.bfloat16)
    assert runner.measure(again) == runner.measure(first)
    with torch.no_grad():
        assert torch.equal(again.model(windows).logits, first.model(windows).logits)


def test_a_model_from_the_cache_is_measured_anew_on_another_text(windows, tmp_path, calls):
    runner, steps = make_runner(windows, tmp_path), read_pipeline([PRUNE, RETRAIN])
    runner.run(steps)
    names = []

    def other(model):
        names.append(type(model).__name__)
        return {"loss": perplexity(model, windows[3:], "x")["loss"]}

    measure = Measure("another text", other)
    found = run_pipeline(steps, runner.resources, measure, cache=runner.cache, show=False)
    fresh = run_pipeline(steps, runner.resources, measure, show=False)
    assert calls == ["prune", "retrain"] * 2
    assert [row["loss"] for row in found.steps] == [row["loss"] for row in fresh.steps]
    assert "perplexity" not in found.steps[1]  # that was of the first text
    before = len(names)
    run_pipeline(steps, runner.resources, measure, cache=runner.cache, show=False)
    assert len(names) == before  # known by now


def test_smoothed_weights_come_back_exactly(windows, tmp_path):
    runner, steps = make_runner(windows, tmp_path), read_pipeline([{"method": "smooth"}, PRUNE, NF4])
    first = runner.run(steps)
    again = runner.run(steps)
    assert again.steps[1]["cached"] and again.steps[-1]["loss"] == first.steps[-1]["loss"]


def test_another_context_or_a_damaged_entry_is_not_used(windows, tmp_path, calls):
    runner, steps = make_runner(windows, tmp_path), read_pipeline([PRUNE, NF4])
    runner.run(steps)
    other = make_runner(windows, tmp_path)
    other.cache = PrefixCache(tmp_path / "cache", {"model": "y"}, 10**9)
    other.run(steps)
    assert calls == ["prune"] * 2
    for place in (tmp_path / "cache").iterdir():
        (place / "model.safetensors").write_bytes(b"cut off")
    runner.run(steps)
    assert calls == ["prune"] * 3


def test_the_cache_stays_within_its_limit_and_forgets_what_was_used_longest_ago(windows, tmp_path):
    runner = make_runner(windows, tmp_path)
    pipelines = [read_pipeline([{"method": "prune", "params": {"sparsity": s, "round_to": 4}}]) for s in (0.2, 0.3, 0.4)]
    runner.run(pipelines[0])
    size = sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*") if file.is_file())
    runner.cache.limit_bytes = int(2.5 * size)
    runner.run(pipelines[1])
    assert runner.run(pipelines[0]).steps[-1]["cached"]  # used just now
    runner.run(pipelines[2])
    kept = [runner.cache.model([step.identity() for step in steps]) is not None for steps in pipelines]
    assert kept == [True, False, True]
    runner.cache.limit_bytes = 10
    runner.run(read_pipeline([{"method": "prune", "params": {"sparsity": 0.25, "round_to": 4}}]))  # too large to keep: no error


def test_a_full_disk_costs_the_search_its_cache_and_one_line(windows, tmp_path, monkeypatch, capsys):
    runner, wanted = make_runner(windows, tmp_path), make_runner(windows).run(read_pipeline([PRUNE, RETRAIN]))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    found = runner.run(read_pipeline([PRUNE, RETRAIN]))
    assert [row["loss"] for row in found.steps] == [row["loss"] for row in wanted.steps]
    output = capsys.readouterr().out
    assert output.count("was not kept") == 1 and "not enough disk space" in output


def tensor_bytes() -> int:
    """Return the bytes of all tensors that are alive, each memory once."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if type(found) in (torch.Tensor, torch.nn.Parameter) and found.device.type == "cpu":
            storages[found.untyped_storage().data_ptr()] = found.untyped_storage().nbytes()
    return sum(storages.values())


def test_memory_does_not_grow_with_the_trials(windows, tmp_path):
    choices = {"prune.round_to": [8], "prune.sparsity": [0.2, 0.3, 0.4], "retrain.tokens": [48]}
    space = make_space(("prune", "retrain", "smooth", "w8a8", "nf4"), choices=choices)
    runner, kept = make_runner(windows, tmp_path, target=0.1), []
    study = open_study("memory", f"sqlite:///{tmp_path / 'study.db'}", {})
    search(study, space, 18, runner.evaluate, strategy="random", seed=3, finished=lambda _: kept.append(tensor_bytes()))
    assert len(kept) == 18 and len({trial.user_attrs["key"] for trial in counted_trials(study)}) == 18
    model = sum(weight.numel() * 4 for weight in helpers.make_llama().parameters())
    assert (
        max(kept[10:]) < max(kept[:10]) + model
    )  # what is remembered of the dense model comes early; no trial leaves its own behind
    assert all(trial.user_attrs["memory_mb"] > 0 for trial in counted_trials(study))
