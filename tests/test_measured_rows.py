"""Rows are measured model by model: one that dies costs the others nothing, and the dense one runs once for all made from it."""

import gc
import weakref
from functools import partial
from types import SimpleNamespace

import helpers
import pytest
import rows_workspace
import torch

from compactmind.checkpoint import load_checkpoint, save_checkpoint
from compactmind.evaluation import classifiers, language, loaded
from compactmind.evaluation.cost import measure_generation, measure_latency
from compactmind.evaluation.loaded import Checkpoints
from compactmind.forward import predict_logits

workspace = rows_workspace.workspace


def test_a_model_that_dies_in_its_turn_costs_the_others_nothing(workspace):
    def dying(after: int):
        model, calls = helpers.make_distilbert(), iter(range(100))

        def hook(*_):
            if next(calls) >= after:
                raise RuntimeError("out of memory")

        model.register_forward_pre_hook(hook)
        return model

    sound = helpers.make_distilbert()
    for after in (0, 3):
        errors: dict[str, Exception] = {}
        times = measure_latency({"dying": dying(after), "sound": sound}, 1, 4, repeats=3, reference="dying", errors=errors)
        assert list(times) == ["sound"] and times["sound"]["speedup"] is None and times["sound"]["median_ms"] > 0
        assert list(errors) == ["dying"] and str(errors["dying"]) == "out of memory"
    with pytest.raises(RuntimeError, match="out of memory"):
        measure_latency({"dying": dying(1), "sound": sound}, 1, 4, repeats=3, reference="sound")
    errors = {}
    models = {"no language model": sound, "llama": helpers.make_llama()}
    assert list(measure_generation(models, 4, 2, {"llama": "llama"}, errors=errors)) == ["llama"] == [*models][1:]
    assert list(errors) == ["no language model"]


def test_gsm8k_that_cannot_be_asked_costs_its_own_cell_only(monkeypatch):
    def gsm8k(model, *_, **__):
        if model == "dying":
            raise RuntimeError("out of memory")
        return {"problems": 3}

    monkeypatch.setattr(language, "gsm8k", gsm8k)
    rows = [{"name": name, "status": "measured"} for name in ("dying", "sound")] + [{"name": "absent", "status": "failed"}]
    language.measure_gsm8k(rows, {name: SimpleNamespace(model=name, tokenizer=None) for name in ("dying", "sound")}, 3, None)
    assert rows[0]["gsm8k"] is None and rows[0]["not_measured"] == {"gsm8k": "RuntimeError: out of memory"}
    assert rows[1]["gsm8k"] == {"problems": 3} and "gsm8k" not in rows[2]


def language_rows(models: dict, tokenizer, folder) -> tuple[list[dict], dict, dict]:
    """Return rows of language models, all made from `dense`, their checkpoints and their bases."""
    rows = [{"name": name, "status": "measured", "directory": str(folder), "kind": "dense"} for name in models]
    checkpoints = {name: SimpleNamespace(model=model, tokenizer=tokenizer, manifest={}) for name, model in models.items()}
    return rows, checkpoints, dict.fromkeys(models, rows[0])


def measure_quality(rows: list[dict], checkpoints: dict, bases: dict, windows=None) -> None:
    windows = helpers.example_windows() if windows is None else windows
    language._measure_quality(rows, checkpoints, lambda name: windows, "made up", "first", bases)


def test_the_dense_model_runs_once_for_all_that_were_made_from_it(workspace):
    calls = []
    models = {name: helpers.make_llama(seed=seed) for seed, name in enumerate(("dense", "a", "b"))}
    for name, model in models.items():
        model.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    rows, checkpoints, bases = language_rows(models, None, workspace / "models" / "llama")
    measure_quality(rows, checkpoints, bases)
    assert calls == ["dense"] * 3 + ["a"] * 3 + ["b"] * 3 and all(row["divergence"] for row in rows)
    calls.clear()
    measure_quality(rows[1:2], checkpoints, bases)  # dense was measured earlier and runs along
    assert calls == ["dense"] * 3 + ["a"] * 3


def test_a_language_model_that_dies_in_its_turn_costs_the_others_nothing(workspace, capsys):
    models = {name: helpers.make_llama(seed=seed) for seed, name in enumerate(("dense", "dying", "damaged", "sound"))}
    with torch.no_grad():
        models["damaged"].model.norm.weight.fill_(torch.nan)
    models["dying"].forward = None
    rows, checkpoints, bases = language_rows(models, None, workspace / "models" / "llama")
    measure_quality(rows, checkpoints, bases)
    assert [row["status"] for row in rows] == ["measured", "failed", "failed", "measured"]
    assert "TypeError" in rows[1]["error"] and "the model is damaged" in rows[2]["error"] and rows[3]["divergence"]["mean"] > 0
    models["dense"].forward = None  # of an earlier measurement: what is compared with it has a perplexity all the same
    sound = {name: rows[3][name] for name in ("name", "status", "directory", "kind")}
    measure_quality([sound], checkpoints, bases)
    assert sound["status"] == "measured" and sound["perplexity"] == rows[3]["perplexity"] and sound["divergence"] is None
    assert "TypeError" in sound["not_measured"]["divergence"]


