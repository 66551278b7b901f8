"""Files and directories are either whole or absent."""

import collections
import errno
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys

import helpers
import pytest
import torch
from safetensors import SafetensorError

from compactmind import files
from compactmind.errors import CompactMindError
from compactmind.files import (
    lock_directory,
    replace_directory,
    replace_file,
    require_free_space,
    sha256_of,
    write_json_atomically,
    write_text_atomically,
)
from compactmind.training import TrainingState

NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


def names_in(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != files.LOCKS)


def make_old(directory) -> None:
    directory.mkdir()
    (directory / "weights").write_text("old")


def test_sha256_of_a_file_larger_than_one_chunk(tmp_path):
    content = bytes(range(256)) * 9000  # 2.3 MB
    path = tmp_path / "blob"
    path.write_bytes(content)
    assert sha256_of(path) == hashlib.sha256(content).hexdigest()
    with open(path, "rb") as file:
        assert files._sha256_by_chunks(file) == hashlib.sha256(content).hexdigest()


# ---------------------------------------------------------------------------------------------------------------- files
def test_text_and_json_round_trip_and_leave_nothing_else(tmp_path):
    write_text_atomically(tmp_path / "new" / "a.txt", "für\n")
    write_text_atomically(tmp_path / "new" / "a.txt", "second\n")
    write_json_atomically(tmp_path / "new" / "b.json", {"text": "naïve", "list": [1, None]})
    assert (tmp_path / "new" / "a.txt").read_text(encoding="utf-8") == "second\n"
    assert json.loads((tmp_path / "new" / "b.json").read_text(encoding="utf-8")) == {"text": "naïve", "list": [1, None]}
    assert names_in(tmp_path / "new") == ["a.txt", "b.json"]
    assert stat.S_IMODE((tmp_path / "new" / "a.txt").stat().st_mode) & 0o444 == 0o444  # others may read it


def test_a_failed_write_leaves_the_old_text_and_no_temporary_file(tmp_path):
    path = tmp_path / "a.txt"
    write_text_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text_atomically(path, "half \ud800 of a character")
    with pytest.raises(TypeError):
        write_json_atomically(path, {"not json": object()})
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(("module", "broken"), [(files.tempfile, "mkstemp"), (files.os, "fsync")], ids=["create", "write"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES], ids=errno.errorcode.get)
def test_a_disk_that_cannot_be_written_is_a_clear_message(tmp_path, monkeypatch, module, broken, number):
    path = tmp_path / "a.txt"
    write_text_atomically(path, "old")

    def fail(*_, **__):
        raise OSError(number, "in the system's words")

    monkeypatch.setattr(module, broken, fail)
    with pytest.raises(CompactMindError, match=f"{files.UNWRITABLE[number]}.*a.txt"):
        write_text_atomically(path, "new")
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["a.txt"]


# ---------------------------------------------------------------------------------------------------------- directories
def test_replace_directory_swaps_the_whole_content(tmp_path):
    directory = tmp_path / "models" / "teacher"
    with replace_directory(directory) as temporary:
        (temporary / "weights").write_text("old")
        (temporary / "only_old").write_text("x")
        assert not directory.exists()
    with replace_directory(directory) as temporary:
        assert temporary.parent == directory.parent  # a sibling: renaming never copies
        (temporary / "weights").write_text("new")
        assert (directory / "weights").read_text() == "old"
    assert names_in(directory) == ["weights"]
    assert (directory / "weights").read_text() == "new"
    assert names_in(directory.parent) == ["teacher"]


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_an_error_inside_leaves_the_old_directory_whole(tmp_path, error):
    directory = tmp_path / "teacher"
    make_old(directory)
    with pytest.raises(type(error)), replace_directory(directory) as temporary:
        (temporary / "weights").write_text("half")
        raise error
    assert (directory / "weights").read_text() == "old"
    assert names_in(tmp_path) == ["teacher"]


def test_an_error_inside_leaves_nothing_where_nothing_was(tmp_path):
    with pytest.raises(RuntimeError), replace_directory(tmp_path / "teacher"):
        raise RuntimeError("boom")
    assert names_in(tmp_path) == []


