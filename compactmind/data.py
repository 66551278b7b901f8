"""Labelled sentences: reading, splitting, tokenizing once, and length-bucketed batches."""

import csv
import hashlib
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase
from transformers.trainer_pt_utils import LengthGroupedSampler

from compactmind.errors import CompactMindError
from compactmind.files import sha256_of, write_json_atomically, write_text_atomically

SPLITS = ("train", "validation", "test")
DESCRIPTION = "dataset.json"
TEXT_COLUMNS = ("sentence", "text", "content")
"""Names under which the sentence is looked for: copies of SST-2 differ, sometimes between their own two files."""
BLANK = object()
"""Stands for a blank line of a jsonl file: no row, but counted, so that row numbers are those an editor shows."""
READABLE = (".tsv", ".jsonl", ".parquet", ".csv")


@dataclass(frozen=True)
class Sentence:
    """A labelled sentence."""

    text: str
    label: int
    """0 negative, 1 positive."""


def read_labelled_sentences(path: Path) -> list[Sentence]:
    """Read a tsv, csv, jsonl or parquet file with the columns `sentence` (or `text`, `content`) and `label`.

    Raises CompactMindError naming the file and the row (counted from 1, without the header) of the first problem.
    """
    if not path.is_file():
        raise CompactMindError(f"{path} not found: run `python download_model.py` first")
    try:
        if path.suffix == ".jsonl":
            rows = read_json_lines(path)
        elif path.suffix == ".parquet":
            rows = pandas.read_parquet(path).to_dict("records")
        elif path.suffix in (".tsv", ".csv"):
            separator, quoting = ("\t", csv.QUOTE_NONE) if path.suffix == ".tsv" else (",", csv.QUOTE_MINIMAL)
            frame = pandas.read_csv(
                path, sep=separator, quoting=quoting, dtype=str, keep_default_na=False, index_col=False, encoding="utf-8"
            )
            rows = frame.to_dict("records")
        else:
            raise CompactMindError(f"{path}: cannot read {path.suffix!r} files, expected one of {', '.join(READABLE)}")
    except (pandas.errors.EmptyDataError, pandas.errors.ParserError, UnicodeDecodeError, OSError, ValueError) as error:
        raise CompactMindError(
            f"{path} cannot be read: {error}. Fix or delete it, then run `python download_model.py`"
        ) from None
    if not rows:
        raise CompactMindError(f"{path} holds no sentences: it needs the columns sentence and label and at least one row")
    return [_check_row(path, number, row) for number, row in enumerate(rows, start=1) if row is not BLANK]


