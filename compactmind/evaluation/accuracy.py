"""What a classifier gets right, how sure that number is, and whether two classifiers differ."""

import math
from typing import Any

import numpy
import torch


def accuracy_of(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the share of rows whose largest logit is the label, in [0, 1]."""
    return (logits.argmax(dim=-1) == labels).double().mean().item()


def standard_error(accuracy: float, rows: int) -> float:
    """Return the standard error of an accuracy (share in [0, 1]) measured on so many rows."""
    return math.sqrt(accuracy * (1 - accuracy) / rows)


def score_of(logits: torch.Tensor, labels: torch.Tensor, metric: str = "accuracy") -> tuple[float, float]:
    """Return what a task is judged by, of logits (rows, classes) and labels (rows,), and its standard error.

    `metric`: "accuracy"; of two classes "f1", that of the last one, or "mcc", Matthews' correlation. The error of these two is the
    spread over confusion matrices drawn from this one (bootstrap, Efron 1979).
    """
    if metric == "accuracy":
        accuracy = accuracy_of(logits, labels)
        return accuracy, standard_error(accuracy, len(labels))
    counts = torch.bincount(2 * labels + logits.argmax(dim=-1), minlength=4).numpy()
    drawn = numpy.random.default_rng(0).multinomial(counts.sum(), counts / counts.sum(), size=400)
    return float(_of_counts(counts, metric)), float(_of_counts(drawn, metric).std())


def _of_counts(counts: numpy.ndarray, metric: str) -> numpy.ndarray:
    """Return "f1" or "mcc" of confusion matrices (..., 4): true and false negatives and positives as unpacked here; 0 for 0 / 0."""
    tn, fp, fn, tp = numpy.moveaxis(counts.astype(float), -1, 0)
    if metric == "f1":
        above, below = 2 * tp, 2 * tp + fp + fn
    else:
        above, below = tp * tn - fp * fn, numpy.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return above / numpy.where(below > 0, below, 1)


def classification_metrics(logits: torch.Tensor, labels: torch.Tensor, confidence: float = 0.95) -> dict[str, Any]:
    """Return accuracy with its Wilson interval, F1, ROC AUC, Matthews' correlation (MCC), what is right per class, the confusion matrix.

    Logits: (rows, classes), labels: (rows,). `f1` is that of the last of two classes, of more it is `macro_f1`: the mean over the classes
    that occur or are answered. `auc` of more than two is the mean over classes of each against the rest; it is None where only one
    occurs. `confusion_matrix[i][j]` counts rows of label i predicted j; `per_class` has precision, recall, f1 and rows of each. Shares are
    in [0, 1].
    """
    from scipy.stats import binomtest  # here: who only asks a classifier needs neither
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, matthews_corrcoef, precision_recall_fscore_support

    classes = list(range(logits.shape[1]))
    truth, predicted = labels.numpy(), logits.argmax(dim=-1).numpy()
    correct = int((truth == predicted).sum())
    interval = binomtest(correct, len(truth)).proportion_ci(confidence, method="wilson")
    macro_f1 = float(f1_score(truth, predicted, average="macro", zero_division=0))
    each = precision_recall_fscore_support(truth, predicted, labels=classes, zero_division=0)
    names = ("precision", "recall", "f1", "rows")
    per_class = [dict(zip(names, map(float, row), strict=True)) for row in zip(*each, strict=True)]
    return {
        "rows": len(truth),
        "accuracy": float(accuracy_score(truth, predicted)),
        "accuracy_interval": [float(interval.low), float(interval.high)],
        "f1": per_class[1]["f1"] if len(classes) == 2 else macro_f1,
        "macro_f1": macro_f1,
        "mcc": float(matthews_corrcoef(truth, predicted)),
        "auc": area_under_curve(truth, logits.double().softmax(dim=-1).numpy()),
        "per_class": per_class,
        "confusion_matrix": confusion_matrix(truth, predicted, labels=classes).tolist(),
    }


def area_under_curve(truth: numpy.ndarray, probabilities: numpy.ndarray) -> float | None:
    """Return the ROC AUC of the last of two classes, of more the mean over those that occur of each against the rest.

    Labels (rows,), probabilities (rows, classes). None where all labels are the same.
    """
    from sklearn.metrics import roc_auc_score

    occurring = numpy.unique(truth)
    if len(occurring) < 2:
        return None
    asked = [1] if probabilities.shape[1] == 2 else occurring
    return float(numpy.mean([roc_auc_score(truth == label, probabilities[:, label]) for label in asked]))


def mcnemar(reference_correct: numpy.ndarray, other_correct: numpy.ndarray) -> dict[str, Any]:
    """Compare two models on the same rows with the exact McNemar test (McNemar 1947; two-sided binomial).

    Arguments are boolean arrays of shape (rows,). Only rows that one model gets right and the other wrong carry
    information; `p_value` is 1 when there are none.
    """
    from scipy.stats import binomtest

    if reference_correct.shape != other_correct.shape:
        raise ValueError(f"different rows: {reference_correct.shape} against {other_correct.shape}")
    only_reference = int((reference_correct & ~other_correct).sum())
    only_other = int((~reference_correct & other_correct).sum())
    discordant = only_reference + only_other
    p_value = binomtest(only_reference, discordant).pvalue if discordant else 1.0
    return {"only_reference_correct": only_reference, "only_this_correct": only_other, "p_value": float(p_value)}


def holm(p_values: list[float]) -> list[float]:
    """Return p-values corrected for how many were looked at (Holm 1979, Scandinavian Journal of Statistics 6:65), in the same order.

    The smallest is multiplied by their number, the next by one less, and so on; none is smaller than one before it or larger than 1.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def correct_for_many(rows: list[dict[str, Any]]) -> None:
    """Give, in place, every row of a report that was compared with the reference its p-value corrected for all of them, `p_holm`."""
    tests = [row["mcnemar_against_reference"] for row in rows if row.get("mcnemar_against_reference")]
    for comparison, corrected in zip(tests, holm([each["p_value"] for each in tests]), strict=True):
        comparison["p_holm"] = corrected
