"""Retraining a causal LM goes on exactly where it was killed."""

import math

import helpers
import pytest
import torch
from tiny_retraining import STAGE, assert_equal_weights, fail_at, interrupt, make_recipe, pattern_windows, timeless

from compactmind.methods.retraining import causal_lm
from compactmind.methods.retraining.causal_lm import retrain_causal_lm
from compactmind.training import TrainingState, cpu_copy

RUNS = [{}, {"mode": "lora", "lr": 2e-2}, {"accumulation": 2, "hidden_loss_weight": 0.1}, {"optimizer": "adamw_8bit"}]


@pytest.mark.parametrize("settings", RUNS)
def test_a_resumed_run_equals_an_unbroken_one(tmp_path, monkeypatch, capsys, settings):
    teacher, held_out = helpers.make_llama(seed=0), pattern_windows(3, first=2)
    recipe = make_recipe(**{"steps": 16, "evaluations": 4, "distillation": True, "alpha": 0.2} | settings)

    def run(resume=None):
        model = helpers.make_llama(seed=1, attention_dropout=0.1)  # dropout: the random numbers have to match as well
        return model, retrain_causal_lm(model, pattern_windows(7), held_out, recipe, teacher=teacher, resume=resume)

    whole_model, whole = run()
    assert whole["kept_step"] == whole["history"][-1]["step"]  # later than the kill: what is compared was trained after it
    resume = TrainingState(tmp_path / "retrained", STAGE)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        fail_at(patch, causal_lm, "held_out_loss", 4, interrupt)  # before retraining, two evaluations, and then
        run(resume)
    state = resume.load()
    assert state["step"] == whole["history"][1]["step"] == state["kept"]["step"]
    shared = [state[part]["weights"] if part == "kept" else state[part] for part in ("kept", "weights")]
    assert all(each.data_ptr() == shared[1][name].data_ptr() for name, each in shared[0].items())  # saved once
    capsys.readouterr()
    resumed_model, resumed = run(resume)
    assert f"going on after step {whole['history'][1]['step']} of {whole['history'][3]['step']}" in capsys.readouterr().out
    assert timeless(resumed) == timeless(whole)
    assert_equal_weights(resumed_model, whole_model.state_dict())
    again_model, again = run(resume)  # killed before the result was saved: nothing is trained twice
    assert timeless(again) == timeless(whole)
    assert_equal_weights(again_model, whole_model.state_dict())


def test_moments_in_8_bits_take_a_quarter_and_lead_nearly_where_whole_ones_lead(tmp_path):
    result = {}
    for name in ("adamw", "adamw_8bit"):
        model, resume = helpers.make_llama(seed=1, vocab_size=2000, intermediate_size=512), TrainingState(tmp_path / name, STAGE)
        done = retrain_causal_lm(model, pattern_windows(7), pattern_windows(3), make_recipe(16, optimizer=name), resume=resume)
        state = resume.load()["optimizer"]["state"]
        moments = (each for its in state.values() for each in its.values() if torch.is_tensor(each) and each.numel() > 256)
        result[name] = done["loss_after"], sum(each.numel() * each.element_size() for each in moments)
    (whole, large), (rounded, small) = result.values()
    assert rounded == pytest.approx(whole, rel=0.02) and rounded < done["loss_before"] - 0.1
    assert small < 0.35 * large


def test_a_resumed_run_still_has_the_best_weights_of_the_first_part(tmp_path, monkeypatch):
    model, resume = helpers.make_llama(), TrainingState(tmp_path / "retrained", STAGE)
    losses = iter([5.0, 1.0, 3.0])  # before retraining, step 4, step 8
    monkeypatch.setattr(causal_lm, "held_out_loss", lambda *_: next(losses))
    with pytest.raises(StopIteration):
        retrain_causal_lm(model, pattern_windows(), pattern_windows(2), make_recipe(16), resume=resume)
    best = resume.load()["kept"]["weights"]
    assert not torch.equal(best["lm_head.weight"], resume.load()["weights"]["lm_head.weight"])
    losses = iter([4.0, 4.0])
    model = helpers.make_llama()
    result = retrain_causal_lm(model, pattern_windows(), pattern_windows(2), make_recipe(16), resume=resume)
    assert (result["kept_step"], result["loss_before"], result["loss_after"]) == (4, 5.0, 1.0)
    assert_equal_weights(model, best)


@pytest.mark.parametrize("change", [{"processes": 2, "total_steps": 8}, {"mixed_precision": "bf16"}, {"windows_per_step": 4}])
def test_the_state_of_another_plan_is_not_used(tmp_path, monkeypatch, capsys, change):
    def run(resume=None):
        model = helpers.make_llama()
        return model, retrain_causal_lm(model, pattern_windows(), pattern_windows(2), make_recipe(16), resume=resume)

    whole_model, whole = run()
    resume = TrainingState(tmp_path / "retrained", STAGE)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        fail_at(patch, causal_lm, "held_out_loss", 3, interrupt)
        run(resume)
    state = resume.load()
    assert state["plan"] == {"total_steps": 16, "windows_per_step": 2, "processes": 1, "mixed_precision": "no"}
    resume.save(**state | {"plan": state["plan"] | change, "loss_before": 0.1})
    capsys.readouterr()
    model, result = run(resume)
    printed = capsys.readouterr().out
    assert "starting anew" in printed and "going on" not in printed
    for key, value in change.items():
        assert f"'{key}': {value!r}" in printed
    assert timeless(result) == timeless(whole)
    assert_equal_weights(model, whole_model.state_dict())


def test_a_weight_that_is_no_number_is_never_kept(monkeypatch):
    original = causal_lm.held_out_loss

    def spoiling(model, held_out, accelerator):
        loss = original(model, held_out, accelerator)
        if model.lm_head.weight.grad is None and not torch.equal(model.lm_head.weight, start):
            with torch.no_grad():
                model.model.embed_tokens.weight[-1] = math.nan  # of a token that occurs nowhere
        return loss

    model = helpers.make_llama()
    incoming = cpu_copy(model.state_dict())
    start = incoming["lm_head.weight"]
    monkeypatch.setattr(causal_lm, "held_out_loss", spoiling)
    result = retrain_causal_lm(model, pattern_windows(), pattern_windows(2), make_recipe())
    assert min(row["held_out_loss"] for row in result["history"]) < result["loss_before"]
    assert result["kept_step"] == 0
    assert_equal_weights(model, incoming)
