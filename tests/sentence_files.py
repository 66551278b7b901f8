"""Files of labelled sentences as tests write them, and the message with which one is refused."""

import pytest

from compactmind.data import Sentence, read_labelled_sentences
from compactmind.errors import CompactMindError

ROWS = [Sentence("a good film", 1), Sentence('the "best", they say', 0), Sentence("naïve — and long", 1)]


def write(path, text: str):
    path.write_text(text, encoding="utf-8")
    return path


def refused(path) -> str:
    """Return the message with which a file is refused; it names the file."""
    with pytest.raises(CompactMindError) as caught:
        read_labelled_sentences(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


CONTENTS = {"tsv": "sentence\tlabel\ngood\t1\nbad\t0\n", "csv": "sentence,label\ngood,1\nbad,0\n"}
CONTENTS["jsonl"] = '{"sentence": "good", "label": 1}\n{"sentence": "bad", "label": 0}\n'
