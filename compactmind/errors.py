"""The one exception a user is meant to read: it names the value, the valid choices and the command that fixes it."""

import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager


class CompactMindError(Exception):
    """A problem with input, settings or files that the user can fix. Scripts print it without a traceback."""


def first_line(error: BaseException) -> str:
    """Return what an error says, on one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def shown(value: object) -> str:
    """Return a value as a message shows it: of one with more than 60 characters the beginning."""
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Inside the `with` block a package that is not installed is a CompactMindError naming the extra of this one that brings it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise CompactMindError(f"{error.name} is not installed: {how_to_add(extra)}") from None


def how_to_add(extra: str) -> str:
    """Return the command that installs an extra: of the installed package, or where it is imported from a clone, in that."""
    try:
        importlib.metadata.version("compactmind")
    except importlib.metadata.PackageNotFoundError:
        return f"pip install '.[{extra}]', in the folder of the clone"
    return f"pip install 'compactmind[{extra}]'"
