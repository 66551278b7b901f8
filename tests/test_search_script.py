"""5_bayesian_search.py as a user runs it: one pipeline or a search, the results reload, and clear words about bad input."""

import csv
import json
import runpy
import shlex
import shutil

import helpers
import optuna
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, HeliumConfig, HeliumForCausalLM

from compactmind import forward
from compactmind.checkpoint import load_checkpoint
from compactmind.evaluation.divergence import divergence
from compactmind.evaluation.perplexity import paired_ratio, perplexity
from compactmind.manifest import read_manifest
from compactmind.methods.registry import Resources
from compactmind.search import findings, making
from compactmind.search.findings import known_findings, write_findings
from compactmind.text import load_documents, token_windows

SCRIPT = "5_bayesian_search.py"


def models_in(folder) -> list[str]:
    return sorted(path.name for path in (folder / "models").iterdir() if path.name != ".locks")


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
    assert models_in(folder) == ["llama", "llama_pruned"]  # no state of retraining


def test_logits_of_the_dense_model_that_are_kept_change_no_number(monkeypatch):
    windows, found = helpers.example_windows(count=3, length=12), []
    stage = runpy.run_path(str(helpers.REPOSITORY / SCRIPT), run_name="stage")
    for kept in (2**31, 0):
        monkeypatch.setattr(forward, "LOGITS_TO_KEEP", kept)
        resources = Resources(windows, windows, windows, helpers.make_llama)
        inputs = stage["PipelineInputs"](None, None, resources, windows, windows, "text", "first", "")
        assert (inputs.dense_on_test.head is None) == bool(kept)
        found.append([inputs.on_test.of(model) for model in (resources.teacher(), helpers.make_llama(seed=1))])
    assert found[0] == found[1]
    assert found[0][0]["divergence"]["mean"] == 0 < found[0][1]["divergence"]["mean"]


def test_a_second_run_has_nothing_to_do(finished, run_here):
    status, output = run_here("--strategy", "fixed", cwd=finished[0])
    assert status == 0 and "up to date" in output


def test_what_a_kill_left_unmeasured_of_a_finished_model_is_measured_by_the_next_run(finished, run_here, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)
    place, path = folder / "models" / "llama_pruned", folder / "results" / "pipeline_llama_pruned.json"
    manifest, written, weights = (
        read_manifest(place),
        path.read_text(encoding="utf-8"),
        (place / "model.safetensors").stat().st_mtime_ns,
    )
    left = {name: value for name, value in manifest.items() if name not in ("interaction", "layer_errors")}
    for cut in (True, False):  # before the manifest was complete, and before the file was written
        if cut:
            (place / "manifest.json").write_text(json.dumps(left), encoding="utf-8")
        path.unlink()
        status, output = run_here("--strategy", "fixed", cwd=folder)
        assert status == 0 and "prune {" not in output, output
        assert read_manifest(place) == manifest and path.read_text(encoding="utf-8") == written
        assert (place / "model.safetensors").stat().st_mtime_ns == weights  # nothing was made again


# ------------------------------------------------------------------------------------------------------ several processes
def prune_and_retrain(batch_size: int) -> str:
    return json.dumps(
        [
            {"method": "prune", "params": {"sparsity": 0.3, "round_to": 8}},
            {"method": "retrain", "params": {"tokens": 512, "batch_size": batch_size, "lr": 1e-3}},
        ]
    )


