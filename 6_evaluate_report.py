"""Measure every model of the pipeline on held-out data and put quality, operations, bytes, time and memory side by side.

Run:   python 6_evaluate_report.py                    (after any of the other stages; every setting: --help)
       python 6_evaluate_report.py --fresh True       (measure every row again)
       python 6_evaluate_report.py --zero_shot arc_easy piqa   (ask the language models, too: docs/report.md)
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
from pathlib import Path
from typing import Any

from common import PROFILE, ReportConfig, parse_command_line, run_stage
from compactmind import classifier_room, kernels
from compactmind.checkpoint import Checkpoint, load_any
from compactmind.data import data_fingerprint, load_split, read_dataset_description
from compactmind.devices import default_device
from compactmind.errors import CompactMindError
from compactmind.evaluation.accuracy import correct_for_many
from compactmind.evaluation.classifiers import measure_classifiers
from compactmind.evaluation.language import measure_gsm8k, measure_in_llama_cpp, measure_language_models
from compactmind.evaluation.llama_cpp import installed
from compactmind.evaluation.rows import (
    check_rows,
    foreign_architecture,
    identify,
    load_models,
    mark_unusable,
    require_room_for,
    reuse_measurements,
)
from compactmind.evaluation.seeds import add_seeds, is_repeat
from compactmind.evaluation.zero_shot import compare_zero_shot, load_tasks, measure_zero_shot, require_tasks
from compactmind.files import read_json, write_json_atomically
from compactmind.gguf_source import folder_of
from compactmind.manifest import MADE_BY, MANIFEST, read_manifest, versions
from compactmind.report import tables
from compactmind.report.as_shipped import SUFFIX, row_of_llama_cpp, with_as_shipped
from compactmind.report.documents import write_cards, write_documents
from compactmind.report.protocols import environment, protocols
from compactmind.report.sentences import sentences, warnings
from compactmind.report.summary import opening_sentences
from compactmind.report.zero_shot import zero_shot_sentences, zero_shot_table
from compactmind.search.cache import Kept
from compactmind.search.places import findings_of
from compactmind.task import read_task
from compactmind.text import load_documents, token_windows

# ------------------------------------------------------------------------------------------------------------ constants
# Every field, its reason and its range: common.ReportConfig.
CONFIG = ReportConfig.for_profile(PROFILE)

MODELS_TO_EVALUATE: dict[str, str] = {}
"""Your own models, name -> folder: any Hugging Face sequence classifier of the same classes or causal language model becomes a row, a GGUF
file too. For example {"my-bert": "/models/my-bert"}; also on the command line: --models my-bert=/models/my-bert."""

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
ENCODER_SETTINGS = ("max_length", "eval_batch_size", "cost_length", "latency_batches", "latency_repeats")
LANGUAGE_SETTINGS = ("seq_len", "eval_windows", "window_choice", "prompt_tokens", "latency_repeats", "gsm8k_problems")
"""Settings a track's measurements depend on."""


# ------------------------------------------------------------------------------------------------------------------ rows
def own_models(config: ReportConfig) -> dict[str, Path]:
    """Return the user's own models, name -> folder, a GGUF file's made. Raises CompactMindError on one that is not there."""
    models = dict(MODELS_TO_EVALUATE)
    for entry in config.models:
        name, separator, folder = entry.partition("=")
        if not (name and separator and folder):
            raise CompactMindError(f"--models {entry!r} is not name=folder: for example --models my-bert=/models/my-bert")
        models[name] = folder
    models = {name: str(folder_of(Path(folder), config.models_dir)) for name, folder in models.items()}
    for name, folder in models.items():
        if not (Path(folder) / "config.json").is_file():
            raise CompactMindError(f"{name}: {folder} holds no model (no config.json); mend MODELS_TO_EVALUATE or --models")
        if name in (*ENCODER_ROWS, *LANGUAGE_ROWS, AS_SHIPPED):
            raise CompactMindError(f"{name} is the name of a model of the pipeline: choose another one for {folder}")
    return {name: Path(folder) for name, folder in models.items()}


