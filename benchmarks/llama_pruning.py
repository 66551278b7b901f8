"""What every criterion makes of a Llama at several sparsities, with and without re-fitting, beside Torch-Pruning's own L2.

Run:   python benchmarks/llama_pruning.py                  (after python download_model.py)
       pip install torch-pruning==1.6.1                    (optional: its rows are left out without it)
       python benchmarks/llama_pruning.py --rounds 3 --structures channels groups --criteria taylor
Reads: models/llama, wikitext_data/{train,test}.jsonl
Writes: results/benchmark_pruning.json, and prints the table; how much memory scoring takes beside it

No retraining. Scored and re-fitted on training text, perplexity on test text against the dense model, paired over windows. All rows cut
the same share of the parameters of the blocks. Torch-Pruning's row: its DependencyGraph finds the couplings and removes the channels,
its GroupMagnitudeImportance(p=2) scores them, the same number in every block (its high-level pruner fails on grouped queries).
"""

import json
import os
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import SearchConfig, StageConfig, parse_command_line, run_stage  # noqa: E402
from compactmind.checkpoint import load_as_released  # noqa: E402
from compactmind.data import read_dataset_description  # noqa: E402
from compactmind.devices import default_device  # noqa: E402
from compactmind.errors import CompactMindError  # noqa: E402
from compactmind.evaluation.cost import resident_bytes  # noqa: E402
from compactmind.evaluation.perplexity import paired_ratio, perplexity  # noqa: E402
from compactmind.files import write_json_atomically  # noqa: E402
from compactmind.forward import window_losses  # noqa: E402
from compactmind.methods.llama import llama_blocks  # noqa: E402
from compactmind.methods.pruning.llama_importance import CRITERIA, score  # noqa: E402
from compactmind.methods.pruning.llama_masks import PruneRecipe  # noqa: E402
from compactmind.methods.pruning.llama_pruning import prune_llama  # noqa: E402
from compactmind.methods.pruning.llama_structure import channel_parameters, prunable_parameters  # noqa: E402
from compactmind.precision import work_in_float32  # noqa: E402
from compactmind.text import calibration_windows, load_documents, token_windows  # noqa: E402


@dataclass(frozen=True)
class BenchmarkConfig(StageConfig):
    sparsities: tuple[float, ...] = (0.1, 0.2, 0.3)
    """Shares of the parameters of the blocks that go."""
    criteria: tuple[str, ...] = CRITERIA
    """Criteria to compare."""
    scope: str = "global"
    """Where the cut is made: global, uniform or measured."""
    structures: tuple[str, ...] = ("channels",)
    """What is cut: channels, groups or both."""
    rounds: int = 1
    """Parts in which it is cut."""
    calibration_windows: int = 16
    """Windows of training text to score and re-fit on."""
    only_memory: bool = False
    """Measure the memory of scoring here and print one line of JSON (what the script starts for itself)."""


TORCH_PRUNING = "Torch-Pruning L2, uniform"


def load(config: BenchmarkConfig):
    """Return a fresh dense model that computes in float32 and its tokenizer."""
    model, tokenizer = load_as_released(config.models_dir / "llama")
    return work_in_float32(model.to(default_device())), tokenizer


# -------------------------------------------------------------------------------------------------------- Torch-Pruning
def prune_with_torch_pruning(model, sparsity: float) -> None:
    """Remove, in place, the FFN channels that Torch-Pruning's L2 rates lowest, of every block the same number."""
    import torch_pruning

    inputs = {"input_ids": torch.zeros(1, 8, dtype=torch.long, device=model.device), "use_cache": False}
    graph = torch_pruning.DependencyGraph()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it lists every norm as a parameter it knows no layer for
        graph.build_dependency(model, example_inputs=inputs, output_transform=lambda output: output.logits)
    importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
    total = prunable_parameters(model)
    for block in llama_blocks(model):
        width = block.up.out_features
        count = round(sparsity * total / (len(model.model.layers) * channel_parameters(block)) / 64) * 64
        whole = graph.get_pruning_group(block.gate, torch_pruning.prune_linear_out_channels, idxs=list(range(width)))
        lowest = importance(whole).argsort()[:count].tolist()
        graph.get_pruning_group(block.gate, torch_pruning.prune_linear_out_channels, idxs=lowest).prune()


def has_torch_pruning() -> bool:
    try:
        import torch_pruning  # noqa: F401
    except ImportError:
        print("Torch-Pruning is not installed: its rows are left out (pip install torch-pruning==1.6.1)")
        return False
    return True


# --------------------------------------------------------------------------------------------------------------- memory
def peak_of(action) -> int:
    """Return by how many bytes memory rises above where it is now while `action` runs; allocated memory on a GPU."""
    if default_device() == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        return torch.cuda.max_memory_allocated() - before
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = resident_bytes()[0]
    action()
    return resident_bytes()[1] - before


