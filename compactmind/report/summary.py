"""What a report opens with: the best model at each size and, in at most five sentences, what it costs, saves, and how sure that is.

Everything is read off the rows. A classifier is compared with the reference by McNemar's test, corrected for the number of rows; a
language model with the dense one by the paired interval of the ratio of perplexities. Models that were measured on other tokens or are
compared with another model are left out: they say nothing beside these.
"""

from collections.abc import Callable
from typing import Any

from compactmind.report.as_shipped import as_shipped
from compactmind.report.sentences import (
    DISTINGUISHABLE,
    FASTER,
    corrected_p,
    largest_batch,
    measured,
    p_in_words,
    reference_of,
    speed,
    speedup,
    tokens_per_second,
)

MOST = 5
"""Sentences a report opens with."""
LISTED = 3
"""Models a sentence lists before it counts the rest."""
Rows = dict[str, dict[str, Any]]


# ------------------------------------------------------------------------------------------------------ which is the best
def best_at_each_size(rows: Rows, quality: Callable[[dict[str, Any]], float]) -> list[str]:
    """Return the names of the rows that no row of as few bytes is as good as, from the smallest on; a higher `quality` is better."""
    names = []
    for name in sorted(rows, key=lambda name: (rows[name]["size_mb"], -quality(rows[name]))):
        if not names or quality(rows[name]) > quality(rows[names[-1]]):
            names.append(name)
    return names


def comparable_classifiers(report: dict[str, Any]) -> Rows:
    """Return the measured classifiers by name: all are measured on the same rows."""
    return measured(report, "encoder")


def comparable_languages(report: dict[str, Any]) -> Rows:
    """Return the measured language models by name that can be put on one axis.

    Beside a measured dense model: itself and what is compared with it by the ratio of perplexities. Without one: those of the protocol
    that most have.
    """
    rows, dense = measured(report, "llm"), reference_of(report, "llm")
    if dense in rows:
        return {name: row for name, row in rows.items() if name == dense or (row["compared_with"] == dense and row["against_dense"])}
    protocols = [str(row["protocol"]) for row in rows.values()]
    common = max(protocols, key=protocols.count, default=None)
    return {name: row for name, row in rows.items() if str(row["protocol"]) == common}


def no_worse_classifier(row: dict[str, Any], reference: dict[str, Any]) -> bool | None:
    """Tell whether a classifier is better than the reference or indistinguishable from it; None if they were not compared."""
    p_value = corrected_p(row)
    if row is reference:
        return True
    return None if p_value is None else p_value >= DISTINGUISHABLE or row["accuracy"] > reference["accuracy"]


def no_worse_language(row: dict[str, Any]) -> bool:
    """Tell whether a language model is better than the dense one or its perplexity indistinguishable from it."""
    return bool(row["against_dense"]) and row["against_dense"]["interval"][0] <= 1


# -------------------------------------------------------------------------------------------------------------- sentences
def opening_sentences(report: dict[str, Any]) -> list[str]:
    """Return at most MOST sentences, of classifiers first; none where nothing was measured."""
    return [*_of_classifiers(report), *_of_languages(report)][:MOST]


