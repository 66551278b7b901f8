"""KL to the dense model: confirmed by other formulas, measured in one pass with perplexity, comparable models alone."""

import json

import helpers
import numpy as np
import pytest
import torch

from compactmind.evaluation.divergence import divergence, measure_windows, token_divergences
from compactmind.evaluation.intervals import mean_interval
from compactmind.forward import CHUNK, next_token_logits, window_losses


@pytest.fixture(scope="module")
def dense():
    return helpers.make_llama()


@pytest.fixture(scope="module")
def other():
    return helpers.make_llama(seed=1)


@pytest.fixture(scope="module")
def windows():
    return helpers.example_windows(count=5, length=20)


@torch.no_grad()
def categoricals(model, windows: torch.Tensor) -> torch.distributions.Categorical:
    """Return the model's predictions as distributions of float64 probabilities: batch (windows, seq_len - 1)."""
    return torch.distributions.Categorical(logits=model(input_ids=windows).logits[:, :-1].double())


def counted(model, calls: list, name: str):
    """Note in `calls` every time the model runs."""
    model.register_forward_pre_hook(lambda *_: calls.append(name))
    return model


# ----------------------------------------------------------------------------------------------------------- the number
def test_it_is_the_divergence_of_two_distributions_over_the_vocabulary(dense, other, windows):
    result = divergence(dense, other, windows)
    expected = torch.distributions.kl_divergence(categoricals(dense, windows), categoricals(other, windows))  # dense first
    assert result["mean"] == pytest.approx(expected.mean().item(), rel=1e-5)
    assert result["divergences"] == pytest.approx(expected.mean(dim=1).tolist(), rel=1e-5)
    assert result["p999"] == pytest.approx(np.quantile(expected.numpy(), 0.999), rel=1e-5)
    assert result["interval"] == pytest.approx([bound.item() for bound in mean_interval(expected.mean(dim=1))], rel=1e-4)
    backwards = divergence(other, dense, windows)
    assert abs(backwards["mean"] / result["mean"] - 1) > 1e-3


def test_the_top_tokens_are_counted(dense, other, windows):
    tops = [categoricals(model, windows).probs.argmax(dim=-1) for model in (dense, other)]
    expected = (tops[0] == tops[1]).double().mean().item()
    near = helpers.make_llama()
    with torch.no_grad():
        near.lm_head.weight.add_(0.02 * torch.randn(near.lm_head.weight.shape, generator=torch.Generator().manual_seed(3)))
    assert divergence(dense, other, windows)["same_top"] == pytest.approx(expected)
    assert expected < 0.5 < divergence(dense, near, windows)["same_top"] < 1


def test_the_dense_model_is_no_step_from_itself(dense, windows):
    result = divergence(dense, dense, windows)
    assert (result["mean"], result["interval"], result["p999"], result["same_top"]) == (0.0, (0.0, 0.0), 0.0, 1.0)
    assert result["divergences"] == [0.0] * 5
    assert json.loads(json.dumps(result))["mean"] == 0


def test_it_grows_with_the_error_and_never_falls_below_zero(dense, windows):
    means = []
    for size in (1e-6, 1e-3, 1e-2, 1e-1):
        noisy = helpers.make_llama()
        with torch.no_grad():
            noise = torch.randn(noisy.lm_head.weight.shape, generator=torch.Generator().manual_seed(2))
            noisy.lm_head.weight.add_(size * noise)
        result = divergence(dense, noisy, windows)
        assert 0 <= result["interval"][0] <= result["mean"] <= result["interval"][1] and result["mean"] <= result["p999"]
        means.append(result["mean"])
    assert means == sorted(means) and means[0] < 1e-6 < 1e-4 < means[-1]


def test_a_constant_added_to_all_logits_changes_nothing():
    logits = torch.randn(7, 50, generator=torch.Generator().manual_seed(0))
    divergences, same = token_divergences(logits, logits + 30)
    assert divergences.max() < 1e-5 and same.all() and divergences.min() >= 0


