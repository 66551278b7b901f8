"""Measure every model of the pipeline on held-out data and put quality, operations, bytes, time and memory side by side.

Run:   python 6_evaluate_report.py              (after any of the other stages; every setting: --help)
Reads: models/*, results/search/summary.json, sst2_data/test.jsonl, wikitext_data/test.jsonl     (test sentences are used here and nowhere else)
Writes: results/final_report.json               everything measured, with protocols, environment and goals
        results/final_report.png                accuracy against GFLOPs, point size by bytes
        results/model_comparison.{csv,png,pdf}  accuracy, inference time, load time, size
        results/perplexity_against_size.png     the language models
Time:  about four minutes on 2 CPU cores for six encoders and four language models.

A stage that has not run is a row that names the command to run; it never breaks the report. Definitions of the metrics:
compactmind/evaluation/accuracy.py and cost.py.
"""

import csv
import datetime
import io
import json
import os
import platform
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import matplotlib
import psutil
import torch

from common import PROFILE, ReportConfig, parse_command_line, run_stage
from compactmind.checkpoint import how_to_make, load_checkpoint, read_manifest, versions
from compactmind.data import EncodedSentences, data_fingerprint, load_split, read_dataset_description
from compactmind.errors import CompactMindError
from compactmind.evaluation.accuracy import classification_metrics, mcnemar, predict_logits
from compactmind.evaluation.capability import MATCHES
from compactmind.evaluation.cost import (
    gflops,
    gmacs_thop,
    measure_latency,
    measure_load_time,
    peak_memory,
    weight_megabytes,
)
from compactmind.evaluation.language import (
    draw_perplexity_against_size,
    gsm8k_table,
    language_table,
    measure_gsm8k,
    measure_language_models,
)
from compactmind.files import write_json_atomically, write_text_atomically
from compactmind.text import load_documents, token_windows

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# ------------------------------------------------------------------------------------------------------------ constants
# Every field, its reason and its range: common.ReportConfig.
CONFIG = ReportConfig.for_profile(PROFILE)

SCHEMA_VERSION = 2

ENCODER_ROWS = (
    "teacher", "student_finetuned", "student_distilled", "student_pruned", "student_distilled_nf4", "student_pruned_nf4",
)  # fmt: skip
LANGUAGE_ROWS = ("llama", "llama_nf4", "llama_w8a8_naive", "llama_w8a8", "llama_pruned", "llama_searched")
"""The rows a complete run has, in this order; further checkpoints of the same track under models/ follow them."""
DENSE_LANGUAGE_MODEL = "llama"
"""The language model the others are compared with."""

COLOURS = ["#4d4d4d", "#9a6fb0", "#1f5fa8", "#b03a2e", "#5aa1d8", "#e08e79", "#2e7d32", "#c79a00", "#00838f", "#6d4c41"]
"""One colour per row, the same in every plot."""


# ------------------------------------------------------------------------------------------------------------------ rows
def row_names(models_dir: Path) -> dict[str, list[str]]:
    """Return the names of all rows by track: the standard ones, then every other checkpoint found (a broken one: encoder)."""
    names = {"encoder": list(ENCODER_ROWS), "llm": list(LANGUAGE_ROWS)}
    for manifest in sorted(models_dir.glob("[!.]*/manifest.json")):
        name = manifest.parent.name
        if name in (*ENCODER_ROWS, *LANGUAGE_ROWS):
            continue
        try:
            architecture = read_manifest(manifest.parent)["architecture"]
        except CompactMindError:
            names["encoder"].append(name)
            continue
        for track, task in (("encoder", "SequenceClassification"), ("llm", "CausalLM")):
            if task in architecture:
                names[track].append(name)
    return names


