"""The classification tasks of GLUE: which columns hold what, what the classes are called, and what each is judged by.

Wang et al. 2019 (https://arxiv.org/abs/1804.07461). STS-B is no classification. The labels of the test sets are hidden: dev is what is
reported here, as papers do, and validation is split off train. Columns are called as on the hub (nyu-mll/glue) or as in GLUE's own files.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from compactmind.errors import CompactMindError
from compactmind.labelled import HIDDEN, Columns
from compactmind.rows import READABLE


@dataclass(frozen=True)
class GlueTask:
    """One task of GLUE."""

    columns: Columns
    labels: tuple[str, ...]
    metric: str = "accuracy"
    dev: tuple[str, ...] = ("validation", "dev")
    """What the part that is reported is called on the hub and in a folder."""


def _pair(first: tuple[str, ...], second: tuple[str, ...], *label: str) -> Columns:
    return Columns(first, ("label", *label), second, unlabelled=HIDDEN)


SENTENCE = Columns(("sentence",), header=("source", "label", "mark", "sentence"), unlabelled=HIDDEN)
"""CoLA's: its own files have no header."""


ENTAILED = ("entailment", "not_entailment")

GLUE = {
    "cola": GlueTask(SENTENCE, ("unacceptable", "acceptable"), "mcc"),
    "mnli": GlueTask(
        _pair(("premise", "sentence1"), ("hypothesis", "sentence2"), "gold_label"), ("entailment", "neutral", "contradiction"),
        dev=("validation_matched", "dev_matched"),
    ),
    "mrpc": GlueTask(_pair(("sentence1", "#1 String"), ("sentence2", "#2 String"), "Quality"), ("not_equivalent", "equivalent"), "f1"),
    "qnli": GlueTask(_pair(("question",), ("sentence",)), ENTAILED),
    "qqp": GlueTask(_pair(("question1",), ("question2",), "is_duplicate"), ("not_duplicate", "duplicate"), "f1"),
    "rte": GlueTask(_pair(("sentence1",), ("sentence2",)), ENTAILED),
    "wnli": GlueTask(_pair(("sentence1",), ("sentence2",)), ("not_entailment", "entailment")),
}  # fmt: skip
"""Name of the task -> what it is; sst2 is what this project reads without being told, see `split_sst2` of sources/sentences.py."""


def glue_files(folder: Path, name: str) -> dict[str, Path]:
    """Return the files of a task in a folder: train, and test for dev; empty if there are none.

    Raises CompactMindError if there is only one of them, or several for one part.
    """
    files = {}
    for part, stems in (("train", ("train",)), ("test", GLUE[name].dev)):
        pattern = re.compile(rf"({'|'.join(stems)})[.-]")
        paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in READABLE and pattern.match(path.name))
        if len(paths) > 1:
            names = ", ".join(path.name for path in paths)
            raise CompactMindError(f"{folder} holds several files for {stems[-1]} ({names}): join them, or leave one")
        if paths:
            files[part] = paths[0]
    if len(files) == 1:
        missing = "train.tsv" if "test" in files else f"{GLUE[name].dev[-1]}.tsv"
        raise CompactMindError(f"{folder} holds only half of {name}: add {missing}")
    return files
