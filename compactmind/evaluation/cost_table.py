"""What the attention and the FFN of one layer cost with every number of heads and at every width: measured, or counted.

A table is measured with models of one layer, all in turns, and stretched so that it gives the time of the whole model, measured in the same
rounds. It is kept in a file per machine, shape and software: a run that goes on, or is repeated, decides by the same numbers.
"""

import hashlib
import json
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy
import torch
from sklearn.isotonic import isotonic_regression
from transformers import PreTrainedModel, __version__

from compactmind.evaluation.cost import gflops, measure_latency
from compactmind.files import write_json_atomically
from compactmind.methods.pruning.budget import CostTable
from compactmind.methods.pruning.encoder import layer_shapes
from compactmind.methods.pruning.masks import of_widths

WIDTHS = 8
"""Widths of an FFN that are measured, evenly spaced; what lies between them is on a straight line."""


def gflops_table(model: PreTrainedModel, sequence_length: int) -> CostTable:
    """Return the GFLOPs of the parts of a classifier, for one sequence; they are proportional to heads and neurons."""
    heads, widths = _widths(model)
    rest = gflops(of_widths(model, [0] * len(heads), [0] * len(heads)), sequence_length)
    empty, head, neuron = (gflops(of_widths(model, [h], [w]), sequence_length) for h, w in ((0, 0), (1, 0), (0, 1)))
    per_head, per_neuron, most = head - empty, neuron - empty, max(widths)
    costs = tuple(number * per_head for number in range(max(heads) + 1))
    return CostTable(f"GFLOPs (sequence of {sequence_length})", rest, costs, ((0, 0.0), (most, most * per_neuron)))


def latency_table(
    model: PreTrainedModel, batch_size: int, sequence_length: int, repeats: int, cache_directory: Path
) -> CostTable:
    """Return the milliseconds of the parts of a classifier for a batch, from the cache if this machine has measured them before."""
    path = cache_directory / f".latency_table_{_key(model, batch_size, sequence_length, repeats)}.json"
    if (known := _cached(path)) is not None:
        return known
    table = measure_table(model, batch_size, sequence_length, repeats)
    write_json_atomically(path, asdict(table))
    return table


def measure_table(model: PreTrainedModel, batch_size: int, sequence_length: int, repeats: int) -> CostTable:
    """Return the milliseconds of the parts of a classifier for a batch, measured now; `model` is in evaluation mode afterwards."""
    heads, widths = _widths(model)
    most_heads, most = max(heads), max(widths)
    steps = sorted({round(most * step / WIDTHS) for step in range(1, WIDTHS + 1)} - {0})
    shapes = {("nothing",): ([0] * len(heads), [0] * len(heads)), ("layer",): ([0], [0])}
    shapes |= {("heads", number): ([number], [0]) for number in range(1, most_heads + 1)}
    shapes |= {("neurons", width): ([0], [width]) for width in steps}
    models = {"/".join(map(str, name)): _sharing_tables(of_widths(model, *shape), model).eval() for name, shape in shapes.items()}
    timings = measure_latency({**models, "whole": model.eval()}, batch_size, sequence_length, repeats, reference="whole")
    ms = {name: each["low_ms"] for name, each in timings.items()}  # what else runs on the machine only ever adds to a time
    cost = {
        "heads": [0.0, *(ms[f"heads/{number}"] - ms["layer"] for number in range(1, most_heads + 1))],
        "neurons": [0.0, *(ms[f"neurons/{width}"] - ms["layer"] for width in steps)],
    }
    rising = {name: numpy.maximum(isotonic_regression(values), 0.0) for name, values in cost.items()}  # what is wider is not faster
    for values in rising.values():
        values[0] = 0.0
    measured = sum(rising["heads"][each] for each in heads)
    measured += sum(float(numpy.interp(each, [0, *steps], rising["neurons"])) for each in widths)
    stretch = max(ms["whole"] - ms["nothing"], 0.0) / measured if measured else 0.0
    return CostTable(
        f"ms (batch of {batch_size} x {sequence_length} tokens)",
        ms["nothing"],
        tuple(float(stretch * value) for value in rising["heads"]),
        tuple((width, float(stretch * value)) for width, value in zip([0, *steps], rising["neurons"], strict=True)),
    )


def _widths(model: PreTrainedModel) -> tuple[list[int], list[int]]:
    shapes = layer_shapes(model)
    return [shape["num_heads"] for shape in shapes], [shape["intermediate_size"] for shape in shapes]


def _sharing_tables(narrow: PreTrainedModel, model: PreTrainedModel) -> PreTrainedModel:
    narrow.set_input_embeddings(model.get_input_embeddings())  # one table for all of them
    return narrow


def _key(model: PreTrainedModel, *protocol: int) -> str:
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else platform.processor() or platform.machine()
    machine = [platform.node(), device, os.cpu_count(), torch.get_num_threads(), torch.__version__, __version__]
    shape = [model.config.model_type.removeprefix("pruned_"), model.config.hidden_size, layer_shapes(model)]
    return hashlib.sha256(json.dumps([machine, shape, protocol]).encode()).hexdigest()[:16]


def _cached(path: Path) -> CostTable | None:
    try:
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return CostTable(known["unit"], known["rest"], tuple(known["heads"]), tuple(tuple(each) for each in known["neurons"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
