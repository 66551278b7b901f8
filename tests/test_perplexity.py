"""Perplexity: confirmed by other formulas, with an interval and the protocol that belong to it."""

import json
import math

import helpers
import pytest
import torch

from compactmind.errors import CompactMindError
from compactmind.evaluation.intervals import mean_interval
from compactmind.evaluation.perplexity import paired_ratio, perplexity, perplexity_interval, window_losses


@pytest.fixture(scope="module")
def llama():
    return helpers.make_llama()


@pytest.fixture(scope="module")
def windows():
    return helpers.example_windows(count=7, length=20)


@torch.no_grad()
def log_likelihoods(model, windows: torch.Tensor) -> torch.Tensor:
    """Return ln p of every token but the first of each window, token by token: float64 (windows, seq_len - 1)."""
    rows = []
    for window in windows:
        probabilities = model(window[None]).logits[0].double().softmax(-1)
        rows.append([math.log(probabilities[t - 1, window[t]]) for t in range(1, len(window))])
    return torch.tensor(rows, dtype=torch.float64)


def difficult_windows(count: int, seed: int = 0) -> torch.Tensor:
    """Return made-up losses of windows that differ a lot: float64 (count,)."""
    return 3 + torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ----------------------------------------------------------------------------------------------------------- the number
def test_losses_are_those_the_model_computes_from_its_labels(llama, windows):
    losses = window_losses(llama, windows)
    assert losses.shape == (7,) and losses.dtype == torch.float64
    with torch.no_grad():
        expected = [llama(input_ids=window[None], labels=window[None]).loss.item() for window in windows]
    assert losses.tolist() == pytest.approx(expected, rel=1e-6)
    assert len(set(losses.tolist())) == 7


def test_perplexity_is_one_over_the_geometric_mean_of_the_probabilities(llama, windows):
    likelihoods = log_likelihoods(llama, windows)
    result = perplexity(llama, windows, "some text")
    assert result["perplexity"] == pytest.approx(1 / math.exp(likelihoods.sum() / (7 * 19)), rel=1e-6)
    assert result["loss"] == pytest.approx(-likelihoods.mean().item(), rel=1e-6)
    assert result["losses"] == pytest.approx((-likelihoods.mean(dim=1)).tolist(), rel=1e-6)


def test_a_model_that_finds_all_tokens_equally_likely_has_the_size_of_its_vocabulary(windows):
    model = helpers.make_llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    result = perplexity(model, windows, "some text")
    assert result["perplexity"] == pytest.approx(helpers.LLAMA_VOCABULARY, rel=1e-5)
    assert result["interval"] == pytest.approx((result["perplexity"], result["perplexity"]), rel=1e-9)


def test_the_last_token_predicts_nothing_and_the_first_is_not_predicted(llama, windows):
    losses = window_losses(llama, windows)
    shorter = window_losses(llama, windows[:, :-1])
    last = -log_likelihoods(llama, windows)[:, -1]
    assert torch.allclose(losses * 19, shorter * 18 + last, rtol=1e-5)


def test_a_window_does_not_see_the_others(llama, windows):
    assert torch.equal(window_losses(llama, windows[2:5]), window_losses(llama, windows)[2:5])


def test_a_model_in_bfloat16_is_summed_in_more_than_bfloat16(windows):
    losses = window_losses(helpers.cast_parameters(helpers.make_llama(), torch.bfloat16), windows)
    assert losses.dtype == torch.float64
    assert not torch.equal(losses, losses.to(torch.bfloat16).double())
    assert torch.allclose(losses, window_losses(helpers.make_llama(), windows), rtol=0.02)


def test_the_protocol_says_what_the_number_was_measured_on(llama, windows):
    result = perplexity(llama, windows, "wikitext_data/test")
    assert set(result) == {"perplexity", "interval", "loss", "losses", "protocol"}
    assert result["protocol"] == {
        "text": "wikitext_data/test",
        "join": "\n\n",
        "seq_len": 20,
        "windows": 7,
        "windows_from": "first",
        "predicted_tokens": 7 * 19,
    }
    assert json.loads(json.dumps(result))["losses"] == result["losses"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_damaged_weights_are_refused_naming_the_window_and_the_text(windows, value):
    model = helpers.make_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = value
    with pytest.raises(CompactMindError, match="window 0 of some text is nan: the model is damaged"):
        perplexity(model, windows, "some text")


def test_the_damaged_window_is_the_one_that_is_named(windows):
    model = helpers.make_llama()
    unseen = helpers.LLAMA_VOCABULARY - 1
    windows = windows.clone().clamp(max=unseen - 1)
    windows[4, 3] = unseen
    with torch.no_grad():
        model.model.embed_tokens.weight[unseen] = math.nan
    with pytest.raises(CompactMindError, match="window 4 of some text"):
        perplexity(model, windows, "some text")


# --------------------------------------------------------------------------------------------------------- the interval
def test_the_interval_contains_the_value_and_is_the_same_every_time(llama, windows):
    first, second = (perplexity(llama, windows, "some text") for _ in range(2))
    low, high = first["interval"]
    assert low < first["perplexity"] < high
    assert first == second


def test_the_interval_is_that_of_the_mean_loss_on_the_scale_of_perplexities():
    losses = difficult_windows(20)
    assert perplexity_interval(losses) == pytest.approx([bound.exp().item() for bound in mean_interval(losses)])


def test_losses_of_a_damaged_model_still_have_bounds():
    low, high = perplexity_interval(torch.tensor([3.0, 699.0], dtype=torch.float64))
    assert 0 <= low < high < math.inf


def test_one_window_has_an_interval_without_width():
    assert perplexity_interval(torch.tensor([2.0], dtype=torch.float64)) == pytest.approx((math.exp(2), math.exp(2)))


# ------------------------------------------------------------------------------------------------------------ two models
def test_a_model_against_itself_has_exactly_the_ratio_one():
    losses = difficult_windows(11).tolist()
    assert paired_ratio(losses, losses) == {"ratio": 1.0, "interval": (1.0, 1.0)}


def test_the_ratio_is_that_of_the_two_perplexities(llama, windows):
    other = perplexity(helpers.make_llama(seed=1), windows, "some text")
    reference = perplexity(llama, windows, "some text")
    result = paired_ratio(other["losses"], reference["losses"])
    assert result["ratio"] == pytest.approx(other["perplexity"] / reference["perplexity"], rel=1e-9)
    low, high = result["interval"]
    assert low < result["ratio"] < high


def test_the_difficulty_of_the_windows_cancels():
    reference = difficult_windows(30)
    losses = reference + 0.1 + 0.001 * difficult_windows(30, seed=1)
    result = paired_ratio(losses.tolist(), reference.tolist())
    low, high = result["interval"]
    assert low < result["ratio"] < high and high - low < 0.001
    alone = perplexity_interval(losses)
    assert alone[1] / alone[0] - 1 > 100 * (high - low)


def test_models_that_saw_different_windows_are_not_compared():
    with pytest.raises(ValueError, match="2 windows against 3"):
        paired_ratio([1.0, 2.0], [1.0, 2.0, 3.0])
