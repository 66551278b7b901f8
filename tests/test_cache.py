"""The cache of a search: pipelines that begin alike share that beginning, which comes back as it was and within its limits."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import helpers
import pytest
import torch
import trial_runs
from trial_runs import NF4, PRUNE, RETRAIN, W8A8, make_runner

from compactmind.evaluation.perplexity import perplexity
from compactmind.methods.registry import METHODS
from compactmind.search.cache import PrefixCache
from compactmind.search.compressor import Measure, read_pipeline, run_pipeline, stored_bytes

windows = trial_runs.windows


@pytest.fixture
def calls(monkeypatch):
    """A list that grows by the name of every method that really runs."""
    result = []
    for method in (METHODS["prune"], METHODS["retrain"]):

        def apply(*arguments, method=method):
            result.append(method.name)
            return method.apply(*arguments)

        monkeypatch.setitem(METHODS, method.name, replace(method, apply=apply))
    return result


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
    result = run_pipeline(steps, runner.resources, measure, cache=runner.cache, show=False)
    fresh = run_pipeline(steps, runner.resources, measure, show=False)
    assert calls == ["prune", "retrain"] * 2
    assert [row["loss"] for row in result.steps] == [row["loss"] for row in fresh.steps]
    assert "perplexity" not in result.steps[1]  # that was of the first text
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
    result = runner.run(read_pipeline([PRUNE, RETRAIN]))
    assert [row["loss"] for row in result.steps] == [row["loss"] for row in wanted.steps]
    output = capsys.readouterr().out
    assert output.count("was not kept") == 1 and "not enough disk space" in output
