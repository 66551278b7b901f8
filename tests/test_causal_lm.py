"""Retraining a causal LM: it learns, never returns worse weights than it was given, and goes on exactly where it was killed."""

import copy
import json
import math

import helpers
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from helpers import REPOSITORY
from safetensors.torch import load_file

from compactmind.errors import CompactMindError
from compactmind.forward import window_losses
from compactmind.methods.retraining import causal_lm, loss
from compactmind.methods.retraining.causal_lm import retrain_causal_lm
from compactmind.methods.retraining.loss import RetrainingLoss, TeacherStates
from compactmind.methods.retraining.recipe import RetrainRecipe
from compactmind.precision import widen
from compactmind.training import TrainingState, cpu_copy

SEQ_LEN = 16
STAGE = {"script": "made up", "config": {}, "inputs": {}}
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_recipe(steps: int = 12, **changes) -> RetrainRecipe:
    """Return a recipe of `steps` steps of 2 windows without a teacher; `changes` on top."""
    settings = {"tokens": steps * 2 * SEQ_LEN, "batch_size": 2, "lr": 5e-3, "distillation": False}
    return RetrainRecipe(**settings | changes)


def pattern_windows(count: int = 10, period: int = 5, first: int = 0) -> torch.Tensor:
    """Return windows of a text that repeats `period` tokens for ever, which a model can learn: int64 (count, SEQ_LEN)."""
    return (torch.arange(first, first + count * SEQ_LEN) % period * 11 + 3).view(count, SEQ_LEN)


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


def mean_loss(model, windows: torch.Tensor) -> float:
    return window_losses(model, windows).mean().item()


def assert_equal_weights(model, weights: dict[str, torch.Tensor]) -> None:
    state = model.state_dict()
    assert state.keys() == weights.keys()
    assert [name for name in weights if not torch.equal(state[name], weights[name])] == []


def timeless(result: dict) -> dict:
    """Return a result without what differs from run to run."""
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in result["history"]]
    return {key: value for key, value in result.items() if key != "seconds"} | {"history": rows}


def fail_at(monkeypatch, module, name: str, call: int, action) -> None:
    """Make call number `call` (from 1) of a function of a module return what `action` makes of its result."""
    original, calls = getattr(module, name), []

    def replacement(*arguments, **options):
        calls.append(name)
        result = original(*arguments, **options)
        return action(result) if len(calls) == call else result

    monkeypatch.setattr(module, name, replacement)


def interrupt(_):
    raise KeyboardInterrupt


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


# ------------------------------------------------------------------------------------------------------------- resuming
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
    found = {}
    for name in ("adamw", "adamw_8bit"):
        model, resume = helpers.make_llama(seed=1, vocab_size=2000, intermediate_size=512), TrainingState(tmp_path / name, STAGE)
        done = retrain_causal_lm(model, pattern_windows(7), pattern_windows(3), make_recipe(16, optimizer=name), resume=resume)
        state = resume.load()["optimizer"]["state"]
        moments = (each for its in state.values() for each in its.values() if torch.is_tensor(each) and each.numel() > 256)
        found[name] = done["loss_after"], sum(each.numel() * each.element_size() for each in moments)
    (whole, large), (rounded, small) = found.values()
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


# -------------------------------------------------------------------------------------------------- batches and schedule
TWO_PROCESSES = """
import json, sys
sys.path[:0] = sys.argv[1:3]
import helpers
import test_causal_lm as shared
from compactmind.training import make_accelerator
from safetensors.torch import save_file
accelerator = make_accelerator()
assert accelerator.num_processes == 2
with helpers.training_batches() as seen:
    model, result = shared.retrain_with(batch_size=1, accelerator=accelerator)
with open(f"{sys.argv[3]}/seen_by_{accelerator.process_index}.json", "w") as file:
    json.dump(seen, file)
if accelerator.is_main_process:
    save_file(model.state_dict(), sys.argv[3] + "/weights.safetensors")
    with open(sys.argv[3] + "/result.json", "w") as file:
        json.dump(result, file)
"""