def scoring_memory(model, windows: torch.Tensor) -> dict:
    """Return in MB the model's own bytes, and what plain inference and scoring by taylor need beside them."""
    own = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    inference = peak_of(lambda: window_losses(model, windows[:2]))
    return {
        "model_mb": own / 1e6,
        "inference_mb": inference / 1e6,
        "taylor_mb": peak_of(lambda: score(model, "taylor", windows[:2])) / 1e6,
    }


# ----------------------------------------------------------------------------------------------------------------- main
def main(config: BenchmarkConfig) -> None:
    stage = SearchConfig.for_profile(config.profile)
    model, tokenizer = load(config)
    windows = {
        split: cut(tokenizer, load_documents(stage.text_dir, split), stage.seq_len, count)
        for split, cut, count in (
            ("train", calibration_windows, config.calibration_windows), ("test", token_windows, stage.eval_windows)
        )
    }  # fmt: skip
    if config.only_memory:
        print(json.dumps(scoring_memory(model, windows["train"])))
        return
    command = [sys.executable, __file__, *sys.argv[1:], "--only_memory", "True"]
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "1000000"
    }  # what is freed goes back at once: the peak is what is needed
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise CompactMindError(f"measuring the memory of scoring failed: {done.stderr.strip()[-400:]}")
    memory = json.loads(done.stdout.splitlines()[-1])
    text = f"{read_dataset_description(stage.text_dir)['source']['source']}, test"
    dense, rows = perplexity(model, windows["test"], text), []
    print(f"dense {dense['perplexity']:.3f}, {json.dumps(dense['protocol'])}", flush=True)

    path = config.results_dir / "benchmark_pruning.json"
    settings = {name: getattr(config, name) for name in ("scope", "structures", "rounds", "calibration_windows")}
    record = {**settings, "protocol": dense["protocol"], "dense": dense["perplexity"], "memory": memory, "rows": rows}

    def add(name: str, sparsity: float, compensate: bool, make) -> None:
        started = time.perf_counter()
        small = make()
        seconds, losses = time.perf_counter() - started, window_losses(small, windows["test"])
        row = {
            "name": name, "sparsity": sparsity, "compensate": compensate, "seconds": seconds,
            "sparsity_measured": 1 - prunable_parameters(small) / whole,
            "perplexity": losses.mean().exp().item(), **paired_ratio(losses.tolist(), dense["losses"]),
        }  # fmt: skip
        rows.append(row)
        write_json_atomically(path, record)
        low, high = row["interval"]
        print(
            f"{name:<28}{row['sparsity_measured']:>7.1%}{'  re-fitted' if compensate else '           '}{row['perplexity']:>14.2f}"
            f"{row['ratio']:>10.3f}x [{low:.3f}, {high:.3f}]{seconds:>8.0f} s",
            flush=True,
        )

    def ours(scores, **settings):
        recipe = PruneRecipe(scope=config.scope, structures=config.structures, rounds=config.rounds, **settings)
        return prune_llama(load(config)[0], recipe, windows["train"], scores)[0]

    def theirs(sparsity):
        pruned, _ = load(config)
        prune_with_torch_pruning(pruned, sparsity)
        return pruned

    whole = prunable_parameters(model)
    if has_torch_pruning():
        for sparsity in config.sparsities:
            add(TORCH_PRUNING, sparsity, False, lambda s=sparsity: theirs(s))
    for criterion in config.criteria:
        started = time.perf_counter()
        scores = score(model, criterion, windows["train"], seed=config.seed)
        print(f"{criterion}: scored in {time.perf_counter() - started:.0f} s", flush=True)
        for sparsity in config.sparsities:
            for compensate in (False, True):
                settings = {"criterion": criterion, "sparsity": sparsity, "compensate": compensate, "seed": config.seed}
                add(criterion, sparsity, compensate, lambda s=scores, c=settings: ours(s, **c))

    # ---- table
    shown = "/".join(config.structures)
    print(f"\nperplexity, times dense; {shown}, {config.scope}, {config.rounds} round(s); second number of a pair: re-fitted")
    print(f"{'':<28}" + "".join(f"{sparsity:>24.0%}" for sparsity in config.sparsities))
    for name in dict.fromkeys(row["name"] for row in rows):
        cells = [
            " ".join(f"{row['ratio']:>11.4g}" for row in rows if (row["name"], row["sparsity"]) == (name, sparsity))
            for sparsity in config.sparsities
        ]
        print(f"{name:<28}" + "".join(f"{cell:>24}" for cell in cells))
    print(
        f"memory: {memory['model_mb']:.0f} MB of weights; scoring by taylor needs {memory['taylor_mb']:.0f} MB beside them "
        f"({memory['taylor_mb'] / memory['model_mb']:.2f} times), plain inference {memory['inference_mb']:.0f} MB"
    )
    print(f"written to {path}")


if __name__ == "__main__":
    run_stage(main, parse_command_line(BenchmarkConfig.for_profile()))
