"""What cannot be retrained, or not beside its teacher, is refused before anything happens."""

import math

import helpers
import pytest
import torch
from tiny_retraining import SEQ_LEN, assert_equal_weights, make_recipe, pattern_windows

from compactmind.errors import CompactMindError
from compactmind.methods.retraining.causal_lm import retrain_causal_lm
from compactmind.training import cpu_copy

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
