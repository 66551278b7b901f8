"""Writes the windows that peers are calibrated on, as a JSON list of lists of token ids.

Run:   python benchmarks/peers/calibration.py --model models/llama --text wiki.valid.raw --output calibration.json
Reads: the model's tokenizer; a text file as it is, or the validation split of a text folder

Peers read token ids, so that all of them, and our own methods, see the same windows. A file is one text, tokenized once as it stands, as
llama.cpp's perplexity reads it; the documents of a folder are joined by a blank line. Never give it the test split.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from compactmind.text import load_documents, token_windows  # noqa: E402


@dataclass(frozen=True)
class CalibrationConfig:
    output: Path
    """File to write."""
    model: Path = Path("models/llama")
    """Model whose tokenizer cuts the text."""
    text: Path = Path("wikitext_data")
    """One text file (wiki.valid.raw), or a folder with validation.jsonl."""
    windows: int = 24
    """How many windows."""
    seq_len: int = 512
    """Tokens of each."""


def text_windows(model: Path, text: Path, split: str, seq_len: int, windows: int, choice: str = "first") -> torch.Tensor:
    """Return windows of a text file as it stands, or of a split of a text folder: int64 (windows, seq_len); `choice`: see token_windows."""
    if not text.exists():
        raise SystemExit(f"error: {text} not found: a text file, or a folder that `python download_model.py` fills")
    documents = load_documents(text, split) if text.is_dir() else [text.read_text(encoding="utf-8")]
    return token_windows(AutoTokenizer.from_pretrained(model), documents, seq_len, windows, choice)


def main(config: CalibrationConfig) -> None:
    windows = text_windows(config.model, config.text, "validation", config.seq_len, config.windows)
    config.output.write_text(json.dumps(windows.tolist()), encoding="utf-8")
    print(f"{config.output}: {len(windows)} windows of {config.seq_len} tokens of {config.text}")


if __name__ == "__main__":
    main(tyro.cli(CalibrationConfig, config=(tyro.conf.FlagConversionOff,), use_underscores=True))
