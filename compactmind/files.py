"""Files and directories that are either whole or absent, whatever kills the process, and one writer at a time for each directory.

A reader never repairs: what an interrupted writer left behind is put in order by the next one that holds the directory's lock.
"""

import contextlib
import ctypes
import errno
import glob
import hashlib
import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from compactmind.errors import CompactMindError

MANIFEST = "manifest.json"
"""The file of a checkpoint that says what it is: manifest.py."""
WEIGHTS = "model.safetensors"
"""The weight file of a checkpoint of this project."""
LOCK_WAIT_SECONDS = 5.0
"""How long a writer waits for another one: long enough for one that only looks whether its output is up to date."""
UNWRITABLE = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "it is on a read-only file system",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
}
"""Errors of the operating system that a user can do something about."""
LOCKS = ".locks"
"""Folder beside what is locked, with an empty file for each name; they stay: a lock on a file that somebody removes protects nothing."""
EXCHANGE = 2
"""RENAME_EXCHANGE of renameat2(2)."""


# ---------------------------------------------------------------------------------------------------------------- reading
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


def weight_files(directory: Path) -> list[Path]:
    """Return the files that hold the weights of a Hugging Face folder, sorted: those that transformers would load, and no others.

    A whole file goes before an index of shards, safetensors before pickles. What lies beside them (the same weights in another
    format, adapters) does not count. Raises CompactMindError if there are none or if a shard of the index is missing.
    """
    for whole in (WEIGHTS, "pytorch_model.bin"):
        if (directory / whole).is_file():
            return [directory / whole]
        index = directory / f"{whole}.index.json"
        if not index.is_file():
            continue
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            files = [directory / name for name in names]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CompactMindError(f"{index} is no index of weight files ({error!r}): copy the folder again") from None
        for file in files:
            if not file.is_file():
                raise CompactMindError(f"{index} names {file.name}, which is not there: copy the folder again")
        return files
    lacking = "weights (model.safetensors or pytorch_model.bin, whole or in shards with an index)"
    if not (directory / "config.json").is_file():
        lacking = "model (no config.json)"
    raise CompactMindError(f"{directory} holds no {lacking}: run `python download_model.py`, or give another folder")


# ------------------------------------------------------------------------------------------------------------ what can fail
def free_space(directory: Path) -> int:
    """Return the bytes that are free on the disk that holds `directory`, or will."""
    place = resolve_directory(directory)
    return shutil.disk_usage(next(parent for parent in [place, *place.parents] if parent.exists())).free


def require_free_space(directory: Path, needed_bytes: int) -> None:
    """Raise CompactMindError if the disk that holds `directory` has less than `needed_bytes` free."""
    free = free_space(directory)
    if free < needed_bytes:
        raise CompactMindError(
            f"not enough disk space to write {directory}: {needed_bytes / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free. "
            "Free some space (models/ holds every checkpoint) and run the same command again; nothing was changed."
        )


def why_unwritable(error: BaseException | None) -> str | None:
    """Return in words why the operating system refused to write, None if this error is about something else.

    Libraries report a failed write as an exception of their own: safetensors says why in its text, torch.save raised it while it
    handled the system's.
    """
    while error is not None:
        if reason := UNWRITABLE.get(getattr(error, "errno", None)):
            return reason
        if "No space left" in str(error):
            return UNWRITABLE[errno.ENOSPC]
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def explain_unwritable(target: Path) -> Iterator[None]:
    """Turn a full disk, a read-only one and missing permissions into a CompactMindError that names what was being written."""
    try:
        yield
    except Exception as error:
        if reason := why_unwritable(error):
            raise CompactMindError(
                f"{reason}: {target} could not be written; what stood there before is unchanged. "
                "Mend that and run the same command again."
            ) from error
        raise


def fsync_directory(directory: Path) -> None:
    """Make the names in a directory outlast a power cut; does nothing where directories cannot be opened (Windows)."""
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# ------------------------------------------------------------------------------------------------------------------- files
@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to be written; on success it takes its place, on any error it vanishes.

    A reader sees the old content or the new one, never a part, also after a power cut. The name is this process's own, so that several
    may write at once (the last one wins); what killed processes left is removed. Raises CompactMindError when the disk is full or
    cannot be written.
    """
    with explain_unwritable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale_temporaries(path)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{_temporary_prefix(path)}{os.getpid()}-")
        os.close(handle)
    temporary = Path(name)
    try:
        with explain_unwritable(path):
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def remove_stale_temporaries(path: Path) -> None:
    """Remove what `replace_file` of a process of this machine that is no more has left beside `path`."""
    prefix = _temporary_prefix(path)
    for temporary in path.parent.glob(glob.escape(prefix) + "*"):
        process = temporary.name.removeprefix(prefix).partition("-")[0]
        if process.isdigit() and not _is_written_by(int(process), temporary):
            temporary.unlink(missing_ok=True)


def _is_written_by(process: int, temporary: Path) -> bool:
    """Tell whether the process that began a file runs; one that started a minute after the file was touched got the number later."""
    try:
        import psutil  # here: who only loads models needs none
    except ImportError:
        return True
    try:
        return psutil.Process(process).create_time() < temporary.stat().st_mtime + 60
    except (psutil.NoSuchProcess, FileNotFoundError):
        return False
    except psutil.AccessDenied:
        return True


def _temporary_prefix(path: Path) -> str:
    return f".{path.name.removeprefix('.')}.tmp-{socket.gethostname()}-"


def write_text_atomically(path: Path, text: str) -> None:
    """Write a text file in UTF-8 with `replace_file`."""
    with replace_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> dict[str, Any] | None:
    """Return what a stage wrote, None if it has not run or was interrupted while it wrote."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_json_atomically(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    write_text_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