def _of_classifiers(report: dict[str, Any]) -> list[str]:
    rows, batch = comparable_classifiers(report), largest_batch(report)
    if not rows:
        return []
    reference = rows.get(reference_of(report, "encoder"))
    others = {name: row for name, row in rows.items() if row is not reference}
    compared = [row for row in others.values() if reference and no_worse_classifier(row, reference) is not None]
    if len(rows) == 1:
        (row,) = rows.values()
        return [f"One classifier was measured, {_accurate(row)}, {row['size_mb']:.1f} MB: there is nothing to compare it with."]
    if not compared:
        best, smallest = max(rows.values(), key=lambda row: row["accuracy"]), min(rows.values(), key=lambda row: row["size_mb"])
        text = f"The most accurate classifier is {_accurate(best)}, {best['size_mb']:.1f} MB"
        if smallest is best:
            text += ", and no other is smaller"
        else:
            text += f"; the smallest is {_accurate(smallest)}, {smallest['size_mb']:.1f} MB"
        return [f"{text}: none was compared with a reference, so whether they differ is not known."]
    good = [row for row in compared if no_worse_classifier(row, reference)]
    smaller = [row for row in good if row["size_mb"] < reference["size_mb"]]
    against = f"{reference['name']} ({reference['accuracy']:.1%})"
    if not smaller:
        text = f"No classifier smaller than {against}, {reference['size_mb']:.1f} MB, was measured"
        if any(row["size_mb"] < reference["size_mb"] for row in compared):
            text = f"Every classifier smaller than {against}, {reference['size_mb']:.1f} MB, is measurably worse than it"
        best = max(compared, key=lambda row: row["accuracy"])
        small, quick = best, speedup(best, batch)
        times = f", {speed(quick)} at batch {batch.removeprefix('batch_')}" if quick else ""
        lines = [
            f"{text}; the most accurate of the others is {_accurate(best)}, {best['size_mb']:.1f} MB{times}, {_verdict(best, reference)}."
        ]
    else:
        small = min(smaller, key=lambda row: (row["size_mb"], -row["accuracy"]))
        quick = speedup(small, batch)
        times = f" and is {speed(quick)} at batch {batch.removeprefix('batch_')}" if quick else ""
        lines = [
            f"The smallest classifier that is no worse than {against} as far as {reference['rows']} test rows can tell is "
            f"{_accurate(small)}, {_verdict(small, reference)}: it takes {small['size_mb']:.1f} MB instead of "
            f"{reference['size_mb']:.1f}{times}."
        ]
    timed = [row for row in good if (speedup(row, batch) or 0) >= FASTER]
    if timed:
        quick = max(timed, key=lambda row: speedup(row, batch))
        if quick is not small:
            which = "of them" if smaller else f"that is no worse than {reference['name']}"
            lines.append(
                f"The fastest {which} is {_accurate(quick)}: {speed(speedup(quick, batch))} than {reference['name']} at batch "
                f"{batch.removeprefix('batch_')}, {quick['size_mb']:.1f} MB, {_verdict(quick, reference)}."
            )
    return lines


def _accurate(row: dict[str, Any]) -> str:
    low, high = row["accuracy_interval"]
    return f"{row['name']} with {row['accuracy']:.1%} [{low:.1%}, {high:.1%}]"


def _verdict(row: dict[str, Any], reference: dict[str, Any]) -> str:
    """Return whether two classifiers can be distinguished, which the corrected p-value decides, in words."""
    if corrected_p(row) >= DISTINGUISHABLE:
        return f"not distinguishable ({p_in_words(row)})"
    return f"{'better' if row['accuracy'] > reference['accuracy'] else 'worse'} ({p_in_words(row)})"