def retrain_with(batch_size: int, accelerator: Accelerator | None = None):
    """Return a model after 8 steps of accumulated batches, and what came out."""
    model, windows = helpers.make_llama(), helpers.example_windows(12, SEQ_LEN)
    recipe = RetrainRecipe(tokens=8 * 4 * SEQ_LEN, batch_size=batch_size, accumulation=2, lr=1e-3, distillation=False)
    return model, retrain_causal_lm(model, windows, windows[:2], recipe, accelerator=accelerator)


def test_two_processes_with_half_the_windows_each_are_one_with_all(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    ended = helpers.run_python(script, REPOSITORY, REPOSITORY / "tests", tmp_path, cwd=tmp_path, processes=2)
    assert ended.returncode == 0, ended.stderr
    with helpers.training_batches() as seen:
        model, alone = retrain_with(batch_size=2)
    helpers.assert_shared_out(helpers.batches_seen(tmp_path), seen)
    together, weights = helpers.read_json(tmp_path / "result.json"), load_file(tmp_path / "weights.safetensors")
    assert alone["kept_step"] == together["kept_step"] == 8 and alone["tokens_seen"] == together["tokens_seen"]
    for ours, theirs in zip(alone["history"], together["history"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)  # the mean over both processes
        assert ours["held_out_loss"] == pytest.approx(theirs["held_out_loss"], rel=1e-4)
    start = helpers.make_llama().state_dict()
    for name, tensor in model.state_dict().items():
        assert (tensor - weights[name]).norm() < 0.05 * (tensor - start[name]).norm(), name


def test_two_batches_of_one_window_are_one_batch_of_two(monkeypatch):
    # Plain gradient descent: AdamW would hide a gradient of the wrong size.
    monkeypatch.setattr(causal_lm, "make_optimizer", lambda model, lr, *_: torch.optim.SGD(model.parameters(), lr=lr))
    models, results = [], []
    for sizes in ({"batch_size": 2, "accumulation": 1}, {"batch_size": 1, "accumulation": 2}):
        models.append(helpers.make_llama())
        recipe = make_recipe(8, lr=0.1, max_grad_norm=1e6, **sizes)
        results.append(timeless(retrain_causal_lm(models[-1], pattern_windows(), pattern_windows(2), recipe)))
    assert results[0]["kept_step"] == results[1]["kept_step"] == 8
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    for ours, theirs in zip(results[0]["history"], results[1]["history"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    assert (models[0].lm_head.weight - helpers.make_llama().lm_head.weight).abs().max() > 1e-3


def test_a_large_gradient_is_scaled_down(monkeypatch):
    monkeypatch.setattr(causal_lm, "make_optimizer", lambda model, lr, *_: torch.optim.SGD(model.parameters(), lr=lr))
    model, before = helpers.make_llama(), helpers.make_llama()
    recipe = make_recipe(1, lr=0.5, max_grad_norm=1e-2, warmup_ratio=0.0, evaluations=1)
    assert retrain_causal_lm(model, pattern_windows(), pattern_windows(2), recipe)["kept_step"] == 1
    moved = [ours - theirs for ours, theirs in zip(model.parameters(), before.parameters(), strict=True)]
    assert torch.stack([change.norm() for change in moved]).norm().item() == pytest.approx(0.5 * 1e-2, rel=1e-3)


def test_the_optimizer_gets_rate_and_weight_decay(monkeypatch):
    seen = []
    original = causal_lm.make_optimizer
    monkeypatch.setattr(causal_lm, "make_optimizer", lambda *arguments: seen.append(arguments[1:]) or original(*arguments))
    recipe = make_recipe(1, lr=2e-3, weight_decay=0.07, evaluations=1)
    retrain_causal_lm(helpers.make_llama(), pattern_windows(), pattern_windows(2), recipe)
    assert seen == [(2e-3, 0.07, False)]


def test_tokens_seen_counts_the_tokens_of_the_windows_that_were_seen(monkeypatch):
    shapes = []
    original = RetrainingLoss.forward
    monkeypatch.setattr(RetrainingLoss, "forward", lambda self, batch: shapes.append(batch.shape) or original(self, batch))
    recipe = make_recipe(tokens=150, batch_size=3, accumulation=2, evaluations=9)  # 96 tokens a step
    result = retrain_causal_lm(helpers.make_llama(), pattern_windows(), pattern_windows(2), recipe)
    assert set(shapes) == {(3, SEQ_LEN)}
    assert result["tokens_seen"] == sum(shape.numel() for shape in shapes) == 192
    assert [row["step"] for row in result["history"]] == [1, 2]  # never more evaluations than steps


def test_the_rates_of_a_run_are_those_of_the_schedule():
    recipe = make_recipe(10, evaluations=10, warmup_ratio=0.2, lr=1e-3)
    history = retrain_causal_lm(helpers.make_llama(), pattern_windows(), pattern_windows(2), recipe)["history"]
    falling = [1e-3 * math.cos(math.pi / 2 * done / 8) ** 2 for done in range(8)]
    assert [row["lr"] for row in history] == pytest.approx([1e-3 / 3, 2e-3 / 3, *falling])


# ------------------------------------------------------------------------------------------------------------------ lora
def test_adapters_change_the_seven_linears_only_and_leave_a_plain_model():
    model, original = helpers.make_llama(), helpers.make_llama()
    model.model.norm.weight.requires_grad_(False)
    recipe = make_recipe(20, mode="lora", lr=3e-2, lora_rank=3, lora_alpha=6)
    result = retrain_causal_lm(model, pattern_windows(), pattern_windows(2), recipe)
    assert result["kept_step"] > 0
    assert type(model) is type(original)
    before, after = original.state_dict(), model.state_dict()
    assert list(after) == list(before)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith(tuple(f"{linear}.weight" for linear in SEVEN))}
    assert len(changed) == 14
    for name in changed:  # W + (alpha / rank) B A with 3 columns in B
        singular = torch.linalg.svdvals((after[name] - before[name]).double())
        assert singular[2] > 1e-4 and singular[3] < 1e-5, name
    assert [module for module in model.modules() if type(module).__module__.startswith("peft")] == []
    assert not hasattr(model, "peft_config")
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == ["model.norm.weight"]
    assert mean_loss(model, pattern_windows(2)) == pytest.approx(result["loss_after"], rel=1e-5)


def test_adapters_are_scaled_by_alpha_over_rank(monkeypatch):
    seen = {}
    original = causal_lm.load_trainable

    def spy(model, weights):
        original(model, weights)
        seen.update(weights)

    monkeypatch.setattr(causal_lm, "load_trainable", spy)
    model, before = helpers.make_llama(), helpers.make_llama().model.layers[1].mlp.up_proj.weight
    recipe = make_recipe(8, mode="lora", lr=3e-2, lora_rank=4, lora_alpha=12)
    assert retrain_causal_lm(model, pattern_windows(), pattern_windows(2), recipe)["kept_step"] > 0
    a, b = (seen[f"model.layers.1.mlp.up_proj.lora_{factor}.default.weight"] for factor in "AB")
    torch.testing.assert_close(model.model.layers[1].mlp.up_proj.weight - before, 3.0 * b @ a, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- checkpointing
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_gradient_checkpointing_computes_twice_and_gives_the_same_model(mode):
    models, results, calls = [], [], []
    for enable in (False, True):
        model, counted = helpers.make_llama(), []
        handle = model.model.layers[0].mlp.register_forward_pre_hook(
            lambda module, _, counted=counted: counted.append(1) if module.training else None
        )
        recipe = make_recipe(6, mode=mode, gradient_checkpointing=enable)
        results.append(timeless(retrain_causal_lm(model, pattern_windows(), pattern_windows(2), recipe)))
        handle.remove()
        models.append(model)
        calls.append(len(counted))
    assert calls == [6, 12]
    assert results[0] == results[1] and results[0]["kept_step"] > 0
    assert_equal_weights(models[1], models[0].state_dict())
    assert not models[1].model.layers[0].gradient_checkpointing
    assert not models[1].get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_step_that_raises_leaves_a_plain_model(monkeypatch, mode):
    model = helpers.make_llama()
    model.lm_head.weight.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    incoming = cpu_copy(model.state_dict())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        fail_at(patch, loss, "token_loss", 2, interrupt)
        recipe = make_recipe(6, mode=mode, gradient_checkpointing=True)
        retrain_causal_lm(model, pattern_windows(), pattern_windows(2), recipe)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())
    assert not any(layer.gradient_checkpointing for layer in model.model.layers)
    assert not model.get_input_embeddings()._forward_hooks  # nor the one that checkpointing put there
    if mode == "lora":
        assert_equal_weights(model, incoming)


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


# ------------------------------------------------------------------------------------------------------------- bad input
DISTILL = {"distillation": True}
HIDDEN = DISTILL | {"hidden_loss_weight": 0.5}
EMPTY = torch.empty(0, SEQ_LEN, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        (
            {"windows": EMPTY},
            {},
            "0 training windows and 2 held-out windows: retraining needs at least 1 of each; use more text",
        ),
        ({"held_out": EMPTY}, {}, "4 training windows and 0 held-out windows"),
        ({"windows": pattern_windows(4)[0]}, {}, r"training windows of shape \(16,\): expected \(windows, seq_len\)"),
        ({"held_out": pattern_windows(4)[:, :1]}, {}, r"held-out windows of shape \(4, 1\).*seq_len at least 2"),
        ({"windows": pattern_windows(4) + 300}, {}, "token ids 303 to 347 in the training windows.*0 to 263.*own tokenizer"),
        ({"held_out": pattern_windows(4) - 9}, {}, "token ids -6 to 38 in the held-out windows"),
        ({"model": helpers.released_llama()}, {}, "torch.bfloat16 lose the small steps of training.*dtype=torch.float32"),
        ({"model": helpers.make_llama().requires_grad_(False)}, {}, "requires_grad is False for every weight"),
        ({"model": helpers.make_bert()}, {}, "expected a Llama-like causal LM"),
        ({}, DISTILL, "distillation needs a teacher: give the dense model, or set distillation to False"),
        (
            {"teacher": helpers.make_llama(vocab_size=300)},
            DISTILL,
            "the model has 264 tokens in its vocabulary and the teacher 300",
        ),
        (
            {"teacher": helpers.make_llama(hidden_size=64)},
            HIDDEN,
            "one hidden size, not 32 and 64: set hidden_loss_weight to 0",
        ),
        ({"teacher": helpers.make_llama(num_hidden_layers=1)}, HIDDEN, "at least the model's layers, not 1 for 2"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_happens(changes, settings, message):
    arguments = {"model": helpers.make_llama(), "windows": pattern_windows(4), "held_out": pattern_windows(2), "teacher": None}
    arguments |= changes
    before = cpu_copy(arguments["model"].state_dict())
    with pytest.raises(CompactMindError, match=message):
        retrain_causal_lm(recipe=make_recipe(2, **settings), **arguments)
    assert_equal_weights(arguments["model"], before)


def test_a_model_is_not_its_own_teacher():
    model = helpers.make_llama()
    with pytest.raises(CompactMindError, match="the teacher is the model itself"):
        retrain_causal_lm(model, pattern_windows(4), pattern_windows(2), make_recipe(2, **DISTILL), teacher=model)


def test_a_teacher_of_another_hidden_size_is_fine_without_the_hidden_state_loss():
    teacher = helpers.make_llama(hidden_size=64, num_hidden_layers=1)
    recipe = make_recipe(4, distillation=True)
    result = retrain_causal_lm(helpers.make_llama(), pattern_windows(4), pattern_windows(2), recipe, teacher=teacher)
    assert len(result["history"]) == 4


def test_a_damaged_model_is_refused():
    model = helpers.make_llama()
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(CompactMindError, match="the held-out loss before retraining is nan: the model that came in is damaged"):
        retrain_causal_lm(model, pattern_windows(4), pattern_windows(2), make_recipe(2))


# ------------------------------------------------------------------------------------------------------ the teacher's states
def test_retraining_with_remembered_states_is_the_same_retraining():
    windows, teacher = helpers.example_windows(count=6, length=12), helpers.make_llama().eval()
    recipe, states, losses = RetrainRecipe(tokens=72, evaluations=1), TeacherStates(), []
    for remembered in (None, states, states):
        model = helpers.make_llama(seed=3)
        found = retrain_causal_lm(model, windows, windows[:2], recipe, teacher=teacher, teacher_states=remembered)
        losses.append(found["history"][-1]["loss"])
    assert states.kept and losses == pytest.approx([losses[0]] * 3, rel=1e-6)
