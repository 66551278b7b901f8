"""What a report says of models that were trained with several seeds: a cell, a sentence, a warning."""

from typing import Any

from compactmind.seeds import format_spread

COLUMN = "over seeds"
NOTE = " over seeds: the same training with other seeds, its data, settings and parent as they are: median, lowest to highest."


def has_seeds(row: dict[str, Any]) -> bool:
    """Tell whether a row stands for several runs."""
    return len((row.get("seeds") or {}).get("runs", ())) > 1


def seeds_cell(row: dict[str, Any]) -> str:
    """Return median and spread of a row's accuracy over its seeds, `-` of one that has a single run."""
    if not has_seeds(row):
        return "-"
    accuracies = [run["accuracy"] for run in row["seeds"]["runs"]]
    return f"{format_spread(accuracies)} ({len(accuracies)})"


def seeds_sentences(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Return a sentence for every row that stands for several runs."""
    return [
        f"{name}, trained with {len(row['seeds']['runs'])} seeds: accuracy "
        f"{format_spread([run['accuracy'] for run in row['seeds']['runs']])}; the "
        f"row is the run of seed {row['seeds']['runs'][0]['seed']}, {row['accuracy']:.1%}."
        for name, row in rows.items()
        if has_seeds(row)
    ]


def seeds_warnings(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Return a warning for every run that could not take part."""
    return [
        f"{name}: {run['name']} is left out of its seeds: {run['error'].rstrip('.')}."
        for name, row in rows.items()
        for run in (row.get("seeds") or {}).get("left_out", ())
    ]
