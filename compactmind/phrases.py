"""SST-2's train split: 67,349 phrases of far fewer sentences. What is held out of it must be whole sentences, without their phrases.

For SST-2 alone: on long texts that are no phrases of each other it would cost gigabytes and find nothing.
"""

import bisect
from collections.abc import Callable, Sequence

from compactmind.data import Sentence, normalize, stable_share


def hold_out_whole_sentences(sentences: Sequence[Sentence], share: float) -> dict[str, list[Sentence]]:
    """Split into train and validation where many rows are fragments of others, as SST-2's phrases are of its sentences.

    Validation is a share (by `stable_share`) of the rows that are no fragment of another row; train is what remains without the
    fragments that occur in held-out sentences only. A random split would ask about sentences whose pieces were trained on. Words
    are compared after `normalize`; both parts keep the order of the rows.
    """
    texts = [normalize(sentence.text) for sentence in sentences]
    rows_within = fragment_finder(texts)
    known: set[str] = set()
    whole: set[str] = set()
    for text in sorted(texts, key=lambda text: -len(text.split())):
        if text not in known:
            whole.add(text)
            known |= rows_within(text)
    held_out = {text for text in whole if stable_share(text) < share}
    trainable = set().union(*map(rows_within, whole - held_out))
    return {
        "train": [sentence for sentence, text in zip(sentences, texts, strict=True) if text in trainable],
        "validation": [sentence for sentence, text in zip(sentences, texts, strict=True) if text in held_out],
    }


def fragment_finder(texts: Sequence[str]) -> Callable[[str], set[str]]:
    """Return a function that gives those of the normalized `texts` that are a run of words of the text it is asked about.

    In a sorted list the texts with which a string begins are the greatest one that is not greater than the string, or lie on its
    chain of shorter and shorter beginnings. So one search per word finds all that begin there, and memory grows with the texts,
    not with the square of their lengths as it would if every run of words were kept.
    """
    ordered = sorted({f"{text} " for text in texts})  # the space ends a word: "a go" is no beginning of "a good film"
    longest = max(map(len, ordered), default=0)
    beginning = []  # of each text: the position of the longest other one with which it begins, -1 for none
    for position, text in enumerate(ordered):
        shorter = position - 1
        while shorter >= 0 and not text.startswith(ordered[shorter]):
            shorter = beginning[shorter]
        beginning.append(shorter)

    def rows_within(text: str) -> set[str]:
        text, start, matched = f"{text} ", 0, set()
        while start < len(text):
            rest = text[start : start + longest]
            position = bisect.bisect_right(ordered, rest) - 1
            while position >= 0 and not rest.startswith(ordered[position]):
                position = beginning[position]
            while position >= 0 and ordered[position] not in matched:
                matched.add(ordered[position])
                position = beginning[position]
            start = text.index(" ", start) + 1
        return {row[:-1] for row in matched}

    return rows_within
