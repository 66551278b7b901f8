"""5_bayesian_search.py as a user runs it: one pipeline or a search, the results reload, and clear words about bad input."""

import csv
import json
import shutil

import helpers
import pytest
import torch
from safetensors.torch import load_file
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
    done = helpers.run_script(SCRIPT, "--strategy", "fixed", cwd=folder)
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
    assert sorted(path.name for path in (folder / "models").glob("[!.]*")) == [
        "llama",
        "llama_pruned",
    ]  # no state of retraining


def test_a_second_run_has_nothing_to_do(finished, run_here):
    status, output = run_here("--strategy", "fixed", cwd=finished[0])
    assert status == 0 and "up to date" in output


def test_a_pipeline_that_begins_like_another_takes_that_beginning_over(finished, run_here, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)
    first = read_manifest(folder / "models" / "llama_pruned")["pipeline"]
    pipeline = json.dumps([{key: row[key] for key in ("method", "params")} for row in first[1:]] + [{"method": "nf4"}])
    settings = ("--strategy", "fixed", "--pipeline", pipeline, "--output", "models/small")
    status, output = run_here(*settings, cwd=folder)
    assert status == 0, output
    rows = read_manifest(folder / "models" / "small")["pipeline"]
    assert [row.get("cached", False) for row in rows] == [False, True, True, False]
    for old, new in zip(first, rows, strict=False):
        assert (old["perplexity"], old["against_dense"], old["done"]) == (new["perplexity"], new["against_dense"], new["done"])
    status, output = run_here(*settings, "--force", "True", cwd=folder)
    again = read_manifest(folder / "models" / "small")["pipeline"]
    assert status == 0 and not any("cached" in row for row in again)
    assert [row["perplexity"] for row in again] == [row["perplexity"] for row in rows]


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


