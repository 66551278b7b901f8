"""The compressor runs a pipeline of methods on a fresh copy of a model and measures after every step.

A pipeline is a list [{"method": "prune", "params": {"sparsity": 0.2}}, {"method": "retrain"}, ...]. Before any time is spent it is
checked: known methods, parameters in range, and an order that can be carried out. A quantized model can neither be pruned nor
retrained, and is quantized once; retraining wants something to recover from.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from compactmind.errors import CompactMindError
from compactmind.evaluation.perplexity import perplexity
from compactmind.methods.registry import Method, Resources, method_named


@dataclass
class Step:
    """One checked step of a pipeline."""

    method: Method
    recipe: Any

    def described(self) -> dict[str, Any]:
        """Return the step with all its parameters, as JSON has it."""
        return json.loads(json.dumps({"method": self.method.name, "params": asdict(self.recipe)}))


@dataclass
class Compressed:
    """What came out of a pipeline."""

    model: PreTrainedModel
    kind: str
    """Kind of checkpoint: dense, pruned, w8a8 or nf4."""
    quantization: dict[str, Any] | None
    steps: list[dict[str, Any]]
    """A row per step, the dense model first: method, params, what was done, loss and perplexity on held-out text, seconds."""
    interaction: float | None
    """Loss of the whole minus the sum of the losses of its parts, in nats; None unless something is combined with quantization."""


def read_pipeline(pipeline: str | Sequence[dict[str, Any]]) -> list[Step]:
    """Return the checked steps of a pipeline, given as a list or as its JSON. Raises CompactMindError saying what is wrong."""
    if isinstance(pipeline, str):
        try:
            pipeline = json.loads(pipeline)
        except json.JSONDecodeError as error:
            raise CompactMindError(f"the pipeline is no JSON ({error}): for example {EXAMPLE}") from None
    if not isinstance(pipeline, (list, tuple)) or not pipeline:
        raise CompactMindError(f"the pipeline is no list of steps: for example {EXAMPLE}")
    steps = []
    for number, row in enumerate(pipeline, start=1):
        if not isinstance(row, dict) or "method" not in row or set(row) - {"method", "params"}:
            raise CompactMindError(
                f"step {number} of the pipeline wants the keys method and params, not {row!r}: for example {EXAMPLE}"
            )
        try:
            method = method_named(row["method"])
            steps.append(Step(method, method.parameters(row.get("params") or {})))
        except (ValueError, TypeError) as error:
            raise CompactMindError(f"step {number} of the pipeline: {error}") from None
    kinds = [step.method.kind for step in steps]
    for number, (kind, step) in enumerate(zip(kinds, steps, strict=True), start=1):
        if "quantize" in kinds[: number - 1]:
            raise CompactMindError(
                f"step {number}, {step.method.name}, comes after a quantization: int8 and 4-bit weights can neither be pruned nor "
                "trained nor quantized again; put it before"
            )
        if kind == "retrain" and "prune" not in kinds[: number - 1]:
            raise CompactMindError(
                f"step {number}, {step.method.name}, has nothing to recover from: put a prune step before it"
            )
    return steps


EXAMPLE = '[{"method": "prune", "params": {"sparsity": 0.2}}, {"method": "retrain"}, {"method": "w8a8"}]'


def run_pipeline(steps: Sequence[Step], resources: Resources, windows: torch.Tensor, text: str) -> Compressed:
    """Run checked steps on a fresh copy of the dense model and measure perplexity on `windows` of `text` after each.

    The windows must be none that a method sees. With a quantization among several steps it is also run alone on the dense model, so that
    the interaction of the two is known.
    """
    model, kind, quantization = resources.dense(), "dense", None
    measured = _measure(model, windows, text)
    rows = [{"method": "dense", "params": {}, "done": {}, "seconds": 0.0, **measured}]
    for step in steps:
        print(f"{step.method.name} {json.dumps(step.described()['params'])} ...", flush=True)
        started = time.perf_counter()
        model, done = step.method.apply(model, resources, step.recipe)
        kind = step.method.result or kind
        if step.method.kind != "quantize":
            _round(model, resources.released)
        if step.method.kind == "quantize":
            quantization = done
        seconds = time.perf_counter() - started
        rows.append({**step.described(), "done": done, "seconds": seconds, **_measure(model, windows, text)})
        print(f"{step.method.name:<10} perplexity {rows[-1]['perplexity']:9.3f} ({seconds:.0f} s)", flush=True)
    interaction = None
    if quantization and len(steps) > 1:
        alone, _ = steps[-1].method.apply(resources.dense(), resources, steps[-1].recipe)
        dense, before, whole = rows[0]["loss"], rows[-2]["loss"], rows[-1]["loss"]
        of_quantization = _measure(alone, windows, text)["loss"] - dense
        interaction = (whole - dense) - ((before - dense) + of_quantization)
    _store(model, kind, resources.released)
    return Compressed(model, kind, quantization, rows, interaction)


def _round(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give, in place, every weight a value that `dtype` holds: what is measured is what a file in that dtype will be."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).to(parameter.dtype)


def _store(model: PreTrainedModel, kind: str, dtype: torch.dtype) -> None:
    """Cast, in place, the weights to the dtype of the release; of a W8A8 model those outside the blocks (smoothed norms stay exact)."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not (kind == "w8a8" and name.startswith("model.layers.")):
            parameter.data = parameter.data.to(dtype)


def _measure(model: PreTrainedModel, windows: torch.Tensor, text: str) -> dict[str, Any]:
    result = perplexity(model, windows, text)
    return {name: result[name] for name in ("perplexity", "loss", "losses", "protocol")}


@torch.no_grad()
def layer_errors(dense: PreTrainedModel, model: PreTrainedModel, windows: torch.Tensor) -> list[float] | None:
    """Return ||h - h_dense|| / ||h_dense|| of the residual stream after every block; None if their numbers of blocks differ."""
    if len(dense.model.layers) != len(model.model.layers):
        return None
    errors = torch.zeros(len(dense.model.layers), dtype=torch.float64)
    sizes = torch.zeros_like(errors)
    for window in windows:
        ids = window[None]
        wanted, found = (_states(each, ids.to(each.device)) for each in (dense, model))
        for index, (right, state) in enumerate(zip(wanted, found, strict=True)):
            errors[index] += (state.cpu() - right.cpu()).square().sum().double()
            sizes[index] += right.cpu().square().sum().double()
    return (errors / sizes.clamp(min=1e-30)).sqrt().tolist()


def _states(model: PreTrainedModel, ids: torch.Tensor) -> list[torch.Tensor]:
    states: list[torch.Tensor] = []
    read: Callable = lambda _, __, output: states.append((output[0] if isinstance(output, tuple) else output).float())  # noqa: E731
    handles = [layer.register_forward_hook(read) for layer in model.model.layers]
    try:
        model.model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return states
