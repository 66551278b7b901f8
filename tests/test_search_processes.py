"""5_bayesian_search.py in several processes: one with all the windows and two with half of them each make one model."""

import json

import helpers
import optuna
import pytest
import scripts
import search_runs
from search_runs import SCRIPT, models_in

from compactmind.manifest import read_manifest

run_here = search_runs.run_here


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
    ended, seen_together = scripts.run_script_watched(SCRIPT, *two, cwd=tmp_path)
    scripts.assert_shared_out(seen_together, seen)
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
    ended = scripts.run_script(SCRIPT, *settings, "--replay", trained, cwd=tmp_path, processes=2)
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
    ended = scripts.run_python(script, rank, *arguments, cwd=tmp_path, processes=2)  # it waits for both
    assert ended.returncode == 1 and f"ValueError: no memory left in process {rank}" in ended.stderr
    assert models_in(tmp_path) == ["llama"]
