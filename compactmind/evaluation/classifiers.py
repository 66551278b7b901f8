"""Classifiers side by side on the same sentences: what they get right, operations, bytes, time and memory.

accuracy, McNemar        compactmind/evaluation/accuracy.py
GFLOPs, latency, memory  compactmind/evaluation/cost.py
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch

from compactmind.checkpoint import Checkpoint, load_any
from compactmind.data import EncodedSentences
from compactmind.errors import CompactMindError
from compactmind.evaluation.accuracy import classification_metrics, mcnemar, predict_logits
from compactmind.evaluation.cost import gflops, gmacs_thop, measure_latency, measure_load_time, peak_memory, weight_bytes
from compactmind.onnx_export import FILE, OnnxClassifier


def positive_class(model: torch.nn.Module) -> int:
    """Return which of the two classes means "positive" by the names the model gives them, 1 if they say nothing.

    Raises CompactMindError if there are not two.
    """
    names = {int(index): str(name).lower() for index, name in model.config.id2label.items()}
    if len(names) != 2:
        raise CompactMindError(f"it tells {len(names)} classes apart ({', '.join(names.values())}): SST-2 has two")
    return 0 if names[0].startswith("pos") or names[1].startswith("neg") else 1


def measure_classifiers(
    rows: list[dict[str, Any]],
    checkpoints: dict[str, Checkpoint],
    sentences: list[dict[str, Any]],
    *,
    reference: dict[str, Any] | None,
    max_length: int,
    eval_batch_size: int,
    cost_length: int,
    latency_batches: tuple[int, ...],
    latency_repeats: int,
) -> None:
    """Add, in place, every measurement to the rows, whose models are all among the `checkpoints`, by name.

    `reference` is the row the others are compared with: one of these, or one measured earlier, whose model then runs along
    wherever time is compared. A row's `correct` says, a bit per sentence in hexadecimal, what it got right.
    """
    for row in rows:
        checkpoint, directory = checkpoints[row["name"]], Path(row["directory"])
        print(f"{row['name']:<24} accuracy, operations, load time ...", flush=True)
        encoded = EncodedSentences(checkpoint.tokenizer, sentences, max_length)
        logits = predict_logits(checkpoint.model, encoded, eval_batch_size)
        if positive_class(checkpoint.model) == 0:
            logits = logits.flip(-1)
        row.update(classification_metrics(logits, encoded.labels))
        row["correct"] = numpy.packbits((logits.argmax(dim=-1) == encoded.labels).numpy()).tobytes().hex()
        row["gflops"] = gflops(checkpoint.model, cost_length)
        row["gmacs_thop"] = gmacs_thop(checkpoint.model, cost_length)
        row["size_mb"] = weight_bytes(directory) / 1e6
        row["load_seconds"] = measure_load_time(partial(load_any, directory, checkpoint.model.device))
    for row in rows:
        same = reference is None or row["name"] == reference["name"]
        row["mcnemar_against_reference"] = None if same else mcnemar(correct_rows(reference), correct_rows(row))

    for row in rows:
        row["latency"] = {}
    models = {name: checkpoint.model for name, checkpoint in checkpoints.items()}
    models |= {f"{row['name']} (ONNX)": model for row in rows if (model := onnx_twin(row, checkpoints[row["name"]].model))}
    for batch_size in latency_batches:
        print(f"latency at batch {batch_size}, {latency_repeats} rounds of {len(models)} models in turn ...", flush=True)
        times = measure_latency(models, batch_size, cost_length, latency_repeats, reference["name"] if reference else "")
        for row in rows:
            row["latency"][f"batch_{batch_size}"] = times[row["name"]]
            if found := times.get(f"{row['name']} (ONNX)"):
                row.setdefault("onnx_latency", {})[f"batch_{batch_size}"] = found

    print("peak memory, each model in a process of its own ...", flush=True)
    batch_size = max(latency_batches)
    with ThreadPoolExecutor(max_workers=1 if torch.cuda.is_available() else 2) as pool:
        peaks = pool.map(lambda row: peak_memory(Path(row["directory"]), batch_size, cost_length), rows)
        for row, peak in zip(rows, peaks, strict=True):
            row["peak_memory_mb"] = peak


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
