"""Measure every model of the pipeline on held-out data and put quality, operations, bytes, time and memory side by side.

Run:   python 6_evaluate_report.py                    (after any of the other stages; every setting: --help)
       python 6_evaluate_report.py --fresh True       (measure every row again)
       python 6_evaluate_report.py --from_json True   (draw and write everything again from final_report.json, measuring nothing)
Reads: models/*, the summary of a search in results/search, sst2_data/test.jsonl, wikitext_data/test.jsonl   (of test here alone)
Writes: results/final_report.json               everything measured, with protocols and environment; what follows is made of it
        results/final_report.{html,md,tex}      the report: sentences, tables, figures, literature (html: stands alone; tex: the tables)
        results/final_report.png                accuracy against GFLOPs, point size by bytes
        results/model_comparison.{csv,png,pdf}  accuracy, inference time, load time, size
        results/*.png                           the other figures of the report
Time:  a few minutes on 2 CPU cores; rows whose model, data and protocol are as they were come from the report that is there.

A stage that has not run is a row that names the command to run, a model that cannot be measured one that says why; neither breaks the
report. Definitions of the metrics: compactmind/evaluation/accuracy.py and cost.py.
"""

import datetime
import json
import os
import platform
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from common import PROFILE, ReportConfig, parse_command_line, run_stage
from compactmind.checkpoint import Checkpoints, load_any, skeleton_of
from compactmind.data import data_fingerprint, load_split, read_dataset_description
from compactmind.devices import default_device
from compactmind.errors import CompactMindError
from compactmind.evaluation.accuracy import correct_for_many
from compactmind.evaluation.classifiers import measure_classifiers
from compactmind.evaluation.cost import weight_bytes
from compactmind.evaluation.failures import fail, row_fails_alone
from compactmind.evaluation.language import measure_gsm8k, measure_in_llama_cpp, measure_language_models
from compactmind.evaluation.llama_cpp import installed
from compactmind.evaluation.seeds import add_seeds, is_repeat
from compactmind.files import read_json, sha256_of, write_json_atomically, write_text_atomically
from compactmind.manifest import CARD, MADE_BY, MANIFEST, identity_of, read_manifest, versions
from compactmind.methods import memory
from compactmind.methods.memory import Sizes
from compactmind.model_card import model_card
from compactmind.onnx_export import FILE
from compactmind.origin import origin_of
from compactmind.report import tables
from compactmind.report.as_shipped import SUFFIX, row_as_shipped, row_of_llama_cpp
from compactmind.report.documents import write_documents
from compactmind.report.sentences import sentences, warnings
from compactmind.room import require_room
from compactmind.search.places import findings_of
from compactmind.task import read_task
from compactmind.text import load_documents, token_windows

# ------------------------------------------------------------------------------------------------------------ constants
# Every field, its reason and its range: common.ReportConfig.
CONFIG = ReportConfig.for_profile(PROFILE)

MODELS_TO_EVALUATE: dict[str, str] = {}
"""Your own models, name -> folder: any Hugging Face sequence classifier of the same classes or causal language model becomes a row. For
example {"my-bert": "/models/my-bert"}; also on the command line: --models my-bert=/models/my-bert."""

SCHEMA_VERSION = 6

ENCODER_ROWS = (
    "teacher", "student_finetuned", "student_distilled", "student_pruned", "student_distilled_nf4", "student_pruned_nf4",
    "student_pruned_w8a8",
)  # fmt: skip
LANGUAGE_ROWS = (
    "llama", "llama_nf4", "llama_w8a8_naive", "llama_w8a8", "llama_gptq_3.5x", "llama_pruned", "llama_searched", "llama_front_3x",
    "llama_front_4x",
)  # fmt: skip
"""The rows a complete run has, in this order; further checkpoints of the same track under models/ and your own models follow them."""
DENSE_LANGUAGE_MODEL = "llama"
"""The language model that those made from it are compared with."""
AS_SHIPPED = DENSE_LANGUAGE_MODEL + SUFFIX
"""The row of the file it was published as, if it was made of one: no model of its own, see compactmind/report/as_shipped.py."""
LLAMA_CPP = ("Q8_0", "Q4_0")
"""Types that llama.cpp rounds the dense language model to, where it is installed: a row each, run by llama.cpp."""
TASKS = {"encoder": "SequenceClassification", "llm": "CausalLM"}
"""Track -> how the architectures end that belong to it."""
PER_CLASS = (
    "F1 of a class: harmonic mean of its precision and recall; macro: mean over the classes; AUC of more than two: mean of each against "
    "the rest; MCC: Matthews' correlation"
)
ENCODER_SETTINGS = ("max_length", "eval_batch_size", "cost_length", "latency_batches", "latency_repeats")
LANGUAGE_SETTINGS = ("seq_len", "eval_windows", "window_choice", "prompt_tokens", "latency_repeats", "gsm8k_problems")
"""Settings a track's measurements depend on."""