def _of_languages(report: dict[str, Any]) -> list[str]:
    rows, dense_name, file = comparable_languages(report), reference_of(report, "llm"), as_shipped(report)
    dense = rows.get(dense_name)
    models = {name: row for name, row in rows.items() if row is not file and row is not dense}
    if not rows:
        return []
    if not dense or not models:
        best = min(rows.values(), key=lambda row: row["perplexity"])
        which = "One language model was measured" if len(rows) == 1 else f"The best of {len(rows)} language models by perplexity is"
        low, high = best["perplexity_interval"]
        text = f"{best['name']} with perplexity {best['perplexity']:.2f} [{low:.2f}, {high:.2f}], {best['size_mb']:.1f} MB"
        why = "there is nothing to compare it with"
        if not dense and len(rows) > 1:
            why = f"{dense_name}, the dense one, was not measured beside them"
        return [f"{which}{',' if len(rows) == 1 else ''} {text}: {why}."]
    front = best_at_each_size({**models, dense_name: dense}, lambda row: -row["perplexity"])
    windows = dense["protocol"]["windows"]
    if windows < 2:
        listed = _listed([rows[name] for name in reversed(front) if name != dense_name], dense)
        text = f"One window of text gives no interval: whether a language model differs from {dense_name} is not known"
        best = f"; by perplexity against it, the best at each size: {listed}" if listed else ""
        return [f"{text}{best}.", *_fastest(list(models.values()), dense)]
    good = [row for row in models.values() if no_worse_language(row) and row["size_mb"] < dense["size_mb"]]
    lines = []
    if good:
        small = min(good, key=lambda row: (row["size_mb"], row["perplexity"]))
        sure = "better than" if small["against_dense"]["interval"][1] < 1 else "not distinguishable from"
        text = (
            f"The smallest language model that is no worse than {dense_name} as far as {windows} windows can tell is {small['name']}: "
            f"{small['size_mb']:.1f} MB instead of {dense['size_mb']:.1f}, perplexity {_change(small)}, {sure} it{_tokens(small, dense)}"
        )
        if file:
            text += f"; the file that {dense_name} was published as has {file['size_mb']:.1f} MB"
        lines.append(f"{text}.")
    else:
        small = dense
        lines.append(
            f"No language model smaller than {dense_name} ({dense['size_mb']:.1f} MB) has its perplexity as far as "
            f"{windows} windows can tell."
        )
    below = [rows[name] for name in reversed(front) if rows[name]["size_mb"] < small["size_mb"]]
    if below:
        lines.append(
            f"Smaller ones are measurably worse; the best at each size, by perplexity against {dense_name}: {_listed(below, dense)}."
        )
    return [*lines, *_fastest(list(models.values()), dense)]


def _fastest(models: list[dict[str, Any]], dense: dict[str, Any]) -> list[str]:
    """Return what the language model that reads a prompt fastest costs, if one is faster than the dense one."""
    timed = [row for row in models if (speedup(row, "prefill") or 0) >= FASTER]
    if not timed:
        return []
    row = max(timed, key=lambda row: speedup(row, "prefill"))
    decode = speedup(row, "decode")
    sure = ", not distinguishable from it" if _unsure(row) else ", different from it"
    sure = sure if row["protocol"]["windows"] > 1 else ""
    also = f" and generates {speed(decode)}" if decode else ""
    return [
        f"The fastest is {row['name']}: it reads a prompt {speed(speedup(row, 'prefill'))} than {dense['name']}{also}, at "
        f"{row['size_mb']:.1f} MB and perplexity {_change(row)}{sure}."
    ]


def _listed(rows: list[dict[str, Any]], dense: dict[str, Any]) -> str:
    """Return size, perplexity and speed of the first LISTED rows, and how many more there are."""
    models = [f"{row['name']}, {row['size_mb']:.1f} MB, {_change(row)}{_tokens(row, dense)}" for row in rows[:LISTED]]
    return "; ".join([*models, f"and {len(rows) - LISTED} smaller ones"] if len(rows) > LISTED else models)


def _unsure(row: dict[str, Any]) -> bool:
    low, high = row["against_dense"]["interval"]
    return low <= 1 <= high


def _change(row: dict[str, Any]) -> str:
    low, high = (bound - 1 for bound in row["against_dense"]["interval"])
    interval = f" [{low:+.2%}, {high:+.2%}]" if row["protocol"]["windows"] > 1 else ""
    return f"{row['against_dense']['ratio'] - 1:+.2%}{interval}"


def _tokens(row: dict[str, Any], dense: dict[str, Any]) -> str:
    """Return how fast a model generates beside the dense one, nothing where one of them was not timed."""
    mine, theirs = tokens_per_second(row), tokens_per_second(dense)
    return f", {mine:.0f} tokens/s against {theirs:.0f}" if mine and theirs else ""
