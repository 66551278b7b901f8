"""Retraining of a tiny Llama: recipes, text that it can learn and text that it cannot, and how a run is interrupted."""

import torch

from compactmind.forward import window_losses
from compactmind.methods.retraining.recipe import RetrainRecipe

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