def load_rows(config: ReportConfig, track: str, names: list[str], device: str) -> tuple[list[dict], dict]:
    """Return one row per name (with status `measured`, `not run` or `broken`) and the loaded checkpoints by name."""
    rows, checkpoints = [], {}
    for name in names:
        directory = config.models_dir / name
        row = {"name": name, "track": track}
        if not directory.exists():
            rows.append({**row, "status": "not run", "command": how_to_make(directory)})
            continue
        try:
            checkpoints[name] = load_checkpoint(directory, device)
            manifest = checkpoints[name].manifest
        except CompactMindError as error:
            print(f"{name}: {error}")
            rows.append({**row, "status": "broken", "command": how_to_make(directory), "error": str(error)})
            continue
        described = ("kind", "architecture", "parent", "parameters", "layers", "quantization", "stage", "created")
        rows.append(
            {**row, "status": "measured", **{key: manifest[key] for key in described}}
            | {"stage_metrics": manifest["metrics"], "experiment_name": manifest.get("experiment_name")}
            | {key: manifest[key] for key in ("pipeline", "interaction", "layer_errors") if key in manifest}
        )
    return rows, checkpoints


def report_language_models(config: ReportConfig, names: list[str], device: str) -> list[dict]:
    """Return the measured rows of the language models; without their text they are rows that say how to get it."""
    rows, checkpoints = load_rows(config, "llm", names, device)
    if checkpoints:
        try:
            text = read_dataset_description(config.text_dir)["source"]["source"]
            tokenizer = next(iter(checkpoints.values())).tokenizer
            documents = load_documents(config.text_dir, "test")
            windows = token_windows(tokenizer, documents, config.seq_len, config.eval_windows)
        except CompactMindError as error:
            print(f"language models: {error}")
            return [
                {"name": name, "track": "llm", "status": "not run", "command": "python download_model.py"} for name in names
            ]
        measure_language_models(
            rows, checkpoints, config.models_dir, windows, f"{text}, test", reference=DENSE_LANGUAGE_MODEL,
            prompt_tokens=config.prompt_tokens, repeats=config.latency_repeats,
        )  # fmt: skip
    if config.gsm8k_problems:
        file = config.gsm8k_dir / "test.jsonl"
        measure_gsm8k(rows, checkpoints, config.gsm8k_problems, file if file.is_file() else None)
    return rows


def measure(rows: list[dict], checkpoints: dict, config: ReportConfig) -> None:
    """Add, in place, every measurement to the rows that have a checkpoint."""
    measured = [row for row in rows if row["status"] == "measured"]
    sentences = load_split(config.data_dir, "test")
    labels = None
    correct = {}
    for row in measured:
        checkpoint, directory = checkpoints[row["name"]], config.models_dir / row["name"]
        print(f"{row['name']:<24} accuracy, operations, load time ...", flush=True)
        encoded = EncodedSentences(checkpoint.tokenizer, sentences, config.max_length)
        labels = encoded.labels
        logits = predict_logits(checkpoint.model, encoded, config.eval_batch_size)
        row.update(classification_metrics(logits, labels))
        correct[row["name"]] = (logits.argmax(dim=-1) == labels).numpy()
        row["gflops"] = gflops(checkpoint.model, config.cost_length)
        row["gmacs_thop"] = gmacs_thop(checkpoint.model, config.cost_length)
        row["size_mb"] = weight_megabytes(directory)
        row["load_seconds"] = measure_load_time(partial(load_checkpoint, directory, checkpoint.model.device))
    for row in measured:
        row["mcnemar_against_reference"] = (
            mcnemar(correct[config.reference], correct[row["name"]])
            if config.reference in correct and row["name"] != config.reference
            else None
        )

    models = {name: checkpoint.model for name, checkpoint in checkpoints.items()}
    for row in measured:
        row["latency"] = {}
    for batch_size in config.latency_batches if models else ():
        print(f"latency at batch {batch_size}, {config.latency_repeats} rounds of all models ...", flush=True)
        times = measure_latency(models, batch_size, config.cost_length, config.latency_repeats, config.reference)
        for row in measured:
            row["latency"][f"batch_{batch_size}"] = times[row["name"]]

    print("peak memory, each model in a process of its own ...", flush=True)
    batch_size = max(config.latency_batches)
    with ThreadPoolExecutor(max_workers=1 if torch.cuda.is_available() else 2) as pool:
        peaks = pool.map(lambda row: peak_memory(config.models_dir / row["name"], batch_size, config.cost_length), measured)
        for row, peak in zip(measured, peaks, strict=True):
            row["peak_memory_mb"] = peak


