"""Adapters that are trained beside 4-bit weights and added to the ones that came in."""

import copy

import helpers
import pytest
import torch
from tiny_retraining import (
    SEVEN,
    STAGE,
    assert_equal_weights,
    fail_at,
    interrupt,
    make_recipe,
    mean_loss,
    pattern_windows,
    timeless,
)

from compactmind import forward
from compactmind.methods.quantization.packed_linear import NF4Linear
from compactmind.methods.retraining import causal_lm, loss
from compactmind.methods.retraining.causal_lm import retrain_causal_lm
from compactmind.methods.retraining.nf4_base import NF4Base
from compactmind.methods.retraining.recipe import RetrainRecipe
from compactmind.precision import widen
from compactmind.training import TrainingState, cpu_copy

HELD_OUT = pattern_windows(4, first=3)


def recipe_of(steps: int = 22, **changes) -> RetrainRecipe:
    return make_recipe(steps, **{"mode": "lora", "base": "nf4", "lr": 3e-2, "gradient_checkpointing": True} | changes)


def bf16_llama(**changes):
    """Return a model as a large one is worked on: bf16 weights that compute in float32."""
    return widen(helpers.released_llama(helpers.make_llama(**changes)))


def is_plain(model) -> bool:
    foreign = [each for each in model.modules() if isinstance(each, NF4Linear) or type(each).__module__.startswith("peft")]
    return foreign == [] and not hasattr(model, "peft_config")


@pytest.mark.parametrize("make", [helpers.make_llama, bf16_llama])
def test_adapters_learn_beside_4_bits_and_are_added_to_the_weights_that_came(make, monkeypatch):
    model, before, kinds = make(), cpu_copy(make().state_dict()), set()
    model.model.norm.weight.requires_grad_(False)
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    original = loss.token_loss

    def look(*arguments):
        kinds.update(type(each) for each in model.modules() if isinstance(each, torch.nn.Linear))
        return original(*arguments)

    monkeypatch.setattr(loss, "token_loss", look)
    result = retrain_causal_lm(model, pattern_windows(), HELD_OUT, recipe_of(lora_rank=3))
    assert NF4Linear in kinds
    assert result["kept_step"] > 0 and result["loss_after"] < 0.8 * result["loss_before"]
    assert mean_loss(model, HELD_OUT) == pytest.approx(result["loss_after"], rel=1e-6)  # of the weights that are returned
    assert result["loss_of_base"] != result["loss_before"]
    assert min(row["held_out_loss"] for row in result["history"]) < result["loss_of_base"]
    assert is_plain(model) and not model.training

    after = model.state_dict()
    assert list(after) == list(before) and all(after[name].dtype == before[name].dtype for name in before)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith(tuple(f"{linear}.weight" for linear in SEVEN))}
    if make is helpers.make_llama:  # the weights that came in plus a product of three columns: no rounding to 4 bits is left
        for name in changed:
            singular = torch.linalg.svdvals((after[name] - before[name]).double())
            assert singular[2] > 1e-4 and singular[3] < 1e-5, name
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trainable


def test_a_resumed_run_equals_an_unbroken_one(tmp_path, monkeypatch):
    recipe = recipe_of(16, distillation=True, hidden_loss_weight=0.1, alpha=0.2)

    def run(resume=None):
        model = bf16_llama(seed=1, attention_dropout=0.1)
        return model, retrain_causal_lm(model, pattern_windows(7), HELD_OUT, recipe, teacher=helpers.make_llama(), resume=resume)

    whole_model, whole = run()
    assert whole["kept_step"] > 8
    resume = TrainingState(tmp_path / "retrained", STAGE)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        fail_at(patch, causal_lm, "held_out_loss", 5, interrupt)  # of what came in, of its 4 bits, of two evaluations, and then
        run(resume)
    assert resume.load()["step"] == whole["history"][1]["step"]
    for _ in range(2):  # the second time nothing is left to train
        model, resumed = run(resume)
        assert timeless(resumed) == timeless(whole)
        assert_equal_weights(model, whole_model.state_dict())


