"""More texts for a student to read with its teacher: copies of the training texts with words masked, or with a run of words alone.

Tang et al. 2019 (https://arxiv.org/abs/1903.12136): a word is masked with probability 0.1, and a quarter of the copies keep one run of 1
to 5 words. Their third change, another word of the same part of speech, needs a tagger and is left out. Nobody has labelled the copies:
the teacher's answer is all that is known of them.
"""

import random
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from compactmind.data import Sentence
from compactmind.errors import CompactMindError

MASKED = 0.1
"""Share of the words of a copy that are masked."""
RUNS = 0.25
"""Share of the copies that keep one run of words."""
LONGEST_RUN = 5
"""Words such a run has at most."""


def mask_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what stands for a hidden word in text that a tokenizer reads. Raises CompactMindError if it has nothing that does."""
    if not tokenizer.mask_token:
        raise CompactMindError("augment masks words, and this tokenizer has no mask token: use --augment 0")
    return tokenizer.mask_token


def augmented(sentences: Sequence[Sentence], copies: int, mask: str, seed: int) -> list[Sentence]:
    """Return the sentences, then so many changed copies of all of them, with the labels of the originals.

    Which words are changed depends on `seed` alone and not on `mask`: two tokenizers read the same copies. A text keeps one word at least
    that is not masked; of pairs both texts are masked, neither is cut.
    """
    draw = random.Random(seed)

    def masked(text: str) -> str:
        words = text.split()
        hidden = [draw.random() < MASKED for _ in words]
        if words and all(hidden):
            hidden[draw.randrange(len(words))] = False
        return " ".join(mask if hide else word for word, hide in zip(words, hidden, strict=True))

    def run_of(text: str) -> str:
        words = text.split()
        length = min(len(words), draw.randint(1, LONGEST_RUN))
        start = draw.randint(0, len(words) - length)
        return " ".join(words[start : start + length])

    def changed(sentence: Sentence) -> Sentence:
        if sentence.pair is not None:
            return replace(sentence, text=masked(sentence.text), pair=masked(sentence.pair))
        text = run_of(sentence.text) if draw.random() < RUNS else sentence.text
        return replace(sentence, text=masked(text))

    return [*sentences, *(changed(sentence) for _ in range(copies) for sentence in sentences)]
