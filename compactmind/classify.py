"""Try a classifier on your own sentences.

Run:   python -m compactmind.classify "a lovely film" "two hours I will not get back"          (in this repository: python classify.py ...)
       python -m compactmind.classify --model models/student_pruned_w8a8 --json < reviews.txt > answers.jsonl      (a sentence per line)
Reads: any directory under models/ with a classifier, or any Hugging Face sequence classifier.
Prints: label, probability of the label and sentence, tab-separated; with --json an object per line. The labels are the model's own names
        of its classes, positive and negative where it has two without names.
"""

import gc

if __name__ == "__main__":
    gc.disable()  # what importing makes stays: looking for garbage in it is a third of the time until the first answer

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from compactmind.checkpoint import silence_libraries
from compactmind.console import errors_in_one_line, open_model, texts_of
from compactmind.data import EncodedSentences, Sentence
from compactmind.errors import CompactMindError
from compactmind.evaluation.classifiers import class_names, positive_class
from compactmind.forward import predict_logits
from compactmind.limits import positions_of

if __name__ == "__main__":
    gc.freeze()
    gc.enable()


def classify(model, tokenizer, texts: list[str], max_length: int) -> list[dict[str, object]]:
    """Return, per text, `text`, `label`, `score` (probability of the label), and of two classes `positive` (probability of that one).

    Raises CompactMindError on a text without tokens and on a model whose answers are no classes or no numbers.
    """
    names = class_names(model)
    encoded = EncodedSentences(tokenizer, [Sentence(text, 0) for text in texts], min(max_length, positions_of(model) or max_length))
    for text, ids in zip(texts, encoded.input_ids, strict=True):
        if not ids:
            raise CompactMindError(f"the text {text!r} has no tokens for this model")
    probabilities = predict_logits(model, encoded, len(texts)).softmax(dim=-1)
    if not probabilities.isfinite().all():
        raise CompactMindError("the model's logits are not numbers: its weights are damaged, or its training diverged")
    answers = []
    for text, row in zip(texts, probabilities.tolist(), strict=True):
        score = max(row)
        answers.append({"text": text, "label": names[row.index(score)], "score": score})
        if len(names) == 2:
            answers[-1]["positive"] = row[positive_class(model)]
    return answers


def in_batches(texts: Iterator[str], size: int) -> Iterator[list[str]]:
    """Return the texts, so many at a time, as they come."""
    while batch := list(islice(texts, size)):
        yield batch


def main(arguments: list[str] | None = None) -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="*", help="sentences; without any they are read from standard input, one per line")
    parser.add_argument("--model", type=Path, default=Path("models/student_pruned"), help="directory of the classifier")
    parser.add_argument("--batch_size", type=int, default=32, help="sentences at a time")
    parser.add_argument("--max_length", type=int, default=128, help="tokens after which a sentence is cut")
    parser.add_argument("--json", action="store_true", help="print an object per line")
    asked = parser.parse_args(arguments)
    if asked.batch_size < 1 or asked.max_length < 2:
        parser.error(f"batch_size {asked.batch_size} and max_length {asked.max_length} must be at least 1 and 2")
    if not asked.texts and (sys.stdin is None or sys.stdin.isatty()):
        parser.error('no sentence: give some, or pipe them in, for example "a lovely film"')
    silence_libraries()
    with errors_in_one_line():
        checkpoint = open_model(asked.model, "SequenceClassification")
        for batch in in_batches(texts_of(asked.texts, sys.stdin and sys.stdin.buffer), asked.batch_size):
            for found in classify(checkpoint.model, checkpoint.tokenizer, batch, asked.max_length):
                if asked.json:
                    print(json.dumps(found, ensure_ascii=False))
                else:
                    print(f"{found['label']}\t{found['score']:.3f}\t{found['text']}")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
