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


def classification_metrics(logits: torch.Tensor, labels: torch.Tensor, confidence: float = 0.95) -> dict[str, Any]:
    """Return accuracy with its Wilson interval, F1 of the positive class, ROC AUC and the confusion matrix.

    Logits: (rows, 2), labels: (rows,) of 0/1. `confusion_matrix[i][j]` counts rows of label i predicted j. Shares are
    in [0, 1]. The AUC is None when only one label occurs.
    """
    from scipy.stats import binomtest  # here: who only asks a classifier needs neither
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, roc_auc_score

    truth, predicted = labels.numpy(), logits.argmax(dim=-1).numpy()
    correct = int((truth == predicted).sum())
    interval = binomtest(correct, len(truth)).proportion_ci(confidence, method="wilson")
    probability = logits.double().softmax(dim=-1)[:, 1].numpy()
    return {
        "rows": len(truth),
        "accuracy": float(accuracy_score(truth, predicted)),
        "accuracy_interval": [float(interval.low), float(interval.high)],
        "f1": float(f1_score(truth, predicted, zero_division=0)),
        "auc": float(roc_auc_score(truth, probability)) if len(set(truth.tolist())) == 2 else None,
        "confusion_matrix": confusion_matrix(truth, predicted, labels=[0, 1]).tolist(),
    }


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