# ----------------------------------------------------------------------------------------------------------------- goals
def goals(rows: list[dict], config: ReportConfig, real_sst2: bool) -> list[dict]:
    """Return what this project set out to reach beside what was measured: goal, measured value, met (None: not measured)."""
    by_name = {row["name"]: row for row in rows if row["status"] == "measured"}
    batch = f"batch_{max(config.latency_batches)}"

    def value(name: str, read):
        """Return read(row) of a measured row (None where something it needs is missing)."""
        try:
            return read(by_name[name])
        except (KeyError, TypeError, ZeroDivisionError):
            return None

    def difference(name: str, other: str):
        return value(name, lambda row: row["accuracy"] - by_name[other]["accuracy"])

    teacher_goal, student_goal = (0.90, 0.88) if real_sst2 else (0.835, 0.825)
    nf4_pairs = [("student_distilled_nf4", "student_distilled"), ("student_pruned_nf4", "student_pruned")]
    wanted = [
        ("teacher accuracy", teacher_goal, value("teacher", lambda row: row["accuracy"]), "share"),
        ("distilled student accuracy", student_goal, value("student_distilled", lambda row: row["accuracy"]), "share"),
        ("distilled minus control accuracy", 0.0, difference("student_distilled", "student_finetuned"), "points"),
        (
            "GFLOPs removed by pruning",
            0.40,
            value("student_pruned", lambda row: 1 - row["gflops"] / by_name["student_distilled"]["gflops"]),
            "share",
        ),
        ("pruned minus distilled accuracy", -0.011, difference("student_pruned", "student_distilled"), "points"),
        (
            f"pruned speed-up at {batch.replace('_', ' ')}",
            1.4,
            value("student_pruned", lambda row: row["latency"][batch]["speedup"]) if config.reference == "student_distilled" else None,
            "factor",
        ),
    ]  # fmt: skip
    for name, parent in nf4_pairs:
        wanted.append((f"{name} minus parent accuracy", -0.005, difference(name, parent), "points"))
        wanted.append(
            (f"{name} times smaller", 2.0, value(name, lambda row, p=parent: by_name[p]["size_mb"] / row["size_mb"]), "factor")
        )
    benchmark, throughput = config.results_dir / "benchmark_training.json", None
    if benchmark.is_file():
        throughput = json.loads(benchmark.read_text(encoding="utf-8"))["rows"][-1]["speedup"]
    wanted.append(("training throughput (see benchmarks/)", 3.0, throughput, "factor"))
    return [
        {"goal": name, "bound": "at least", "value": least, "measured": found, "unit": unit,
         "met": None if found is None else bool(found >= least - 1e-9)}
        for name, least, found, unit in wanted
    ]  # fmt: skip


