"""A row of the report that cannot be measured fails alone, and so does one measurement of a row: both say why.

A row whose quality cannot be measured is `failed`, with its `error`. A cost that cannot be measured is left out of a measured row, whose
`not_measured` names it and the reason.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from compactmind.errors import CompactMindError

LONGEST = 300
"""Characters of a reason: some libraries put a page of advice into an exception."""


def reason_of(error: Exception) -> str:
    """Return what an exception says in one line; the kind of error goes before it unless it was written to be read."""
    message = " ".join(str(error).split())
    if not isinstance(error, CompactMindError):
        message = f"{type(error).__name__}: {message}".removesuffix(": ")
    return message if len(message) <= LONGEST else f"{message[: LONGEST - 3]}..."


def fail(row: dict[str, Any], error: Exception) -> None:
    """Make, in place, a row one that failed because of `error`, and say so."""
    row |= {"status": "failed", "error": reason_of(error)}
    print(f"{row['name']}: {row['error']}", flush=True)


def leave_out(row: dict[str, Any], what: str, error: Exception) -> None:
    """Note in a row, in place, that `what` was not measured because of `error`, and say so."""
    row.setdefault("not_measured", {})[what] = reason_of(error)
    print(f"{row['name']}: {what} is left out: {reason_of(error)}", flush=True)


@contextmanager
def row_fails_alone(row: dict[str, Any]) -> Iterator[None]:
    """Inside the `with` block an error makes the row, in place, one that failed; the program goes on after the block."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  any model may be a row, and whatever it raises must not cost the other rows
        fail(row, error)


@contextmanager
def cell_fails_alone(row: dict[str, Any], key: str) -> Iterator[None]:
    """Inside the `with` block an error leaves `row[key]` None, with the reason; the program goes on after the block."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  as above: what else is known of the row stays
        row[key] = None
        leave_out(row, key, error)


@contextmanager
def collecting(errors: dict[str, Exception], name: str) -> Iterator[None]:
    """Inside the `with` block an error is put into `errors` under a name; the program goes on after the block."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  as above
        errors[name] = error
