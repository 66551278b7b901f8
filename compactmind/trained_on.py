"""What a classifier was trained on, held against the data a stage reads: its classes must be those of the data, its sentences should be.

A model keeps the names of its classes in config.json and the fingerprint of its data in manifest.json, so that models left over from
earlier data are known before any weights are read.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from compactmind.data import data_fingerprint
from compactmind.devices import is_main_process
from compactmind.errors import CompactMindError
from compactmind.manifest import how_to_make, read_manifest
from compactmind.task import Task, is_sentiment, read_task


def class_names_of(directory: Path) -> tuple[str, ...]:
    """Return what the classifier in a folder calls its classes, in the order of its logits: LABEL_0, LABEL_1, ... if it has no names.

    Raises CompactMindError if config.json cannot be read.
    """
    try:
        names = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("id2label")
        names = names or {"0": "LABEL_0", "1": "LABEL_1"}  # transformers writes none where there are two without names
        return tuple(str(names[index]) for index in sorted(names, key=int))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CompactMindError(f"{directory / 'config.json'} is damaged ({error}): {_again(directory)}") from None


def same_classes(names: Sequence[str], labels: Sequence[str], in_order: bool = True) -> bool:
    """Tell whether a model's classes are those of the data: by name, or as many where the model has no names (LABEL_0, LABEL_1, ...).

    Without `in_order` they may come in another order and other capitals. Negative and positive may be spelt in any way.
    """
    names, labels = list(names), list(labels)
    if len(names) != len(labels):
        return False
    if all(re.fullmatch(r"label_\d+", name.lower()) for name in names):
        return True
    if tuple(labels) == Task().labels and is_sentiment(names):
        names = ["positive" if name.lower().startswith("pos") else "negative" for name in names]
    return names == labels or (not in_order and sorted(map(str.lower, names)) == sorted(map(str.lower, labels)))


def check_classes(directory: Path, data_dir: Path, in_order: bool = True) -> None:
    """Raise CompactMindError if the classifier in a folder is of other classes than the data: both, and the command that makes it anew.

    `in_order`: see `same_classes`.
    """
    names, labels = class_names_of(directory), read_task(data_dir).labels
    if not same_classes(names, labels, in_order):
        raise CompactMindError(
            f"{directory} was trained for other classes ({', '.join(names)}) than those of {data_dir} ({', '.join(labels)}): "
            f"{_again(directory)}"
        )


def warn_of_other_sentences(directories: Iterable[Path], data_dir: Path) -> None:
    """Print one line that names the classifiers trained on other sentences than those in `data_dir`, nothing if there are none.

    One whose manifest does not say what it was trained on is not named.
    """
    fingerprint = data_fingerprint(data_dir)
    others = [each for each in dict.fromkeys(directories) if read_manifest(each).get("data_fingerprint") not in (None, "", fingerprint)]
    if others and is_main_process():
        commands = dict.fromkeys(f"`{_command(each)}`" for each in others)
        print(
            f"warning: {', '.join(each.name for each in others)} {'was' if len(others) == 1 else 'were'} trained on other sentences than "
            f"those in {data_dir}, of the same classes; to train on these run {' and '.join(commands)}",
            flush=True,
        )


def check_trained_on(directories: Iterable[Path], data_dir: Path) -> None:
    """Raise CompactMindError on a checkpoint of other classes than the data; say in one line which are of other sentences."""
    directories = list(directories)
    for directory in directories:
        read_manifest(directory)
        check_classes(directory, data_dir)
    warn_of_other_sentences(directories, data_dir)


def _command(directory: Path) -> str:
    """Return what makes a checkpoint: the command its name stands for, else the script that its manifest names."""
    return how_to_make(directory) or f"python {read_manifest(directory)['stage'].get('script')}"


def _again(directory: Path) -> str:
    return f"run `{_command(directory)}` again" + ("" if how_to_make(directory) else ", with the settings it was made with")