# ------------------------------------------------------------------------------------------------------------------ rows
def own_models(config: ReportConfig) -> dict[str, Path]:
    """Return the user's own models, name -> folder. Raises CompactMindError on one that is not there."""
    found = dict(MODELS_TO_EVALUATE)
    for entry in config.models:
        name, separator, folder = entry.partition("=")
        if not (name and separator and folder):
            raise CompactMindError(f"--models {entry!r} is not name=folder: for example --models my-bert=/models/my-bert")
        found[name] = folder
    for name, folder in found.items():
        if not (Path(folder) / "config.json").is_file():
            raise CompactMindError(f"{name}: {folder} holds no model (no config.json); mend MODELS_TO_EVALUATE or --models")
        if name in (*ENCODER_ROWS, *LANGUAGE_ROWS, AS_SHIPPED):
            raise CompactMindError(f"{name} is the name of a model of the pipeline: choose another one for {folder}")
    return {name: Path(folder) for name, folder in found.items()}


def list_rows(config: ReportConfig) -> list[dict[str, Any]]:
    """Return a row per model with name, track, directory and status: found, or what `not run`, `broken` and `failed` mean, see `unusable`.

    The standard rows come first, then every other checkpoint under models/, then the user's own.
    """
    places = {name: config.models_dir / name for name in (*ENCODER_ROWS, *LANGUAGE_ROWS)}
    for manifest in sorted(config.models_dir.glob(f"[!.]*/{MANIFEST}")):
        if not is_repeat(manifest.parent):
            places.setdefault(manifest.parent.name, manifest.parent)
    if AS_SHIPPED in places:
        raise CompactMindError(
            f"{places[AS_SHIPPED]} has the name of the file that {DENSE_LANGUAGE_MODEL} was published as: rename it"
        )
    rows, own = [], own_models(config)
    for name, directory in {**places, **own}.items():
        row = {"name": name, "track": "llm" if name in LANGUAGE_ROWS else "encoder", "directory": str(directory)}
        if not directory.exists():
            rows.append({**row, "status": "not run", "command": MADE_BY[name]})
            continue
        try:
            architecture = foreign_architecture(directory) if name in own else read_manifest(directory)["architecture"]
            track = next((track for track, task in TASKS.items() if task in architecture), None)
            if track is None and name in own:
                raise CompactMindError(f"{directory} holds a {architecture}: only {' and '.join(TASKS.values())} can be measured")
        except CompactMindError as error:
            unusable(row, error)
            rows.append(row)
            continue
        if track:
            rows.append({**row, "track": track, "status": "found"})
    return rows


def unusable(row: dict[str, Any], error: Exception) -> None:
    """Make, in place, a row `broken`, with the command that makes its model again, or `failed` where no command does; both say why."""
    fail(row, error)
    if row["name"] in MADE_BY and isinstance(error, CompactMindError):
        row |= {"status": "broken", "command": MADE_BY[row["name"]]}


