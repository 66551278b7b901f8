"""5_bayesian_search.py with one pipeline, as a user runs it: what it makes, measures again and takes over from another."""

import json
import runpy
import shutil

import helpers
import pytest
import scripts
import search_runs
import torch
from search_runs import SCRIPT, models_in
from transformers import AutoModelForCausalLM

from compactmind import forward
from compactmind.attention import with_attention_kernel
from compactmind.checkpoint import load_checkpoint
from compactmind.evaluation.divergence import divergence
from compactmind.evaluation.perplexity import paired_ratio, perplexity
from compactmind.manifest import read_manifest
from compactmind.methods.registry import Resources
from compactmind.text import load_documents, token_windows

run_here = search_runs.run_here


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return a directory in which the stage has run once with its default pipeline, and what it printed."""
    folder = tmp_path_factory.mktemp("search")
    helpers.add_llama(folder)
    done = scripts.run_script(SCRIPT, "--strategy", "fixed", cwd=folder)
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
    plain = with_attention_kernel(AutoModelForCausalLM.from_pretrained(folder / "models" / "llama_pruned", dtype=torch.float32))
    with torch.no_grad():
        assert torch.equal(model(helpers.example_windows()).logits, plain(helpers.example_windows()).logits)
    assert AutoModelForCausalLM.from_pretrained(folder / "models" / "llama_pruned").dtype == torch.bfloat16  # as released
    assert models_in(folder) == ["llama", "llama_pruned"]  # no state of retraining


def test_logits_of_the_dense_model_that_are_kept_change_no_number(monkeypatch):
    windows, result = helpers.example_windows(count=3, length=12), []
    stage = runpy.run_path(str(helpers.REPOSITORY / SCRIPT), run_name="stage")
    for kept in (2**31, 0):
        monkeypatch.setattr(forward, "LOGITS_TO_KEEP", kept)
        resources = Resources(windows, windows, windows, helpers.make_llama)
        inputs = stage["PipelineInputs"](None, None, resources, windows, windows, "text", "first", "")
        assert (inputs.dense_on_test.made is None) == bool(kept)
        result.append([inputs.on_test.of(model) for model in (resources.teacher(), helpers.make_llama(seed=1))])
    assert result[0] == result[1]
    assert result[0][0]["divergence"]["mean"] == 0 < result[0][1]["divergence"]["mean"]


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
    result = divergence(dense.model, checkpoint.model, windows)
    losses = [perplexity(each.model, windows, "")["losses"] for each in (checkpoint, dense)]
    before, row = manifest["pipeline"]
    assert before["divergence"]["mean"] == 0 and before["against_dense"]["ratio"] == 1
    assert row["divergence"]["mean"] == pytest.approx(result["mean"], rel=1e-3)
    assert row["divergence"]["same_top"] == result["same_top"]
    assert row["against_dense"]["ratio"] == pytest.approx(paired_ratio(*losses)["ratio"], rel=1e-4)
    assert helpers.read_json(tmp_path / "results" / "pipeline_llama_1.6x.json")["pipeline"] == manifest["pipeline"]
    status, output = run_here(*settings, pipeline)
    assert status == 0 and "up to date" in output
    status, output = run_here(*settings, '[{"method": "gptq", "params": {"target_compression": 9}}]')
    assert status == 1 and "Traceback" not in output and read_manifest(tmp_path / "models" / "llama_1.6x") == manifest, output


def test_what_tensors_cost_is_measured_once_for_all_targets(tmp_path, run_here):
    helpers.add_llama(tmp_path)

    def make(target, name, *more, before=()):
        """Return what it took from an earlier run: sensitivities of the linears, and what every tensor costs in every width."""
        pipeline = json.dumps([*before, {"method": "gptq", "params": {"target_compression": target}}])
        status, output = run_here("--strategy", "fixed", "--output", f"models/{name}", "--pipeline", pipeline, *more)
        assert status == 0, output
        return [line.split()[0].strip(",") for line in output.splitlines() if "measured by an earlier run" in line]

    assert not make(1.6, "first")
    (kept,) = (tmp_path / "results" / "search" / "costs").glob("costs_*.json")
    (sensitivities,) = kept.parent.glob("sensitivities_*.json")
    (states,) = kept.parent.glob("states_*.safetensors")  # of the dense model on test text, for all of them
    left = states.stat().st_mtime_ns
    assert make(1.5, "second") == ["sensitivities", "costs"] and states.stat().st_mtime_ns == left
    assert not make(1.5, "forced", "--force", True)
    second, forced = (load_checkpoint(tmp_path / "models" / name) for name in ("second", "forced"))
    assert second.manifest["quantization"]["tensors"] == forced.manifest["quantization"]["tensors"]
    assert not make(1.7, "more_text", "--calibration_windows", 8)  # which is spread further: other windows
    assert not make(1.7, "fewer", "--calibration_windows", 2)
    prune = {"method": "prune", "params": {"sparsity": 0.2, "round_to": 8}}
    assert make(2.0, "pruned", before=[prune]) == ["sensitivities", "costs"]  # the latter for gptq alone, beside it
    assert load_checkpoint(tmp_path / "models" / "pruned").manifest["quantization"]["expected_kl"] > 0
    assert make(2.0, "shorter", before=[{**prune, "params": {"sparsity": 0.0, "blocks": 1}}]) == ["sensitivities"]
    for number, damaged in enumerate(('{"belongs_to": 3}', kept.read_text()[:-40])):  # other targets: what was made is in the cache
        kept.write_text(damaged)
        assert make(1.61 + number / 10, f"after_{number}") == ["sensitivities"]
        sensitivities.write_text(damaged)
        assert make(1.62 + number / 10, f"without_{number}") == ["costs"]
    helpers.add_llama(tmp_path, hidden_size=64)  # another model
    assert not make(1.6, "another")
