"""Files and directories are either whole or absent."""

import collections
import errno
import hashlib
import json
import shutil
import stat

import pytest
import torch
from safetensors import SafetensorError

from compactmind import files
from compactmind.errors import CompactMindError
from compactmind.files import (
    recover_directory,
    replace_directory,
    require_free_space,
    sha256_of,
    write_json_atomically,
    write_text_atomically,
)
from compactmind.training import TrainingState

NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


def names_in(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


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
def test_a_full_disk_while_writing_a_text_file_is_a_clear_message(tmp_path, monkeypatch, module, broken):
    path = tmp_path / "a.txt"
    write_text_atomically(path, "old")

    def fail(*_, **__):
        raise NO_SPACE

    monkeypatch.setattr(module, broken, fail)
    with pytest.raises(CompactMindError, match="disk is full.*a.txt"):
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


def test_a_kill_between_the_two_renames_is_recovered(tmp_path, monkeypatch):
    directory = tmp_path / "teacher"
    make_old(directory)
    real_rename = files.Path.rename

    def rename_then_die(path, target):
        real_rename(path, target)
        raise SystemError("killed")  # what runs after the first rename never runs

    with monkeypatch.context() as patch:
        patch.setattr(files.Path, "rename", rename_then_die)
        with pytest.raises(SystemError), replace_directory(directory) as temporary:
            (temporary / "weights").write_text("new")
    assert not directory.exists()
    recover_directory(directory)
    assert (directory / "weights").read_text() == "old"
    recover_directory(directory)  # nothing left to do
    assert (directory / "weights").read_text() == "old"
    with replace_directory(directory) as temporary:
        (temporary / "weights").write_text("newer")
    assert (directory / "weights").read_text() == "newer"
    assert names_in(tmp_path) == ["teacher"]  # the temporary directory of the killed run is gone too


def test_a_kill_after_both_renames_keeps_the_new_directory(tmp_path):
    directory = tmp_path / "teacher"
    make_old(directory)
    shutil.copytree(directory, tmp_path / ".teacher.old")
    (directory / "weights").write_text("new")
    recover_directory(directory)
    assert (directory / "weights").read_text() == "new"
    assert names_in(tmp_path) == ["teacher"]


def test_temporary_directories_of_killed_runs_are_swept_but_not_those_of_others(tmp_path):
    for stale in (".teacher.tmp-abc", ".teacher_base.tmp-abc"):
        (tmp_path / stale).mkdir()
    with replace_directory(tmp_path / "teacher") as temporary:
        (temporary / "weights").write_text("new")
    assert names_in(tmp_path) == [".teacher_base.tmp-abc", "teacher"]


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


@pytest.mark.parametrize(
    "error", [NO_SPACE, SafetensorError("I/O error: No space left on device (os error 28)")], ids=["os", "safetensors"]
)
def test_a_disk_that_fills_up_while_writing_is_a_clear_message(tmp_path, error):
    directory = tmp_path / "teacher"
    make_old(directory)
    with pytest.raises(CompactMindError, match="disk is full.*teacher.*unchanged"), replace_directory(directory):
        raise error
    assert (directory / "weights").read_text() == "old"
    assert names_in(tmp_path) == ["teacher"]


def test_a_disk_that_fills_up_while_saving_training_state_is_a_clear_message(tmp_path):
    state = TrainingState(tmp_path / "teacher", {"script": "x"})
    state.save(model=torch.ones(3))
    state.path.with_suffix(".tmp").symlink_to("/dev/full")  # every write to it fails as on a full disk
    with pytest.raises(CompactMindError, match="disk is full"):
        state.save(model=torch.zeros(100_000))
    assert torch.equal(state.load()["model"], torch.ones(3))
    assert names_in(tmp_path) == [".teacher.training.pt"]


def test_other_errors_are_not_mistaken_for_a_full_disk(tmp_path):
    with pytest.raises(PermissionError), replace_directory(tmp_path / "teacher"):
        raise PermissionError(errno.EACCES, "Permission denied")
