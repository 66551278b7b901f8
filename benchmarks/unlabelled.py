"""Sentences that nobody has labelled, out of the running text of the language models, and a few labelled ones: for `--unlabelled`.

Run:   python download_model.py
       python benchmarks/unlabelled.py             (seconds; docs/your_own_data.md says what comes next)
Reads: wikitext_data/train.jsonl (embedded profile: 23,476 IMDB reviews), sst2_data/train.jsonl
Writes: own_data/review_sentences.jsonl, `rows` sentences of 5 to 50 words, drawn by `seed`
        own_data/few.jsonl, every `every`th labelled sentence: as if no others were labelled
"""

import json
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import StageConfig, parse_command_line, run_stage  # noqa: E402
from compactmind.data import load_split  # noqa: E402
from compactmind.files import write_text_atomically  # noqa: E402
from compactmind.labelled import as_rows  # noqa: E402
from compactmind.text import load_documents  # noqa: E402

SHORTEST, LONGEST = 5, 50
"""Words of a sentence."""


@dataclass(frozen=True)
class BenchmarkConfig(StageConfig):
    text_dir: Path = Path("wikitext_data")
    """Running text, written by download_model.py."""
    output: Path = Path("own_data")
    """Folder for both tables."""
    rows: int = 20_000
    """Sentences to draw."""
    every: int = 13
    """Of so many labelled sentences the last one is kept."""


def sentences_of(document: str) -> list[str]:
    """Return the parts of a text that end like sentences, or at the end of a line."""
    parts = (part.strip() for part in re.split(r"(?<=[.!?])\s+|\n+|<br ?/?>", document))
    return [part for part in parts if SHORTEST <= len(part.split()) <= LONGEST]


def main(config: BenchmarkConfig) -> None:
    every = [sentence for document in load_documents(config.text_dir, "train") for sentence in sentences_of(document)]
    chosen = random.Random(config.seed).sample(every, min(config.rows, len(every)))
    few = as_rows(load_split(config.data_dir, "train")[config.every - 1 :: config.every])
    config.output.mkdir(parents=True, exist_ok=True)
    for name, rows in {"review_sentences": [{"text": text} for text in chosen], "few": few}.items():
        write_text_atomically(config.output / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        print(f"{config.output / f'{name}.jsonl'}: {len(rows):,} rows")


if __name__ == "__main__":
    run_stage(main, parse_command_line(BenchmarkConfig()))