def read_json_lines(path: Path) -> list:
    """Return one value per line of a jsonl file, BLANK for blank lines. Raises CompactMindError naming the row."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CompactMindError(
            f"{path} cannot be read: {error}. Fix or delete it, then run `python download_model.py`"
        ) from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            rows.append(BLANK)
        else:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise CompactMindError(f"{path}, row {number}: not valid JSON ({error.msg}): {line[:80]!r}") from None
    return rows if any(row is not BLANK for row in rows) else []


def _check_row(path: Path, number: int, row: object) -> Sentence:
    where = f"{path}, row {number}"
    column = next((name for name in TEXT_COLUMNS if name in row), None) if isinstance(row, dict) else None
    if column is None or "label" not in row:
        columns = sorted(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise CompactMindError(f"{where}: expected the columns sentence and label, found {columns}")
    label = row["label"]
    if isinstance(label, float) and label.is_integer():  # a column with one missing value is read as floats
        label = int(label)
    text, label = row[column], str(label).strip()
    if not isinstance(text, str) or not text.strip():
        raise CompactMindError(f"{where}: the sentence is empty")
    if label not in ("0", "1"):
        raise CompactMindError(f"{where}: label {row['label']!r} is not 0 (negative) or 1 (positive): {text[:60]!r}")
    return Sentence(text.strip(), int(label))


def normalize(text: str) -> str:
    """Return the text with case, punctuation and spacing removed: what two spellings of one sentence share."""
    return " ".join(re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).lower()))


def stable_share(text: str) -> float:
    """Return a number in [0, 1) that depends on the normalized text only: the same in every run, order and release."""
    return int.from_bytes(hashlib.sha256(normalize(text).encode()).digest()[:8], "big") / 2**64


def deduplicate(sentences: Sequence[Sentence], against: Sequence[Sentence] = ()) -> list[Sentence]:
    """Return the sentences whose normalized text is new, first occurrence kept, none that occurs in `against`."""
    seen = {normalize(sentence.text) for sentence in against}
    kept = []
    for sentence in sentences:
        key = normalize(sentence.text)
        if key not in seen:
            seen.add(key)
            kept.append(sentence)
    return kept


def split_by_hash(sentences: Sequence[Sentence], shares: dict[str, float]) -> dict[str, list[Sentence]]:
    """Split by `stable_share`: each named split takes the next interval of [0, 1), the last one the rest.

    A sentence never changes its split when others are added or removed.
    """
    parts: dict[str, list[Sentence]] = {name: [] for name in shares}
    for sentence in sentences:
        position, upper = stable_share(sentence.text), 0.0
        for name, share in shares.items():
            upper += share
            if position < upper or name == list(shares)[-1]:
                parts[name].append(sentence)
                break
    return parts


def hold_out_whole_sentences(sentences: Sequence[Sentence], share: float) -> dict[str, list[Sentence]]:
    """Split into train and validation where many rows are fragments of others, as SST-2's phrases are of its sentences.

    Validation is a share (by `stable_share`) of the rows that are no fragment of another row; train is what remains without the
    fragments that occur in held-out sentences only. A random split would ask about sentences whose pieces were trained on. Words
    are compared after `normalize`; both parts keep the order of the rows.
    """
    known: set[str] = set()
    whole: set[str] = set()
    for text in sorted((normalize(sentence.text) for sentence in sentences), key=lambda text: -len(text.split())):
        if text not in known:
            whole.add(text)
            known |= _fragments(text)
    held_out = {text for text in whole if stable_share(text) < share}
    trainable = set().union(*(_fragments(text) for text in whole - held_out))
    return {
        "train": [sentence for sentence in sentences if normalize(sentence.text) in trainable],
        "validation": [sentence for sentence in sentences if normalize(sentence.text) in held_out],
    }


def _fragments(text: str) -> set[str]:
    """Return every run of words of a normalized text, itself included."""
    words = text.split()
    return {" ".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)} | {text}


def write_dataset(data_dir: Path, splits: dict[str, list[Sentence]], source: str) -> dict:
    """Write the sentences of each split with `write_splits`; the description counts the positive ones."""
    rows = {name: [{"sentence": s.text, "label": s.label} for s in splits[name]] for name in SPLITS}
    return write_splits(data_dir, rows, source, {name: {"positive": sum(s.label for s in splits[name])} for name in SPLITS})


def write_splits(data_dir: Path, splits: dict[str, list[dict]], source: str | dict, counts: dict[str, dict]) -> dict:
    """Write train/validation/test.jsonl and dataset.json, which is written last and vouches for the others.

    `counts` adds entries to what dataset.json says of a split. Returns that description.
    """
    (data_dir / DESCRIPTION).unlink(missing_ok=True)
    description = {"source": source, "splits": {}}
    for name in SPLITS:
        path = data_dir / f"{name}.jsonl"
        write_text_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in splits[name]))
        description["splits"][name] = {"rows": len(splits[name]), **counts[name], "sha256": sha256_of(path)}
    write_json_atomically(data_dir / DESCRIPTION, description)
    return description


def read_dataset_description(data_dir: Path) -> dict:
    """Return dataset.json after checking that every split is the file it describes. Raises CompactMindError."""
    path = data_dir / DESCRIPTION
    if not path.is_file():
        raise CompactMindError(f"{path} not found: run `python download_model.py` first")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        recorded = {name: description["splits"][name]["sha256"] for name in SPLITS}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CompactMindError(f"{path} is damaged ({error!r}): run `python download_model.py` again") from None
    for name, digest in recorded.items():
        split = data_dir / f"{name}.jsonl"
        if not split.is_file() or sha256_of(split) != digest:
            raise CompactMindError(f"{split} is missing or was changed: run `python download_model.py` again")
    return description


def data_fingerprint(data_dir: Path) -> str:
    """Return one SHA-256 over the three splits: the identity of the data a model was trained and chosen on."""
    splits = read_dataset_description(data_dir)["splits"]
    return hashlib.sha256("".join(splits[name]["sha256"] for name in SPLITS).encode()).hexdigest()


def load_split(data_dir: Path, split: str) -> list[Sentence]:
    """Return the sentences of train, validation or test. Raises CompactMindError if they are missing or malformed."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}, expected one of {', '.join(SPLITS)}")
    return read_labelled_sentences(data_dir / f"{split}.jsonl")


class EncodedSentences:
    """Sentences tokenized once, padded batch by batch.

    `input_ids` holds one list of token ids per row, `labels` is an int64 tensor of shape (rows,).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sentences: Sequence[Sentence], max_length: int):
        self.input_ids = tokenizer([s.text for s in sentences], truncation=True, max_length=max_length)["input_ids"]
        self.labels = torch.tensor([sentence.label for sentence in sentences])
        self.pad_token_id = tokenizer.pad_token_id

    def __len__(self) -> int:
        return len(self.input_ids)

    def collate(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return a batch padded to its longest row, with zeros where the tokenizer has no padding token.

        `input_ids`, `attention_mask` (1 keep, 0 padding): (len(rows), longest); `labels`, `rows`: (len(rows),).
        """
        ids = [torch.tensor(self.input_ids[row], dtype=torch.long) for row in rows]
        input_ids = pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id or 0)
        lengths = torch.tensor([len(row) for row in ids])
        return {
            "input_ids": input_ids,
            "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
            "labels": self.labels[list(rows)],
            "rows": torch.tensor(list(rows)),
        }

    def training_batches(self, batch_size: int, seed: int) -> DataLoader:
        """Return a loader over all rows in random order, rows of similar length together (little padding)."""
        lengths = [len(ids) for ids in self.input_ids]
        sampler = LengthGroupedSampler(batch_size, lengths=lengths, generator=torch.Generator().manual_seed(seed))
        return DataLoader(range(len(self)), batch_size=batch_size, sampler=sampler, collate_fn=self.collate)

    def evaluation_batches(self, batch_size: int) -> DataLoader:
        """Return a loader over all rows from short to long; `rows` says where each result belongs."""
        order = sorted(range(len(self)), key=lambda row: len(self.input_ids[row]))
        return DataLoader(order, batch_size=batch_size, collate_fn=self.collate)