@pytest.mark.parametrize("tokens", [1, CHUNK - 1, CHUNK, CHUNK + 1])
def test_a_token_does_not_see_the_others(tokens):
    first, second = torch.randn(2, tokens, 11, generator=torch.Generator().manual_seed(0))
    divergences, same = token_divergences(first, second)
    assert divergences.shape == same.shape == (tokens,) and divergences.dtype == torch.float32 and same.dtype == torch.bool
    alone = [token_divergences(first[i : i + 1], second[i : i + 1]) for i in range(tokens)]
    assert torch.allclose(divergences, torch.cat([kl for kl, _ in alone]))
    assert torch.equal(same, torch.cat([top for _, top in alone]))


def test_predictions_in_half_precision_are_compared_in_float32():
    logits = torch.randn(2, 9, 400, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=each.double()) for each in logits))
    assert torch.allclose(token_divergences(*logits)[0].double(), exact, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------- one pass
def test_losses_are_those_of_perplexity(dense, other, windows):
    result = measure_windows({"other": other, "dense": dense}, windows, "dense")
    for name, model in (("dense", dense), ("other", other)):
        assert torch.equal(result[name]["losses"], window_losses(model, windows))
    assert result["other"]["divergence"] == divergence(dense, other, windows)
    assert result["dense"]["divergence"]["mean"] == 0
    assert measure_windows({"other": other}, windows, None)["other"]["divergence"] is None


def test_every_model_reads_every_window_once(windows):
    calls = []
    models = {name: counted(helpers.make_llama(seed=seed), calls, name) for seed, name in enumerate(("a", "dense", "b"))}
    measure_windows(models, windows, "dense")
    assert calls == ["dense", "a", "b"] * len(windows)


def test_logits_at_hand_are_as_good_as_the_model(dense, other, windows):
    kept = [next_token_logits(dense, window) for window in windows]
    assert measure_windows({"other": other}, windows, kept)["other"]["divergence"] == divergence(dense, other, windows)


def test_another_vocabulary_is_not_compared(dense, windows):
    larger = helpers.make_llama(vocab_size=helpers.LLAMA_VOCABULARY + 8)
    result = measure_windows({"dense": dense, "larger": larger}, windows, "dense")
    assert result["larger"]["divergence"] is None and len(result["larger"]["losses"]) == 5
    with pytest.raises(ValueError, match="vocabularies of 264 and 272"):
        divergence(dense, larger, windows)
    with pytest.raises(ValueError, match=r"shapes \(2, 3\) and \(2, 4\): the vocabularies differ"):
        token_divergences(torch.zeros(2, 3), torch.zeros(2, 4))


@pytest.mark.parametrize("window", [0, 2])
def test_a_model_that_raises_is_left_out_and_the_others_go_on(dense, windows, window):
    def dying(seed: int):
        model, calls = helpers.make_llama(seed=seed), iter(range(100))

        def hook(*_):
            if next(calls) == window:
                raise RuntimeError("out of memory")

        model.register_forward_pre_hook(hook)
        return model

    models = {"dense": dense, "dying": dying(1), "sound": helpers.make_llama(seed=2)}
    with pytest.raises(RuntimeError, match="out of memory"):
        measure_windows({**models, "dying": dying(1)}, windows, "dense")
    errors: dict[str, Exception] = {}
    result = measure_windows(models, windows, "dense", errors)
    assert list(result) == ["dense", "sound"] and str(errors["dying"]) == "out of memory"
    assert result["sound"]["divergence"] == divergence(dense, models["sound"], windows)
    errors = {}
    result = measure_windows({"dense": dying(0), "sound": models["sound"]}, windows, "dense", errors)  # nothing to compare with
    assert list(errors) == ["dense"] and list(result) == ["sound"]
    assert result["sound"]["divergence"] is None and len(result["sound"]["losses"]) == len(windows)
