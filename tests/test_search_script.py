"""5_bayesian_search.py as a user searches: what is found and saved, studies beside each other, and what no trial reaches."""

import csv
import json
import shlex
import shutil

import helpers
import optuna
import pytest
import scripts
import search_runs
import torch
from safetensors.torch import load_file
from search_runs import SCRIPT, models_in
from transformers import HeliumConfig, HeliumForCausalLM

from compactmind.checkpoint import load_checkpoint
from compactmind.manifest import read_manifest
from compactmind.search import findings, making
from compactmind.search.findings import known_findings, write_findings

run_here = search_runs.run_here


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
    return folder, scripts.run_script_once(SCRIPT, "--n_trials", 7, "--target_compression", 1.05, "--final_tokens", 0, cwd=folder)


def test_a_search_saves_the_best_pipeline_that_reaches_the_target_and_everything_it_found(searched):
    folder, output = searched
    summary = helpers.read_json(folder / "results" / "search" / "summary.json")
    assert summary["trials"] == 7 and sum(summary["states"].values()) == 7
    best, manifest = summary["best"], read_manifest(folder / "models" / "llama_searched")
    assert manifest["search"]["trial"] == best["trial"]
    assert [row["method"] for row in manifest["pipeline"]] == ["dense", *best["methods"]]
    assert helpers.read_json(folder / "results" / "search" / "best_pipeline.json") == best["pipeline"]
    assert best["confirmed"]["kl"] == min(result["kl"] for result in summary["confirmed"].values()) > 0
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
    return folder, scripts.run_script_once(SCRIPT, *NARROW, cwd=folder)


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
    said = "no pipeline of these methods is expected to be 50 times smaller: nf4 comes nearest, 4.00 times"
    assert status == 1 and said in output and "trial   0" not in output, output
    assert not (tmp_path / "models" / "llama_searched").exists()


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
        "prune.structures": [["channels"]], "retrain.tokens": [64], "retrain.lr": [1e-3], "retrain.alpha": [0.5],
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