def list_rows(config: ReportConfig) -> list[dict[str, Any]]:
    """Return a row per model with name, track, directory and status: present, or `not run`, `broken`, `failed`, see `mark_unusable`.

    The standard rows come first, then every other checkpoint under models/, then the user's own.
    """
    rows, own = [], own_models(config)
    places = {name: config.models_dir / name for name in (*ENCODER_ROWS, *LANGUAGE_ROWS)}
    for manifest in sorted(config.models_dir.glob(f"[!.]*/{MANIFEST}")):
        if not is_repeat(manifest.parent) and manifest.parent not in own.values():
            places.setdefault(manifest.parent.name, manifest.parent)
    if AS_SHIPPED in places:
        raise CompactMindError(
            f"{places[AS_SHIPPED]} has the name of the file that {DENSE_LANGUAGE_MODEL} was published as: rename it"
        )
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
            mark_unusable(row, error)
            rows.append(row)
            continue
        if track:
            rows.append({**row, "track": track, "status": "present"})
    return rows


def compared_with(row: dict[str, Any], track: str, config: ReportConfig) -> str | None:
    """Return the name of the row a row is compared with: classifiers with one reference, a language model with what it was made from."""
    if track == "encoder":
        return config.reference
    return row["name"] if row["name"] == DENSE_LANGUAGE_MODEL else row["made_from"]


def measure_track(
    config: ReportConfig, track: str, rows: list[dict[str, Any]], known: dict[str, dict[str, Any]], machine: str
) -> None:
    """Give, in place, every row of a track whose model is there its measurements: the earlier ones where they hold, else new ones."""
    mine = [row for row in rows if row["track"] == track]
    data = config.data_dir if track == "encoder" else config.text_dir
    settings = ENCODER_SETTINGS if track == "encoder" else LANGUAGE_SETTINGS
    present = [row for row in mine if row["status"] == "present"]
    if not present:
        return
    try:
        what = {"data": data_fingerprint(data), "machine": machine, "versions": versions(), "kernels": kernels.identity()}
        what |= config.relevant(*settings)
        text = read_dataset_description(data)["source"]["source"]
        held_out = load_split(data, "test") if track == "encoder" else load_documents(data, "test")
    except CompactMindError as error:
        if track == "encoder":
            raise
        print(f"language models: {error}")
        for row in present:
            row |= {"status": "not run", "command": "python download_model.py"}
        return
    if track == "encoder":
        check_rows(present, data)
        present = [row for row in present if row["status"] == "present"]
    identify(present)
    for row in present:
        if row["status"] == "present":
            row["compared_with"] = compared_with(row, track, config)
    needed = reuse_measurements(present, known, what)
    kept = sum(row["status"] == "measured" for row in present)
    if kept:
        print(
            f"{track}: {kept} of {kept + len(needed)} rows are as they were and come from the earlier report "
            "(--fresh True measures them again)"
        )
    if not needed:
        return
    if track == "encoder":
        classifier_room.require_room_for("6_evaluate_report.py", config)
    else:
        require_room_for(needed, DENSE_LANGUAGE_MODEL, config.eval_windows, config.seq_len, config.results_dir)
    reference = config.reference if track == "encoder" else DENSE_LANGUAGE_MODEL
    others = {reference, *(row["compared_with"] for row in needed)}
    runs_along = [row for row in present if row["name"] in others and row not in needed and row["status"] == "measured"]
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
        prompt_tokens=config.prompt_tokens, repeats=config.latency_repeats, fresh=config.fresh,
        states=lambda base, windows: Kept(config.results_dir / "search" / "costs", {"model": base}, config.fresh).states(windows),
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
    own = [row_of_llama_cpp(dense, kind, installed()) for kind in LLAMA_CPP]
    earlier = [known.get(row["name"], {}) for row in own]
    if all(
        each.get("status") == "measured" and each["measured_with"] == row["measured_with"]
        for each, row in zip(earlier, own, strict=True)
    ):
        return earlier
    checkpoint = load_any(Path(dense["directory"]), "cpu")
    documents = load_documents(config.text_dir, "test")
    windows = token_windows(checkpoint.tokenizer, documents, config.seq_len, config.eval_windows, config.window_choice)
    measure_in_llama_cpp(own, checkpoint, dense, windows, **config.relevant("prompt_tokens"), repeats=config.latency_repeats)
    return own


