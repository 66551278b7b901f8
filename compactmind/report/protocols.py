"""How each number of a report was made, and on what: sentences beside the numbers, written down with them."""

import os
import platform
from pathlib import Path
from typing import Any

import psutil
import torch

from compactmind.devices import default_device
from compactmind.manifest import versions

PER_CLASS = (
    "F1 of a class: harmonic mean of its precision and recall; macro: mean over the classes; AUC of more than two: mean of each against "
    "the rest; MCC: Matthews' correlation"
)


def protocols(settings: dict[str, Any], description: dict[str, Any], reference: str, as_shipped: str) -> dict[str, str]:
    """Return how each number was made, in one sentence each.

    `settings` are the report's, `description` is of the sentences, `reference` the classifier that others are compared with and
    `as_shipped` the name of the row of a published file.
    """
    rows = description["splits"]["test"]["rows"]
    length, threads = settings["cost_length"], torch.get_num_threads()
    where = "GPU" if default_device() == "cuda" else f"{threads} CPU threads"
    return {
        "accuracy": f"{rows} held-out test sentences ({description['source']['source']}), cut at {settings['max_length']} tokens; "
        "95% Wilson interval; never used for training or selection",
        "mcnemar": f"exact two-sided McNemar test against {reference} on the same sentences; p corrected for the number of rows "
        "compared with it (Holm 1979)",
        **({"per class": PER_CLASS} if "task" in description else {}),
        "gflops": f"2 x MACs / 1e9, batch 1, {length} tokens, attention matmuls included (FlopCounterMode)",
        "gmacs_thop": f"thop's multiply-accumulates / 1e9, batch 1, {length} tokens, attention matmuls not included",
        "size_mb": "1e6 bytes of the weight files",
        "parameters": "counted before packing",
        "load_seconds": "median of 3 loads from a warm page cache, tokenizer and the check of what is read included",
        "latency": f"forward pass, {length} tokens, {where}, median of {settings['latency_repeats']} rounds after 2 of warm-up, 10th to "
        f"90th percentile; all models take turns in each round; speed-up = median ratio to {reference} within a round",
        "peak_memory_mb": f"1e6 bytes a fresh process adds when it loads the model and runs batch {max(settings['latency_batches'])} of "
        f"{length} tokens, a language model one prompt (resident memory on a CPU, allocated memory on a GPU)",
        "perplexity": "exp of the mean loss over predicted tokens, non-overlapping windows of the documents joined by a blank line; "
        "every row carries text, seq_len, windows, where in the text they are (spread over it, or its first) and tokens; 95% interval of "
        "neighbouring windows from equal-weighted cosines (Lazarus et al. 2018), paired against the model it was made from",
        "divergence": "KL(model it was made from || row) in nats over the predicted tokens of the same windows, float32 logits: mean with "
        "the interval of perplexity, 99.9th percentile of the tokens, share of equal top tokens; none where tokens or vocabulary are "
        "others. Between quantizations of one model it is what to choose by: far less noise than in a ratio of perplexities",
        "gsm8k": "lm-eval, gsm8k_cot (8 worked examples), greedy, the first problems of the test split; strict: the answer where the "
        "examples put it, flexible: the last number; 95% Wilson interval",
        "zero-shot": "lm-eval, its own tasks, no examples, the choice of the highest log-likelihood (acc_norm: per character); "
        "95% Wilson interval; exact two-sided McNemar test against the model it was made from on the same problems, p corrected "
        "for all comparisons",
        "compression_ratio": "bytes of the weight files of the model it was made from, as released (of one made of a GGUF file, as "
        f"dequantized; the file itself is {as_shipped}) / bytes of the row's",
        "generation": f"batch 1, {where}, medians of {settings['latency_repeats']} rounds of all models in turn after 2 of warm-up; "
        f"prefill: {settings['prompt_tokens']} random tokens with cache, logits of the last one; decode: one more token, mean of 8",
    }


def environment() -> dict[str, object]:
    """Return what the numbers were measured on."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        cpu = next(
            (line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")), cpu
        )
    gpu = torch.cuda.get_device_name() if default_device() == "cuda" else None
    return {
        "machine": f"{gpu or cpu}, {torch.get_num_threads()} threads",
        "os": f"{platform.system()} {platform.machine()}",
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpu": gpu,
        "versions": versions(),
    }
