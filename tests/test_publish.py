"""publish.py: what would be pushed, and what is."""

import runpy
from types import SimpleNamespace

import helpers
import pytest

from compactmind.checkpoint import save_checkpoint
from compactmind.errors import CompactMindError


@pytest.fixture
def pushed(monkeypatch):
    """What reaches the hub, which is not there."""
    calls = []
    api = SimpleNamespace(
        create_repo=lambda name, **options: calls.append(("create", name, options)),
        upload_folder=lambda **options: calls.append(("upload", options["repo_id"], sorted(options["allow_patterns"]))) or "https://hub/x",
    )
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    return calls


@pytest.fixture
def directory(tmp_path, tokenizer):
    stage = {"script": "download_model.py", "config": {"source": "hub google-bert/bert-base-uncased"}}
    save_checkpoint(tmp_path / "small", helpers.make_distilbert(), tokenizer, kind="dense", parent=None, stage=stage)
    (tmp_path / "small" / "notes.txt").write_text("my own")
    return tmp_path / "small"


def publish(*given):
    return runpy.run_path(str(helpers.REPOSITORY / "publish.py"))["publish"](*given)


def test_without_being_told_to_nothing_is_pushed(directory, pushed, capsys):
    publish(directory, "me/small", False, True)
    output = capsys.readouterr().out
    assert pushed == [] and "would be pushed to me/small, private; nothing was" in output
    assert "model.safetensors" in output and "manifest.json" in output and "README.md" in output and "notes.txt" not in output
    assert "licence apache-2.0, as google-bert/bert-base-uncased" in output


def test_what_belongs_to_the_checkpoint_is_pushed_and_no_more(directory, pushed):
    publish(directory, "me/small", True, True)
    assert pushed[0] == ("create", "me/small", {"private": True, "exist_ok": True})
    names = pushed[1][2]
    assert {"model.safetensors", "config.json", "manifest.json", "README.md"} <= set(names) and "notes.txt" not in names


def test_what_cannot_be_pushed_is_said_in_one_line(directory, pushed, capsys):
    for name in ("small", "me/", "a/b/c"):
        with pytest.raises(CompactMindError, match="give owner/name"):
            publish(directory, name, True, True)
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(CompactMindError, match="model.safetensors"):
        publish(directory, "me/small", True, True)
    assert pushed == []


def test_an_unknown_licence_is_said(tmp_path, tokenizer, pushed, capsys):
    save_checkpoint(tmp_path / "own", helpers.make_distilbert(), tokenizer, kind="dense", parent=None, stage={"script": "x.py"})
    publish(tmp_path / "own", "me/own", False, True)
    assert "the licence of what it was made from is not known here" in capsys.readouterr().out
