"""Writes the windows that peers are calibrated on, as a JSON list of lists of token ids.

Run:   python benchmarks/peers/calibration.py --model models/llama --text wikitext_data --output calibration.json
Reads: the model's tokenizer; the validation split of a text folder, or a text file (wiki.valid.raw)

Peers read token ids, so that all of them, and our own methods, see the same windows: documents joined by a blank line, tokenized once,
no special tokens, as perplexity is measured. Never give it the test split.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from compactmind.text import load_documents, read_documents, token_windows  # noqa: E402


@dataclass(frozen=True)
class CalibrationConfig:
    output: Path
    """File to write."""
    model: Path = Path("models/llama")
    """Model whose tokenizer cuts the text."""
    text: Path = Path("wikitext_data")
    """Folder with validation.jsonl, or one text file."""
    windows: int = 32
    """How many windows."""
    seq_len: int = 512
    """Tokens of each."""


def main(config: CalibrationConfig) -> None:
    documents = load_documents(config.text, "validation") if config.text.is_dir() else read_documents(config.text)
    windows = token_windows(AutoTokenizer.from_pretrained(config.model), documents, config.seq_len, config.windows)
    config.output.write_text(json.dumps(windows.tolist()), encoding="utf-8")
    print(f"{config.output}: {len(windows)} windows of {config.seq_len} tokens")


if __name__ == "__main__":
    main(tyro.cli(CalibrationConfig, config=(tyro.conf.FlagConversionOff,), use_underscores=True))