@pytest.fixture(params=["exchanged in one step", "two renames"])
def way(request, monkeypatch):
    """Both ways in which one directory takes another's place."""
    if request.param == "two renames":
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    return request.param


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no exchange of two names")
def test_a_reader_finds_a_directory_at_any_time(tmp_path, monkeypatch):
    directory, seen = tmp_path / "teacher", []
    make_old(directory)
    real = files.fsync_directory
    monkeypatch.setattr(files, "fsync_directory", lambda path: (seen.append((directory / "weights").read_text()), real(path)))
    with replace_directory(directory) as temporary:
        (temporary / "weights").write_text("new")
    assert seen[0] == "old" and seen[-1] == "new"


@pytest.mark.parametrize("renames", [1, 2])
def test_a_kill_between_or_after_the_two_renames_loses_nothing(tmp_path, monkeypatch, renames):
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    directory = tmp_path / "teacher"
    make_old(directory)
    real_rename, done = files.Path.rename, []

    def rename_then_die(path, target):
        real_rename(path, target)
        done.append(target)
        if len(done) == renames:
            raise SystemError("killed")  # what runs after it never runs

    with monkeypatch.context() as patch:
        patch.setattr(files.Path, "rename", rename_then_die)
        with pytest.raises(SystemError), replace_directory(directory) as temporary:
            (temporary / "weights").write_text("new")
    assert directory.exists() == (renames == 2)
    with lock_directory(directory):  # the next writer puts it in order
        assert (directory / "weights").read_text() == ("old" if renames == 1 else "new")
        assert names_in(tmp_path) == ["teacher"]


def test_temporary_directories_of_killed_runs_are_swept_but_not_those_of_others(tmp_path):
    for stale in (".teacher.tmp-abc", ".teacher_base.tmp-abc"):
        (tmp_path / stale).mkdir()
    with replace_directory(tmp_path / "teacher") as temporary:
        (temporary / "weights").write_text("new")
    assert names_in(tmp_path) == [".teacher_base.tmp-abc", "teacher"]


