"""Labelled sentences: reading, splitting, tokenizing once, and length-bucketed batches."""

import hashlib
import json
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_pt_utils import LengthGroupedSampler

from compactmind.errors import CompactMindError, shown
from compactmind.files import lock_directory, sha256_of, write_json_atomically, write_text_atomically
from compactmind.rows import BLANK, HALF_A_PAIR, TEXT_COLUMNS, read_rows
from compactmind.task import DESCRIPTION, Task, class_text, read_task

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Sentence:
    """A labelled sentence."""

    text: str
    label: int
    """Its class, an index into the names of the task: of sentiment 0 negative, 1 positive."""
    pair: str | None = None
    """The second text where a row has two: premise and hypothesis, question and answer."""


def read_labelled_sentences(path: Path, task: Task = Task()) -> list[Sentence]:  # noqa: B008  frozen
    """Read a tsv, csv, jsonl or parquet file with the columns `sentence` (or `text`, `content`), `label` and of a task of pairs `pair`.

    The label is the index of a class. Raises CompactMindError naming the file and the row (counted from 1, without the header) of the
    first problem.
    """
    if not path.is_file():
        raise CompactMindError(f"{path} not found: run `python download_model.py` first")
    rows = read_rows(path)
    if not rows:
        raise CompactMindError(f"{path} holds no sentences: it needs the columns sentence and label and at least one row")
    return [check_row(f"{path}, row {number}", row, task) for number, row in enumerate(rows, start=1) if row is not BLANK]


def all_texts(sentences: Iterable[Sentence]) -> list[str]:
    """Return all texts of sentences, the second ones of pairs too."""
    return [text for sentence in sentences for text in (sentence.text, sentence.pair) if text is not None]


def check_row(where: str, row: object, task: Task = Task()) -> Sentence:  # noqa: B008  frozen
    """Return the sentence of a row that has been read. Raises CompactMindError naming it as `where` and what is wrong with it."""
    column = next((name for name in TEXT_COLUMNS if name in row), None) if isinstance(row, dict) else None
    if column is None or "label" not in row:
        columns = sorted(map(shown, row)) if isinstance(row, dict) else type(row).__name__
        raise CompactMindError(f"{where}: expected the columns sentence and label, found {columns}")
    text, label = row[column], class_text(row["label"])
    missing = text is None or (isinstance(text, float) and math.isnan(text))  # NaN: what a parquet file reads as
    if not missing and not isinstance(text, str):
        raise CompactMindError(f"{where}: the sentence is of type {type(text).__name__}, not text: {str(text)[:60]!r}")
    if missing or not text.strip():
        raise CompactMindError(f"{where}: the sentence is empty")
    if HALF_A_PAIR.search(text):
        raise CompactMindError(f"{where}: half a surrogate pair, which is no character: {text[:60]!r}")
    if label not in map(str, range(len(task.labels))):
        choices = ", ".join(f"{index} ({name})" for index, name in enumerate(task.labels[:-1]))
        choices += f" or {len(task.labels) - 1} ({task.labels[-1]})"
        raise CompactMindError(f"{where}: label {shown(repr(row['label']))} is not {choices}: {text[:60]!r}")
    if task.pairs and not isinstance(row.get("pair"), str):
        raise CompactMindError(f"{where}: the second text of the pair (pair) is missing: {text[:60]!r}")
    return Sentence(text.strip(), int(label), row["pair"] if task.pairs else None)


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


def write_dataset(data_dir: Path, splits: dict[str, list[Sentence]], source: str) -> dict:
    """Write the sentences of each split with `write_splits`; the description counts the positive ones."""
    rows = {name: [{"sentence": s.text, "label": s.label} for s in splits[name]] for name in SPLITS}
    return write_splits(data_dir, rows, source, {name: {"positive": sum(s.label for s in splits[name])} for name in SPLITS})


def write_splits(
    data_dir: Path, splits: dict[str, list[dict]], source: str | dict, counts: dict[str, dict], **more: dict
) -> dict:
    """Write train/validation/test.jsonl and dataset.json, which vouches for them with their SHA-256. Returns that description.

    `counts` adds entries to what dataset.json says of a split, `more` to what it says of all. Everything is written beside the old files
    before the first of them is replaced: until then the old dataset is whole, from then on until the end dataset.json vouches for the new
    one and lists in `replaces` what the old files were, so that the next run knows them for its own. Raises CompactMindError rather than
    replace a file of somebody's own (`refuse_own_files`), and if another process is writing this data.
    """
    with lock_directory(data_dir / DESCRIPTION):
        return _write_splits(data_dir, splits, source, counts, more)


