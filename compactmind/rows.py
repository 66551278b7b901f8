"""The rows of a file: tsv, csv, jsonl or parquet, each a dict from column to what stands there."""

import csv
import io
import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

from compactmind.errors import CompactMindError

TEXT_COLUMNS = ("sentence", "text", "content")
"""Names under which the sentence is looked for: copies of SST-2 differ, sometimes between their own two files."""
HALF_A_PAIR = re.compile("[\ud800-\udfff]")
"""What JSON can spell and no encoding can write: half of an emoji, as careless truncation leaves it."""
BLANK = object()
"""Stands for a blank line of a jsonl file: no row, but counted, so that row numbers are those an editor shows."""
READABLE = (".tsv", ".jsonl", ".parquet", ".csv")


def read_rows(path: Path, names: Sequence[str] = ()) -> list:
    """Return the rows of a tsv, csv, jsonl or parquet file as dicts, BLANK for blank lines of jsonl.

    `names`: of the columns of a tsv or csv file without a header. Raises CompactMindError if the file cannot be read.
    """
    try:
        if path.suffix.lower() == ".jsonl":
            return read_json_lines(path)
        if path.suffix.lower() == ".parquet":
            import pandas  # here: who only asks a model needs none

            return pandas.read_parquet(path).to_dict("records")
        if path.suffix.lower() in (".tsv", ".csv"):
            return _read_table(path, names)
    except (OSError, ValueError) as error:  # what pandas and UTF-8 have to say are ValueErrors
        raise unreadable(path, error) from None
    raise CompactMindError(f"{path}: cannot read {path.suffix!r} files, expected one of {', '.join(READABLE)}")


def unreadable(path: Path, error: Exception) -> CompactMindError:
    """Return the error that says in one line why a file cannot be read."""
    reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
    return CompactMindError(f"{path} cannot be read: {reason}. Fix or delete it, then run `python download_model.py`")


def _read_table(path: Path, names: Sequence[str] = ()) -> list[dict[str, str]]:
    """Return the rows of a tsv or csv file; raises ValueError (or what pandas raises) if it is no table of text."""
    import pandas

    with open(path, encoding="utf-8-sig", newline="") as file:  # a byte order mark is none of the first name's letters
        content = file.read()
    before, nul, _ = content.partition("\0")  # pandas would end the sentence there, silently
    if nul:
        raise ValueError(f"line {before.count(chr(10)) + 1} holds a NUL character")
    separator, quoting = ("\t", csv.QUOTE_NONE) if path.suffix.lower() == ".tsv" else (",", csv.QUOTE_MINIMAL)
    options = {"sep": separator, "quoting": quoting, "dtype": str, "keep_default_na": False, "index_col": False}
    if names:
        return pandas.read_csv(io.StringIO(content), header=None, names=list(names), **options).to_dict("records")
    header = pandas.read_csv(io.StringIO(content), header=None, nrows=1, **options).iloc[0].tolist()
    if twice := [name for name in (*TEXT_COLUMNS, "label") if header.count(name) > 1]:
        raise ValueError(f"two columns are named {twice[0]!r}")
    with warnings.catch_warnings():
        warnings.simplefilter("error", pandas.errors.ParserWarning)  # what the first row has too much would be left out
        try:
            return pandas.read_csv(io.StringIO(content), **options).to_dict("records")
        except pandas.errors.ParserWarning:
            raise ValueError(f"row 1 has more columns than the {len(header)} of the header: quote what holds a {separator!r}") from None


def read_json_lines(path: Path) -> list:
    """Return one value per line of a jsonl file, BLANK for blank lines. Raises CompactMindError naming the row."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            rows.append(BLANK)
        else:
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:  # RecursionError: brackets nested deeper than Python goes
                raise CompactMindError(f"{path}, row {number}: not valid JSON ({error}): {line[:80]!r}") from None
    return rows if any(row is not BLANK for row in rows) else []
