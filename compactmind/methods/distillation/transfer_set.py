"""What students read with their teacher: the labelled texts, changed copies of them, and texts that nobody has labelled.

Hinton et al. 2015 (https://arxiv.org/abs/1503.02531) call it the transfer set; Turc et al. 2019 (https://arxiv.org/abs/1908.08962) add
plain text of the domain to it. What has no label gets the class the teacher gives it.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compactmind.data import SPLITS, EncodedSentences, Sentence, load_split
from compactmind.errors import CompactMindError, shown
from compactmind.files import sha256_of
from compactmind.labelled import key_of
from compactmind.methods.distillation.teacher_logits import cached_teacher_logits
from compactmind.methods.vocabulary import same_tokenizer
from compactmind.rows import BLANK, HALF_A_PAIR, TEXT_COLUMNS, read_rows
from compactmind.task import Task

SETTINGS = ("max_length", "eval_batch_size", "models_dir")
"""What `read_with_teacher` takes of the settings of a script."""


class Teacher(Protocol):
    """Who answers, as a checkpoint is loaded."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    """Of the weights."""


def read_unlabelled(path: Path, task: Task, known: Iterable[Sentence]) -> tuple[list[Sentence], int]:
    """Return the texts of a csv, tsv, jsonl or parquet file (column sentence, text or content, or the only one; of a task of pairs `pair`
    too), each once, and the number of rows that were left out: empty or broken ones, repeated ones, and those that ask the same as one of
    `known`, the labelled texts, held-out ones among them.

    Labels are 0 until the teacher has read them. Raises CompactMindError on a file that cannot be read, a column that is not there, and if
    nothing is left.
    """
    seen, kept, rows = {key_of(sentence) for sentence in known}, [], 0
    for number, row in enumerate(read_rows(path), start=1):
        if row is BLANK:
            continue
        rows, where = rows + 1, f"{path}, row {number}"
        names = list(row) if isinstance(row, dict) else []
        column = names[0] if len(names) == 1 else next((name for name in TEXT_COLUMNS if name in names), None)
        if column is None or (task.pairs and "pair" not in names):
            wanted = f"a column {', '.join(TEXT_COLUMNS[:-1])} or {TEXT_COLUMNS[-1]}" + " and a column pair" * task.pairs
            raise CompactMindError(f"{where}: expected {wanted}, found {', '.join(map(shown, names)) or type(row).__name__}")
        texts = [row[column], *([row["pair"]] if task.pairs else [])]
        if not all(isinstance(text, str) and text.strip() and not HALF_A_PAIR.search(text) for text in texts):
            continue
        sentence = Sentence(texts[0].strip(), 0, texts[1].strip() if task.pairs else None)
        if (key := key_of(sentence)) not in seen:
            seen.add(key)
            kept.append(sentence)
    if not kept:
        raise CompactMindError(f"{path} has {rows} rows and no text that is not among the labelled ones: leave --unlabelled out")
    return kept, rows - len(kept)


def _there(file: str) -> Path:
    if not Path(file).is_file():
        raise CompactMindError(f"{file} not found: give --unlabelled the path of a csv, tsv, jsonl or parquet file")
    return Path(file)


def unlabelled_record(file: str) -> dict[str, str]:
    """Return what a model of unlabelled texts depends on, for its manifest; of "" nothing. Raises CompactMindError if it is not there."""
    return {"unlabelled": sha256_of(_there(file))} if file else {}


def unlabelled_texts(file: str, data_dir: Path, task: Task, say: Callable[[str], None]) -> list[Sentence]:
    """Return what `read_unlabelled` does of a file beside the sentences of data_dir, of "" nothing; `say` is given the numbers."""
    if not file:
        return []
    texts, left_out = read_unlabelled(_there(file), task, [sentence for name in SPLITS for sentence in load_split(data_dir, name)])
    say(f"{len(texts)} texts without labels from {file}; {left_out} rows are left out: empty, broken, repeated or among the labelled ones")
    return texts


def label_by_teacher(labels: torch.Tensor, teacher_logits: torch.Tensor, labelled: int) -> torch.Tensor:
    """Return labels (rows,) in which the rows after the first `labelled` have the class of the largest teacher logit, (rows, classes)."""
    return torch.cat([labels[:labelled], teacher_logits[labelled:].argmax(dim=-1).to(labels.device, labels.dtype)])


def read_with_teacher(
    sentences_for: Callable[[PreTrainedTokenizerBase], Sequence[Sentence]], labelled: int, tokenizer: PreTrainedTokenizerBase,
    teacher: Teacher, accelerator: Accelerator, *, max_length: int, eval_batch_size: int, models_dir: Path,
) -> tuple[EncodedSentences, torch.Tensor]:  # fmt: skip
    """Return what a student with this tokenizer reads, and the teacher's logits of it, (rows, classes), from the cache if they are there.

    `sentences_for` returns the sentences for a tokenizer (the mask of a copy is its own), the `labelled` ones first; the class of the
    others is the teacher's.
    """
    own = EncodedSentences(tokenizer, sentences_for(tokenizer), max_length)
    by_teacher = own
    if not same_tokenizer(teacher.tokenizer, tokenizer):
        by_teacher = EncodedSentences(teacher.tokenizer, sentences_for(teacher.tokenizer), max_length)
    logits = cached_teacher_logits(teacher.model, teacher.fingerprint, by_teacher, eval_batch_size, models_dir, accelerator)
    own.labels = label_by_teacher(own.labels, logits, labelled)
    return own, logits