def test_two_processes_with_half_the_windows_each_are_one_with_all_and_one_writes(tmp_path, run_here):
    helpers.add_llama(tmp_path)
    fixed = ("--strategy", "fixed", "--pipeline")
    with helpers.training_batches() as seen:
        status, output = run_here(*fixed, prune_and_retrain(2), "--output", "models/alone")
    assert status == 0, output
    two = (*fixed, prune_and_retrain(1), "--output", "models/together")
    ended, seen_together = helpers.run_script_watched(SCRIPT, *two, cwd=tmp_path)
    helpers.assert_shared_out(seen_together, seen)
    for line in ("# 5_bayesian_search.py", "windows of 32 tokens", "prune {", "retrain {", "saved to models/together"):
        assert ended.stdout.count(line) == 1
    assert "error" not in ended.stderr
    alone, together = (read_manifest(tmp_path / "models" / name) for name in ("alone", "together"))
    assert together["pipeline"][1]["perplexity"] == alone["pipeline"][1]["perplexity"]
    ours, theirs = (each["pipeline"][2]["done"] for each in (together, alone))
    assert ours["kept_step"] == theirs["kept_step"] > 0 and ours["tokens_seen"] == theirs["tokens_seen"]
    for one, other in zip(ours["history"], theirs["history"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["held_out_loss"] == pytest.approx(other["held_out_loss"], rel=1e-4)
    records = [each["stage"]["config"]["retraining"] for each in (alone, together)]
    assert records == [[{"num_processes": n, "effective_batch": 2, "mixed_precision": "no"}] for n in (1, 2)]
    assert models_in(tmp_path) == ["alone", "llama", "together"]

    status, output = run_here(*two)  # as one process: another batch, another model
    assert status == 0 and "models/together is made again: it was made with another config.retraining" in output, output
    assert "cached" not in read_manifest(tmp_path / "models" / "together")["pipeline"][2]


def test_a_trial_is_replayed_by_two_processes_and_searched_by_workers_of_one(tmp_path, run_here, monkeypatch):
    helpers.add_llama(tmp_path)
    space = {"prune.round_to": [8], "prune.sparsity": [0.3], "prune.criterion": ["l2"], "retrain.tokens": [256]}
    settings = ("--methods", "prune", "retrain", "--choices", json.dumps(space), "--target_compression", 1.05, "--n_trials", 4)
    with monkeypatch.context() as several:
        several.setenv("WORLD_SIZE", "2")
        status, output = run_here(*settings)
    assert status == 1 and "was started as 2 processes: start several workers instead" in output and "--storage" in output
    assert models_in(tmp_path) == ["llama"] and not (tmp_path / "results").exists()
    status, output = run_here(*settings)
    assert status == 0, output
    study = optuna.load_study(study_name="llama-bayesian", storage=f"sqlite:///{tmp_path}/results/search/study.db")
    trained = next(each.number for each in study.trials if len(each.user_attrs.get("pipeline", ())) == 2)
    ended = helpers.run_script(SCRIPT, *settings, "--replay", trained, cwd=tmp_path, processes=2)
    assert ended.returncode == 0 and ended.stdout.count(f"saved to models/llama_trial_{trained}") == 1, ended.stderr
    config = read_manifest(tmp_path / "models" / f"llama_trial_{trained}")["stage"]["config"]
    assert config["study"]["trial"] == trained and config["retraining"][0]["num_processes"] == 2


BROKEN = f"""
import os, runpy, sys
sys.path[:1] = [{str(helpers.REPOSITORY)!r}]
from compactmind.methods.retraining import loss
def broken(*_):
    raise ValueError("no memory left in process " + os.environ["RANK"])
if os.environ["RANK"] == sys.argv[1]:
    loss.RetrainingLoss.forward = broken
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_fails_ends_the_others(tmp_path, rank):
    helpers.add_llama(tmp_path)
    script = tmp_path / "broken.py"
    script.write_text(BROKEN)
    arguments = (helpers.REPOSITORY / SCRIPT, "--profile", "smoke", "--strategy", "fixed")
    ended = helpers.run_python(script, rank, *arguments, cwd=tmp_path, processes=2)  # it waits for both
    assert ended.returncode == 1 and f"ValueError: no memory left in process {rank}" in ended.stderr
    assert models_in(tmp_path) == ["llama"]


def test_other_windows_are_another_measurement_of_another_model(finished, run_here, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)
    spread = read_manifest(folder / "models" / "llama_pruned")["pipeline"]
    status, output = run_here("--strategy", "fixed", "--window_choice", "first", cwd=folder)
    assert status == 0 and "up to date" not in output, output
    first = read_manifest(folder / "models" / "llama_pruned")["pipeline"]
    assert not any("cached" in row for row in first)  # validation text decided which weights were kept
    assert {row["protocol"]["windows_from"] for row in spread} == {"spread"}
    assert {row["protocol"]["windows_from"] for row in first} == {"first"}
    assert first[0]["perplexity"] != spread[0]["perplexity"]


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


def test_a_quantization_alone_is_a_pipeline(tmp_path, run_here):
    helpers.add_llama(tmp_path)
    settings = ("--strategy", "fixed", "--output", "models/llama_1.6x", "--pipeline")
    pipeline = '[{"method": "gptq", "params": {"target_compression": 1.6}}]'
    status, output = run_here(*settings, pipeline)
    assert status == 0 and "interaction" not in output and "KL, nats" in output, output
    checkpoint = load_checkpoint(tmp_path / "models" / "llama_1.6x")
    manifest, dense = checkpoint.manifest, load_checkpoint(tmp_path / "models" / "llama")
    assert manifest["kind"] == "grouped" and manifest["interaction"] is None and len(manifest["layer_errors"]) == 2
    size, whole = (each.manifest["files"]["model.safetensors"]["bytes"] for each in (checkpoint, dense))
    assert whole / size >= 1.6
    windows = token_windows(helpers.make_byte_tokenizer(), load_documents(tmp_path / "wikitext_data", "test"), 32, 4, "spread")
    found = divergence(dense.model, checkpoint.model, windows)
    losses = [perplexity(each.model, windows, "")["losses"] for each in (checkpoint, dense)]
    before, row = manifest["pipeline"]
    assert before["divergence"]["mean"] == 0 and before["against_dense"]["ratio"] == 1
    assert row["divergence"]["mean"] == pytest.approx(found["mean"], rel=1e-3)
    assert row["divergence"]["same_top"] == found["same_top"]
    assert row["against_dense"]["ratio"] == pytest.approx(paired_ratio(*losses)["ratio"], rel=1e-4)
    assert helpers.read_json(tmp_path / "results" / "pipeline_llama_1.6x.json")["pipeline"] == manifest["pipeline"]
    status, output = run_here(*settings, pipeline)
    assert status == 0 and "up to date" in output
    status, output = run_here(*settings, '[{"method": "gptq", "params": {"target_compression": 9}}]')
    assert status == 1 and "Traceback" not in output and read_manifest(tmp_path / "models" / "llama_1.6x") == manifest, output


def test_what_tensors_cost_is_measured_once_for_all_targets(tmp_path, run_here):
    helpers.add_llama(tmp_path)

    def make(target, name, *more):
        pipeline = f'[{{"method": "gptq", "params": {{"target_compression": {target}}}}}]'
        status, output = run_here("--strategy", "fixed", "--output", f"models/{name}", "--pipeline", pipeline, *more)
        assert status == 0, output
        return "measured by an earlier run" in output

    assert not make(1.6, "first")
    (kept,) = (tmp_path / "results" / "search" / "costs").iterdir()
    assert make(1.5, "second")
    assert not make(1.5, "forced", "--force", True)
    second, forced = (load_checkpoint(tmp_path / "models" / name) for name in ("second", "forced"))
    assert second.manifest["quantization"]["tensors"] == forced.manifest["quantization"]["tensors"]
    assert make(1.7, "third", "--calibration_windows", 8)  # costs are measured on the first windows
    assert not make(1.7, "fewer", "--calibration_windows", 2)
    for damaged in ('{"belongs_to": 3}', kept.read_text()[:-40]):
        kept.write_text(damaged)
        assert not make(1.6, f"after_{len(damaged)}")
    helpers.add_llama(tmp_path, hidden_size=64)  # another model
    assert not make(1.6, "another")


# ------------------------------------------------------------------------------------------------------------------ search
def test_a_search_gives_gptq_its_target_and_any_of_its_trials_comes_again(tmp_path, run_here):
    helpers.add_llama(tmp_path)
    settings = ("--methods", "prune", "smooth", "gptq", "--target_compression", 1.5, "--n_trials", 3)
    settings += ("--choices", '{"prune.round_to": [8], "prune.sparsity": [0.2, 0.3]}')
    status, output = run_here(*settings)
    assert status == 0, output
    with open(tmp_path / "results" / "search" / "trials.csv", newline="", encoding="utf-8") as file:
        rows = {row["pipeline"]: row for row in csv.DictReader(file)}
    assert list(rows)[:2] == ["gptq", "smooth > gptq"]
    assert all(float(row["compression_ratio"]) >= 1.5 for row in rows.values() if row["compression_ratio"])
    status, output = run_here(*settings, "--replay", rows["gptq"]["trial"])
    manifest = load_checkpoint(tmp_path / "models" / f"llama_trial_{rows['gptq']['trial']}").manifest
    assert status == 0 and manifest["pipeline"][-1]["params"]["target_compression"] == 1.5, output
    searched = read_manifest(tmp_path / "models" / "llama_searched")
    assert searched["kind"] == "grouped" and searched["pipeline"][-1]["cached"]  # a trial has made it


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """Return a directory in which a search has run once, and what it printed."""
    folder = tmp_path_factory.mktemp("searched")
    helpers.add_llama(folder)
    return folder, helpers.run_script_once(SCRIPT, "--n_trials", 7, "--target_compression", 1.05, "--final_tokens", 0, cwd=folder)


def test_a_search_saves_the_best_pipeline_that_reaches_the_target_and_everything_it_found(searched):
    folder, output = searched
    summary = helpers.read_json(folder / "results" / "search" / "summary.json")
    assert summary["trials"] == 7 and sum(summary["states"].values()) == 7
    best, manifest = summary["best"], read_manifest(folder / "models" / "llama_searched")
    assert manifest["search"]["trial"] == best["trial"]
    assert [row["method"] for row in manifest["pipeline"]] == ["dense", *best["methods"]]
    assert helpers.read_json(folder / "results" / "search" / "best_pipeline.json") == best["pipeline"]
    assert best["confirmed"]["kl"] == min(found["kl"] for found in summary["confirmed"].values()) > 0
    assert summary["quality"] == "kl" and summary["chosen"][0]["trial"] == best["trial"]
    assert [row["left_out"] for row in summary["ablation"]] == (best["methods"] if len(best["methods"]) > 1 else [])
    assert best["measured"]["compression_ratio"] >= 1.05
    dense = read_manifest(folder / "models" / "llama")["files"]["model.safetensors"]["bytes"]
    stored = load_file(folder / "models" / "llama_searched" / "model.safetensors")
    weights = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    assert dense / weights == pytest.approx(best["measured"]["compression_ratio"])
    load_checkpoint(folder / "models" / "llama_searched")
    names = {path.name for path in (folder / "results" / "search").iterdir()}
    plots = {f"{name}.png" for name in ("convergence", "importance", "pareto", "error_accumulation", "retraining_gain")}
    assert plots | {"study.db", "trials.csv", "best_pipeline.json", "summary.json", "cache"} == names - {"costs"}  # gptq's, if it was run
    with open(folder / "results" / "search" / "trials.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7 and all(row["pipeline"] and (row["perplexity"] or row["reason"]) for row in rows)
    assert f"--replay {best['trial']}" in output and "optuna-dashboard sqlite:///" in output and output.count("to go") == 7


def test_a_finished_search_has_nothing_to_do_and_a_longer_one_goes_on(searched, run_here, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(searched[0], folder)
    settings = ("--target_compression", 1.05, "--final_tokens", 0)
    status, output = run_here("--n_trials", 7, *settings, cwd=folder)
    assert status == 0 and "7 of 7 trials are there" in output and "up to date" in output, output
    status, output = run_here("--n_trials", 9, *settings, cwd=folder)
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


NARROW = (
    "--study_name", "narrow", "--target_compression", 1.04, "--n_trials", 2, "--methods", "prune", "nf4",
    "--choices", '{"prune.round_to": [8], "prune.sparsity": [0.2, 0.3]}', "--storage", "sqlite:///own.db",
)  # fmt: skip


@pytest.fixture(scope="module")
def two_studies(searched, tmp_path_factory):
    """Return a directory in which a second study with another target has run after the first, and what it printed."""
    folder = tmp_path_factory.mktemp("two") / "copy"
    shutil.copytree(searched[0], folder)
    return folder, helpers.run_script_once(SCRIPT, *NARROW, cwd=folder)


def state_of(folder) -> dict[str, bytes]:
    """Return what lies in a directory, but for locks, the databases and what is half way through a pipeline."""
    files = [path for path in folder.rglob("*") if path.is_file() and not {".locks", "cache"} & set(path.parts)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.suffix != ".db"}


def test_two_studies_have_places_of_their_own(searched, two_studies, run_here):
    before, now = state_of(searched[0]), state_of(two_studies[0])
    assert {name: now[name] for name in before} == before
    mine = ("results/search/narrow/", "models/llama_searched_narrow/", "results/pipeline_llama_searched_narrow.json")
    assert now.keys() > before.keys() and all(name.startswith(mine) for name in now.keys() - before.keys())
    summary = helpers.read_json(two_studies[0] / "results" / "search" / "narrow" / "summary.json")
    assert summary["study"] == "narrow" and summary["target_compression"] == 1.04 and summary["trials"] == 2
    assert "findings go to results/search/narrow, the best model to models/llama_searched_narrow" in two_studies[1]
    status, output = run_here("--n_trials", 7, "--target_compression", 1.05, "--final_tokens", 0, cwd=two_studies[0])
    assert status == 0 and "models/llama_searched is up to date" in output, output
    status, output = run_here(*NARROW, cwd=two_studies[0])
    assert status == 0 and "models/llama_searched_narrow is up to date" in output, output
    assert state_of(two_studies[0]) == now


def test_the_printed_command_makes_that_very_trial_again(two_studies, run_here):
    folder, output = two_studies
    command = output.split("any of them again: ")[1].splitlines()[0]
    status, output = run_here(*shlex.split(command)[2:], cwd=folder)
    assert status == 0, output
    best = helpers.read_json(folder / "results" / "search" / "narrow" / "summary.json")["best"]
    name = f"llama_trial_{best['trial']}_narrow"
    stage = read_manifest(folder / "models" / name)["stage"]
    assert stage["config"]["study"]["name"] == "narrow" and stage["config"]["study"]["trial"] == best["trial"]
    assert stage["config"]["study"] | {"storage": "sqlite:///own.db", "target_compression": 1.04} == stage["config"]["study"]
    again, searched = (load_checkpoint(folder / "models" / each).model for each in (name, "llama_searched_narrow"))
    with torch.no_grad():
        assert torch.equal(again(helpers.example_windows()).logits, searched(helpers.example_windows()).logits)


def test_an_output_that_two_studies_write_is_that_of_the_last_one_asked_for(two_studies, run_here, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(two_studies[0], folder)
    first = ("--n_trials", 7, "--target_compression", 1.05, "--final_tokens", 0, "--output", "models/mine")
    for arguments, study in (
        (first, "llama-bayesian"),
        ((*NARROW, "--output", "models/mine"), "narrow"),
        (first, "llama-bayesian"),
    ):
        status, output = run_here(*arguments, cwd=folder)
        assert status == 0 and "models/mine is up to date" not in output, output
        assert read_manifest(folder / "models" / "mine")["stage"]["config"]["study"]["name"] == study


def test_findings_are_known_only_for_what_they_depend_on(tmp_path):
    study = optuna.create_study(study_name="one")
    trial = study.ask()
    measured = {"kl": 0.1, "perplexity": 9.0, "compression_ratio": 2.0, "loss": 2.0, "bytes": 100}
    for name, value in {
        "measured": measured,
        "pipeline": [{"method": "nf4", "params": {}}],
        "seconds": 1.0,
        "steps": [],
    }.items():
        trial.set_user_attr(name, value)
    study.tell(trial, 9.0)
    depends_on = {"storage": "here", "objectives": ("perplexity",), "top": 3}
    confirmed = {0: measured}
    summary = write_findings(study, tmp_path, 1.5, confirmed, depends_on)
    assert known_findings(study, tmp_path, depends_on) == summary
    assert known_findings(study, tmp_path, depends_on | {"storage": "there"}) is None
    assert known_findings(study, tmp_path, depends_on | {"objectives": ("perplexity", "bytes")}) is None
    assert known_findings(optuna.create_study(study_name="two"), tmp_path, depends_on) is None
    assert known_findings(study, tmp_path / "nowhere", depends_on) is None
    running = study.ask()
    assert known_findings(study, tmp_path, depends_on) is None
    write_findings(study, tmp_path, 1.5, confirmed, depends_on)
    assert known_findings(study, tmp_path, depends_on) is None  # somebody is still at it
    study.tell(running, state=optuna.trial.TrialState.FAIL)
    assert known_findings(study, tmp_path, depends_on) is None
    (tmp_path / "summary.json").write_text("cut o", encoding="utf-8")
    assert known_findings(study, tmp_path, depends_on) is None


def test_another_space_is_another_study(searched, run_here):
    status, output = run_here("--target_compression", 1.05, "--methods", "nf4", "--choices", "{}", cwd=searched[0])
    assert status == 1 and "made for something else" in output and "--study_name" in output


def test_a_target_out_of_reach_says_what_was_reached(tmp_path, run_here):
    helpers.add_llama(tmp_path)
    status, output = run_here("--methods", "nf4", "--choices", "{}", "--target_compression", 50)
    assert status == 1 and "50 times smaller" in output and "the highest expected" in output, output
    assert not (tmp_path / "models" / "llama_searched").exists()
    assert (tmp_path / "results" / "search" / "trials.csv").is_file()


def test_a_search_whose_only_trial_failed_says_why(tmp_path, run_here):
    helpers.add_llama(tmp_path)
    choices = '{"prune.round_to": [8], "prune.sparsity": [0.95], "prune.scope": ["uniform"]}'
    settings = ("--methods", "prune", "--choices", choices, "--target_compression", 1.01)
    status, output = run_here(*settings, "--n_trials", 1)
    assert status == 1 and "0.00" not in output, output
    assert (
        "no trial ran to its end, 1 failed; the last one, trial 0 (prune): CompactMindError: sparsity 0.95 cannot be met"
        in output
    )
    assert "results/search/trials.csv" in output and "another --study_name" in output
    rows = (tmp_path / "results" / "search" / "trials.csv").read_text(encoding="utf-8")
    assert "cannot be met" in rows


def test_a_model_that_cannot_be_pruned_so_is_refused_before_the_first_trial(tmp_path, run_here):
    helpers.add_llama(tmp_path)
    model = helpers.randomize(HeliumForCausalLM(HeliumConfig(**helpers.llama_settings(head_dim=8))))
    model.save_pretrained(tmp_path / "helium")
    helpers.make_byte_tokenizer().save_pretrained(tmp_path / "helium")
    status, output = run_here("--model_path", "helium", "--choices", '{"prune.structures": [["groups"]]}')
    assert status == 1 and "'helium' cannot be pruned of key-value groups" in output and "use structures channels" in output, output
    study = optuna.load_study(study_name="helium-bayesian", storage=f"sqlite:///{tmp_path}/results/search/study.db")
    assert study.trials == [] and models_in(tmp_path) == ["llama"]
    status, output = run_here(
        "--model_path", "helium", "--methods", "nf4", "--choices", "{}", "--n_trials", 1, "--study_name", "q"
    )
    assert status == 0 and (tmp_path / "models" / "llama_searched_q").is_dir(), output


def test_no_model_is_lost_for_what_is_only_to_be_known_of_it(tmp_path, run_here, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no memory left\nand more")

    helpers.add_llama(tmp_path)
    for name in ("interaction", "layer_errors"):
        monkeypatch.setattr(making, name, broken)
    monkeypatch.setitem(findings.SEARCH_FIGURES, "pareto", broken)
    status, output = run_here(
        "--methods", "prune", "nf4", "--mode", "hybrid", "--n_trials", 2, "--target_compression", 1.2,
        "--choices", '{"prune.round_to": [8], "prune.sparsity": [0.2, 0.3]}',
    )  # fmt: skip
    assert status == 0, output
    for what in ("the interaction", "the error of every layer"):
        assert f"{what} could not be measured and is left out: RuntimeError: no memory left\n" in output
    assert "pareto.png could not be drawn: RuntimeError" in output
    manifest = load_checkpoint(tmp_path / "models" / "llama_searched").manifest
    assert manifest["interaction"] is None and manifest["layer_errors"] is None and manifest["search"]
    assert (tmp_path / "results" / "search" / "convergence.png").is_file()


def test_several_objectives_are_measured(tmp_path, run_here):
    helpers.add_llama(tmp_path)
    status, output = run_here(
        "--methods", "prune", "nf4", "--choices", '{"prune.round_to": [8], "prune.sparsity": [0.3]}', "--n_trials", 3,
        "--objectives", "perplexity", "bytes", "latency", "memory", "--target_compression", 1.01,
    )  # fmt: skip
    assert status == 0, output
    folder = tmp_path / "results" / "search" / "llama-bayesian-front"
    with open(folder / "trials.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["state"] == "COMPLETE"]
    assert rows and all(float(row[name]) > 0 for row in rows for name in ("perplexity", "bytes", "latency", "memory"))


FRONT = (
    "--methods", "nf4", "gptq", "--choices", "{}", "--objectives", "kl", "bytes", "--save_front", 1.2, 1.6, 9, "--n_trials", 7,
)  # fmt: skip


def test_a_front_is_saved_at_every_size_that_something_reaches(tmp_path, run_here):
    helpers.add_llama(tmp_path)
    status, output = run_here(*FRONT)
    assert status == 0, output
    assert models_in(tmp_path) == ["llama", "llama_front_1.6x", "llama_searched"]  # which is the one of the usual size
    assert "the best models to models/llama_searched, models/llama_front_1.6x, models/llama_front_9x" in output
    assert "save_front 9: no trial is so many times smaller: the smallest is" in output
    folder = tmp_path / "results" / "search" / "llama-bayesian-front"
    summary, dense = helpers.read_json(folder / "summary.json"), read_manifest(tmp_path / "models" / "llama")
    sizes = [point["bytes"] for point in summary["front"]["points"]]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) > 1 and (folder / "pareto.png").is_file()
    distances = [point["kl"] for point in summary["front"]["points"]]
    assert distances == sorted(distances) and summary["target_compression"] == 1.2
    for ratio, name, chosen in zip((1.2, 1.6), ("llama_searched", "llama_front_1.6x"), summary["chosen"], strict=False):
        manifest = load_checkpoint(tmp_path / "models" / name).manifest
        assert manifest["search"]["trial"] == chosen["trial"]
        assert dense["files"]["model.safetensors"]["bytes"] / manifest["files"]["model.safetensors"]["bytes"] >= ratio
        small = {number: row for number, row in summary["confirmed"].items() if row["compression_ratio"] >= ratio}
        assert chosen["confirmed"]["kl"] == min(row["kl"] for row in small.values())
        assert manifest["pipeline"][-1]["divergence"]["mean"] > 0 and manifest["pipeline"][-1]["protocol"]["text"].endswith("test")
    assert [line.split()[0] for line in output.splitlines() if "times smaller" in line][:1] == ["trial"]
    status, output = run_here(*FRONT)
    assert status == 0 and output.count("is up to date") == 2 and "save_front 9: no trial" in output, output
    status, output = run_here(*FRONT, "--strategy", "evolution", "--first_guesses", False)
    its_own = {f"{name}_llama-evolution-front" for name in ("llama_searched", "llama_front_1.6x")}
    assert status == 0 and its_own <= set(models_in(tmp_path)), output


def test_the_best_pipeline_is_retrained_long_before_it_is_saved(tmp_path, run_here):
    helpers.add_llama(tmp_path)
    choices = {
        "prune.round_to": [8], "prune.sparsity": [0.3], "prune.criterion": ["l2"], "prune.scope": ["uniform"], "prune.blocks": [0],
        "prune.structures": [["channels"]], "retrain.tokens": [64], "retrain.lr": [1e-3], "retrain.distillation": [True],
    }  # fmt: skip
    settings = ("--methods", "prune", "retrain", "--choices", json.dumps(choices), "--target_compression", 1.05, "--n_trials", 2)
    status, output = run_here(*settings, "--final_tokens", 2048)
    assert status == 0, output
    summary = helpers.read_json(tmp_path / "results" / "search" / "summary.json")
    (chosen,) = summary["chosen"]
    training, saved = chosen["final_training"], read_manifest(tmp_path / "models" / "llama_searched")
    assert [step["method"] for step in chosen["pipeline"]] == ["prune", "retrain"], output
    assert training["tokens"] == 2048 and training["kept"] == (training["final"] <= training["searched"]) and training["seconds"] > 0
    assert training["searched"] == chosen["confirmed"]["kl"]
    assert saved["pipeline"][2]["params"]["tokens"] == (2048 if training["kept"] else 64)
    assert f"search: kl {training['searched']:.4g}" in output and f"final training: kl {training['final']:.4g}" in output
    assert [row["left_out"] for row in summary["ablation"]] == ["prune", "retrain"]
    assert "has nothing to recover from" in summary["ablation"][0]["reason"] and summary["ablation"][1]["change"] < 0
    assert "left out" in output


# --------------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--n_trials", 0), ("n_trials 0", "[1, inf)")),
        (("--target_compression", 0), ("target_compression 0", "2.5")),
        (("--methods", "retrain", "--choices", "{}"), ("no legal pipeline",)),
        (("--methods", "prune", "--mode", "hybrid", "--choices", "{}"), ("no legal pipeline", "hybrid")),
        (("--choices", "{"), ("choices are no JSON",)),
        (("--choices", "[1]"), ("are no object",)),
        (("--choices", '{"prune.sparsity": [7]}'), ("sparsity 7",)),
        (("--storage", "sqlite:////nowhere/at/all/study.db"), ("cannot be opened",)),
        (("--objectives", "perplexity", "perplexity"), ("name each once",)),
        (("--objectives", "kl", "perplexity"), ("name one of kl and perplexity", "for example kl bytes")),
        (("--objectives", "bytes"), ("objectives bytes: name one of kl and perplexity",)),
        (("--save_front", 2, 3), ("save_front 2 3 wants models of several sizes", "--objectives kl bytes")),
        (("--save_front", 2, 2, "--objectives", "kl", "bytes"), ("save_front 2 2: name each ratio once",)),
        (("--save_front", 0.5, "--objectives", "kl", "bytes"), ("save_front 0.5 is not in (1, inf)",)),
        (("--strategy", "fixed", "--objectives", "kl", "bytes"), ("strategy fixed runs one pipeline and has no front",)),
        (("--study_name", "a/b"), ("study_name 'a/b'", "for example --study_name narrow")),
        (("--study_name", ".."), ("study_name '..'",)),
        (("--study_name", "cache"), ("study_name 'cache'",)),
        (("--study_name", "summary.json"), ("study_name 'summary.json'",)),
        (("--output", "models/llama"), ("it is the model that is read",)),
    ],
    ids=str,
)
def test_a_search_that_makes_no_sense_is_refused(tmp_path, run_here, arguments, expected):
    helpers.add_llama(tmp_path)
    status, output = run_here(*arguments)
    assert status == 1 and all(part in output for part in expected), output
    assert "Traceback" not in output
    assert models_in(tmp_path) == ["llama"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--pipeline", "["), ("no JSON", "for example")),
        (("--pipeline", '[{"method": "shrink"}]'), ("unknown method 'shrink'", "prune, sparse24, retrain, smooth, w8a8, nf4")),
        (("--pipeline", '[{"method": "w8a8"}, {"method": "prune"}]'), ("comes after a quantization",)),
        (("--pipeline", '[{"method": "prune", "params": {"sparsity": 0.99, "round_to": 8}}]'), ("0.99 cannot be met",)),
        (("--pipeline", '[{"method": "prune", "params": {"round_to": 64}}]'), ("round_to 64", "48")),
        (("--seq_len", 4096), ("less than one window of 4096",)),
        (("--calibration_windows", 0), ("calibration_windows 0", "[1, inf)")),
        (("--model_path", "nowhere"), ("nowhere", "python download_model.py")),
        (("--output", "models"), ("models cannot be written to",)),
        (("--output", "."), ("cannot be written to",)),
        (("--output", "models/llama"), ("models/llama cannot be written to", "it is the model that is read")),
    ],
    ids=str,
)
def test_bad_input_is_named_and_leaves_nothing_behind(tmp_path, run_here, arguments, expected):
    helpers.add_llama(tmp_path)
    status, output = run_here("--strategy", "fixed", *arguments)
    assert status == 1 and all(part in output for part in expected), output
    assert "Traceback" not in output
    assert models_in(tmp_path) == ["llama"]
    assert not (tmp_path / "results").exists() or not list((tmp_path / "results").iterdir())
