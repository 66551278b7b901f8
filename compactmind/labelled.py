"""Any labelled table as sentences of a task: its columns, the names of its classes, its splits, and what should be known about it.

A table is a csv, tsv, jsonl or parquet file, or a part of a data set of the hub. Labels may be words or whole numbers. Of rows that say
nothing (no text, no label) there is a count, of tables that cannot be meant an error. Nothing is written here.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy
import pandas

from compactmind.data import SPLITS, Sentence, normalize, split_by_hash
from compactmind.errors import CompactMindError, shown
from compactmind.rows import BLANK, HALF_A_PAIR, TEXT_COLUMNS, read_rows
from compactmind.task import Task, class_text, fraction_among

HELD_OUT = 0.1
"""Share of the training rows that stands in for each part that is not given, validation or test."""
HIDDEN = ("", "-1", "-")
"""Labels that mean there is none where the source says so: hidden test sets of benchmarks have -1."""
MAJORITY = 0.75
"""Share of one class above which an accuracy alone says little."""
FEW_ROWS = 20
"""A class with fewer training rows is warned of."""
SHOWN = 20
"""Classes whose numbers are printed one by one."""


@dataclass(frozen=True)
class Columns:
    """What the columns of a table are called; several names are tried in turn, `pair` is empty where a row has one text."""

    text: tuple[str, ...] = TEXT_COLUMNS
    label: tuple[str, ...] = ("label",)
    pair: tuple[str, ...] = ()
    header: tuple[str, ...] = ()
    """Names of all columns of a tsv file that may have none."""
    unlabelled: tuple[str, ...] = ("",)
    """Labels that mean there is none."""


@dataclass
class Part:
    """The rows of one split that have a text and a label: (text, second text or None, label as text), and how many had not."""

    name: str
    rows: list[tuple[str, str | None, str]] = field(default_factory=list)
    left_out: Counter = field(default_factory=Counter)
    """What a row lacks -> how many lack it."""
    first: dict[str, int] = field(default_factory=dict)
    """What a row lacks -> the first of them, counted from 1; label -> the first row that has it."""
    by_index: bool = False
    """Whether the labels are indices of classes that the source names, and never the names."""

    @property
    def is_unlabelled(self) -> bool:
        """Whether no row has a label: the hidden answers of a benchmark."""
        return not self.rows and self.left_out["a label"] > 0

    def warnings(self) -> list[str]:
        """Return what was left out, in words."""
        return [
            f"{_rows(count)} of {self.name} without {what} {_are(count)} left out, the first is row {self.first[what]}"
            for what, count in self.left_out.items()
        ]


def _column(where: str, option: str, names: Sequence[str], columns: Iterable) -> str:
    """Return the first of `names` that is among `columns`. Raises CompactMindError naming those that are."""
    columns = [str(name) for name in columns]
    if column := next((name for name in names if name in columns), None):
        return column
    there = _shorten([" ".join(shown(name).split()) for name in columns])  # without a header they are the texts of a row
    raise CompactMindError(f"{where} has no column {' or '.join(names)}, only {there}: choose one with {option}")


def read_part(name: str, rows: Iterable, columns: Columns) -> Part:
    """Return what is used of the rows (dicts, BLANK for none) of a table called `name`.

    Raises CompactMindError on a column that is not there and on a value that is no text or no class.
    """
    part, places = Part(name), None
    for number, row in enumerate(rows, start=1):
        if row is BLANK:
            continue
        where = f"{name}, row {number}"
        if not isinstance(row, dict):
            raise CompactMindError(f"{where}: expected an object with columns, found {type(row).__name__}")
        if places is None or not all(place in row for place in places):
            options = (("--text_column", columns.text), ("--label_column", columns.label), ("--pair_column", columns.pair))
            places = [_column(where if number > 1 else name, option, names, row) for option, names in options if names]
        text, label, *pair = (row[place] for place in places)
        texts, label = [_text(where, value) for value in (text, *pair)], _label(where, label)
        missing = (
            "a text"
            if not texts[0]
            else "a second text"
            if not texts[-1]
            else "a label"
            if label in columns.unlabelled
            else None
        )
        if missing:
            part.left_out[missing] += 1
            part.first.setdefault(missing, number)
            continue
        part.first.setdefault(f"label {label}", number)
        part.rows.append((texts[0], texts[1] if pair else None, label))
    if not part.rows and not part.left_out:
        raise CompactMindError(f"{name} holds no rows: it needs a header and at least one row")
    if fraction := fraction_among(list(dict.fromkeys(label for *_, label in part.rows))):
        row = part.first[f"label {fraction}"]
        raise CompactMindError(f"{name}, row {row}: the label {fraction} is a number with a fraction, no class")
    return part


def read_file(path: Path, columns: Columns) -> Part:
    """Return what is used of a csv, tsv, jsonl or parquet file. Raises CompactMindError as `read_part`, and if there is none."""
    if not path.is_file():
        raise CompactMindError(f"{path} not found: give the path of a csv, tsv, jsonl or parquet file")
    without_header = False
    if columns.header and path.suffix.lower() == ".tsv":
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            without_header = not set(columns.text) & set(file.readline().rstrip("\n").split("\t"))
    return read_part(str(path), read_rows(path, columns.header if without_header else ()), columns)


def load_local_dataset(folder: Path, configuration: str) -> Mapping[str, Any]:
    """Return a data set from a folder laid out like those of the hub. Raises CompactMindError."""
    from datasets import load_dataset

    try:
        dataset = load_dataset(str(folder), configuration or None)
    except Exception as error:  # noqa: BLE001  datasets and what it reads with each have their own errors
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CompactMindError(f"{folder} cannot be read as a data set of the hub ({reason}): mend or remove it") from None
    if "train" not in dataset:
        raise CompactMindError(
            f"{folder} has no part train, only {', '.join(dataset)}: name its files train.csv, test.csv and so on"
        )
    return dataset


def parts_of(
    dataset: Mapping[str, Any], name: str, columns: Columns, labels: Sequence[str] = (), reported: str = ""
) -> tuple[dict[str, Part], tuple[str, ...]]:
    """Return the parts of a data set of the hub (datasets.DatasetDict) and the names of its classes, empty if it does not say them.

    Where its test part is missing or its labels are hidden, validation is what is reported and becomes `test`; `reported` names another
    part that does. Raises CompactMindError as `read_part`.
    """
    label = _column(f"{name}, train", "--label_column", columns.label, dataset["train"].column_names)
    its_names = getattr(dataset["train"].features[label], "names", None)
    labels = tuple(labels or its_names or ())
    if labels:
        columns = replace(columns, unlabelled=HIDDEN)
    parts_to_read = ("train", reported) if reported else [part for part in SPLITS if part in dataset]
    if absent := [part for part in parts_to_read if part not in dataset]:
        raise CompactMindError(f"{name} has no part {absent[0]}, only {', '.join(dataset)}")
    parts = {part: read_part(f"{name}, {part}", dataset[part].to_pandas().to_dict("records"), columns) for part in parts_to_read}
    for part in parts.values():
        part.by_index = its_names is not None
    if "test" in parts and parts["test"].is_unlabelled:
        del parts["test"]
    if "test" not in parts and (last := next((part for part in (reported, "validation") if part in parts), None)):
        parts["test"] = parts.pop(last)
    return parts, labels


def _is_missing(value: object) -> bool:
    return value is None or value is pandas.NA or (isinstance(value, float) and math.isnan(value))


def _text(where: str, value: object) -> str:
    if _is_missing(value):
        return ""
    if not isinstance(value, str):
        raise CompactMindError(f"{where}: the text is of type {type(value).__name__}: {str(value)[:60]!r}")
    if HALF_A_PAIR.search(value):
        raise CompactMindError(f"{where}: half a surrogate pair, which is no character: {value[:60]!r}")
    return value.strip()


def _label(where: str, value: object) -> str:
    if _is_missing(value):
        return ""
    if isinstance(value, (list, tuple, dict, numpy.ndarray)):
        raise CompactMindError(f"{where}: the label is several values, {str(value)[:60]}: one class a row is learnt here")
    return class_text(value)


def names_of(part: Part) -> tuple[str, ...]:
    """Return the classes of a part: whole numbers in their order, else words in theirs.

    Raises CompactMindError if there is but one, or as many as no class column has.
    """
    counts = Counter(label for *_, label in part.rows)
    if len(counts) < 2:
        only = "".join(map(_named, counts)) or "none"
        raise CompactMindError(f"{part.name} has rows of one class only ({only}): two are needed{_after(part.warnings())}")
    if len(counts) > 2 and 2 * len(counts) > len(part.rows):
        some = ", ".join(map(_named, list(counts)[:3]))
        raise CompactMindError(
            f"{part.name}: the label column has {len(counts)} different values in {len(part.rows)} rows ({some}, ...): classes come more "
            f"often; is it another column (--label_column)?{_after(part.warnings())}"
        )
    try:
        return tuple(sorted(counts, key=int))
    except ValueError:
        return tuple(sorted(counts))


def to_sentences(part: Part, names: Sequence[str], numbers: bool = False) -> list[Sentence]:
    """Return the rows with the index of their class; with `numbers` a label may be the index itself instead of a name.

    Of a part that is `by_index` it is nothing else: a class called "1" need not be the second. Raises CompactMindError on a label that is
    not among the names.
    """
    index = {str(number): number for number in range(len(names) if numbers or part.by_index else 0)}
    if not part.by_index:
        index |= {name: number for number, name in enumerate(names)}
    if strangers := Counter(label for *_, label in part.rows if label not in index):
        label, count = strangers.most_common(1)[0]
        others = f" and {len(strangers) - 1} others" if len(strangers) > 1 else ""
        rows = f"{_rows(count)}, the first is row {part.first[f'label {label}']}"
        known = f"which the training rows lack: they have {_shorten(list(map(_named, names)))}"
        if part.by_index:
            known = f"which is the index of no class: it has '0' to '{len(names) - 1}'"
        raise CompactMindError(f"{part.name} has the label {_named(label)} ({rows}){others}, {known}")
    return [Sentence(text, index[label], pair) for text, pair, label in part.rows]


def key_of(sentence: Sentence) -> tuple[str, str]:
    """Return what two rows share that ask the same: their words, of a text without any (":-)") the text itself."""
    return normalize(sentence.text) or sentence.text, normalize(sentence.pair or "") or sentence.pair or ""


def without_repeats(sentences: list[Sentence], others: Iterable[Sentence], said: list[str]) -> list[Sentence]:
    """Return the training rows that are new, first occurrence kept, and not among `others`, held out; `said` gets the counts.

    Among themselves they are compared letter by letter, C and C++ are two texts; with held-out ones by `key_of`, so that none is learnt.
    """
    held_out, seen = {key_of(sentence) for sentence in others}, {}
    kept, counts = [], Counter()
    for sentence in sentences:
        key = (sentence.text, sentence.pair)
        if key_of(sentence) in held_out:
            counts["a held-out row asks the same"] += 1
        elif key in seen:
            counts[
                "an earlier row is the same" if seen[key] == sentence.label else "an earlier row is the same with another label"
            ] += 1
        else:
            seen[key] = sentence.label
            kept.append(sentence)
    said += [f"{_rows(count)} of train {_are(count)} left out, because {what}" for what, count in counts.items()]
    return kept


def split(parts: dict[str, Part], names: Sequence[str] = ()) -> tuple[Task, dict[str, list[Sentence]], list[str]]:
    """Return the task, its three splits and the warnings to be printed.

    `parts`: train and, where they are given, validation and test; what is missing is split off train by a hash of the first text, so rows
    that share it stay together and no row ever changes its split. A class no row of which would be left in train keeps its rows there, and
    with them those that differ from them in case and punctuation alone.
    `names`: of the classes, where the source says them. Raises CompactMindError, also if a split has rows of fewer than two classes.
    """
    said = [line for part in parts.values() for line in part.warnings()]
    numbers, names = bool(names), tuple(names) or names_of(parts["train"])
    if len(set(names)) < len(names):
        raise CompactMindError(f"two classes have one name: {_shorten(list(map(shown, names)))}")
    given = {name: to_sentences(part, names, numbers) for name, part in parts.items()}
    held_out = [sentence for name, part in given.items() if name != "train" for sentence in part]
    train = without_repeats(given["train"], held_out, said)
    missing = [name for name in ("test", "validation") if name not in given]
    splits = {**given, "train": train}
    if missing:
        shares = dict.fromkeys(missing, HELD_OUT) | {"train": 1 - HELD_OUT * len(missing)}
        splits |= split_by_hash(train, shares)
        for label in sorted({s.label for s in train} - {s.label for s in splits["train"]}):
            keys = {key_of(s) for s in train if s.label == label}
            for name in missing:
                splits["train"] += [s for s in splits[name] if key_of(s) in keys]
                splits[name] = [s for s in splits[name] if key_of(s) not in keys]
    splits = {name: splits[name] for name in SPLITS}
    for name, part in splits.items():
        if len({sentence.label for sentence in part}) < 2:
            origin = "split off the training rows" if name in missing else "given"
            raise CompactMindError(
                f"the {name} split ({origin}) has {len(part)} rows of fewer than two classes: more rows are needed"
                + (f", or a file of its own (--{name})" if name in missing else "")
                + _after(said)
            )
    pairs = any(sentence.pair is not None for sentence in splits["train"])
    return Task(names, pairs), splits, said + imbalance(splits, names)


def imbalance(splits: dict[str, list[Sentence]], names: Sequence[str]) -> list[str]:
    """Return what the numbers of rows per class mean for what can be learnt and measured."""
    counts, said = {name: class_counts(part, names) for name, part in splits.items()}, []
    largest = max(names, key=lambda name: counts["train"][name])
    share = counts["train"][largest] / len(splits["train"])
    if share > MAJORITY:
        said.append(
            f"{share:.1%} of train is {shown(largest)}: always saying that is as accurate, so look at macro-F1 beside accuracy"
        )
    few = [f"{shown(name)} {count}" for name, count in counts["train"].items() if count < FEW_ROWS]
    if few:
        said.append(f"few training rows: {_shorten(few)}: hardly enough to learn from")
    for split_name in SPLITS:
        if absent := [shown(name) for name, count in counts[split_name].items() if not count]:
            said.append(f"{split_name} has no row of {_shorten(absent)}")
    return said


def class_counts(sentences: Iterable[Sentence], names: Sequence[str]) -> dict[str, int]:
    """Return the rows of every class."""
    counts = Counter(sentence.label for sentence in sentences)
    return {name: counts[index] for index, name in enumerate(names)}


def _rows(count: int) -> str:
    return f"{count} row" + "s" * (count != 1)


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _named(label: str) -> str:
    return repr(shown(label))


def _after(said: Sequence[str]) -> str:
    """Return what was counted before an error, to stand at its end: often its cause."""
    return f" ({'; '.join(said)})" if said else ""


def _shorten(words: list[str]) -> str:
    return ", ".join(words[:SHOWN]) + (f" and {len(words) - SHOWN} more" if len(words) > SHOWN else "")


def describe(splits: dict[str, list[Sentence]], names: Sequence[str]) -> list[str]:
    """Return a line per split: its rows, and how many are of each class."""
    lines = []
    for name, part in splits.items():
        counts = [f"{shown(label)} {count} ({count / len(part):.1%})" for label, count in class_counts(part, names).items()]
        lines.append(f"{name} {len(part)} rows: {_shorten(counts)}")
    return lines


def as_rows(sentences: Iterable[Sentence]) -> list[dict]:
    """Return the rows as they are written to a split's jsonl file."""
    return [
        {"sentence": s.text, **({} if s.pair is None else {"pair": s.pair}), "label": s.label} for s in sentences
    ]  # fmt: skip
