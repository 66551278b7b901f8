"""How to retrain, as far as the settings alone decide it: steps, the order of the windows, rates, and values that are refused."""

import math

import pytest
import torch

from compactmind.methods.retraining.recipe import RetrainRecipe, batch_rows, cosine_decay_with_warmup, plan_steps


@pytest.mark.parametrize(
    ("settings", "seq_len", "processes", "steps"),
    [
        ({"tokens": 320, "batch_size": 2}, 16, 1, 10),
        ({"tokens": 321, "batch_size": 2}, 16, 1, 11),
        ({"tokens": 320, "batch_size": 2, "accumulation": 5}, 16, 1, 2),
        ({"tokens": 320, "batch_size": 2}, 16, 4, 3),
        ({"tokens": 1}, 2048, 1, 1),
    ],
)
def test_the_number_of_steps(settings, seq_len, processes, steps):
    assert plan_steps(RetrainRecipe(**settings), seq_len, processes) == steps


def test_each_pass_shows_every_window_once_in_another_order():
    stream = torch.cat([batch_rows(7, step, 3, seed=5) for step in range(1, 15)])  # 42 windows: 6 passes
    passes = stream.view(6, 7).tolist()
    assert all(sorted(one) == list(range(7)) for one in passes)
    assert len({tuple(one) for one in passes}) == 6
    assert torch.equal(batch_rows(7, 9, 3, seed=5), stream[24:27])
    assert torch.equal(batch_rows(7, 1, 20, seed=5), stream[:20])  # more windows a step than there are
    assert not torch.equal(torch.cat([batch_rows(7, step, 3, seed=6) for step in range(1, 15)]), stream)


def test_the_rate_rises_to_the_peak_and_falls_as_half_a_cosine_to_zero():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler, rates = cosine_decay_with_warmup(optimizer, 4, 20), []
    for _ in range(21):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert rates[4:] == pytest.approx([2 * math.cos(math.pi / 2 * done / 16) ** 2 for done in range(17)])
    assert rates[12] == pytest.approx(1.0) and rates[20] == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("mode", "qlora", "mode 'qlora' is not one of full, lora"),
        *[(name, 0, f"{name} 0 is not at least 1") for name in ("tokens", "batch_size", "accumulation", "evaluations")],
        *[(name, 0, f"{name} 0 is not at least 1") for name in ("lora_rank", "lora_alpha")],
        *[(name, 0.0, f"{name} 0.0 is not above 0 and finite") for name in ("lr", "temperature", "max_grad_norm")],
        *[(name, math.inf, f"{name} inf is not above 0 and finite") for name in ("lr", "temperature", "max_grad_norm")],
        ("lr", math.nan, "lr nan is not above 0 and finite"),
        *[(name, -0.1, f"{name} -0.1 is not at least 0 and finite") for name in ("weight_decay", "hidden_loss_weight")],
        ("warmup_ratio", 1.0, r"warmup_ratio 1.0 is not in \[0, 1\)"),
        ("warmup_ratio", -0.1, r"warmup_ratio -0.1 is not in \[0, 1\)"),
        ("alpha", 1.1, r"alpha 1.1 is not in \[0, 1\]"),
        ("alpha", math.nan, r"alpha nan is not in \[0, 1\]"),
        ("seed", -1, r"seed -1 is not in \[0, 2\^31\]"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_range(name, value, message):
    with pytest.raises(ValueError, match=message):
        RetrainRecipe(**{name: value})


def test_a_hidden_state_loss_without_the_model_to_compare_with_is_refused():
    with pytest.raises(
        ValueError, match="hidden_loss_weight 0.5 compares with the dense model, which distillation False leaves"
    ):
        RetrainRecipe(distillation=False, hidden_loss_weight=0.5)
    RetrainRecipe(distillation=False)
    RetrainRecipe(hidden_loss_weight=0.5)


def test_values_at_the_ends_of_their_ranges_are_fine():
    RetrainRecipe(tokens=1, batch_size=1, accumulation=1, weight_decay=0.0, warmup_ratio=0.0, alpha=0.0, evaluations=1, seed=0)
    RetrainRecipe(mode="lora", alpha=1.0, lora_rank=1, lora_alpha=1, seed=2**31)
