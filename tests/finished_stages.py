"""A directory in which the stages of classifiers have run, copies of it to run something else in, and what is looked at there."""

import re
import shutil

import helpers
import pytest
import scripts

from compactmind.manifest import read_manifest


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A directory in which download_model.py, 1_distill.py and 2_prune_finetune.py have run, and what each printed."""
    names = ("download_model.py", "1_distill.py", "2_prune_finetune.py")

    def run(folder):
        helpers.make_workspace(folder)
        return dict(zip(names, scripts.run_scripts(*((name,) for name in names), cwd=folder), strict=True))

    return scripts.made_once(tmp_path_factory, "finished", run)


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of that directory to run something else in."""
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder, ignore=shutil.ignore_patterns("hf_home"))
    return folder


def digest(folder, name: str) -> str:
    """Return the recorded SHA-256 of a checkpoint's weights, after checking that its files are whole."""
    return read_manifest(folder / "models" / name)["files"]["model.safetensors"]["sha256"]


def leftovers(folder) -> list[str]:
    """Return what a finished run must not leave behind."""
    return sorted(path.name for path in (folder / "models").iterdir() if re.search(r"\.tmp|\.old$|\.training\.", path.name))


def history_without_times(folder, name: str) -> list[dict]:
    return [row | {"seconds": None} for row in helpers.read_json(folder / "models" / name / "training_history.json")]


def expect_error(run_here, name: str, *arguments, cwd, parts: tuple) -> None:
    """Run a stage that cannot work: it ends with status 1 and a message, no traceback."""
    status, output = run_here(name, *arguments, cwd=cwd)
    assert status == 1, output
    message = output[output.index("error: ") :]
    for part in parts:
        assert part in message
