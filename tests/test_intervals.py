"""The interval of a mean over neighbouring windows covers what it says it does."""

import math

import pytest
import torch
from scipy.stats import t as student

from compactmind.evaluation.intervals import degrees_of_freedom, mean_interval

NEIGHBOURS = 0.3
"""Autocorrelation of neighbouring windows."""


def texts(count: int, windows: int, autocorrelation: float, skewed: bool = True) -> torch.Tensor:
    """Return made-up losses around 0, a text a row: autoregressive noise, skewed as losses are; float64 (count, windows)."""
    generator, before = torch.Generator().manual_seed(0), 30
    noise = torch.randn(2, count, windows + before, generator=generator, dtype=torch.float64)
    noise = noise.square().sum(0) - 2 if skewed else noise[0]  # chi-squared of 2 degrees has skewness 2
    rows = [noise[:, 0]]
    for step in noise.T[1:]:
        rows.append(autocorrelation * rows[-1] + step)
    return torch.stack(rows[before:], dim=1)


def coverage(low: torch.Tensor, high: torch.Tensor) -> float:
    """Return the share of intervals that contain the true mean, 0."""
    return ((low <= 0) & (high >= 0)).double().mean().item()


def percentile_bootstrap(values: torch.Tensor, resamples: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    """The interval to be compared with: percentiles of the means of windows drawn as if they were independent (Efron 1979)."""
    drawn = torch.randint(values.shape[1], (resamples, values.shape[1]), generator=torch.Generator().manual_seed(1))
    means = values[:, drawn].mean(dim=2)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=means.dtype), dim=1)
    return low, high


@pytest.mark.parametrize("windows", [8, 16, 64, 300])
def test_neighbours_that_resemble_each_other_are_covered(windows):
    assert 0.93 <= coverage(*mean_interval(texts(4000, windows, NEIGHBOURS, skewed=False))) <= 0.97
    assert 0.90 <= coverage(*mean_interval(texts(4000, windows, NEIGHBOURS))) <= 0.97


@pytest.mark.parametrize("windows", [8, 16, 64])
def test_independent_windows_are_covered(windows):
    assert 0.94 <= coverage(*mean_interval(texts(4000, windows, 0.0, skewed=False))) <= 0.96


def test_the_usual_bootstrap_would_promise_too_much():
    values = texts(1000, 16, NEIGHBOURS, skewed=False)
    assert coverage(*percentile_bootstrap(values)) < 0.86 < 0.93 <= coverage(*mean_interval(values))


def test_many_windows_need_hardly_more_width_than_the_normal_distribution_gives():
    values = texts(500, 300, 0.0, skewed=False)
    low, high = mean_interval(values)
    assert (high - low).mean() == pytest.approx(2 * 1.96 / math.sqrt(300), rel=0.1)


def test_the_interval_is_that_of_a_regression_on_cosines():
    values = texts(1, 16, NEIGHBOURS)[0]
    low, high = mean_interval(values)
    squares = []
    for order in (1, 2, 3):
        cosine = [math.cos(math.pi * order * (place + 0.5) / 16) for place in range(16)]
        inner = sum(weight * value for weight, value in zip(cosine, values.tolist(), strict=True))
        squares.append(inner**2 / sum(weight**2 for weight in cosine))
    margin = student.ppf(0.975, 3) * math.sqrt(sum(squares) / 3 / 16)
    assert low.dtype == torch.float64 and low.shape == ()
    assert low.item() == pytest.approx(values.mean().item() - margin) and high.item() == pytest.approx(
        values.mean().item() + margin
    )


def test_rows_are_independent_of_each_other_and_of_a_constant():
    values = texts(5, 12, NEIGHBOURS)
    low, high = mean_interval(values)
    assert low.shape == high.shape == (5,)
    for row, (a, b) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
        assert [bound.item() for bound in mean_interval(values[row])] == pytest.approx([a, b])
        assert [bound.item() for bound in mean_interval(values[row] + 7)] == pytest.approx([a + 7, b + 7])


def test_equal_windows_and_a_single_one_have_an_interval_without_width():
    for values in (torch.full((9,), 2.5), torch.tensor([2.5])):
        assert [bound.item() for bound in mean_interval(values)] == [2.5, 2.5]


def test_few_windows_are_few_degrees_of_freedom():
    assert [degrees_of_freedom(windows) for windows in (2, 3, 8, 16, 64, 300)] == [1, 2, 2, 3, 6, 18]
    low, high = mean_interval(torch.tensor([1.0, 2.0]))
    assert (high - low).item() == pytest.approx(2 * student.ppf(0.975, 1) * 0.5)
