"""Classifiers side by side on the same sentences: what they get right, operations, bytes, time and memory.

accuracy, McNemar        compactmind/evaluation/accuracy.py
GFLOPs, latency, memory  compactmind/evaluation/cost.py
"""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch

from compactmind.checkpoint import Checkpoint, load_any
from compactmind.data import EncodedSentences, Sentence
from compactmind.devices import default_device
from compactmind.errors import CompactMindError
from compactmind.evaluation.accuracy import classification_metrics, mcnemar
from compactmind.evaluation.cost import gflops, gmacs_thop, measure_latency, measure_load_time, peak_memory, weight_bytes
from compactmind.evaluation.failures import cell_fails_alone, leave_out, row_fails_alone
from compactmind.forward import predict_logits
from compactmind.limits import positions_of, require_positions
from compactmind.onnx_export import FILE, OnnxClassifier
from compactmind.task import Task, is_sentiment


def positive_class(model: torch.nn.Module) -> int:
    """Return which of the two classes means "positive" by the names the model gives them, 1 if they say nothing.

    Raises CompactMindError if there are not two.
    """
    names = {int(index): str(name).lower() for index, name in model.config.id2label.items()}
    if len(names) != 2:
        raise CompactMindError(f"it tells {len(names)} classes apart ({', '.join(names.values())}): SST-2 has two")
    return 0 if names.get(0, "").startswith("pos") or names.get(1, "").startswith("neg") else 1


def columns_of_labels(model: torch.nn.Module, labels: Sequence[str]) -> list[int]:
    """Return, for each of the data's labels, which of the model's logits is its: by name, else in order where one side has no names.

    Raises CompactMindError if they are not the same classes.
    """
    if tuple(labels) == Task().labels:
        positive = positive_class(model)
        return [1 - positive, positive]
    names = [name.lower() for name in _raw_names(model)]
    wanted = [label.lower() for label in labels]
    if len(set(wanted)) == len(wanted) and sorted(names) == sorted(wanted):
        return [names.index(label) for label in wanted]
    nameless = all(re.fullmatch(r"label_\d+", name) for name in names) or wanted == [str(index) for index in range(len(wanted))]
    if len(names) == len(wanted) and (list(labels) == _raw_names(model) or nameless):
        return list(range(len(wanted)))
    raise CompactMindError(
        f"it tells {len(names)} classes apart ({', '.join(_raw_names(model))}), the test rows are of {len(labels)} ({', '.join(labels)})"
    )


def _raw_names(model: torch.nn.Module) -> list[str]:
    config = model.config
    return [str(config.id2label.get(index, f"LABEL_{index}")) for index in range(config.num_labels)]


def class_names(model: torch.nn.Module) -> list[str]:
    """Return what a model calls its classes, in the order of its logits: negative and positive where that is what two of them mean.

    Raises CompactMindError if its logits are not classes of which one is right.
    """
    config = model.config
    if config.num_labels < 2 or config.problem_type == "multi_label_classification":
        what = "one number" if config.num_labels < 2 else "labels of which several may be right"
        raise CompactMindError(f"it gives {what} for a text, not one of several classes")
    names = _raw_names(model)
    if is_sentiment(names) and not hasattr(config, "sentence_pairs"):  # of a task of one's own the names are what they are
        positive = positive_class(model)
        return ["positive" if index == positive else "negative" for index in range(2)]
    return names


