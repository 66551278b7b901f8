"""Try a classifier on your own sentences.

Run:   python classify.py "a lovely film" "two hours I will not get back"
       python classify.py --model models/student_pruned_w8a8 --json < reviews.txt > answers.jsonl      (a sentence per line)
Reads: any directory under models/ with a classifier, or any Hugging Face sequence classifier of two classes.
Prints: label, probability of the label and sentence, tab-separated; with --json an object per line.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch

from compactmind.checkpoint import load_any, silence_libraries
from compactmind.errors import CompactMindError
from compactmind.evaluation.classifiers import positive_class


@torch.inference_mode()
def classify(model, tokenizer, texts: list[str], max_length: int) -> list[dict[str, object]]:
    """Return, per text, `text`, `label` (positive or negative), `score` (probability of the label) and `positive` (of that class)."""
    inputs = tokenizer(texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt").to(model.device)
    inputs.pop("token_type_ids", None)
    probabilities = model(**inputs).logits.float().softmax(dim=-1)[:, positive_class(model)].tolist()
    return [
        {"text": text, "label": "positive" if p >= 0.5 else "negative", "score": max(p, 1 - p), "positive": p}
        for text, p in zip(texts, probabilities, strict=True)
    ]


def in_batches(texts: Iterator[str], size: int) -> Iterator[list[str]]:
    """Return the texts, so many at a time, as they come."""
    while batch := list(islice(texts, size)):
        yield batch


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="*", help="sentences; without any they are read from standard input, one per line")
    parser.add_argument("--model", type=Path, default=Path("models/student_pruned"), help="directory of the classifier")
    parser.add_argument("--batch_size", type=int, default=32, help="sentences at a time")
    parser.add_argument("--max_length", type=int, default=128, help="tokens after which a sentence is cut")
    parser.add_argument("--json", action="store_true", help="print an object per line")
    asked = parser.parse_args(arguments)
    if asked.batch_size < 1 or asked.max_length < 2:
        parser.error(f"batch_size {asked.batch_size} and max_length {asked.max_length} must be at least 1 and 2")
    if not asked.texts and sys.stdin.isatty():
        parser.error('no sentence: give some, or pipe them in, for example python classify.py "a lovely film"')
    silence_libraries()
    texts = iter(asked.texts) if asked.texts else (line.strip() for line in sys.stdin if line.strip())
    try:
        checkpoint = load_any(asked.model, "cuda" if torch.cuda.is_available() else "cpu")
        if "SequenceClassification" not in checkpoint.manifest["architecture"]:
            raise CompactMindError(
                f"{asked.model} is no classifier but a {checkpoint.manifest['architecture']}: try generate.py"
            )
        for batch in in_batches(texts, asked.batch_size):
            for found in classify(checkpoint.model, checkpoint.tokenizer, batch, asked.max_length):
                if asked.json:
                    print(json.dumps(found, ensure_ascii=False))
                else:
                    print(f"{found['label']}\t{found['score']:.3f}\t{found['text']}")
            sys.stdout.flush()
    except CompactMindError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
