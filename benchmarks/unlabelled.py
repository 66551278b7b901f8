"""Sentences that nobody has labelled, out of the running text of the language models: what `--unlabelled` was measured with.

Run:   python download_model.py
       python benchmarks/unlabelled.py             (a second; docs/your_own_data.md says what comes next)
Reads: wikitext_data/train.jsonl (embedded profile: 23,476 IMDB reviews)
Writes: own_data/review_sentences.jsonl, `rows` sentences of 5 to 50 words, drawn by `seed`
"""

import json
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import StageConfig, parse_command_line, run_stage  # noqa: E402
from compactmind.files import write_text_atomically  # noqa: E402
from compactmind.text import load_documents  # noqa: E402

SHORTEST, LONGEST = 5, 50
"""Words of a sentence."""


@dataclass(frozen=True)
class BenchmarkConfig(StageConfig):
    text_dir: Path = Path("wikitext_data")
    """Running text, written by download_model.py."""
    output: Path = Path("own_data/review_sentences.jsonl")
    """The table to write."""
    rows: int = 20_000
    """Sentences to draw."""


def sentences_of(document: str) -> list[str]:
    """Return the parts of a text that end like sentences, or at the end of a line."""
    parts = (part.strip() for part in re.split(r"(?<=[.!?])\s+|\n+|<br ?/?>", document))
    return [part for part in parts if SHORTEST <= len(part.split()) <= LONGEST]


def main(config: BenchmarkConfig) -> None:
    every = [sentence for document in load_documents(config.text_dir, "train") for sentence in sentences_of(document)]
    chosen = random.Random(config.seed).sample(every, min(config.rows, len(every)))
    config.output.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(config.output, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in chosen))
    print(f"{len(chosen)} of {len(every)} sentences: {config.output}")


if __name__ == "__main__":
    run_stage(main, parse_command_line(BenchmarkConfig()))