def measure_classifiers(
    rows: list[dict[str, Any]],
    checkpoints: dict[str, Checkpoint],
    sentences: list[Sentence],
    *,
    reference: dict[str, Any] | None,
    task: Task = Task(),  # noqa: B008  frozen
    max_length: int,
    eval_batch_size: int,
    cost_length: int,
    latency_batches: tuple[int, ...],
    latency_repeats: int,
) -> None:
    """Add, in place, every measurement to the rows, whose models are all among the `checkpoints`, by name.

    `reference` is the row the others are compared with: one of these, or one measured earlier, whose model then runs along
    wherever time is compared. A row's `correct` says, a bit per sentence in hexadecimal, what it got right. A row fails alone, see
    compactmind/evaluation/failures.py; if it is the reference, the others are compared with nothing.
    """
    for row in rows:
        print(f"{row['name']:<24} accuracy, operations, load time ...", flush=True)
        with row_fails_alone(row):
            measure_accuracy(row, checkpoints[row["name"]], sentences, task, max_length, eval_batch_size)
    rows = [row for row in rows if row["status"] == "measured"]
    if reference is not None and reference["status"] != "measured":
        reference = None
    along = {} if reference is None else {reference["name"]: checkpoints[reference["name"]].model}
    models = {name: model for name, model in along.items() if (positions_of(model) or cost_length) >= cost_length}
    for row in rows:
        checkpoint, directory = checkpoints[row["name"]], Path(row["directory"])
        for key, count in (("gflops", gflops), ("gmacs_thop", gmacs_thop)):
            with cell_fails_alone(row, key):
                require_positions(checkpoint.model, cost_length, "cost_length")
                row[key] = count(checkpoint.model, cost_length)
        with cell_fails_alone(row, "load_seconds"):
            row["load_seconds"] = measure_load_time(partial(load_any, directory, checkpoint.model.device))
        same = reference is None or row["name"] == reference["name"]
        row["mcnemar_against_reference"] = None if same else mcnemar(correct_rows(reference), correct_rows(row))
        with cell_fails_alone(row, "latency"):
            require_positions(checkpoint.model, cost_length, "cost_length")
            models[row["name"]] = checkpoint.model
            with cell_fails_alone(row, "onnx_latency"):
                if model := onnx_twin(row, checkpoint.model):
                    models[f"{row['name']} (ONNX)"] = model
    for row in rows:
        row["latency"] = {}
        row.pop("onnx_latency", None)
    for batch_size in latency_batches:
        print(f"latency at batch {batch_size}, {latency_repeats} rounds of {len(models)} models in turn ...", flush=True)
        errors: dict[str, Exception] = {}
        times = measure_latency(
            models, batch_size, cost_length, latency_repeats, reference["name"] if reference else "", errors=errors
        )
        for row in rows:
            for name, key in ((row["name"], "latency"), (f"{row['name']} (ONNX)", "onnx_latency")):
                if name in times:
                    row.setdefault(key, {})[f"batch_{batch_size}"] = times[name]
                if name in errors:
                    leave_out(row, f"{key} at batch {batch_size}", errors[name])

    print("peak memory, each model in a process of its own ...", flush=True)

    def measure_memory(row: dict[str, Any]) -> None:
        with cell_fails_alone(row, "peak_memory_mb"):
            require_positions(checkpoints[row["name"]].model, cost_length, "cost_length")
            row["peak_memory_mb"] = peak_memory(Path(row["directory"]), max(latency_batches), cost_length)

    with ThreadPoolExecutor(max_workers=1 if default_device() == "cuda" else 2) as pool:
        list(pool.map(measure_memory, rows))


def measure_accuracy(
    row: dict[str, Any], checkpoint: Checkpoint, sentences: list[Sentence], task: Task, max_length: int, batch_size: int
) -> None:
    """Add, in place, what a classifier gets right and the bytes of its weights; `max_length` is what its sentences are cut at."""
    model = checkpoint.model
    columns = columns_of_labels(model, task.labels)
    row["max_length"] = min(max_length, positions_of(model) or max_length)
    encoded = EncodedSentences(checkpoint.tokenizer, sentences, row["max_length"])
    logits = predict_logits(model, encoded, batch_size)
    if not logits.isfinite().all():
        raise CompactMindError("its logits are not numbers: the weights are damaged, or its training diverged")
    logits = logits[:, columns]
    row["cut"] = {"rows": encoded.cut, "share": encoded.cut / len(encoded), "length_of_99": encoded.length_of(0.99)}
    row.update(classification_metrics(logits, encoded.labels))
    row["correct"] = numpy.packbits((logits.argmax(dim=-1) == encoded.labels).numpy()).tobytes().hex()
    row["size_mb"] = weight_bytes(Path(row["directory"])) / 1e6


def onnx_twin(row: dict[str, Any], model: torch.nn.Module) -> OnnxClassifier | None:
    """Return the ONNX file of a row as a model, None if there is none or nothing to run it with."""
    path = Path(row["directory"]) / FILE
    if not path.is_file():
        return None
    try:
        return OnnxClassifier(path, model.config)
    except CompactMindError as error:
        print(f"{path} is not measured: {error}")
        return None


def correct_rows(row: dict[str, Any]) -> numpy.ndarray:
    """Return which sentences a measured row got right: boolean (rows,)."""
    return numpy.unpackbits(numpy.frombuffer(bytes.fromhex(row["correct"]), numpy.uint8), count=row["rows"]).astype(bool)