def _write_splits(
    data_dir: Path, splits: dict[str, list[dict]], source: str | dict, counts: dict[str, dict], more: dict[str, dict]
) -> dict:
    refuse_own_files(data_dir)
    description = {"source": source, **more, "splits": {}}
    new = {name: data_dir / f".{name}.jsonl.new" for name in SPLITS}
    try:
        for name, path in new.items():
            write_text_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in splits[name]))
            description["splits"][name] = {"rows": len(splits[name]), **counts[name], "sha256": sha256_of(path)}
        write_json_atomically(data_dir / DESCRIPTION, {**description, "replaces": sorted(_recorded_hashes(data_dir))})
        for name, path in new.items():
            os.replace(path, data_dir / f"{name}.jsonl")
    finally:
        for path in new.values():
            path.unlink(missing_ok=True)
    write_json_atomically(data_dir / DESCRIPTION, description)
    return description


def _recorded_hashes(data_dir: Path) -> set[str]:
    """Return the SHA-256 of every file that dataset.json says was written here, empty if it says nothing."""
    try:
        description = json.loads((data_dir / DESCRIPTION).read_text(encoding="utf-8"))
        return {split["sha256"] for split in description["splits"].values()} | set(description.get("replaces", []))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()


def refuse_own_files(data_dir: Path) -> None:
    """Raise CompactMindError if a split is there that `write_splits` did not write, or that was changed since: it is somebody's own."""
    vouched_for = _recorded_hashes(data_dir)
    for path in (data_dir / f"{name}.jsonl" for name in SPLITS):
        if path.exists() and sha256_of(path) not in vouched_for:
            raise CompactMindError(
                f"{path} was not written by download_model.py, or was changed since, and would be overwritten: move it away or delete "
                "it, then run `python download_model.py` (your own sentences go to sst2_data/glue/sst2/, text to wikitext_data/wiki.*.raw)"
            )


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
            what = "is being replaced, or that was interrupted" if "replaces" in description else "is missing or was changed"
            raise CompactMindError(f"{split} {what}: run `python download_model.py` again")
    return description


def data_fingerprint(data_dir: Path) -> str:
    """Return one SHA-256 over the three splits and the names of the classes: what a model was trained and chosen on.

    Those of sentiment are left out.
    """
    description = read_dataset_description(data_dir)
    content = "".join(description["splits"][name]["sha256"] for name in SPLITS)
    if "task" in description:
        content += json.dumps(description["task"]["labels"])
    return hashlib.sha256(content.encode()).hexdigest()