# ------------------------------------------------------------------------------------------------------------------ search
@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """Return a directory in which a search has run once, and what it printed."""
    folder = tmp_path_factory.mktemp("searched")
    helpers.add_llama(folder)
    done = helpers.run_script(SCRIPT, "--n_trials", 7, "--target_compression", 1.05, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_a_search_saves_the_best_pipeline_that_reaches_the_target_and_everything_it_found(searched):
    folder, output = searched
    summary = helpers.read_json(folder / "results" / "search" / "summary.json")
    assert summary["trials"] == 7 and sum(summary["states"].values()) == 7
    best, manifest = summary["best"], read_manifest(folder / "models" / "llama_searched")
    assert manifest["search"]["trial"] == best["trial"]
    assert [row["method"] for row in manifest["pipeline"]] == ["dense", *best["methods"]]
    assert helpers.read_json(folder / "results" / "search" / "best_pipeline.json") == best["pipeline"]
    assert best["confirmed"]["perplexity"] == min(found["perplexity"] for found in summary["confirmed"].values())
    assert best["measured"]["compression_ratio"] >= 1.05
    dense = read_manifest(folder / "models" / "llama")["files"]["model.safetensors"]["bytes"]
    stored = load_file(folder / "models" / "llama_searched" / "model.safetensors")
    weights = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    assert dense / weights == pytest.approx(best["measured"]["compression_ratio"])
    load_checkpoint(folder / "models" / "llama_searched")
    names = {path.name for path in (folder / "results" / "search").iterdir()}
    plots = {f"{name}.png" for name in ("convergence", "importance", "pareto", "error_accumulation", "retraining_gain")}
    assert plots | {"study.db", "trials.csv", "best_pipeline.json", "summary.json", "cache"} == names
    with open(folder / "results" / "search" / "trials.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7 and all(row["pipeline"] and (row["perplexity"] or row["reason"]) for row in rows)
    assert f"--replay {best['trial']}" in output and "optuna-dashboard sqlite:///" in output and output.count("to go") == 7


def test_a_finished_search_has_nothing_to_do_and_a_longer_one_goes_on(searched, run_here, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(searched[0], folder)
    status, output = run_here("--n_trials", 7, "--target_compression", 1.05, cwd=folder)
    assert status == 0 and "7 of 7 trials are there" in output and "up to date" in output, output
    status, output = run_here("--n_trials", 9, "--target_compression", 1.05, cwd=folder)
    assert status == 0 and output.count("to go") == 2, output
    assert helpers.read_json(folder / "results" / "search" / "summary.json")["trials"] == 9


def test_any_trial_can_be_made_again(searched, run_here):
    folder, _ = searched
    summary = helpers.read_json(folder / "results" / "search" / "summary.json")
    number = summary["best"]["trial"]
    settings = ("--target_compression", 1.05, "--replay", number)
    status, output = run_here(*settings, cwd=folder)
    assert status == 0, output
    again, best = (load_checkpoint(folder / "models" / name) for name in (f"llama_trial_{number}", "llama_searched"))
    with torch.no_grad():
        assert torch.equal(again.model(helpers.example_windows()).logits, best.model(helpers.example_windows()).logits)
    assert again.manifest["pipeline"][-1]["perplexity"] == best.manifest["pipeline"][-1]["perplexity"]
    status, output = run_here("--target_compression", 1.05, "--replay", 99, cwd=folder)
    assert status == 1 and "no trial 99" in output and str(number) in output


def test_another_space_is_another_study(searched, run_here):
    status, output = run_here("--target_compression", 1.05, "--methods", "nf4", "--choices", "{}", cwd=searched[0])
    assert status == 1 and "made for something else" in output and "--study_name" in output


def test_a_target_out_of_reach_says_what_was_reached(tmp_path, run_here):
    helpers.add_llama(tmp_path)
    status, output = run_here("--methods", "nf4", "--choices", "{}", "--target_compression", 50)
    assert status == 1 and "50 times smaller" in output and "the highest expected" in output, output
    assert not (tmp_path / "models" / "llama_searched").exists()
    assert (tmp_path / "results" / "search" / "trials.csv").is_file()


def test_several_objectives_are_measured(tmp_path, run_here):
    helpers.add_llama(tmp_path)
    status, output = run_here(
        "--methods", "prune", "nf4", "--choices", '{"prune.round_to": [8], "prune.sparsity": [0.3]}', "--n_trials", 3,
        "--objectives", "perplexity", "bytes", "latency", "memory", "--target_compression", 1.01,
    )  # fmt: skip
    assert status == 0, output
    with open(tmp_path / "results" / "search" / "trials.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["state"] == "COMPLETE"]
    assert rows and all(float(row[name]) > 0 for row in rows for name in ("perplexity", "bytes", "latency", "memory"))


# --------------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--n_trials", 0), ("n_trials 0", "at least 1")),
        (("--target_compression", 0), ("target_compression 0", "2.5")),
        (("--methods", "retrain", "--choices", "{}"), ("no legal pipeline",)),
        (("--methods", "prune", "--mode", "hybrid", "--choices", "{}"), ("no legal pipeline", "hybrid")),
        (("--choices", "{"), ("choices are no JSON",)),
        (("--choices", "[1]"), ("are no object",)),
        (("--choices", '{"prune.sparsity": [7]}'), ("sparsity 7",)),
        (("--storage", "sqlite:////nowhere/at/all/study.db"), ("cannot be opened",)),
        (("--objectives", "perplexity", "perplexity"), ("name each once",)),
    ],
    ids=str,
)
def test_a_search_that_makes_no_sense_is_refused(tmp_path, run_here, arguments, expected):
    helpers.add_llama(tmp_path)
    status, output = run_here(*arguments)
    assert status == 1 and all(part in output for part in expected), output
    assert "Traceback" not in output
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["llama"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--pipeline", "["), ("no JSON", "for example")),
        (("--pipeline", '[{"method": "shrink"}]'), ("unknown method 'shrink'", "prune, retrain, smooth, w8a8, nf4")),
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
    status, output = run_here("--strategy", "fixed", *arguments)
    assert status == 1 and all(part in output for part in expected), output
    assert "Traceback" not in output
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["llama"]
    assert not (tmp_path / "results").exists() or not list((tmp_path / "results").iterdir())
