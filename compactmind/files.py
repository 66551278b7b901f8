"""Files and directories that are either whole or absent, whatever kills the process."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from compactmind.errors import CompactMindError


def sha256_of(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256_by_chunks(file)


def _sha256_by_chunks(file) -> str:
    """`hashlib.file_digest` for Python 3.10, which lacks it."""
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def require_free_space(directory: Path, needed_bytes: int) -> None:
    """Raise CompactMindError if the disk that holds `directory` has less than `needed_bytes` free."""
    existing = next(parent for parent in [directory, *directory.absolute().parents] if parent.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise CompactMindError(
            f"not enough disk space to write {directory}: {needed_bytes / 1e6:.0f} MB needed, {free_bytes / 1e6:.0f} MB free. "
            "Free some space (models/ holds every checkpoint) and run the same command again; nothing was changed."
        )


@contextlib.contextmanager
def explain_full_disk(target: Path) -> Iterator[None]:
    """Turn the operating system's "no space left" into a CompactMindError that names what was being written."""
    try:
        yield
    except Exception as error:
        # safetensors reports a failed write as an exception of its own, so the text is looked at too.
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise CompactMindError(
                f"the disk is full: {target} could not be written; what stood there before is unchanged. "
                "Free some space and run the same command again."
            ) from error
        raise


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to be written; on success it takes its place, on any error it vanishes.

    A reader sees the old content or the new one, never a part. The name is this process's own, so that several may write at once (the
    last one wins); what killed processes left is removed. Raises CompactMindError when the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{path.name}.tmp-*"):
        process = stale.name.rpartition(".tmp-")[2].partition("-")[0]
        if process.isdigit() and not psutil.pid_exists(int(process)):
            stale.unlink(missing_ok=True)
    with explain_full_disk(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.tmp-{os.getpid()}-")
    os.close(handle)
    temporary = Path(name)
    try:
        os.chmod(temporary, 0o644)
        with explain_full_disk(path):
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old content or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with explain_full_disk(path):
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.tmp-")
    try:
        with explain_full_disk(path), os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json_atomically(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    write_text_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def recover_directory(directory: Path) -> None:
    """Finish what a kill between the two renames of `replace_directory` left undone; otherwise do nothing."""
    displaced = directory.with_name(f".{directory.name}.old")
    if displaced.is_dir():
        if directory.exists():
            shutil.rmtree(displaced)
        else:
            displaced.rename(directory)


@contextlib.contextmanager
def replace_directory(directory: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """Yield an empty temporary sibling of `directory`; on success it takes its place, on any error it vanishes.

    A kill at any moment leaves the previous directory whole (under its own name, or to be put back by
    `recover_directory`). Raises CompactMindError when the disk is full.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    recover_directory(directory)
    for stale in directory.parent.glob(f".{directory.name}.tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)
    require_free_space(directory, needed_bytes)
    with explain_full_disk(directory):
        temporary = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}.tmp-"))
    try:
        os.chmod(temporary, 0o755)
        with explain_full_disk(directory):
            yield temporary
            for path in temporary.rglob("*"):
                if path.is_file():
                    with open(path, "rb+") as file:
                        os.fsync(file.fileno())
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    displaced = directory.with_name(f".{directory.name}.old")
    if directory.exists():
        directory.rename(displaced)
    temporary.rename(directory)
    if displaced.exists():
        shutil.rmtree(displaced)