def spread(of: int, count: int) -> list[int]:
    """Return the numbers, from 0 to before `of`, of the middles of `count` equal parts; all where there are no more.

    What is next to each other in a text or a table is often of one kind: of one document, or of one class.
    """
    return list(range(of)) if of <= count else [(2 * index + 1) * of // (2 * count) for index in range(count)]


def far_first(of: int) -> list[int]:
    """Return the numbers from 0 to before `of` in an order of which every beginning is spread over all of them.

    Digits of the binary number backwards (van der Corput 1935): half way comes second, the quarters next. For what is read in part first.
    """
    return sorted(range(of), key=lambda number: f"{number:0{max(of - 1, 1).bit_length()}b}"[::-1])


def load_split(data_dir: Path, split: str) -> list[Sentence]:
    """Return the sentences of train, validation or test. Raises CompactMindError if they are missing or malformed."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}, expected one of {', '.join(SPLITS)}")
    return read_labelled_sentences(data_dir / f"{split}.jsonl", read_task(data_dir))


class EncodedSentences:
    """Sentences, or pairs of them, tokenized once, padded batch by batch.

    `input_ids` holds one list of token ids per row and `token_type_ids` of pairs (else None) as many zeros and ones, `labels` is an int64
    tensor of shape (rows,), `whole_lengths` the tokens each row has uncut and `cut` the number of rows that have more than `max_length`.
    Of a pair the longer text is cut first. Raises CompactMindError where only some rows are pairs.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sentences: Sequence[Sentence], max_length: int):
        alone = sum(sentence.pair is None for sentence in sentences)
        if 0 < alone < len(sentences):
            raise CompactMindError(f"{alone} of {len(sentences)} texts have no second text beside them: give each one, or none")
        self.pairs = len(sentences) > 0 and not alone

        def encode(part: Sequence[Sentence], **options) -> dict[str, list[list[int]]]:
            texts = [[s.text for s in part], *([[s.pair for s in part]] if self.pairs else [])]
            return tokenizer(*texts, return_token_type_ids=self.pairs, **options)

        encoded = encode(sentences, truncation=True, max_length=max_length)
        self.input_ids, self.token_type_ids = encoded["input_ids"], encoded.get("token_type_ids")
        self.max_length, self.whole_lengths = max_length, [len(ids) for ids in self.input_ids]
        if full := [row for row, length in enumerate(self.whole_lengths) if length >= max_length]:
            whole = encode([sentences[row] for row in full], verbose=False)["input_ids"]
            for row, ids in zip(full, whole, strict=True):
                self.whole_lengths[row] = len(ids)
        self.cut = sum(length > max_length for length in self.whole_lengths)
        self.labels = torch.tensor([sentence.label for sentence in sentences])
        self.pad_token_id = tokenizer.pad_token_id

    def __len__(self) -> int:
        return len(self.input_ids)

    def describe_cut(self) -> str:
        """Return how many rows lose their end at `max_length`, and which length would cut 1% of them."""
        rows = len(self)
        if not self.cut:
            return f"none of {rows} sentences is cut at {self.max_length} tokens"
        said = f"{self.cut} of {rows} sentences ({self.cut / rows:.1%}) {'is' if self.cut == 1 else 'are'} cut at {self.max_length} tokens"
        enough = self.length_of(0.99)
        return said + (f"; at {enough} it would be 1%" if enough > self.max_length else "")

    def length_of(self, share: float) -> int:
        """Return the tokens that a `share` of the rows has at most."""
        return sorted(self.whole_lengths)[math.ceil(share * len(self)) - 1]

    def collate(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return a batch padded to its longest row, with zeros where the tokenizer has no padding token.

        `input_ids`, `attention_mask` (1 keep, 0 padding), of pairs `token_type_ids`: (len(rows), longest); `labels`, `rows`: (len(rows),).
        """
        ids = [torch.tensor(self.input_ids[row], dtype=torch.long) for row in rows]
        input_ids = pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id or 0)
        lengths = torch.tensor([len(row) for row in ids])
        batch = {
            "input_ids": input_ids,
            "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
            "labels": self.labels[list(rows)],
            "rows": torch.tensor(list(rows)),
        }
        if self.token_type_ids is not None:
            types = [torch.tensor(self.token_type_ids[row], dtype=torch.long) for row in rows]
            batch["token_type_ids"] = pad_sequence(types, batch_first=True)
        return batch

    def training_batches(self, batch_size: int, seed: int, processes: int = 1) -> DataLoader:
        """Return a loader over all rows in random order, rows of similar length together (little padding).

        Several processes take the batches in turn; the order is that of one process with as many sentences per step as all of them.
        """
        lengths = [len(ids) for ids in self.input_ids]
        sampler = LengthGroupedSampler(batch_size * processes, lengths=lengths, generator=torch.Generator().manual_seed(seed))
        return DataLoader(range(len(self)), batch_size=batch_size, sampler=sampler, collate_fn=self.collate)

    def evaluation_batches(self, batch_size: int) -> DataLoader:
        """Return a loader over all rows from short to long; `rows` says where each result belongs."""
        order = sorted(range(len(self)), key=lambda row: len(self.input_ids[row]))
        return DataLoader(order, batch_size=batch_size, collate_fn=self.collate)


def model_inputs(batch: dict[str, torch.Tensor], model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return what of a batch of `EncodedSentences` a model reads, wrapped for several processes or not, on its device.

    Token ids, mask, and of pairs the token types where the model has two of them: DistilBERT has none, RoBERTa one.
    """
    names = ["input_ids", "attention_mask"]
    if "token_type_ids" in batch and reads_token_types(model):
        names.append("token_type_ids")
    device = next(model.parameters()).device
    return {name: batch[name].to(device) for name in names}


def reads_token_types(model: PreTrainedModel) -> bool:
    """Tell whether a model has two token types, by which it tells the texts of a pair apart."""
    return (getattr(getattr(model, "module", model).config, "type_vocab_size", 0) or 0) > 1


def require_same_texts(model: PreTrainedModel, sentences: EncodedSentences) -> None:
    """Raise CompactMindError if a model was trained on pairs of texts and these are single, or the other way round; some do not say."""
    wanted = getattr(model.config, "sentence_pairs", None)
    if wanted is not None and wanted != sentences.pairs:
        trained_on = ("pairs of texts and was given single ones", "single texts and was given pairs")[not wanted]
        raise CompactMindError(
            f"the model was trained on {trained_on}: use the data it was trained on (--pair_column of download_model.py)"
        )