HOLD = """
import sys
from pathlib import Path
from compactmind.files import replace_directory
with replace_directory(Path(sys.argv[1])) as temporary:
    (temporary / "weights").write_text("of the other process")
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_two_processes_at_one_directory_do_not_touch_each_others_work(tmp_path, way):
    directory = tmp_path / "teacher"
    make_old(directory)
    command = [sys.executable, "-c", HOLD, str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=helpers.REPOSITORY) as other:
        assert other.stdout.readline() == "writing\n"
        with pytest.raises(CompactMindError, match="teacher is being written by another process"):  # noqa: SIM117
            with replace_directory(directory, wait_seconds=0.2):
                pytest.fail("two writers at once")
        assert (directory / "weights").read_text() == "old"
        other.stdin.close()
        assert other.wait() == 0
    assert (directory / "weights").read_text() == "of the other process"
    with replace_directory(directory, wait_seconds=0.2) as temporary:
        (temporary / "weights").write_text("new")
    assert (directory / "weights").read_text() == "new"
    assert names_in(tmp_path) == ["teacher"]


def test_a_killed_writer_keeps_no_lock(tmp_path):
    directory = tmp_path / "teacher"
    make_old(directory)
    command = [sys.executable, "-c", HOLD, str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=helpers.REPOSITORY) as other:
        assert other.stdout.readline() == "writing\n"
        other.kill()
    with replace_directory(directory) as temporary:
        (temporary / "weights").write_text("new")
    assert (directory / "weights").read_text() == "new"
    assert names_in(tmp_path) == ["teacher"]


def test_a_process_may_take_its_own_lock_again(tmp_path):
    directory = tmp_path / "teacher"
    with lock_directory(directory):
        with replace_directory(directory) as temporary:
            (temporary / "weights").write_text("new")
        command = [sys.executable, "-c", HOLD, str(directory)]
        other = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=helpers.REPOSITORY)
        assert other.returncode and "being written by another process" in other.stderr  # still held after the inner block
    assert names_in(tmp_path) == ["teacher"]


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path, way):
    disk, models = tmp_path / "disk", tmp_path / "models"
    disk.mkdir(), models.mkdir()
    make_old(disk / "big")
    (models / "teacher").symlink_to(disk / "big")
    with replace_directory(models / "teacher") as temporary:
        assert temporary.parent == disk  # on the disk it will be on
        (temporary / "weights").write_text("new")
    assert (models / "teacher").is_symlink() and (disk / "big" / "weights").read_text() == "new"
    assert names_in(models) == ["teacher"] and names_in(disk) == ["big"]


def test_a_link_to_a_disk_that_is_not_there_is_named(tmp_path):
    (tmp_path / "teacher").symlink_to(tmp_path / "unmounted" / "teacher")
    with pytest.raises(CompactMindError, match="teacher is a link to .*unmounted is not there"):  # noqa: SIM117
        with replace_directory(tmp_path / "teacher"):
            pytest.fail("wrote beside the mount point")
    assert names_in(tmp_path) == ["teacher"]


def test_what_is_renamed_is_on_the_disk_before_and_its_name_after(tmp_path, monkeypatch, way):
    """The order that a power cut cannot turn into a name without content: content, rename, directory."""
    directory, events = tmp_path / "teacher", []
    make_old(directory)
    real_fsync, real_rename = os.fsync, files.Path.rename

    def fsync(handle):
        events.append(os.readlink(f"/proc/self/fd/{handle}").rpartition("/")[2])
        real_fsync(handle)

    monkeypatch.setattr(files.os, "fsync", fsync)
    monkeypatch.setattr(files.Path, "rename", lambda path, target: (events.append("rename"), real_rename(path, target)))
    if way != "two renames":
        real_exchange = files._exchange
        monkeypatch.setattr(files, "_exchange", lambda *pair: (events.append("rename"), real_exchange(*pair))[1])
    with replace_directory(directory) as temporary:
        (temporary / "weights").write_text("new")
    assert events.index("weights") < events.index("rename") < len(events) - 1 - events[::-1].index(tmp_path.name)
    events.clear()
    monkeypatch.setattr(files.os, "replace", lambda *pair: (events.append("rename"), os.rename(*pair)))
    write_text_atomically(tmp_path / "a.txt", "x")
    assert events[0].startswith(".a.txt.tmp-") and events[1:] == ["rename", tmp_path.name]


# ------------------------------------------------------------------------------------------------------------ full disk
def test_too_little_space_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    make_old(tmp_path / "teacher")
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 3 * 10**6, 3 * 10**6))
    with pytest.raises(CompactMindError, match=r"teacher: 5 MB needed, 3 MB free"):  # noqa: SIM117
        with replace_directory(tmp_path / "teacher", needed_bytes=5 * 10**6):
            pytest.fail("the body ran on a full disk")
    require_free_space(tmp_path / "not" / "yet" / "there", 3 * 10**6)  # exactly enough
    assert (tmp_path / "teacher" / "weights").read_text() == "old"
    assert names_in(tmp_path) == ["teacher"]


def as_torch_says_it() -> RuntimeError:
    """Return what torch.save raises: an error of its own while it closes the file that could not be written."""
    try:
        try:
            raise NO_SPACE
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    "error",
    [NO_SPACE, SafetensorError("I/O error: No space left on device (os error 28)"), as_torch_says_it()],
    ids=["os", "safetensors", "torch"],
)
def test_a_disk_that_fills_up_while_writing_is_a_clear_message(tmp_path, error):
    directory = tmp_path / "teacher"
    make_old(directory)
    with pytest.raises(CompactMindError, match="disk is full.*teacher.*unchanged"), replace_directory(directory):
        raise error
    assert (directory / "weights").read_text() == "old"
    assert names_in(tmp_path) == ["teacher"]


def test_a_disk_that_fills_up_while_saving_training_state_is_a_clear_message(tmp_path, monkeypatch):
    state, make = TrainingState(tmp_path / "teacher", {"script": "x"}), files.tempfile.mkstemp
    state.save(model=torch.ones(3))

    def on_a_full_disk(**arguments):
        handle, name = make(**arguments)
        os.unlink(name)
        os.symlink("/dev/full", name)  # every write to it fails as on a full disk
        return handle, name

    monkeypatch.setattr(files.tempfile, "mkstemp", on_a_full_disk)
    with pytest.raises(CompactMindError, match="disk is full"):
        state.save(model=torch.zeros(100_000))
    assert torch.equal(state.load()["model"], torch.ones(3))
    assert names_in(tmp_path) == [".teacher.training.pt"]


def test_other_errors_are_not_mistaken_for_a_full_disk(tmp_path):
    with pytest.raises(IsADirectoryError), replace_directory(tmp_path / "teacher"):
        raise IsADirectoryError(errno.EISDIR, "Is a directory")
    with pytest.raises(IsADirectoryError), replace_file(tmp_path / "a.txt"):
        raise IsADirectoryError(errno.EISDIR, "Is a directory")