# ------------------------------------------------------------------------------------------------------------- directories
_held: dict[Path, tuple[filelock.BaseFileLock, int]] = {}
"""The locks of this process: real path of the directory -> lock and how often it was taken."""


def resolve_directory(directory: Path) -> Path:
    """Return where a directory really is: links are followed, so that one place has one name.

    Raises CompactMindError for a link whose target's parent is not there: the disk it points to is not mounted.
    """
    real = Path(os.path.realpath(directory))
    if directory.is_symlink() and not real.parent.is_dir():
        raise CompactMindError(
            f"{directory} is a link to {real}, and {real.parent} is not there: mount that disk, or remove the link"
        )
    return real


@contextlib.contextmanager
def lock_directory(directory: Path, wait_seconds: float = LOCK_WAIT_SECONDS) -> Iterator[None]:
    """Inside the `with` block this process is the only one that writes `directory`, which need not be there yet.

    The lock is the operating system's and ends with the process, however that ends. The process may take it again while it has it. What
    an interrupted writer left is put in order first. Raises CompactMindError if another process still has it after `wait_seconds`.
    """
    place = resolve_directory(directory)
    lock, count = _held.get(place, (None, 0))
    if lock is None:
        path = place.parent / LOCKS / f"{place.name}.lock"
        with explain_unwritable(directory):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(path, thread_local=False)
            try:
                lock.acquire(timeout=wait_seconds)
            except filelock.Timeout:
                raise CompactMindError(
                    f"{directory} is being written by another process, which holds {path}: wait until it ends, or write elsewhere"
                ) from None
    _held[place] = (lock, count + 1)
    try:
        if not count:
            _recover(place)
        yield
    finally:
        if count:
            _held[place] = (lock, count)
        else:
            del _held[place]
            lock.release()


@contextlib.contextmanager
def lock_directory_patiently(directory: Path, wait_seconds: float) -> Iterator[None]:
    """Do what `lock_directory` does; that another process is waited for is printed."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock_directory(directory, wait_seconds=1))
        except CompactMindError as busy:
            print(f"{busy}; waiting ...", flush=True)
            stack.enter_context(lock_directory(directory, wait_seconds))
        yield


def _recover(place: Path) -> None:
    """Put in order what a killed `replace_directory` left; whoever calls holds the lock."""
    displaced = place.with_name(f".{place.name}.old")
    if displaced.is_dir():
        if place.exists():
            shutil.rmtree(displaced)
        else:
            displaced.rename(place)
    for stale in place.parent.glob(f".{place.name}.tmp-*"):
        if stale.is_dir():
            shutil.rmtree(stale, ignore_errors=True)


@contextlib.contextmanager
def replace_directory(directory: Path, needed_bytes: int = 0, wait_seconds: float = LOCK_WAIT_SECONDS) -> Iterator[Path]:
    """Yield an empty temporary sibling of `directory`; on success it takes its place, on any error it vanishes.

    A kill at any moment, a power cut too, leaves the previous directory or the new one whole. Where the system can exchange two
    directories in one step (Linux) a reader finds one of them at any time. A link stays, and what it points to is replaced. Raises
    CompactMindError when the disk is full or cannot be written, or if another process is writing the same directory.
    """
    with lock_directory(directory, wait_seconds):
        place = resolve_directory(directory)
        require_free_space(directory, needed_bytes)
        with explain_unwritable(directory):
            temporary = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}.tmp-"))
        try:
            os.chmod(temporary, 0o755)
            with explain_unwritable(directory):
                yield temporary
                for path in [*temporary.rglob("*"), temporary]:
                    if path.is_file():
                        with open(path, "rb+") as file:
                            os.fsync(file.fileno())
                    else:
                        fsync_directory(path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        if not place.exists():
            temporary.rename(place)
        elif _exchange(temporary, place):
            fsync_directory(place.parent)
            shutil.rmtree(temporary)
        else:
            displaced = place.with_name(f".{place.name}.old")
            place.rename(displaced)
            temporary.rename(place)
            fsync_directory(place.parent)
            shutil.rmtree(displaced)
        fsync_directory(place.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two directories in one step; False where the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    here = -100  # AT_FDCWD: paths are relative to the working directory
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), EXCHANGE) == 0
