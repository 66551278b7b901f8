"""The rows of a report before and while they are measured: what is known of a model, whose it is, and what must be measured again."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from compactmind.checkpoint import load_any, skeleton_of
from compactmind.devices import default_device
from compactmind.errors import CompactMindError
from compactmind.evaluation.cost import weight_bytes
from compactmind.evaluation.failures import fail, row_fails_alone
from compactmind.evaluation.loaded import Checkpoints
from compactmind.files import sha256_of
from compactmind.manifest import MADE_BY, MANIFEST, identity_of, read_manifest
from compactmind.methods import memory
from compactmind.methods.memory import Sizes
from compactmind.onnx_export import FILE
from compactmind.room import require_room
from compactmind.trained_on import check_classes, warn_of_other_sentences


def mark_unusable(row: dict[str, Any], error: Exception) -> None:
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
    record = {name: manifest[name] for name in names}
    record |= {"stage_metrics": manifest["metrics"], "experiment_name": manifest.get("experiment_name")}
    record |= {name: manifest[name] for name in ("pipeline", "interaction", "layer_errors") if name in manifest}
    record["model_name"] = (manifest["stage"].get("config") or {}).get("source", row["name"])
    history = Path(row["directory"]) / "training_history.json"
    record["history"] = json.loads(history.read_text(encoding="utf-8")) if history.is_file() else None
    return record


def check_rows(rows: list[dict[str, Any]], data_dir: Path) -> None:
    """Make, in place, present classifiers of other classes than the data `mark_unusable`; say in one line which saw other sentences.

    Only one that was trained on data of this project: what others call the classes of their models may be their own words for the same.
    """
    for row in rows:
        directory = Path(row["directory"])
        if row["status"] != "present" or not (directory / MANIFEST).is_file():
            continue
        try:
            if read_manifest(directory).get("data_fingerprint"):
                check_classes(directory, data_dir, in_order=False)
        except CompactMindError as error:
            mark_unusable(row, error)
    present = [Path(row["directory"]) for row in rows if row["status"] == "present"]
    warn_of_other_sentences([directory for directory in present if (directory / MANIFEST).is_file()], data_dir)


def identify(rows: list[dict[str, Any]]) -> None:
    """Give, in place, every present row its `identity`, a hash of its weights, and `made_from`: the row its model was made from.

    A manifest records the weights a stage read, not only their name: `made_from` is None if no row has just those.
    """
    for row in rows:
        with row_fails_alone(row):
            row["identity"] = identity_of(Path(row["directory"]))
    for row in rows:
        if row["status"] != "present":
            continue
        directory, made_from = Path(row["directory"]), None
        if (directory / MANIFEST).is_file():
            manifest = read_manifest(directory)
            inputs = manifest["stage"].get("inputs") or {}
            parent_hash = inputs.get(manifest.get("parent")) or inputs.get("model")
            same = [other["name"] for other in rows if parent_hash and other.get("identity") == parent_hash and other is not row]
            made_from = manifest["parent"] if manifest.get("parent") in same else next(iter(same), None)
        row["made_from"] = made_from


def reuse_measurements(rows: list[dict[str, Any]], known: dict[str, dict[str, Any]], what: dict[str, Any]) -> list[dict[str, Any]]:
    """Complete, in place, the present rows whose measurement is `known` (an earlier report's, by name); return the others.

    A measurement holds as long as the weights, those it was compared with, the machine and `what` (data, settings) are the same. One
    that lacks something is tried again.
    """
    identities = {row["name"]: row.get("identity") for row in rows}
    needed = []
    for row in rows:
        if row["status"] != "present":
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
    """Return the checkpoints by name; a row whose model cannot be loaded is `mark_unusable` and has none."""
    checkpoints = Checkpoints({row["name"]: partial(load_any, Path(row["directory"]), device) for row in rows})
    for row in rows:
        try:
            row |= {"status": "measured", **described(row, checkpoints[row["name"]].manifest)}
        except Exception as error:  # noqa: BLE001  any folder may be a row, and each library has its own way to say it cannot read one
            checkpoints.discard(row["name"])
            mark_unusable(row, error)
    return checkpoints


def require_room_for(rows: list[dict[str, Any]], reference: str, eval_windows: int, seq_len: int, results_dir: Path) -> None:
    """Say what memory measuring the language models takes: small ones all at once, of large ones the dearest.

    `reference` is the name of the dense one, `eval_windows` windows of `seq_len` tokens are read. Raises CompactMindError without
    that much.
    """
    dense = next((row for row in rows if row["name"] == reference), None)
    if dense is None:
        return
    folder, device = Path(dense["directory"]), default_device()
    windows = 0, eval_windows, seq_len
    sizes = Sizes.of(skeleton_of(folder), weight_bytes(folder), *windows, device == "cuda")
    held = {row["name"]: weight_bytes(Path(row["directory"])) for row in rows} | {dense["name"]: sizes.held}
    held = {"all models": sum(held.values())} if sizes.small else held
    needs = {name: memory.report(sizes, size) for name, size in held.items()}
    require_room(needs, 0, results_dir, device, "fewer rows, or a smaller --seq_len, take less")