def language_goals(rows: list[dict], config: ReportConfig) -> list[dict]:
    """Return the goals of the language models as `goals` does; `bound` says from which side."""
    row = next((row for row in rows if row["name"] == "llama_w8a8" and row["status"] == "measured"), None)
    against = row["against_dense"] if row else None
    times = {phase: row["generation"][phase]["speedup"] if row else None for phase in ("prefill", "decode")}
    wanted = [
        ("llama_w8a8 perplexity above dense", "at most", 0.005, against["ratio"] - 1 if against else None, "share"),
        (f"llama_w8a8 prefill of {config.prompt_tokens} tokens", "at least", 1.6, times["prefill"], "factor"),
        ("llama_w8a8 decode", "at least", 1.5, times["decode"], "factor"),
        ("llama_w8a8 bytes of the released", "at most", 0.62, 1 / row["compression_ratio"] if against else None, "share"),
    ]
    benchmark = config.results_dir / "benchmark_int8.json"
    found = json.loads(benchmark.read_text(encoding="utf-8"))["rows"] if benchmark.is_file() else []
    compiled = next((row["prefill"]["against_float32"] for row in found if row["name"] == "CompactMind W8A8, compiled"), None)
    wanted.append(("... compiled (see benchmarks/)", "at least", 2.3, compiled, "factor"))
    pruned = next((row for row in rows if row["name"] == "llama_pruned" and row["status"] == "measured"), None)
    against = pruned["against_dense"] if pruned else None
    seconds = [step["seconds"] for step in (pruned or {}).get("pipeline", []) if step["method"] == "retrain"]
    wanted += [
        ("llama_pruned perplexity, times dense", "at most", 1.2, against["ratio"] if against else None, "factor"),
        ("llama_pruned prefill", "at least", 1.15, pruned["generation"]["prefill"]["speedup"] if pruned else None, "factor"),
        ("llama_pruned retraining", "at most", 10.0, sum(seconds) / 60 if seconds else None, "minutes"),
    ]
    found = search_summary(config.results_dir) or {}
    hybrid, single = (found.get(f"best_{name}") for name in ("hybrid", "single"))
    if hybrid and single:
        against = hybrid["measured"]["perplexity"] / single["measured"]["perplexity"]
        wanted.append(("best hybrid's perplexity against best single's", "at most", 1.0, against, "factor"))
    return [
        {"goal": name, "bound": bound, "value": value, "measured": measured, "unit": unit,
         "met": None if measured is None else bool(measured >= value if bound == "at least" else measured <= value)}
        for name, bound, value, measured, unit in wanted
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- search
def search_summary(results_dir: Path) -> dict | None:
    """Return what the search over pipelines found, None if there was none."""
    path = results_dir / "search" / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def print_search(found: dict | None) -> None:
    """Print what the search found: the best pipeline, hybrids against single methods, how errors added up, what retraining won."""
    if not found or not found["best"]:
        return
    print(
        f"\nsearch for {found['target_compression']:g} times smaller, {found['trials']} trials; perplexities of validation text:"
    )
    best, single, hybrid = found["best"], found["best_single"], found["best_hybrid"]
    print(f"  best: trial {best['trial']}, {' > '.join(best['methods'])}, {best['confirmed']['perplexity']:.2f} on all windows")
    for name, row in (("hybrid", hybrid), ("single method", single)):
        shown = f"{row['measured']['perplexity']:.2f}, {' > '.join(row['methods'])}" if row else "none reached the target"
        print(f"  best {name}: {shown}")
    for number, row in found["confirmed"].items():
        if row["interaction"] is not None:
            print(f"  trial {number}: quantization costs {row['interaction']:+.4f} nats more here than on the dense model")
    if found["retraining"]:
        gains = [gain["nats"] / gain["seconds"] * 60 for gain in found["retraining"]]
        print(f"  retraining won {sum(gains) / len(gains):.3f} nats per minute, mean of {len(gains)}")


# ------------------------------------------------------------------------------------------------------------ protocols
def protocols(config: ReportConfig, description: dict) -> dict[str, str]:
    """Return how each number was made, in one sentence each."""
    rows = description["splits"]["test"]["rows"]
    length, threads = config.cost_length, torch.get_num_threads()
    where = "GPU" if torch.cuda.is_available() else f"{threads} CPU threads"
    return {
        "accuracy": f"{rows} held-out test sentences ({description['source']['source']}), cut at {config.max_length} tokens; "
        "95% Wilson interval; never used for training or selection",
        "mcnemar": f"exact two-sided McNemar test against {config.reference} on the same sentences",
        "gflops": f"2 x MACs / 1e9, batch 1, {length} tokens, attention matmuls included (FlopCounterMode)",
        "gmacs_thop": f"thop's multiply-accumulates / 1e9, batch 1, {length} tokens, attention matmuls not included",
        "size_mb": "1e6 bytes of the weight files",
        "parameters": "counted before packing",
        "load_seconds": "median of 3 loads from a warm page cache, tokenizer included",
        "latency": f"forward pass, {length} tokens, {where}, median of {config.latency_repeats} rounds after 2 of warm-up, 10th to "
        f"90th percentile; all models take turns in each round; speed-up = median ratio to {config.reference} within a round",
        "peak_memory_mb": f"1e6 bytes a fresh process adds when it loads the model and runs batch {max(config.latency_batches)} of "
        f"{length} tokens, a language model one prompt (resident memory on a CPU, allocated memory on a GPU)",
        "perplexity": "exp of the mean loss over predicted tokens, non-overlapping windows of the documents joined by a blank line; "
        "every row carries text, seq_len, windows and tokens; interval: bootstrap over windows, paired against the dense model",
        "gsm8k": "lm-eval, gsm8k_cot (8 worked examples), greedy, the first problems of the test split; strict: the answer where the "
        "examples put it, flexible: the last number; 95% Wilson interval",
        "compression_ratio": f"bytes of the weight files of {DENSE_LANGUAGE_MODEL}, as released / bytes of the row's",
        "generation": f"batch 1, {where}, medians of {config.latency_repeats} rounds of all models in turn after 2 of warm-up; prefill: "
        f"{config.prompt_tokens} random tokens with cache, logits of the last one; decode: one more token, mean of 8",
    }


def environment() -> dict[str, object]:
    """Return what the numbers were measured on."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        cpu = next(
            (line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")), cpu
        )
    return {
        "os": f"{platform.system()} {platform.machine()}",
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions(),
    }


# ----------------------------------------------------------------------------------------------------------------- plots
def save_figure(figure, path: Path) -> None:
    """Write a figure whole or not at all."""
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    figure.savefig(temporary, dpi=150)
    temporary.replace(path)


def plot_accuracy_against_gflops(rows: list[dict], protocol: dict, path: Path) -> None:
    """Draw one point per model: GFLOPs, accuracy with its interval, area proportional to bytes."""
    figure, axes = plt.subplots(figsize=(9, 5.5), constrained_layout=True)
    for colour, row in zip(COLOURS * len(rows), rows, strict=False):
        if row["status"] != "measured":
            continue
        accuracy, (low, high) = 100 * row["accuracy"], (100 * bound for bound in row["accuracy_interval"])
        axes.errorbar(
            row["gflops"], accuracy, yerr=[[accuracy - low], [high - accuracy]], color=colour, capsize=3, lw=1, alpha=0.6
        )
        axes.scatter(
            row["gflops"], accuracy, s=8 * row["size_mb"], color=colour, alpha=0.55, edgecolor="white", zorder=3,
            label=f"{row['name']}: {accuracy:.1f}%, {row['gflops']:.2f} GFLOPs, {row['size_mb']:.1f} MB",
        )  # fmt: skip
    axes.set(xlabel="GFLOPs per sentence (128 tokens)" if "128 tokens" in protocol["gflops"] else "GFLOPs per sentence",
             ylabel="test accuracy (%), 95% interval", xlim=(0, None))  # fmt: skip
    axes.set_title("Accuracy against operations; area of a point = size of its weight file")
    axes.grid(alpha=0.3)
    legend = axes.legend(loc="upper left", bbox_to_anchor=(0, -0.12), ncol=2, frameon=False, fontsize=9)
    for handle in legend.legend_handles:
        handle.set_sizes([60])
    save_figure(figure, path)
    plt.close(figure)


def plot_language_models(rows: list[dict], path: Path) -> None:
    """Draw perplexity against the size of the weight file."""
    figure, axes = plt.subplots(figsize=(8, 5), constrained_layout=True)
    draw_perplexity_against_size(axes, rows, COLOURS)
    axes.set_title(f"Language models on the same {rows[0].get('protocol', {}).get('windows', '')} windows of held-out text")
    save_figure(figure, path)
    plt.close(figure)


def plot_comparison(rows: list[dict], config: ReportConfig, paths: list[Path]) -> None:
    """Draw four panels of bars: accuracy, inference time, load time, size."""
    measured = [(colour, row) for colour, row in zip(COLOURS * len(rows), rows, strict=False) if row["status"] == "measured"]
    names, colours = [row["name"] for _, row in measured], [colour for colour, _ in measured]
    batch = f"batch_{max(config.latency_batches)}"
    latency = [row["latency"][batch] for _, row in measured]
    accuracy = [100 * row["accuracy"] for _, row in measured]
    panels = [
        ("test accuracy (%), 95% interval", accuracy, [[a - 100 * row["accuracy_interval"][0] for a, (_, row) in zip(accuracy, measured, strict=True)],
                                                       [100 * row["accuracy_interval"][1] - a for a, (_, row) in zip(accuracy, measured, strict=True)]]),
        (f"inference time at {batch.replace('_', ' ')} (ms), 10th to 90th percentile", [t["median_ms"] for t in latency],
         [[t["median_ms"] - t["low_ms"] for t in latency], [t["high_ms"] - t["median_ms"] for t in latency]]),
        ("load time (ms)", [1e3 * row["load_seconds"] for _, row in measured], None),
        ("size of the weight file (MB)", [row["size_mb"] for _, row in measured], None),
    ]  # fmt: skip
    figure, grid = plt.subplots(2, 2, figsize=(13, 0.55 * len(names) * 2 + 2.2), constrained_layout=True)
    style = {"lw": 1, "capsize": 3, "ecolor": "#333333"}
    for axes, (title, values, errors) in zip(grid.flat, panels, strict=True):
        if title.startswith("test accuracy"):  # points: bars that do not start at zero would mislead
            axes.errorbar(values, names, xerr=errors, fmt="none", **style)
            axes.scatter(values, names, color=colours, s=70, zorder=3)
            axes.margins(y=0.1)
            axes.grid(axis="x", alpha=0.3)
        else:
            axes.barh(names, values, xerr=errors, color=colours, alpha=0.85, error_kw=style)
        axes.invert_yaxis()
        axes.set_title(title, fontsize=11)
        ends = [value + error for value, error in zip(values, errors[1] if errors else [0] * len(values), strict=True)]
        for position, (value, end) in enumerate(zip(values, ends, strict=True)):
            axes.annotate(f"{value:.1f}", (end, position), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
        low, high = axes.get_xlim()
        axes.set_xlim(low, high + 0.08 * (high - low))
        axes.spines[["top", "right"]].set_visible(False)
    for path in paths:
        save_figure(figure, path)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------- tables
def comparison_csv(rows: list[dict], config: ReportConfig) -> str:
    """Return the comparison as CSV text, one line per row, empty cells where a stage has not run."""
    fields = ["name", "status", "accuracy", "accuracy_low", "accuracy_high", "f1", "auc", "mcnemar_p", "parameters", "gflops",
              "gmacs_thop", "size_mb", "load_seconds", "peak_memory_mb",
              "perplexity", "perplexity_low", "perplexity_high", "compression_ratio", "prefill_ms", "decode_ms",
              "gsm8k_strict", "gsm8k_flexible"]  # fmt: skip
    fields += [
        f"latency_{batch}_{what}" for batch in config.latency_batches for what in ("median_ms", "low_ms", "high_ms", "speedup")
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        flat = dict(row)
        if row["status"] == "measured" and row["track"] == "llm":
            flat["perplexity_low"], flat["perplexity_high"] = row["perplexity_interval"]
            flat |= {f"{phase}_ms": row["generation"][phase]["median_ms"] for phase in ("prefill", "decode")}
            flat |= {f"gsm8k_{match}": row["gsm8k"][match]["accuracy"] for match in MATCHES if "gsm8k" in row}
        elif row["status"] == "measured":
            flat["accuracy_low"], flat["accuracy_high"] = row["accuracy_interval"]
            flat["mcnemar_p"] = (row["mcnemar_against_reference"] or {}).get("p_value")
            for batch in config.latency_batches:
                flat |= {f"latency_{batch}_{what}": value for what, value in row["latency"][f"batch_{batch}"].items()}
        writer.writerow(flat)
    return text.getvalue()


def print_table(rows: list[dict], config: ReportConfig) -> None:
    """Print the rows aligned, one line each."""
    batches = "".join(f"{f'ms@{batch}':>9}" for batch in config.latency_batches)
    print(
        f"\n{'model':<24}{'accuracy [95% interval]':>25}{'F1':>7}{'AUC':>7}{'p':>7}{'M param':>9}{'GFLOPs':>8}{'thop':>7}"
        f"{'MB':>7}{batches}{'speed-up':>9}{'load s':>8}{'peak MB':>9}"
    )
    for row in rows:
        if row["status"] != "measured":
            print(f"{row['name']:<24}{row['status']}: run `{row['command']}`")
            continue
        low, high = row["accuracy_interval"]
        p_value = row["mcnemar_against_reference"]
        times = [row["latency"][f"batch_{batch}"] for batch in config.latency_batches]
        speedup = times[-1]["speedup"]
        cells = {
            "accuracy": f"{row['accuracy']:.2%} [{low:.1%}, {high:.1%}]",
            "auc": "-" if row["auc"] is None else f"{row['auc']:.3f}",
            "p": "-" if p_value is None else f"{p_value['p_value']:.3f}",
            "speedup": "-" if speedup is None else f"{speedup:.2f}x",
        }
        print(
            f"{row['name']:<24}{cells['accuracy']:>25}{row['f1']:>7.3f}{cells['auc']:>7}{cells['p']:>7}"
            f"{row['parameters'] / 1e6:>9.2f}{row['gflops']:>8.3f}{row['gmacs_thop']:>7.3f}{row['size_mb']:>7.1f}"
            + "".join(f"{time['median_ms']:>9.1f}" for time in times)
            + f"{cells['speedup']:>9}{row['load_seconds']:>8.2f}{row['peak_memory_mb']:>9.1f}"
        )


def print_goals(wanted: list[dict]) -> None:
    """Print each goal with what was measured."""
    shown = {"share": "{:.1%}", "points": "{:+.1f}", "factor": "{:.2f}x", "minutes": "{:.1f} min"}
    verdicts = {True: "met", False: "MISSED", None: "not run"}
    print(f"\n{'goal':<44}{'wanted':>16}{'measured':>10}")
    for goal in wanted:
        scale = 100 if goal["unit"] == "points" else 1
        bound, found = (
            "" if value is None else shown[goal["unit"]].format(scale * value) for value in (goal["value"], goal["measured"])
        )
        print(f"{goal['goal']:<44}{goal['bound'] + ' ' + bound:>16}{found:>10}  {verdicts[goal['met']]}")


# ----------------------------------------------------------------------------------------------------------------- main
def main(config: ReportConfig) -> None:
    description = read_dataset_description(config.data_dir)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = row_names(config.models_dir)
    rows, checkpoints = load_rows(config, "encoder", names["encoder"], device)
    measure(rows, checkpoints, config)
    language_rows = report_language_models(config, names["llm"], device)
    real_sst2 = not description["source"]["source"].startswith("PyPI")
    report = {
        "schema_version": SCHEMA_VERSION,
        "profile": config.profile,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(),
        "data": {**description, "fingerprint": data_fingerprint(config.data_dir)},
        "protocols": protocols(config, description),
        "goals": [*goals(rows, config, real_sst2), *language_goals(language_rows, config)],
        "search": search_summary(config.results_dir),
        "models": [*rows, *language_rows],
    }
    results = config.results_dir
    write_json_atomically(results / "final_report.json", report)
    write_text_atomically(results / "model_comparison.csv", comparison_csv(report["models"], config))
    if checkpoints:
        plot_accuracy_against_gflops(rows, report["protocols"], results / "final_report.png")
        plot_comparison(rows, config, [results / "model_comparison.png", results / "model_comparison.pdf"])
    if any(row["status"] == "measured" for row in language_rows):
        plot_language_models(language_rows, results / "perplexity_against_size.png")
    print_table(rows, config)
    print(f"\n{language_table(language_rows)}{gsm8k_table(language_rows)}")
    print_search(report["search"])
    if config.profile != "smoke":
        print_goals(report["goals"])
    print(
        f"\nreport: {results / 'final_report.json'}, plots: {results / 'final_report.png'}, {results / 'model_comparison.png'}"
    )


if __name__ == "__main__":
    run_stage(main, parse_command_line(CONFIG))
