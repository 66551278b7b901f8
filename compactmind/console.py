"""What the scripts that try a model share: opening it, reading texts from standard input, and errors of one line."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from compactmind.checkpoint import Checkpoint, load_any
from compactmind.devices import default_device
from compactmind.errors import CompactMindError
from compactmind.evaluation.failures import reason_of
from compactmind.gguf_source import folder_of

TASKS = {
    "SequenceClassification": ("classifier", "classify.py, or python -m compactmind.classify"),
    "CausalLM": ("language model", "generate.py, or python -m compactmind.generate"),
}
"""What the name of an architecture says -> what such a model is called, and what to try it with."""


def open_model(directory: Path, task: str) -> Checkpoint:
    """Load a checkpoint, a Hugging Face folder or a GGUF file whose architecture is of `task`, a key of TASKS. Raises CompactMindError."""
    directory = folder_of(directory, Path("models"), lambda line: print(line, file=sys.stderr))
    try:
        checkpoint = load_any(directory, default_device())
    except CompactMindError as error:
        if not directory.exists():  # of one that was not named, either
            raise CompactMindError(f"{error}; --model takes any other folder") from None
        raise
    except Exception as error:  # noqa: BLE001  any folder may be given, and each library has its own way to say it cannot read one
        raise CompactMindError(f"{directory} could not be loaded ({reason_of(error)})") from error
    architecture = checkpoint.manifest["architecture"]
    if task not in architecture:
        instead = next((f"try {script}" for other, (_, script) in TASKS.items() if other in architecture), "it has no head for that")
        raise CompactMindError(f"{directory} is no {TASKS[task][0]} but a {architecture}: {instead}")
    return checkpoint


def texts_of(given: list[str], stream: BinaryIO) -> Iterator[str]:
    """Return the texts that were given, without any the lines of a stream as they come; blank ones are left out.

    Raises CompactMindError on one that is not UTF-8.
    """
    for number, line in enumerate(map(os.fsencode, given) if given else stream, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError:
            where = f"text {number}" if given else f"line {number} of standard input"
            raise CompactMindError(f"{where} is not UTF-8: convert it, for example with `iconv -f latin1 -t utf-8`") from None
        if text or given:
            yield text


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Inside the `with` block a problem the user can fix ends the program with one line, a reader that has gone with none."""
    try:
        yield
        sys.stdout.flush()
    except CompactMindError as error:
        raise SystemExit(f"error: {error}") from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes once more at the end
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
