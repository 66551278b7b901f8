"""Retraining a causal LM: it learns, and never returns worse weights than it was given."""

import copy
import json
import math

import helpers
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from llamas import make_other
from tiny_retraining import (
    SEQ_LEN,
    STAGE,
    assert_equal_weights,
    fail_at,
    interrupt,
    make_recipe,
    mean_loss,
    pattern_windows,
    timeless,
)

from compactmind.evaluation.divergence import divergence
from compactmind.methods.retraining import causal_lm, loss
from compactmind.methods.retraining.causal_lm import retrain_causal_lm
from compactmind.methods.retraining.loss import RetrainingLoss, TeacherStates
from compactmind.methods.retraining.recipe import RetrainRecipe, windows_read
from compactmind.precision import widen
from compactmind.training import TrainingState, cpu_copy


@torch.no_grad()
def sampled_windows(model, count: int, seed: int = 0) -> torch.Tensor:
    """Return windows that `model` wrote itself, so that no model predicts them better: int64 (count, SEQ_LEN)."""
    generator = torch.Generator().manual_seed(seed)
    windows = torch.randint(0, helpers.LLAMA_VOCABULARY, (count, 1), generator=generator)
    while windows.shape[1] < SEQ_LEN:
        probabilities = model(input_ids=windows).logits[:, -1].softmax(-1)
        windows = torch.cat([windows, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
    return windows


@torch.no_grad()
def disturbed(model, scale: float, seed: int = 3):
    """Return a copy of `model` with noise on every weight."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model


# ------------------------------------------------------------------------------------------------------------- learning
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_training_lowers_the_held_out_loss_and_reports_the_weights_it_leaves(mode, capsys):
    model, held_out = helpers.make_llama(), pattern_windows(4, first=3)
    before = mean_loss(model, held_out)
    recipe = make_recipe(22, mode=mode, lr={"full": 5e-3, "lora": 3e-2}[mode], evaluations=4)
    result = retrain_causal_lm(model, pattern_windows(), held_out, recipe, log_every=10, label="tiny")

    assert result["loss_before"] == pytest.approx(before)
    assert result["loss_after"] < 0.7 * before
    assert mean_loss(model, held_out) == pytest.approx(result["loss_after"], rel=1e-5)
    assert result["perplexity_before"] == pytest.approx(math.exp(before))
    assert result["perplexity_after"] == pytest.approx(math.exp(result["loss_after"]))
    assert not model.training and result["stopped"] is None

    history = result["history"]
    assert [row["step"] for row in history] == [6, 11, 17, 22]  # evenly spaced, the last step included
    assert {row["phase"] for row in history} == {"retrain"}
    assert all(set(row) == {"step", "phase", "loss", "held_out_loss", "perplexity", "lr", "seconds"} for row in history)
    assert result["loss_after"] == min(row["held_out_loss"] for row in history)
    assert result["loss_after"] == next(row["held_out_loss"] for row in history if row["step"] == result["kept_step"])
    assert [row["perplexity"] for row in history] == pytest.approx([math.exp(row["held_out_loss"]) for row in history])
    assert history[-1]["loss"] < history[0]["loss"]
    assert 0 < history[-1]["lr"] < history[0]["lr"] < recipe.lr
    json.dumps(result, allow_nan=False)

    printed = capsys.readouterr().out
    assert printed.count("tiny ") == 3 + 4  # after steps 10, 20, 22, and the evaluations
    assert f"tiny: kept the weights of step {result['kept_step']}" in printed


def test_the_reported_training_loss_is_the_mean_since_the_last_row(monkeypatch):
    losses = []
    original = RetrainingLoss.forward
    monkeypatch.setattr(RetrainingLoss, "forward", lambda self, batch: losses.append(original(self, batch)) or losses[-1])
    recipe = make_recipe(7, evaluations=2)
    history = retrain_causal_lm(helpers.make_llama(), pattern_windows(), pattern_windows(2), recipe)["history"]
    losses = [loss.item() for loss in losses]
    assert [row["loss"] for row in history] == pytest.approx([sum(losses[:4]) / 4, sum(losses[4:]) / 3])


@pytest.mark.parametrize("settings", [{}, {"mode": "lora"}, {"model": {"tie_word_embeddings": True}}])
def test_a_model_that_training_ruins_comes_back_exactly_as_it_was(settings, capsys):
    settings = dict(settings)
    model = helpers.make_llama(**settings.pop("model", {}))
    incoming, held_out = cpu_copy(model.state_dict()), sampled_windows(model, 6)
    recipe = make_recipe(6, lr=3.0, evaluations=3, **settings)
    result = retrain_causal_lm(model, pattern_windows(), held_out, recipe)
    assert_equal_weights(model, incoming)
    assert result["kept_step"] == 0 and result["stopped"] is None
    assert result["loss_after"] == result["loss_before"]
    assert len(result["history"]) == 3
    assert min(row["held_out_loss"] for row in result["history"]) > result["loss_before"] + 1
    assert "kept the weights of before retraining" in capsys.readouterr().out


def test_a_perplexity_beyond_all_floats_is_still_a_number_in_json(monkeypatch):
    losses = iter([2.0, 1e6])
    monkeypatch.setattr(causal_lm, "held_out_loss", lambda *_: next(losses))
    result = retrain_causal_lm(helpers.make_llama(), pattern_windows(), pattern_windows(2), make_recipe(2, evaluations=1))
    assert result["history"][0]["held_out_loss"] == 1e6
    assert result["history"][0]["perplexity"] > 1e300 and result["stopped"] is None
    json.dumps(result, allow_nan=False)


def test_a_held_out_loss_that_only_equals_the_first_keeps_the_weights_that_came_in(monkeypatch):
    monkeypatch.setattr(causal_lm, "held_out_loss", lambda *_: 2.0)
    model = helpers.make_llama()
    incoming = cpu_copy(model.state_dict())
    assert retrain_causal_lm(model, pattern_windows(), pattern_windows(2), make_recipe(4))["kept_step"] == 0
    assert_equal_weights(model, incoming)


def test_what_learns_from_the_dense_model_alone_is_chosen_by_the_divergence_from_it(tmp_path, monkeypatch, capsys):
    held_out, teacher, at_home = pattern_windows(4, first=3), helpers.make_llama(seed=1), helpers.make_llama()
    states, resume = TeacherStates(), TrainingState(tmp_path, STAGE)
    retrain_causal_lm(at_home, pattern_windows(), held_out, make_recipe())  # knows the text, of which the teacher knows nothing
    recipe = make_recipe(distillation=True, alpha=1.0)

    def run(**options):
        model = copy.deepcopy(at_home)
        return model, retrain_causal_lm(model, pattern_windows(), held_out, recipe, **options)

    model, result = run(teacher=teacher)
    kls = {row["step"]: row["kl"] for row in result["history"]}
    assert result["kl_after"] == min(kls.values()) == kls[result["kept_step"]] < 0.8 * result["kl_before"]
    assert result["kl_after"] == pytest.approx(divergence(teacher, model, held_out)["mean"], rel=1e-5)
    assert result["kl_before"] == pytest.approx(divergence(teacher, at_home, held_out)["mean"], rel=1e-5)
    assert result["loss_after"] > result["loss_before"] + 0.1  # by the loss on text it would have got its weights back
    assert result["loss_after"] == pytest.approx(mean_loss(model, held_out)) and f"KL {result['kl_after']:.4f}" in capsys.readouterr().out

    for windows in windows_read(pattern_windows(), held_out, recipe):
        states.read(teacher, windows)
    assert run(teacher_states=states)[1]["kl_after"] == pytest.approx(result["kl_after"], rel=1e-4)  # of a teacher that is gone
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        fail_at(patch, causal_lm, "held_out_quality", 3, interrupt)
        run(teacher=teacher, resume=resume)
    again, resumed = run(teacher=teacher, resume=resume)
    assert_equal_weights(again, model.state_dict())
    assert timeless(resumed) == timeless(result)
    assert "kl_after" not in retrain_causal_lm(model, pattern_windows(), held_out, make_recipe(2, distillation=True), teacher=teacher)


def test_frozen_weights_stay_and_the_others_learn():
    model = helpers.make_llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    incoming = cpu_copy(model.state_dict())
    result = retrain_causal_lm(model, pattern_windows(), pattern_windows(2), make_recipe())
    unchanged = [name for name, tensor in model.state_dict().items() if torch.equal(tensor, incoming[name])]
    assert unchanged == ["model.embed_tokens.weight"] and result["kept_step"] > 0


def test_bfloat16_autocast_trains_float32_weights(fresh_accelerator):
    model, held_out = helpers.make_llama(), pattern_windows(4, first=3)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append((module.training, output.dtype)))
    recipe = make_recipe(20, distillation=True, hidden_loss_weight=0.1, gradient_checkpointing=True)
    result = retrain_causal_lm(
        model, pattern_windows(), held_out, recipe, teacher=helpers.make_llama(), accelerator=accelerator
    )
    assert set(seen) == {(True, torch.bfloat16), (False, torch.float32)}  # held-out losses are measured in full precision
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert result["loss_after"] < result["loss_before"]
    assert mean_loss(model, held_out) == pytest.approx(result["loss_after"])


def test_a_large_model_that_was_made_float32_trains_every_weight_in_bfloat16(fresh_accelerator):
    model, held_out = widen(helpers.released_llama(helpers.make_llama())), pattern_windows(4, first=3)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    incoming = cpu_copy(model.float().state_dict())
    result = retrain_causal_lm(model, pattern_windows(), held_out, make_recipe(20), accelerator=accelerator)
    assert result["loss_after"] < result["loss_before"] and mean_loss(model, held_out) == pytest.approx(result["loss_after"])
    assert [name for name, tensor in model.state_dict().items() if torch.equal(tensor, incoming[name])] == []


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_fp16_with_a_loss_scale_trains_float32_weights_and_goes_on_where_it_was(fresh_accelerator, tmp_path, monkeypatch, mode):
    resume = TrainingState(tmp_path / "retrained", STAGE)

    def run(resume=None):
        model, accelerator = helpers.make_llama(), helpers.fp16_on_a_cpu()
        recipe = make_recipe(12, mode=mode, lr={"full": 5e-3, "lora": 3e-2}[mode], distillation=True, hidden_loss_weight=0.1)
        teacher = helpers.make_llama(seed=1)
        options = {"teacher": teacher, "accelerator": accelerator, "resume": resume}
        return model, accelerator, retrain_causal_lm(model, pattern_windows(), pattern_windows(4, first=3), recipe, **options)

    model, accelerator, whole = run()
    assert accelerator.scaler.get_scale() == 65536  # no step was skipped: nothing overflowed
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert whole["kept_step"] > 6 and whole["loss_after"] < whole["loss_before"] and whole["stopped"] is None
    assert mean_loss(model, pattern_windows(4, first=3)) == pytest.approx(whole["loss_after"], rel=1e-5)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        fail_at(patch, causal_lm, "held_out_loss", 4, interrupt)
        run(resume)
    state = resume.load()
    resume.save(**state | {"scaler": state["scaler"] | {"scale": 1024.0}})
    again, accelerator, resumed = run(resume)
    assert accelerator.scaler.get_scale() == 1024
    assert resumed["loss_after"] == pytest.approx(whole["loss_after"], rel=1e-2)


# --------------------------------------------------------------------------------------------------- a loss that is none
@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_a_loss_that_is_no_number_ends_the_run_with_the_best_weights(monkeypatch, capsys, mode, bad):
    fail_at(monkeypatch, loss, "token_loss", 7, lambda loss: loss * float(bad))
    model, held_out = helpers.make_llama(), pattern_windows(4, first=3)
    recipe = make_recipe(12, mode=mode, lr={"full": 5e-3, "lora": 3e-2}[mode], evaluations=3)
    result = retrain_causal_lm(model, pattern_windows(), held_out, recipe)
    assert result["stopped"] == f"loss became {bad} at step 7"
    assert result["stopped"] in capsys.readouterr().out
    assert [row["step"] for row in result["history"]] == [4]
    assert result["kept_step"] == 4 and result["tokens_seen"] == 6 * 2 * SEQ_LEN
    assert result["loss_after"] < result["loss_before"]
    assert mean_loss(model, held_out) == pytest.approx(result["loss_after"], rel=1e-5)
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_loss_that_is_no_number_before_any_evaluation_leaves_the_weights_that_came_in(monkeypatch, mode):
    fail_at(monkeypatch, loss, "token_loss", 3, lambda loss: loss * math.nan)
    model = helpers.make_llama()
    incoming = cpu_copy(model.state_dict())
    result = retrain_causal_lm(model, pattern_windows(), pattern_windows(2), make_recipe(12, mode=mode))
    assert_equal_weights(model, incoming)
    assert result["stopped"] == "loss became nan at step 3"
    assert (result["kept_step"], result["loss_after"], len(result["history"])) == (0, result["loss_before"], 0)


def test_a_held_out_loss_that_is_no_number_ends_the_run_too(monkeypatch):
    fail_at(monkeypatch, causal_lm, "window_losses", 3, lambda losses: losses * math.nan)  # before retraining, step 4, step 8
    model, held_out = helpers.make_llama(), pattern_windows(4, first=3)
    result = retrain_causal_lm(model, pattern_windows(), held_out, make_recipe(12, evaluations=3))
    assert result["stopped"] == "held-out loss became nan at step 8"
    assert [row["step"] for row in result["history"]] == [4] and result["kept_step"] == 4
    assert mean_loss(model, held_out) == pytest.approx(result["loss_after"])


# ---------------------------------------------------------------------------------------------------------- distillation
@torch.no_grad()
def divergence_from(teacher, student, windows: torch.Tensor) -> float:
    """Return KL(teacher || student) in nats, mean over the tokens of `windows`."""
    p, q = (model(input_ids=windows).logits.log_softmax(-1) for model in (teacher, student))
    return (p.exp() * (p - q)).sum(-1).mean().item()


def test_distillation_brings_a_damaged_model_back_towards_the_one_it_came_from():
    teacher = helpers.make_llama(scale=0.3)
    weights = cpu_copy(teacher.state_dict())
    windows, held_out = sampled_windows(teacher, 40), sampled_windows(teacher, 12, seed=1)
    student = disturbed(teacher, 0.15)
    control = copy.deepcopy(student)
    before = divergence_from(teacher, student, held_out)
    settings = {"steps": 60, "lr": 3e-3}
    recipe = make_recipe(**settings, distillation=True, alpha=1.0, temperature=1.0)
    result = retrain_causal_lm(student, windows, held_out, recipe, teacher=teacher)
    retrain_causal_lm(control, windows, held_out, make_recipe(**settings))
    after, without = (divergence_from(teacher, model, held_out) for model in (student, control))
    assert after < 0.7 * before
    assert after < without  # the teacher's predictions say more than one sampled token
    assert result["loss_after"] < result["loss_before"]
    assert_equal_weights(teacher, weights)
    assert not teacher.training


def test_the_hidden_state_loss_brings_hidden_states_closer():
    teacher = helpers.make_llama()
    student, windows = disturbed(teacher, 0.1), sampled_windows(teacher, 20)

    @torch.no_grad()
    def distance(model) -> float:
        states = (each(input_ids=windows, output_hidden_states=True).hidden_states[1:] for each in (model, teacher))
        return sum(F.mse_loss(*pair).item() for pair in zip(*states, strict=True))

    before = distance(student)
    recipe = make_recipe(40, lr=3e-3, distillation=True, alpha=1.0, hidden_loss_weight=10.0)
    assert retrain_causal_lm(student, windows, windows[:6], recipe, teacher=teacher)["kept_step"] > 0
    assert distance(student) < 0.7 * before


# ------------------------------------------------------------------------------------------------------ the teacher's states
def granite():
    return make_other("granite", logits_scaling=6.0).eval()


@pytest.mark.parametrize("make_teacher", [lambda: helpers.make_llama().eval(), granite], ids=["llama", "granite"])
def test_retraining_with_remembered_states_is_the_same_retraining(make_teacher):
    windows, teacher = helpers.example_windows(count=6, length=12), make_teacher()
    recipe, states, losses = RetrainRecipe(tokens=72, evaluations=1), TeacherStates(), []
    for remembered in (None, states, states):
        model = helpers.make_llama(seed=3)
        result = retrain_causal_lm(model, windows, windows[:2], recipe, teacher=teacher, teacher_states=remembered)
        losses.append(result["history"][-1]["loss"])
    assert states.kept and losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    with torch.no_grad():  # the teacher may be gone, and its head divides as it did
        assert torch.equal(states.logits(None, windows[:2, :-1]), torch.cat([teacher(row[None, :-1]).logits for row in windows[:2]]))


def test_with_no_weight_on_its_predictions_the_dense_model_is_not_asked():
    assert make_recipe(distillation=True).distils and not make_recipe(distillation=True, alpha=0.0).distils
    assert not make_recipe(distillation=False).distils
    assert make_recipe(distillation=True, alpha=0.0, hidden_loss_weight=0.1).distils
