"""Searches and pipelines that make no sense are refused in clear words and leave nothing behind."""

import helpers
import pytest
import search_runs
from search_runs import models_in

from compactmind import room
from compactmind.errors import CompactMindError

run_here = search_runs.run_here


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
        (("--strategy", "fixed", "--objectives", "perplexity"), ("strategy fixed runs one pipeline", "leave --objectives perplexity out")),
        (("--strategy", "evolution", "--sampler", "gp"), ("sampler gp belongs to strategy bayesian", "leave --sampler out")),
        (
            ("--objectives", "kl", "bytes", "--save_front", 3, 4, "--target_compression", 3.5),
            ("target_compression 3.5 is none of the sizes of save_front 3 4", "leave --target_compression out"),
        ),
        (
            ("--methods", "prune", "gptq", "--target_compression", 60, "--choices", '{"prune.sparsity": [0.2]}'),
            ("no pipeline of these methods is expected to be 60 times smaller", "comes nearest", "choose a smaller --target_compression"),
        ),
        (
            ("--methods", "gptq", "--objectives", "kl", "bytes", "--save_front", 12, 14),
            ("expected to be 12 times smaller: gptq comes nearest", "choose a smaller --save_front"),
        ),
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


def test_what_was_refused_before_its_first_trial_holds_nothing_up_that_is_mended(tmp_path, run_here, monkeypatch):
    helpers.add_llama(tmp_path)
    settings = ("--methods", "nf4", "--choices", "{}", "--target_compression", 1.05, "--n_trials", 1)

    def refuse(*_):
        raise CompactMindError("too little memory: a smaller --seq_len takes less")

    with monkeypatch.context() as patch:
        patch.setattr(room, "require_room", refuse)
        status, output = run_here(*settings)
    assert status == 1 and "too little memory" in output, output
    status, output = run_here(*settings, "--seq_len", 24, "--dry_run", True)  # beside the study that is there now
    assert status == 0, output
    status, output = run_here(*settings, "--seq_len", 16)
    assert status == 0 and "llama_searched" in models_in(tmp_path), output
    status, output = run_here(*settings, "--seq_len", 24)
    assert status == 1 and "made for something else (seq_len: 16 there, 24 here)" in output, output