def test_adapters_that_help_4_bits_only_are_left_out(monkeypatch, capsys):
    losses = iter([2.0, 5.0, 4.0, 3.0, 2.0])  # as it came, its 4 bits, two evaluations, merged
    monkeypatch.setattr(causal_lm, "held_out_loss", lambda *_: next(losses))
    model = bf16_llama()
    incoming = cpu_copy(model.state_dict())
    result = retrain_causal_lm(model, pattern_windows(), HELD_OUT, recipe_of(8, evaluations=2))
    assert (result["kept_step"], result["loss_before"], result["loss_after"], result["loss_of_base"]) == (0, 2.0, 2.0, 5.0)
    assert_equal_weights(model, incoming)
    assert is_plain(model) and "kept the weights of before retraining" in capsys.readouterr().out


def test_no_step_better_than_the_base_leaves_the_weights_that_came(monkeypatch):
    losses = iter([2.0, 3.0, 3.0])
    monkeypatch.setattr(causal_lm, "held_out_loss", lambda *_: next(losses))
    model = helpers.make_llama()
    incoming = cpu_copy(model.state_dict())
    result = retrain_causal_lm(model, pattern_windows(), HELD_OUT, recipe_of(4, evaluations=1))
    assert (result["kept_step"], result["loss_after"]) == (0, 2.0)
    assert_equal_weights(model, incoming)
    assert is_plain(model)


def test_a_step_that_raises_leaves_the_model_as_it_came(monkeypatch):
    model = bf16_llama()
    incoming = cpu_copy(model.state_dict())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        fail_at(patch, loss, "token_loss", 2, interrupt)
        retrain_causal_lm(model, pattern_windows(), HELD_OUT, recipe_of(6))
    assert_equal_weights(model, incoming)
    assert is_plain(model) and not model.get_input_embeddings()._forward_hooks


def test_weights_that_wait_in_a_file_come_back_the_same(monkeypatch):
    models = [bf16_llama() for _ in range(2)]
    results = []
    for model, keep in zip(models, (2**28, 0), strict=True):
        monkeypatch.setattr(forward, "MEMORY_TO_KEEP", keep)
        results.append(timeless(retrain_causal_lm(model, pattern_windows(), HELD_OUT, recipe_of(8))))
    assert results[0] == results[1] and results[0]["kept_step"] > 0
    assert_equal_weights(models[1], models[0].state_dict())


def test_the_linears_wait_in_their_own_dtype_and_a_quarter_of_it_takes_their_places():
    model = bf16_llama(hidden_size=128, intermediate_size=256)
    model.model.layers[0].self_attn.q_proj.bias = torch.nn.Parameter(torch.ones(32, dtype=torch.bfloat16))
    original = copy.deepcopy(model)
    base = NF4Base(model)
    packed = [each for each in model.modules() if isinstance(each, NF4Linear)]
    assert len(packed) == 14 and {each.dtype for each in base.weights.values()} == {torch.bfloat16}
    waiting = sum(each.numel() * each.element_size() for each in base.weights.values())
    assert sum(each.weight.numel() for each in packed) == waiting / 4
    assert torch.equal(packed[0].bias.float(), torch.ones(32))
    assert packed[0].bias is not base.linears["model.layers.0.self_attn.q_proj"].bias
    for _ in range(2):
        base.use_original_linears()
    assert_equal_weights(model, original.state_dict())
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight += 1  # what was set aside is not what is worked on
    base.restore()
    assert_equal_weights(model, original.state_dict())


def test_a_base_that_would_be_trained_is_refused():
    with pytest.raises(ValueError, match="base 'int3' is not one of as_released, nf4"):
        RetrainRecipe(mode="lora", base="int3")
    with pytest.raises(ValueError, match="base 'nf4' keeps its weights as they are, which mode 'full' trains: set mode to 'lora'"):
        RetrainRecipe(base="nf4")
