"""The file a dense language model was published as, as a row of the report: a compressed model that was there before any work was done.

It has the bytes of the file and the quality of the model made of it (the same weights, there rounded to bfloat16). Nothing else is known of
it: what runs such a file is another program. Whatever is made of the dense model has to be smaller than it or better.
"""

from pathlib import Path
from typing import Any

from compactmind.errors import CompactMindError
from compactmind.manifest import read_manifest

KIND = "published"
LLAMA_CPP = "llama.cpp"
OTHERS = (KIND, LLAMA_CPP)
"""Kinds of rows that are no models of this project: the published file, and what llama.cpp makes and runs (evaluation/llama_cpp.py)."""
SUFFIX = "_as_shipped"
NOT_OF_THE_FILE = ("measured_with", "machine", "not_measured", "history", "gsm8k", "zero_shot", "error", "parent", "layers", "quantization")
"""What of the dense model's row the file's leaves out: what was measured with the model itself, and how it lies under models/."""


def row_as_shipped(dense: dict[str, Any], published: dict[str, Any]) -> dict[str, Any]:
    """Return the row of the file that the model of the row `dense` was published as; measured if that one is, else with its reason."""
    row = {name: value for name, value in dense.items() if name not in NOT_OF_THE_FILE}
    row |= {"name": dense["name"] + SUFFIX, "kind": KIND, "directory": None, "made_from": None, "published_as": published}
    if dense["status"] != "measured":
        reason = {"error": f"it has the quality of {dense['name']}: {dense['error']}"} if "error" in dense else {}
        return row | reason
    size = published["bytes"] / 1e6
    return row | {
        "size_mb": size, "compression_ratio": dense["size_mb"] / size, "kernel": f"as {dense['name']}", "identity": published["sha256"],
        "compared_with": dense["name"], "stage": {}, "load_seconds": None, "peak_memory_mb": None, "generation": None,
    }  # fmt: skip


def row_of_llama_cpp(dense: dict[str, Any], dtype: str, version: str) -> dict[str, Any]:
    """Return the row, still to be measured, of the model of the measured row `dense` as llama.cpp rounds it to `dtype` and runs it."""
    row = {name: value for name, value in dense.items() if name not in (*NOT_OF_THE_FILE, "published_as")}
    return row | {
        "name": f"llama.cpp {dtype}", "kind": LLAMA_CPP, "dtype": dtype, "directory": None, "made_from": dense["name"],
        "compared_with": dense["name"], "kernel": f"llama.cpp ({version})", "stage": {}, "load_seconds": None, "peak_memory_mb": None,
        "identity": f"{dense['identity']} {dtype}", "status": "present", "machine": dense.get("machine"),
        "measured_with": {**dense["measured_with"], "llama.cpp": version},
    }  # fmt: skip


def with_as_shipped(rows: list[dict[str, Any]], reference: str, beside: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of a report with those that are no models of their own behind the dense language model, `reference`: that of the
    file it was published as, if it was made of one, and those `beside` it."""
    completed = []
    for row in rows:
        if row["name"] != reference:
            completed.append(row)
            continue
        try:
            published = read_manifest(Path(row["directory"])).get("published_as")
        except CompactMindError:  # its row says so
            published = None
        dense = {name: value for name, value in row.items() if name != "published_as"}  # an earlier report's may be another
        completed += [dense | {"published_as": published}, row_as_shipped(dense, published)] if published else [dense]
        completed += beside
    return completed


def as_shipped(report: dict[str, Any]) -> dict[str, Any] | None:
    """Return the measured row of the file that the dense language model was published as, None without one."""
    return next((row for row in report["models"] if row.get("kind") == KIND and row["status"] == "measured"), None)


def compressed(report: dict[str, Any], file: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the measured rows that were made of the model which was published as `file`: those it can be compared with."""
    dense = file["compared_with"]
    return [
        row
        for row in report["models"]
        if row["track"] == "llm" and row["status"] == "measured" and row["compared_with"] == dense
        and row["name"] != dense and row["kind"] not in OTHERS and row["against_dense"]
    ]  # fmt: skip


def is_smaller(row: dict[str, Any], file: dict[str, Any]) -> bool:
    """Tell whether a model has fewer bytes than the file."""
    return row["size_mb"] < file["size_mb"]


def is_better(row: dict[str, Any]) -> bool:
    """Tell whether a model's perplexity is below the dense one's, and so the file's, by more than the windows leave to chance."""
    return row["against_dense"]["interval"][1] < 1


def is_dominated(row: dict[str, Any], file: dict[str, Any]) -> bool:
    """Tell whether a model is neither smaller nor better than the file."""
    return not is_smaller(row, file) and not is_better(row)
