"""What a data set asks of a classifier: which classes, of a text or of a pair of texts, and what it is judged by."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig

from compactmind.errors import CompactMindError

WHOLE_WITH_POINT = re.compile(r"([+-]?[0-9]{1,300})\.0*")
"""A whole number as a column with one missing value is read, and saved again: 1.0 is 1."""
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|[+-]?inf", re.IGNORECASE)
DESCRIPTION = "dataset.json"
"""What lies beside the splits and says what they are."""


@dataclass(frozen=True)
class Task:
    """What a data set asks of a classifier: one of several classes for a text, or for a pair of texts."""

    labels: tuple[str, ...] = ("negative", "positive")
    """Names of the classes, in the order of the logits."""
    pairs: bool = False
    """Whether every row is a pair of texts."""
    name: str = ""
    """What the data set is called: a GLUE task, a file, a data set of the hub; empty: the sentiment sentences of the profiles."""
    metric: str = "accuracy"
    """What the task is usually judged by: accuracy, f1 (of the last of two classes), mcc."""

    def head_settings(self) -> dict:
        """Return what `from_pretrained` makes a new head of."""
        names = dict(enumerate(self.labels))
        return {"num_labels": len(names), "id2label": names, "label2id": {name: index for index, name in names.items()}}

    def mark(self, config: PretrainedConfig) -> None:
        """Note in a model's configuration, in place, whether it is trained on pairs; what is made of the model keeps the note."""
        if self.name:
            config.sentence_pairs = self.pairs


def is_sentiment(names: Sequence[str]) -> bool:
    """Tell whether two names are those of negative and positive in any spelling, or no names (LABEL_0, LABEL_1)."""
    return len(names) == 2 and all(re.fullmatch(r"(pos|neg)(itive|ative)?|label_\d+", name.lower()) for name in names)


def read_task(data_dir: Path) -> Task:
    """Return the task of the data in `data_dir` as dataset.json has it, sentiment where it says nothing. Raises CompactMindError."""
    try:
        entry = json.loads((data_dir / DESCRIPTION).read_text(encoding="utf-8")).get("task")
        return Task(**{**entry, "labels": tuple(entry["labels"])}) if entry else Task()
    except FileNotFoundError:
        return Task()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CompactMindError(
            f"{data_dir / DESCRIPTION} is damaged ({error!r}): run `python download_model.py` again"
        ) from None


def class_text(value: object) -> str:
    """Return a label as text, the same one whatever kind of file it stood in: 1.0 is 1 and True is true, as text too."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip()
    if whole := WHOLE_WITH_POINT.fullmatch(text):
        return str(int(whole[1]))
    return text.lower() if text.lower() in ("true", "false") else text


def fraction_among(labels: Sequence[str]) -> str | None:
    """Return the first label that is no whole number where all of them are numbers, which are no classes then; else None."""
    fraction = next((label for label in labels if NUMBER.fullmatch(label) and not float(label).is_integer()), None)
    return fraction if fraction and all(map(NUMBER.fullmatch, labels)) else None
