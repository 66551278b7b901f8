"""Running text for language models: reading it, keeping its parts apart, and cutting it into windows of tokens."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from compactmind.data import SPLITS, far_first, spread, write_splits
from compactmind.errors import CompactMindError
from compactmind.rows import BLANK, HALF_A_PAIR, read_json_lines, unreadable

JOIN = "\n\n"
CHARACTERS_PER_TOKEN = 8
"""More than a token has on average: when only the first windows are wanted, a prefix this long is tokenized, and where it is too short
one four times as long."""
LAST = 16
"""Tokens at the end of a prefix that may be others where the text goes on."""
WINDOW_CHOICES = ("spread", "first")
"""Which windows of a text are taken where not all are. The first ones are of a few documents; spread ones stand for the whole text."""
CALIBRATION_SPAN = 16
"""Calibration text is spread over so many times as many windows: neighbouring ones are of one document."""
READABLE = (".raw", ".txt", ".tokens", ".parquet", ".jsonl")


def read_documents(path: Path) -> list[str]:
    """Return the documents of a text file: one per line of raw text, one per row (column `text`) of jsonl and parquet.

    Lines keep their newline and blank ones become empty documents, which is how the WikiText-2 of the hub stores them and
    what published perplexities are measured on. Raises CompactMindError naming the file and the row.
    """
    if not path.is_file():
        raise CompactMindError(f"{path} not found: run `python download_model.py` first")
    if path.suffix.lower() == ".jsonl":
        return [_text_of(path, number, row) for number, row in enumerate(read_json_lines(path), start=1) if row is not BLANK]
    try:
        if path.suffix.lower() == ".parquet":
            import pandas

            rows = pandas.read_parquet(path, columns=["text"]).to_dict("records")
            return [_text_of(path, number, row) for number, row in enumerate(rows, start=1)]
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError, KeyError) as error:
        raise unreadable(path, error) from None
    return [line + "\n" if line.strip() else "" for line in (lines[:-1] if lines[-1] == "" else lines)]


def _text_of(path: Path, number: int, row: object) -> str:
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise CompactMindError(f"{path}, row {number}: expected an object with the key text and a string: {str(row)[:80]}")
    if HALF_A_PAIR.search(row["text"]):
        raise CompactMindError(f"{path}, row {number}: half a surrogate pair, which is no character: {row['text'][:60]!r}")
    return row["text"]


def write_text(text_dir: Path, splits: dict[str, list[str]], source: dict) -> dict:
    """Write train/validation/test.jsonl and the dataset.json that vouches for them; returns that description."""
    rows = {name: [{"text": document} for document in splits[name]] for name in SPLITS}
    return write_splits(text_dir, rows, source, {name: {"characters": sum(map(len, splits[name]))} for name in SPLITS})


def load_documents(text_dir: Path, split: str) -> list[str]:
    """Return the documents of train (calibration, retraining), validation (choices) or test (reported numbers only).

    Raises CompactMindError if they are missing or malformed.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}, expected one of {', '.join(SPLITS)}")
    return read_documents(text_dir / f"{split}.jsonl")


def token_windows(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], seq_len: int, max_windows: int = 0, choice: str = "first"
) -> torch.Tensor:
    """Return non-overlapping windows of the documents joined by a blank line and tokenized once, int64 (windows, seq_len).

    At most `max_windows` of them (0 = all), in the order of the text: the `first`, or `spread` evenly over the whole of it, which takes the
    time to tokenize all of it. An incomplete last window is dropped. Raises CompactMindError if the text is shorter than one window,
    ValueError on another choice.
    """
    if choice not in WINDOW_CHOICES:
        raise ValueError(f"unknown choice of windows {choice!r}, expected one of {', '.join(WINDOW_CHOICES)}")
    joined = JOIN.join(documents)
    wanted = max_windows * seq_len if choice == "first" else 0
    characters = wanted * CHARACTERS_PER_TOKEN or len(joined)
    while True:
        ids = tokenizer(joined[:characters], return_tensors="pt", verbose=False)["input_ids"][0]
        if len(ids) > wanted + LAST or characters >= len(joined):
            break
        characters *= 4
    count = len(ids) // seq_len
    if count == 0:
        raise CompactMindError(
            f"the text has {len(ids)} tokens, less than one window of {seq_len}: use more text or a smaller --seq_len"
        )
    windows = ids[: count * seq_len].view(count, seq_len)
    if choice == "spread" and max_windows:
        return windows[spread(count, max_windows)]
    return windows[:max_windows] if max_windows else windows


def calibration_of(windows: torch.Tensor, count: int) -> torch.Tensor:
    """Return the windows (`count`, seq_len) of training text (windows, seq_len) that methods observe: spread over the first
    CALIBRATION_SPAN times as many, fewer if there are not so many, in an order of which every beginning is spread too."""
    chosen = windows[spread(min(len(windows), CALIBRATION_SPAN * count), count)]
    return chosen[far_first(len(chosen))]


def calibration_windows(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], seq_len: int, count: int) -> torch.Tensor:
    """Return `calibration_of` the windows that `token_windows` cuts documents into; it reads no more of them than that takes."""
    return calibration_of(token_windows(tokenizer, documents, seq_len, CALIBRATION_SPAN * count), count)
