"""What is said about right and wrong answers, checked by hand and by formulas written a second time."""

import math

import numpy
import pytest
import torch

from compactmind.evaluation.accuracy import (
    accuracy_of,
    classification_metrics,
    correct_for_many,
    holm,
    mcnemar,
    score_of,
    standard_error,
)

LABELS = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0, 0, 0])
SCORES = torch.tensor([0.9, 0.8, 0.6, -0.3, 0.7, -0.1, -0.2, -0.5, -0.6, -0.9])  # label 1 is predicted where positive
LOGITS = torch.stack([-SCORES, SCORES], dim=1)


def wilson(correct: int, rows: int) -> tuple[float, float]:
    """The 95% score interval of Wilson 1927, from its textbook formula."""
    z, p = 1.959963984540054, correct / rows
    centre = p + z * z / (2 * rows)
    half = z * math.sqrt(p * (1 - p) / rows + z * z / (4 * rows * rows))
    return (centre - half) / (1 + z * z / rows), (centre + half) / (1 + z * z / rows)


def exact_two_sided(wins: int, losses: int) -> float:
    """Twice the smaller tail of a fair coin, at most 1."""
    n = wins + losses
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(wins, losses) + 1)) / 2**n)


def test_metrics_against_hand_numbers():
    # Right: 3 of the 4 positives, 5 of the 6 negatives.
    metrics = classification_metrics(LOGITS, LABELS)
    assert metrics["rows"] == 10
    assert metrics["accuracy"] == accuracy_of(LOGITS, LABELS) == 0.8
    assert metrics["confusion_matrix"] == [[5, 1], [1, 3]]
    assert metrics["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))
    pairs = [(p > n) + 0.5 * (p == n) for p in SCORES[LABELS == 1].tolist() for n in SCORES[LABELS == 0].tolist()]
    assert metrics["auc"] == pytest.approx(sum(pairs) / len(pairs))  # the chance that a positive outranks a negative
    assert metrics["accuracy_interval"] == pytest.approx(wilson(8, 10), abs=1e-9)


@pytest.mark.parametrize(("correct", "rows"), [(0, 5), (5, 5), (1, 2), (793, 872), (900, 1000)])
def test_the_interval_is_wilsons(correct, rows):
    labels = torch.ones(rows, dtype=torch.long)
    logits = torch.zeros(rows, 2)
    logits[:correct, 1] = 1.0
    logits[correct:, 0] = 1.0
    metrics = classification_metrics(logits, labels)
    assert metrics["accuracy_interval"] == pytest.approx(wilson(correct, rows), abs=1e-9)
    assert metrics["auc"] is None  # one label only
    assert metrics["confusion_matrix"] == [[0, 0], [rows - correct, correct]]


def test_another_confidence_gives_another_width():
    low, high = classification_metrics(LOGITS, LABELS, confidence=0.99)["accuracy_interval"]
    inner_low, inner_high = classification_metrics(LOGITS, LABELS)["accuracy_interval"]
    assert low < inner_low < inner_high < high


@pytest.mark.parametrize(
    ("wins", "losses", "both", "neither"), [(0, 0, 3, 2), (1, 0, 0, 0), (8, 2, 20, 5), (30, 30, 1, 1), (3, 14, 9, 0)]
)
def test_mcnemar_against_a_binomial_sum(wins, losses, both, neither):
    reference = numpy.array([True] * wins + [False] * losses + [True] * both + [False] * neither)
    other = numpy.array([False] * wins + [True] * losses + [True] * both + [False] * neither)
    result = mcnemar(reference, other)
    assert (result["only_reference_correct"], result["only_this_correct"]) == (wins, losses)
    assert result["p_value"] == pytest.approx(exact_two_sided(wins, losses), abs=1e-12)
    assert mcnemar(other, reference)["p_value"] == result["p_value"]


def test_mcnemar_refuses_different_rows():
    with pytest.raises(ValueError, match="different rows"):
        mcnemar(numpy.array([True]), numpy.array([True, False]))


def test_the_standard_error_is_the_spread_of_a_share():
    assert standard_error(0.5, 100) == pytest.approx(0.05)
    assert standard_error(1.0, 100) == 0
    drawn = torch.distributions.Binomial(200, torch.tensor(0.8)).sample((4000,)) / 200
    assert standard_error(0.8, 200) == pytest.approx(drawn.std().item(), rel=0.1)


def by_hand(truth: list[int], scores: list[list[float]]) -> dict:
    """Return metrics of several classes from their definitions, counted one by one."""
    classes, predicted = range(len(scores[0])), [row.index(max(row)) for row in scores]
    each, areas = [], []
    for label in classes:
        hit = sum(t == p == label for t, p in zip(truth, predicted, strict=True))
        asked, said = truth.count(label), predicted.count(label)
        each.append({"precision": hit / said if said else 0, "recall": hit / asked if asked else 0, "rows": asked,
                     "f1": 2 * hit / (asked + said) if asked + said else 0})  # fmt: skip
        mine = [row[label] for t, row in zip(truth, scores, strict=True) if t == label]
        others = [row[label] for t, row in zip(truth, scores, strict=True) if t != label]
        if mine and others:
            areas.append(sum((m > o) + 0.5 * (m == o) for m in mine for o in others) / len(mine) / len(others))
    seen = [label for label in classes if label in truth or label in predicted]
    indicator = [[[float(v == c) for c in classes] for v in values] for values in (truth, predicted)]
    x, y = (numpy.array(side) - numpy.mean(side, axis=0) for side in indicator)
    spread = math.sqrt((x * x).sum() * (y * y).sum())
    return {
        "per_class": each, "macro_f1": sum(each[label]["f1"] for label in seen) / len(seen), "auc": sum(areas) / len(areas),
        "mcc": (x * y).sum() / spread if spread else 0.0,
        "confusion_matrix": [[sum((t, p) == (i, j) for t, p in zip(truth, predicted, strict=True)) for j in classes] for i in classes],
    }  # fmt: skip


@pytest.mark.parametrize(("classes", "missing"), [(2, None), (3, None), (4, 2), (5, 0)])
def test_metrics_of_several_classes_by_counting(classes, missing):
    generator = torch.Generator().manual_seed(classes)
    labels = torch.randint(0, classes, (60,), generator=generator)
    labels[labels == missing] = 1  # a class that does not occur
    logits = torch.randn(60, classes, generator=generator) + torch.nn.functional.one_hot(labels, classes)
    if missing == 2:
        logits[:, missing] = -9.0  # nor is it ever answered
    metrics, expected = classification_metrics(logits, labels), by_hand(labels.tolist(), logits.softmax(-1).tolist())
    for name, value in expected.items():
        if name == "per_class":
            assert metrics[name] == [pytest.approx(one) for one in value]
        else:
            assert metrics[name] == (value if name == "confusion_matrix" else pytest.approx(value, abs=1e-9)), name
    assert metrics["f1"] == pytest.approx(metrics["per_class"][1]["f1"] if classes == 2 else metrics["macro_f1"])


def test_holm_by_its_definition_and_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([]) == [] and holm([0.2]) == [0.2] and holm([0.9, 0.8]) == [1.0, 1.0]
    values = torch.rand(9, generator=torch.Generator().manual_seed(0)).div(20).tolist()
    for index, corrected in enumerate(holm(values)):  # rejected at a level just where Holm's steps come to it
        ranked = sorted(values)
        reached = [(len(values) - rank) * p for rank, p in enumerate(ranked) if p <= values[index]]
        assert corrected == pytest.approx(min(1.0, max(reached)))


def test_every_row_that_was_compared_is_corrected_for_all():
    rows = [{"mcnemar_against_reference": {"p_value": p}} for p in (0.01, 0.04)]
    rows += [{"mcnemar_against_reference": None}, {"status": "not run"}]
    correct_for_many(rows)
    assert [row["mcnemar_against_reference"]["p_holm"] for row in rows[:2]] == pytest.approx([0.02, 0.04])
    correct_for_many(rows[:1])  # made again: from the p-value itself
    assert rows[0]["mcnemar_against_reference"]["p_holm"] == 0.01


@pytest.mark.parametrize("metric", ["accuracy", "f1", "mcc"])
def test_a_score_is_what_the_report_says_and_its_error_what_other_rows_would_change(metric):
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(4000, generator=generator) < 0.3).long()
    logits = torch.stack([torch.zeros(4000), labels * 1.5 - 0.75 + torch.randn(4000, generator=generator)], dim=1)
    score, _ = score_of(logits, labels, metric)
    assert score == pytest.approx(classification_metrics(logits, labels)[metric], abs=1e-12)
    of_parts = [score_of(logits[i : i + 100], labels[i : i + 100], metric) for i in range(0, 4000, 100)]
    spread = torch.tensor([each for each, _ in of_parts]).std().item()
    assert torch.tensor([error for _, error in of_parts]).mean().item() == pytest.approx(spread, rel=0.3)


def test_a_classifier_that_says_one_class_alone_scores_nothing():
    logits, labels = torch.tensor([[1.0, 0.0]]).repeat(10, 1), torch.tensor([0] * 7 + [1] * 3)
    assert score_of(logits, labels, "mcc") == (0.0, 0.0) and score_of(logits, labels, "f1") == (0.0, 0.0)
    assert score_of(logits, labels)[0] == pytest.approx(0.7)