def foreign_architecture(directory: Path) -> str:
    """Return the class of a model in any Hugging Face folder."""
    try:
        return json.loads((directory / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        raise CompactMindError(f"{directory / 'config.json'} does not say which architecture it is") from None


def described(row: dict[str, Any], manifest: dict[str, Any]) -> dict[str, Any]:
    """Return what a row says of its model beside measurements."""
    names = ("kind", "architecture", "parent", "parameters", "layers", "quantization", "stage", "created")
    found = {name: manifest[name] for name in names}
    found |= {"stage_metrics": manifest["metrics"], "experiment_name": manifest.get("experiment_name")}
    found |= {name: manifest[name] for name in ("pipeline", "interaction", "layer_errors") if name in manifest}
    found["model_name"] = (manifest["stage"].get("config") or {}).get("source", row["name"])
    history = Path(row["directory"]) / "training_history.json"
    found["history"] = json.loads(history.read_text(encoding="utf-8")) if history.is_file() else None
    return found


# ---------------------------------------------------------------------------------------------------------- who is whose
def identify(rows: list[dict[str, Any]]) -> None:
    """Give, in place, every found row its `identity`, a hash of its weights, and `made_from`: the row its model was made from.

    A manifest records the weights a stage read, not only their name: `made_from` is None if no row has just those.
    """
    for row in rows:
        with row_fails_alone(row):
            row["identity"] = identity_of(Path(row["directory"]))
    for row in rows:
        if row["status"] != "found":
            continue
        directory, made_from = Path(row["directory"]), None
        if (directory / MANIFEST).is_file():
            manifest = read_manifest(directory)
            inputs = manifest["stage"].get("inputs") or {}
            wanted = inputs.get(manifest.get("parent")) or inputs.get("model")
            same = [other["name"] for other in rows if wanted and other.get("identity") == wanted and other is not row]
            made_from = manifest["parent"] if manifest.get("parent") in same else next(iter(same), None)
        row["made_from"] = made_from


def compared_with(row: dict[str, Any], track: str, config: ReportConfig) -> str | None:
    """Return the name of the row a row is compared with: classifiers with one reference, a language model with what it was made from."""
    if track == "encoder":
        return config.reference
    return row["name"] if row["name"] == DENSE_LANGUAGE_MODEL else row["made_from"]


def with_as_shipped(rows: list[dict[str, Any]], beside: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of a report with those that are no models of their own behind the dense language model: that of the file it was
    published as, if it was made of one, and those `beside` it."""
    found = []
    for row in rows:
        if row["name"] != DENSE_LANGUAGE_MODEL:
            found.append(row)
            continue
        try:
            published = read_manifest(Path(row["directory"])).get("published_as")
        except CompactMindError:  # its row says so
            published = None
        dense = {name: value for name, value in row.items() if name != "published_as"}  # an earlier report's may be another
        found += [dense | {"published_as": published}, row_as_shipped(dense, published)] if published else [dense]
        found += beside
    return found


# --------------------------------------------------------------------------------------------------- what must be measured
def split_by_need(rows: list[dict[str, Any]], known: dict[str, dict[str, Any]], what: dict[str, Any]) -> list[dict[str, Any]]:
    """Complete, in place, the found rows whose measurement is `known` (an earlier report's, by name); return the others.

    A measurement holds as long as the weights, those it was compared with, the machine and `what` (data, settings) are the same. One
    that lacks something is tried again.
    """
    identities = {row["name"]: row.get("identity") for row in rows}
    needed = []
    for row in rows:
        if row["status"] != "found":
            continue
        key = {**what, "weights": row["identity"], "reference": identities.get(row["compared_with"])}
        exported = Path(row["directory"]) / FILE
        key["onnx"] = sha256_of(exported) if exported.is_file() else None
        row["measured_with"] = json.loads(json.dumps(key))
        earlier = known.get(row["name"], {})
        holds = earlier.get("status") == "measured" and earlier.get("measured_with") == row["measured_with"]
        if holds and not earlier.get("not_measured"):
            row.update({**earlier, **{name: row[name] for name in ("directory", "made_from", "compared_with")}})
        else:
            needed.append(row)
    return needed


def load_models(rows: list[dict[str, Any]], device: str) -> Checkpoints:
    """Return the checkpoints by name; a row whose model cannot be loaded is `unusable` and has none."""
    found = Checkpoints({row["name"]: partial(load_any, Path(row["directory"]), device) for row in rows})
    for row in rows:
        try:
            row |= {"status": "measured", **described(row, found[row["name"]].manifest)}
        except Exception as error:  # noqa: BLE001  any folder may be a row, and each library has its own way to say it cannot read one
            found.discard(row["name"])
            unusable(row, error)
    return found


def require_room_for(config: ReportConfig, rows: list[dict[str, Any]]) -> None:
    """Say what memory measuring the language models takes: small ones all at once, of large ones the dearest.

    Raises CompactMindError if it is not there.
    """
    dense = next((row for row in rows if row["name"] == DENSE_LANGUAGE_MODEL), None)
    if dense is None:
        return
    folder, device = Path(dense["directory"]), default_device()
    windows = 0, config.eval_windows, config.seq_len
    sizes = Sizes.of(skeleton_of(folder), weight_bytes(folder), *windows, device == "cuda")
    held = {row["name"]: weight_bytes(Path(row["directory"])) for row in rows} | {dense["name"]: sizes.held}
    held = {"all models": sum(held.values())} if sizes.small else held
    needs = {name: memory.report(sizes, size) for name, size in held.items()}
    require_room(needs, 0, config.results_dir, device, "fewer rows, or a smaller --seq_len, take less")


def measure_track(
    config: ReportConfig, track: str, rows: list[dict[str, Any]], known: dict[str, dict[str, Any]], machine: str
) -> None:
    """Give, in place, every found row of a track its measurements: the earlier ones where they hold, else new ones."""
    mine = [row for row in rows if row["track"] == track]
    data = config.data_dir if track == "encoder" else config.text_dir
    settings = ENCODER_SETTINGS if track == "encoder" else LANGUAGE_SETTINGS
    found = [row for row in mine if row["status"] == "found"]
    if not found:
        return
    try:
        what = {"data": data_fingerprint(data), "machine": machine, "versions": versions(), **config.relevant(*settings)}
        text = read_dataset_description(data)["source"]["source"]
        held_out = load_split(data, "test") if track == "encoder" else load_documents(data, "test")
    except CompactMindError as error:
        if track == "encoder":
            raise
        print(f"language models: {error}")
        for row in found:
            row |= {"status": "not run", "command": "python download_model.py"}
        return
    identify(found)
    for row in found:
        if row["status"] == "found":
            row["compared_with"] = compared_with(row, track, config)
    needed = split_by_need(found, known, what)
    kept = sum(row["status"] == "measured" for row in found)
    if kept:
        print(
            f"{track}: {kept} of {kept + len(needed)} rows are as they were and come from the earlier report "
            "(--fresh True measures them again)"
        )
    if not needed:
        return
    if track == "llm":
        require_room_for(config, needed)
    reference = config.reference if track == "encoder" else DENSE_LANGUAGE_MODEL
    others = {reference, *(row["compared_with"] for row in needed)}
    runs_along = [row for row in found if row["name"] in others and row not in needed and row["status"] == "measured"]
    device = default_device()
    checkpoints = load_models([*runs_along, *needed], device)
    there = {row["name"]: row for row in (*runs_along, *needed) if row["name"] in checkpoints}
    needed = [row for row in needed if row["name"] in there]
    for row in needed:
        row["machine"] = machine
    if not needed:
        return
    if track == "encoder":
        measure_classifiers(
            needed, checkpoints, held_out, reference=there.get(reference), task=read_task(data), **config.relevant(*ENCODER_SETTINGS)
        )  # fmt: skip
        return

    def windows_for(tokenizer):
        return token_windows(tokenizer, held_out, config.seq_len, config.eval_windows, config.window_choice)

    measure_language_models(
        needed, checkpoints, windows_for, f"{text}, test", config.window_choice, reference=there.get(reference),
        bases={row["name"]: there[row["compared_with"]] for row in needed if row["compared_with"] in there},
        prompt_tokens=config.prompt_tokens, repeats=config.latency_repeats,
    )  # fmt: skip
    if config.gsm8k_problems:
        file = config.gsm8k_dir / "test.jsonl"
        measure_gsm8k(needed, checkpoints, config.gsm8k_problems, file if file.is_file() else None)


def measure_llama_cpp(
    config: ReportConfig, rows: list[dict[str, Any]], known: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the rows of the dense language model as llama.cpp rounds and runs it, with the earlier measurements where they hold.

    There are none where llama.cpp is not installed, the dense model is not measured or the others run on a GPU: this one does not.
    """
    dense = next((row for row in rows if row["name"] == DENSE_LANGUAGE_MODEL and row["status"] == "measured"), None)
    if not dense or not installed() or default_device() == "cuda":
        return []
    found = [row_of_llama_cpp(dense, kind, installed()) for kind in LLAMA_CPP]
    earlier = [known.get(row["name"], {}) for row in found]
    if all(
        each.get("status") == "measured" and each["measured_with"] == row["measured_with"]
        for each, row in zip(earlier, found, strict=True)
    ):
        return earlier
    checkpoint = load_any(Path(dense["directory"]), "cpu")
    documents = load_documents(config.text_dir, "test")
    windows = token_windows(checkpoint.tokenizer, documents, config.seq_len, config.eval_windows, config.window_choice)
    measure_in_llama_cpp(found, checkpoint, dense, windows, **config.relevant("prompt_tokens"), repeats=config.latency_repeats)
    return found


# ------------------------------------------------------------------------------------------------------------ protocols
def protocols(config: ReportConfig, description: dict) -> dict[str, str]:
    """Return how each number was made, in one sentence each."""
    rows = description["splits"]["test"]["rows"]
    length, threads = config.cost_length, torch.get_num_threads()
    where = "GPU" if default_device() == "cuda" else f"{threads} CPU threads"
    return {
        "accuracy": f"{rows} held-out test sentences ({description['source']['source']}), cut at {config.max_length} tokens; "
        "95% Wilson interval; never used for training or selection",
        "mcnemar": f"exact two-sided McNemar test against {config.reference} on the same sentences; p corrected for the number of rows "
        "compared with it (Holm 1979)",
        **({"per class": PER_CLASS} if "task" in description else {}),
        "gflops": f"2 x MACs / 1e9, batch 1, {length} tokens, attention matmuls included (FlopCounterMode)",
        "gmacs_thop": f"thop's multiply-accumulates / 1e9, batch 1, {length} tokens, attention matmuls not included",
        "size_mb": "1e6 bytes of the weight files",
        "parameters": "counted before packing",
        "load_seconds": "median of 3 loads from a warm page cache, tokenizer and the check of what is read included",
        "latency": f"forward pass, {length} tokens, {where}, median of {config.latency_repeats} rounds after 2 of warm-up, 10th to "
        f"90th percentile; all models take turns in each round; speed-up = median ratio to {config.reference} within a round",
        "peak_memory_mb": f"1e6 bytes a fresh process adds when it loads the model and runs batch {max(config.latency_batches)} of "
        f"{length} tokens, a language model one prompt (resident memory on a CPU, allocated memory on a GPU)",
        "perplexity": "exp of the mean loss over predicted tokens, non-overlapping windows of the documents joined by a blank line; "
        "every row carries text, seq_len, windows, where in the text they are (spread over it, or its first) and tokens; 95% interval of "
        "neighbouring windows from equal-weighted cosines (Lazarus et al. 2018), paired against the model it was made from",
        "divergence": "KL(model it was made from || row) in nats over the predicted tokens of the same windows, float32 logits: mean with "
        "the interval of perplexity, 99.9th percentile of the tokens, share of equal top tokens; none where tokens or vocabulary are "
        "others. Between quantizations of one model it is what to choose by: far less noise than in a ratio of perplexities",
        "gsm8k": "lm-eval, gsm8k_cot (8 worked examples), greedy, the first problems of the test split; strict: the answer where the "
        "examples put it, flexible: the last number; 95% Wilson interval",
        "compression_ratio": "bytes of the weight files of the model it was made from, as released (of one made of a GGUF file, as "
        f"dequantized; the file itself is {AS_SHIPPED}) / bytes of the row's",
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


# ----------------------------------------------------------------------------------------------------------------- main
def measured_report(config: ReportConfig, path: Path) -> dict[str, Any]:
    """Return the report's dict, with new measurements where the one at `path` has none that hold; written there after every track."""
    earlier = {} if config.fresh else read_json(path) or {}
    known = {row["name"]: row for row in earlier.get("models", [])} if earlier.get("schema_version") == SCHEMA_VERSION else {}
    description, where = read_dataset_description(config.data_dir), environment()
    rows = sorted(list_rows(config), key=lambda row: list(TASKS).index(row["track"]))
    for track in TASKS:
        measure_track(config, track, rows, known, where["machine"])
        if track == "encoder":
            add_seeds(rows, known, config.data_dir, config.max_length, config.eval_batch_size)
        beside = measure_llama_cpp(config, rows, known) if track == "llm" else []
        told = with_as_shipped([finished(row, known) for row in rows], beside)
        report = json.loads(json.dumps(report_of(config, told, description, where)))
        write_json_atomically(path, report)
    return report


def finished(row: dict[str, Any], known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return a row as a report may hold it: one whose track has yet to be measured as the earlier report has it, or as not run."""
    if row["status"] != "found":
        return row
    if known.get(row["name"], {}).get("status") == "measured":
        return known[row["name"]]
    return {**row, "status": "not run", "command": "python 6_evaluate_report.py"}


def report_of(
    config: ReportConfig, rows: list[dict[str, Any]], description: dict[str, Any], where: dict[str, Any]
) -> dict[str, Any]:
    """Return the report's dict from its rows, the description of the sentences and the environment."""
    correct_for_many(rows)
    return {
        "schema_version": SCHEMA_VERSION,
        "profile": config.profile,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "environment": where,
        "settings": json.loads(json.dumps(config.relevant(*ENCODER_SETTINGS, *LANGUAGE_SETTINGS))),
        "references": {"encoder": config.reference, "llm": DENSE_LANGUAGE_MODEL},
        "data": {**description, "fingerprint": data_fingerprint(config.data_dir)},
        "protocols": protocols(config, description),
        "search": read_json(findings_of(config.results_dir / "search", config.models_dir / "llama_searched") / "summary.json"),
        "smoothquant": read_json(config.results_dir / "smoothquant.json"),
        "models": rows,
    }


def write_cards(report: dict[str, Any]) -> None:
    """Put the numbers of every measured checkpoint into the card beside it, never into a folder of another project."""
    for row in report["models"]:
        directory = Path(row["directory"] or "")
        if row["status"] == "measured" and row["directory"] and (directory / MANIFEST).is_file():
            try:
                manifest = read_manifest(directory)
                card = model_card(row["name"], manifest, row, origin_of(directory.parent, manifest), report["data"]["source"]["source"])
                write_text_atomically(directory / CARD, card)
            except (OSError, CompactMindError) as error:
                print(f"{directory / CARD} stays as it is: {error}")


def print_report(report: dict[str, Any], config: ReportConfig) -> None:
    """Print the tables and sentences a terminal has room for."""
    shown = [
        tables.encoder_table(report),
        tables.per_class_table(report),
        tables.language_table(report),
        tables.gsm8k_table(report),
        tables.search_table(report),
    ]
    for table in shown:
        if table is not None:
            print(f"\n{table.as_text()}")
    for title, lines in (("Summary", sentences(report)), ("Warnings", warnings(report))):
        if lines:
            print(f"\n{title}\n" + "\n".join(f"- {line}" for line in lines))


def main(config: ReportConfig) -> None:
    path = config.results_dir / "final_report.json"
    if config.from_json:
        report = read_json(path)
        if not report or report.get("schema_version") != SCHEMA_VERSION:
            raise CompactMindError(
                f"{path} is no report of this version: run `python 6_evaluate_report.py` without --from_json"
            )
    else:
        report = measured_report(config, path)
        write_cards(report)
    documents = write_documents(report, config.results_dir)
    print_report(report, config)
    print(f"\nreport: {', '.join(map(str, [*documents, path]))}")


if __name__ == "__main__":
    run_stage(main, parse_command_line(CONFIG))