def test_a_text_is_tokenized_once_for_all_models_with_one_tokenizer(workspace, monkeypatch):
    asked = []

    def windows_for(tokenizer) -> torch.Tensor:
        asked.append(tokenizer)
        return helpers.example_windows()

    models = {name: helpers.make_llama(seed=seed) for seed, name in enumerate(("dense", "a", "b"))}
    rows, checkpoints, bases = language_rows(models, None, workspace / "models" / "llama")
    for each in checkpoints.values():
        each.tokenizer = helpers.make_byte_tokenizer()
    checkpoints["b"].tokenizer = helpers.make_tokenizer(workspace / "t")
    checkpoints = kept(checkpoints)
    monkeypatch.setattr(language, "measure_load_time", lambda *_: 0.1)
    monkeypatch.setattr(language, "measure_generation", lambda *_, **__: {})
    monkeypatch.setattr(language, "peak_memory", lambda *_: 1.0)
    language.measure_language_models(
        rows, checkpoints, windows_for, "made up", "spread", reference=rows[0], bases=bases, prompt_tokens=4, repeats=1
    )
    assert asked == [checkpoints[name].tokenizer for name in ("dense", "b")]
    assert {row["protocol"]["windows_from"] for row in rows} == {"spread"}


def kept(checkpoints: dict) -> Checkpoints:
    """Return checkpoints that are in memory already as those of a report."""
    return Checkpoints({name: lambda each=each: each for name, each in checkpoints.items()})


def test_of_large_models_one_is_in_memory_at_a_time_and_the_numbers_are_those_of_small_ones(workspace, monkeypatch):
    folder, there, most = workspace / "models" / "llama", weakref.WeakSet(), []

    def load(name: str, seed: int):
        model, path = helpers.make_llama(seed=seed), workspace / "large" / name
        save_checkpoint(path, model, helpers.make_byte_tokenizer(), kind="dense", parent=None, stage={})
        del model
        loaded = load_checkpoint(path)
        there.add(loaded.model)
        gc.collect()
        most.append(len(there))
        return loaded

    def measured() -> list[dict]:
        most.clear()
        rows, _, bases = language_rows({"dense": None, "a": None, "b": None}, None, folder)
        checkpoints = Checkpoints({name: partial(load, name, seed) for seed, name in enumerate(("dense", "a", "b"))})
        language.measure_language_models(
            rows, checkpoints, lambda _: helpers.example_windows(), "made up", "first", reference=rows[0], bases=bases,
            prompt_tokens=4, repeats=2,
        )  # fmt: skip
        return rows

    monkeypatch.setattr(language, "peak_memory", lambda *_: 1.0)
    monkeypatch.setattr(language, "load_any", lambda *_: None)
    small, in_memory = measured(), max(most)
    monkeypatch.setattr(loaded, "SMALL_BYTES", 0)
    large, one = measured(), max(most)
    assert (in_memory, one) == (3, 1)
    for a, b in zip(small, large, strict=True):
        assert (a["losses"], a["divergence"], a["against_dense"]) == (b["losses"], b["divergence"], b["against_dense"])
        assert b["generation"]["prefill"]["speedup"] > 0 and b["load_seconds"] >= 0 and "not_measured" not in b
    assert large[0]["generation"]["decode"]["speedup"] == 1


def test_a_diverged_classifier_is_no_row_of_numbers(workspace, monkeypatch):
    row = {"name": "mine", "status": "measured", "directory": str(workspace / "models" / "student_distilled")}
    monkeypatch.setattr(classifiers, "predict_logits", lambda *given: predict_logits(*given) * torch.nan)
    checkpoint = SimpleNamespace(model=helpers.make_distilbert(), tokenizer=helpers.make_tokenizer(workspace / "t"))
    classifiers.measure_classifiers(
        [row], {"mine": checkpoint}, helpers.make_sentences(4), reference=row, max_length=8, eval_batch_size=2, cost_length=4,
        latency_batches=(1,), latency_repeats=1,
    )  # fmt: skip
    assert row["status"] == "failed" and "logits are not numbers" in row["error"] and "accuracy" not in row
