"""A model that is large beside the memory goes through the whole LLM track: each stage in a process that is killed beyond a limit."""

import json
import os
import sys
from pathlib import Path

import helpers
import pytest
import scripts

SHARE = 3.0
"""Bytes that a stage may hold beyond what the libraries take, as a multiple of the weight file; pages of files can be dropped."""

LIMITED = f"""
import json, os, runpy, sys, threading, time
from pathlib import Path
sys.path.insert(0, {str(helpers.REPOSITORY)!r})
import torch
from compactmind import checkpoint, precision
from compactmind.methods import memory
share, small, command = json.loads(sys.argv[1])
for module in (checkpoint, memory, precision):
    module.SMALL_BYTES = small

def held():
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))

def watch(limit):
    while held() < limit:
        time.sleep(0.002)
    os.write(2, b"killed: it holds more than its limit")
    os._exit(137)

torch.nn.functional.linear(torch.ones(64, 64), torch.ones(64, 64))
limit = held() + int(share * Path("models/llama/model.safetensors").stat().st_size)
threading.Thread(target=watch, args=(limit,), daemon=True).start()
sys.argv = command
runpy.run_path(command[0], run_name="__main__")
"""
"""Runs a script that is killed where it holds more than `share` times the weight file; models beyond `small` are large."""

PIPELINE = [
    {"method": "prune", "params": {"sparsity": 0.2, "round_to": 8}},
    {"method": "retrain", "params": {"mode": "lora", "gradient_checkpointing": True, "tokens": 128, "evaluations": 1}},
]
STAGES = {
    "4_smoothquant_llama.py": ("--nf4_compensation", "False", "--alpha", "0.5", "--alpha_grid", "0.5"),
    "5_bayesian_search.py": ("--strategy", "fixed", "--pipeline", json.dumps(PIPELINE)),
    "6_evaluate_report.py": ("--latency_repeats", "1"),
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A workspace whose Llama takes 90 MB in bf16: more than anything else in memory."""
    folder = tmp_path_factory.mktemp("large")
    helpers.make_workspace(folder)
    scripts.run_script_once("download_model.py", cwd=folder)
    helpers.add_llama(folder, hidden_size=768, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=12, num_key_value_heads=4)
    return folder


@pytest.fixture
def run_limited(workspace):
    """Run a script with less memory: `run_limited(name, small)` -> (exit status, output); forks of one that has imported all."""
    launcher, runner, said = scripts.Launcher(workspace), workspace / "limited.py", workspace / "said.txt"
    runner.write_text(LIMITED, encoding="utf-8")

    def run(name: str, small: int) -> tuple[int, str]:
        command = [str(helpers.REPOSITORY / name), "--profile", "smoke", *STAGES[name]]
        status = launcher.run([sys.executable, str(runner), json.dumps([SHARE, small, command])], workspace, Path(os.devnull), said)
        return status, said.read_text(encoding="utf-8")

    yield run
    launcher.close()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a process holds that cannot be dropped")
def test_every_stage_of_a_large_model_keeps_to_a_small_multiple_of_its_weights(workspace, run_limited):
    status, output = run_limited("5_bayesian_search.py", small=10**9)  # float32 as a whole, and the teacher beside it
    assert status == 137 and "more than its limit" in output, output[-1000:]
    for name in STAGES:
        status, output = run_limited(name, small=0)
        assert status == 0, f"{name}: {output[-3000:]}"
    report = helpers.read_json(workspace / "results" / "final_report.json")
    rows = {row["name"]: row for row in report["models"] if row["track"] == "llm" and row["status"] == "measured"}
    assert {"llama", "llama_w8a8", "llama_nf4", "llama_pruned"} <= set(rows)
    assert all(row["generation"]["decode"]["speedup"] for row in rows.values())
    assert rows["llama_pruned"]["compression_ratio"] > 1.2
