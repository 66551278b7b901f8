"""5_bayesian_search.py as a user runs it: one pipeline, its result reloads, and clear words about bad input."""

import helpers
import pytest
import torch
from transformers import AutoModelForCausalLM

from compactmind.checkpoint import load_checkpoint, read_manifest

SCRIPT = "5_bayesian_search.py"


@pytest.fixture
def run_here(monkeypatch, capfd, tmp_path):
    def run(*arguments, cwd=tmp_path):
        return helpers.run_script_here(SCRIPT, *arguments, cwd=cwd, monkeypatch=monkeypatch, capfd=capfd)

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return a directory in which the stage has run once with its default pipeline, and what it printed."""
    folder = tmp_path_factory.mktemp("search")
    helpers.add_llama(folder)
    done = helpers.run_script(SCRIPT, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_the_default_pipeline_prunes_and_retrains(finished):
    folder, output = finished
    manifest = read_manifest(folder / "models" / "llama_pruned")
    assert manifest["kind"] == "pruned" and manifest["parent"] == "llama"
    assert [row["method"] for row in manifest["pipeline"]] == ["dense", "prune", "retrain"]
    assert len({shape["intermediate_size"] for shape in manifest["layers"]}) == 1
    assert len(manifest["layer_errors"]) == 2 and all(error > 0 for error in manifest["layer_errors"])
    assert helpers.read_json(folder / "results" / "pipeline_llama_pruned.json")["pipeline"] == manifest["pipeline"]
    assert all(word in output for word in ("dense", "prune", "retrain", "models/llama_pruned"))
    model = load_checkpoint(folder / "models" / "llama_pruned").model
    plain = AutoModelForCausalLM.from_pretrained(folder / "models" / "llama_pruned", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(model(helpers.example_windows()).logits, plain(helpers.example_windows()).logits)
    assert AutoModelForCausalLM.from_pretrained(folder / "models" / "llama_pruned").dtype == torch.bfloat16  # as released
    assert sorted(path.name for path in (folder / "models").iterdir()) == ["llama", "llama_pruned"]  # no state of retraining


def test_a_second_run_has_nothing_to_do(finished, run_here):
    status, output = run_here(cwd=finished[0])
    assert status == 0 and "up to date" in output


def test_a_pipeline_of_the_users_own(tmp_path, run_here):
    helpers.add_llama(tmp_path)
    pipeline = '[{"method": "prune", "params": {"sparsity": 0.3, "round_to": 8, "scope": "global"}}, {"method": "w8a8"}]'
    status, output = run_here("--strategy", "fixed", "--pipeline", pipeline, "--output", "models/mine")
    assert status == 0 and "interaction of quantization with the rest" in output, output
    manifest = read_manifest(tmp_path / "models" / "mine")
    assert manifest["kind"] == "w8a8" and manifest["interaction"] is not None
    assert load_checkpoint(tmp_path / "models" / "mine").model.generate(
        helpers.example_windows()[:1], max_new_tokens=2
    ).shape == (1, 18)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--pipeline", "["), ("no JSON", "for example")),
        (("--pipeline", '[{"method": "shrink"}]'), ("unknown method 'shrink'", "prune, retrain, w8a8, nf4")),
        (("--pipeline", '[{"method": "w8a8"}, {"method": "prune"}]'), ("comes after a quantization",)),
        (("--pipeline", '[{"method": "prune", "params": {"sparsity": 0.99, "round_to": 8}}]'), ("0.99 cannot be met",)),
        (("--pipeline", '[{"method": "prune", "params": {"round_to": 64}}]'), ("round_to 64", "48")),
        (("--seq_len", 4096), ("less than one window of 4096",)),
        (("--calibration_windows", 0), ("calibration_windows 0", "at least 1")),
        (("--model_path", "nowhere"), ("nowhere", "python download_model.py")),
    ],
    ids=str,
)
def test_bad_input_is_named_and_leaves_nothing_behind(tmp_path, run_here, arguments, expected):
    helpers.add_llama(tmp_path)
    status, output = run_here(*arguments)
    assert status == 1 and all(part in output for part in expected), output
    assert "Traceback" not in output
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["llama"]
    assert not (tmp_path / "results").exists() or not list((tmp_path / "results").iterdir())
