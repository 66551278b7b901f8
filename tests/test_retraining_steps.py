"""The steps of retraining a causal LM: batches, schedule, adapters and checkpointing, and what several processes make of them."""

import math

import helpers
import pytest
import scripts
import torch
from accelerate import Accelerator
from helpers import REPOSITORY
from safetensors.torch import load_file
from tiny_retraining import (
    SEQ_LEN,
    SEVEN,
    assert_equal_weights,
    fail_at,
    interrupt,
    make_recipe,
    mean_loss,
    pattern_windows,
    timeless,
)

from compactmind.methods.retraining import causal_lm, loss
from compactmind.methods.retraining.causal_lm import retrain_causal_lm
from compactmind.methods.retraining.loss import RetrainingLoss
from compactmind.methods.retraining.recipe import RetrainRecipe
from compactmind.training import cpu_copy

# -------------------------------------------------------------------------------------------------- batches and schedule
TWO_PROCESSES = """
import json, sys
sys.path[:0] = sys.argv[1:3]
import helpers
import test_retraining_steps as shared
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
    ended = scripts.run_python(script, REPOSITORY, REPOSITORY / "tests", tmp_path, cwd=tmp_path, processes=2)
    assert ended.returncode == 0, ended.stderr
    with helpers.training_batches() as seen:
        model, alone = retrain_with(batch_size=2)
    scripts.assert_shared_out(scripts.batches_seen(tmp_path), seen)
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