# ----------------------------------------------------------------------------------------------------------------- main
def measured_report(config: ReportConfig, path: Path) -> dict[str, Any]:
    """Return the report's dict, with new measurements where the one at `path` has none that hold; written there after every track."""
    earlier = {} if config.fresh else read_json(path) or {}
    known = {row["name"]: row for row in earlier.get("models", [])} if earlier.get("schema_version") == SCHEMA_VERSION else {}
    description, where = read_dataset_description(config.data_dir), environment()
    tasks, refused = load_tasks(config.zero_shot, config.zero_shot_dir)
    for name, why in refused.items():
        print(f"{name} is left out: {why}")
    rows = sorted(list_rows(config), key=lambda row: list(TASKS).index(row["track"]))
    for track in TASKS:
        measure_track(config, track, rows, known, where["machine"])
        if track == "encoder":
            add_seeds(rows, known, config.data_dir, config.max_length, config.eval_batch_size)
        beside = measure_llama_cpp(config, rows, known) if track == "llm" else []
        if track == "llm" and tasks:
            mine = [row for row in rows if row["track"] == "llm"]
            measure_zero_shot(mine, checkpoint_of, tasks, config.zero_shot_dir, config.zero_shot_limit)
        finished_rows = with_as_shipped([finished(row, known) for row in rows], DENSE_LANGUAGE_MODEL, beside)
        report = json.loads(json.dumps(report_of(config, finished_rows, description, where, refused)))
        write_json_atomically(path, report)
    return report


def checkpoint_of(row: dict[str, Any]) -> Checkpoint:
    """Load the checkpoint of a row."""
    return load_any(Path(row["directory"]), default_device())


def finished(row: dict[str, Any], known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return a row as a report may hold it: one whose track has yet to be measured as the earlier report has it, or as not run."""
    if row["status"] != "present":
        return row
    if known.get(row["name"], {}).get("status") == "measured":
        return known[row["name"]]
    return {**row, "status": "not run", "command": "python 6_evaluate_report.py"}


def report_of(
    config: ReportConfig, rows: list[dict[str, Any]], description: dict[str, Any], where: dict[str, Any], refused: dict[str, str]
) -> dict[str, Any]:
    """Return the report's dict from its rows, the description of the sentences, the environment and the tasks that were refused."""
    correct_for_many(rows)
    compare_zero_shot(rows)
    settings = json.loads(json.dumps(config.relevant(*ENCODER_SETTINGS, *LANGUAGE_SETTINGS)))
    return {
        "schema_version": SCHEMA_VERSION,
        "profile": config.profile,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "environment": where,
        "settings": settings,
        "references": {"encoder": config.reference, "llm": DENSE_LANGUAGE_MODEL},
        "data": {**description, "fingerprint": data_fingerprint(config.data_dir)},
        "protocols": protocols(settings, description, config.reference, AS_SHIPPED),
        "search": read_json(findings_of(config.results_dir / "search", config.models_dir / "llama_searched") / "summary.json"),
        "smoothquant": read_json(config.results_dir / "smoothquant.json"),
        "models": rows,
        "zero_shot_refused": refused,
    }


def print_report(report: dict[str, Any], config: ReportConfig) -> None:
    """Print the tables and sentences a terminal has room for."""
    shown = [
        tables.encoder_table(report),
        tables.per_class_table(report),
        tables.language_table(report),
        zero_shot_table(report),
        tables.gsm8k_table(report),
        tables.search_table(report),
    ]
    for table in shown:
        if table is not None:
            print(f"\n{table.as_text()}")
    summary = [*sentences(report), *zero_shot_sentences(report)]
    for title, lines in (("Summary", summary), ("Warnings", warnings(report)), ("In short", opening_sentences(report))):
        if lines:
            print(f"\n{title}\n" + "\n".join(f"- {line}" for line in lines))


def main(config: ReportConfig) -> None:
    require_tasks(config.zero_shot)
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
