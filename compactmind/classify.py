"""Try a classifier on your own sentences.

Run:   python -m compactmind.classify "a lovely film" "two hours I will not get back"          (in this repository: python classify.py ...)
       python -m compactmind.classify --model models/student_pruned_w8a8 --json < reviews.txt > answers.jsonl      (a sentence per line)
       python -m compactmind.classify --model models/student_distilled "the premise" --pair "the hypothesis"      (a model trained on pairs
       of texts; or one argument or line with a tab between the two)
Reads: any directory under models/ with a classifier, or any Hugging Face sequence classifier.
Prints: label, probability of the label and text, tab-separated; with --json an object per line. The labels are the model's own names
        of its classes, positive and negative where it has two without names.
"""

if __name__ == "__main__":
    from compactmind.quick_start import quick_start

    with quick_start():  # what is imported below
        from compactmind import checkpoint, forward  # noqa: F401

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
from compactmind.evaluation.classifiers import class_names
from compactmind.forward import predict_logits
from compactmind.limits import positions_of


def as_sentences(texts: list[str], pair: str | None, reads_pairs: bool | None) -> list[Sentence]:
    """Return the texts with their second texts: `pair`, or where the model reads pairs what follows a tab.

    `reads_pairs` is None where a model of others does not say. Raises CompactMindError where it and what was given do not go together.
    """
    if pair is not None and reads_pairs is False:
        raise CompactMindError("the model was trained on single texts: leave out --pair")
    if pair is not None or not reads_pairs:
        return [Sentence(text, 0, pair) for text in texts]
    pairs = [text.split("\t") for text in texts]
    for text, parts in zip(texts, pairs, strict=True):
        if len(parts) != 2 or not all(part.strip() for part in parts):
            raise CompactMindError(
                f"the model was trained on pairs of texts: give the second of {text[:60]!r} with --pair, or behind a tab"
            )
    return [Sentence(first.strip(), 0, second.strip()) for first, second in pairs]


def classify(model, tokenizer, texts: list[Sentence], max_length: int) -> list[dict[str, object]]:
    """Return, per text, `text`, of a pair `pair`, `label`, `score` (probability of the label), and the probability of every class.

    These are `positive` of negative and positive, else `scores` by name; `cut`: true where the end was not read. Raises CompactMindError
    on a text without tokens and on a model whose answers are no classes or no numbers.
    """
    names = class_names(model)
    encoded = EncodedSentences(tokenizer, texts, min(max_length, positions_of(model) or max_length))
    for sentence, ids in zip(texts, encoded.input_ids, strict=True):
        if not ids:
            raise CompactMindError(f"the text {sentence.text!r} has no tokens for this model")
    probabilities = predict_logits(model, encoded, len(texts)).softmax(dim=-1)
    if not probabilities.isfinite().all():
        raise CompactMindError("the model's logits are not numbers: its weights are damaged, or its training diverged")
    answers = []
    for sentence, row, length in zip(texts, probabilities.tolist(), encoded.whole_lengths, strict=True):
        score, pair = max(row), {} if sentence.pair is None else {"pair": sentence.pair}
        answers.append({"text": sentence.text, **pair, "label": names[row.index(score)], "score": score})
        if set(names) == {"negative", "positive"}:
            answers[-1]["positive"] = row[names.index("positive")]
        else:
            answers[-1]["scores"] = dict(zip(names, row, strict=True))
        if length > encoded.max_length:
            answers[-1]["cut"] = True
    return answers


def in_batches(texts: Iterator[str], size: int) -> Iterator[list[str]]:
    """Return the texts, so many at a time, as they come."""
    while batch := list(islice(texts, size)):
        yield batch


def main(arguments: list[str] | None = None) -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="*", help="sentences; without any they are read from standard input, one per line")
    parser.add_argument("--pair", help="second text of every one, for a model trained on pairs of texts")
    parser.add_argument("--model", type=Path, default=Path("models/student_pruned"), help="directory of the classifier")
    parser.add_argument("--batch_size", type=int, default=32, help="sentences at a time")
    parser.add_argument("--max_length", type=int, help="tokens after which a sentence is cut; default: as in training, or 128")
    parser.add_argument("--json", action="store_true", help="print an object per line")
    options = parser.parse_args(arguments)
    if options.batch_size < 1 or options.max_length is not None and options.max_length < 2:
        parser.error(f"batch_size {options.batch_size} and max_length {options.max_length} must be at least 1 and 2")
    if not options.texts and (sys.stdin is None or sys.stdin.isatty()):
        parser.error('no sentence: give some, or pipe them in, for example "a lovely film"')
    silence_libraries()
    with errors_in_one_line():
        checkpoint = open_model(options.model, "SequenceClassification")
        foreign = checkpoint.manifest["kind"] == "foreign"
        reads_pairs = getattr(checkpoint.model.config, "sentence_pairs", None if foreign else False)
        max_length = options.max_length or checkpoint.manifest["stage"].get("config", {}).get("max_length", 128)
        read = cut = 0
        for batch in in_batches(texts_of(options.texts, sys.stdin and sys.stdin.buffer), options.batch_size):
            texts = as_sentences(batch, options.pair, reads_pairs)
            for row in classify(checkpoint.model, checkpoint.tokenizer, texts, max_length):
                read, cut = read + 1, cut + row.get("cut", False)
                if options.json:
                    print(json.dumps(row, ensure_ascii=False))
                else:
                    print(row["label"], f"{row['score']:.3f}", row["text"], *filter(None, [row.get("pair")]), sep="\t")
            sys.stdout.flush()
        if cut:
            longest = min(max_length, positions_of(checkpoint.model) or max_length)
            print(f"{cut} of {read} texts had more than {longest} tokens: their ends were not read", file=sys.stderr)


if __name__ == "__main__":
    main()
