"""The compressor runs a pipeline of methods on a fresh copy of a model and measures after every step.

A pipeline is a list [{"method": "prune", "params": {"sparsity": 0.2}}, {"method": "retrain"}, ...]. Before any time is spent it is
checked: known methods, parameters in range, and an order that can be carried out. A quantized model can neither be pruned nor
retrained, and is quantized once; retraining wants something to recover from or a quantization to come; smoothing wants a quantization to
help; zeros that one step has made no other may fill.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from compactmind.checkpoint import bytes_to_save
from compactmind.errors import CompactMindError, first_line
from compactmind.formats.table import FORMATS
from compactmind.methods.registry import Method, Resources, method_named
from compactmind.precision import is_small, widen
from compactmind.search.cache import PrefixCache

EXAMPLE = '[{"method": "prune", "params": {"sparsity": 0.2}}, {"method": "retrain"}, {"method": "w8a8"}]'


@dataclass(frozen=True)
class Measure:
    """What is measured after a step: it becomes part of that step's row."""

    name: str
    """Says all that it depends on beside the model: two measures of one name give the same."""
    of: Callable[[PreTrainedModel], dict[str, Any]]


# ---------------------------------------------------------------------------------------------------------------- pipelines
@dataclass
class Step:
    """One checked step of a pipeline."""

    method: Method
    recipe: Any

    @property
    def has_gradients(self) -> bool:
        """Whether it trains anything, or scores by gradients: its result depends on the precision of training then."""
        learns = bool(self.method.trains and getattr(self.recipe, self.method.trains))
        return learns or bool(self.method.gradients and self.method.gradients(self.recipe))

    def described(self) -> dict[str, Any]:
        """Return the step with all its parameters, as JSON has it."""
        return json.loads(json.dumps({"method": self.method.name, "params": asdict(self.recipe)}))

    def identity(self) -> str:
        """Return a hash of the step and its parameters."""
        return hashlib.sha256(json.dumps(self.described(), sort_keys=True).encode()).hexdigest()[:16]


@dataclass
class Compressed:
    """What came out of a pipeline."""

    model: PreTrainedModel
    kind: str
    """Kind of checkpoint: a key of FORMATS."""
    quantization: dict[str, Any] | None
    steps: list[dict[str, Any]]
    """A row per step, the dense model first: method, params, what was done, seconds, and what was measured."""


def order_problem(methods: Sequence[Method]) -> str | None:
    """Return why these methods cannot be carried out in this order, None if they can."""
    kinds, cutting = [method.kind for method in methods], {"prune", "sparsify"}
    for number, (kind, method) in enumerate(zip(kinds, methods, strict=True), start=1):
        before, after = kinds[: number - 1], kinds[number:]
        if "quantize" in before:
            return (
                f"step {number}, {method.name}, comes after a quantization: quantized weights can neither be pruned nor "
                "trained nor smoothed nor quantized again; put it before"
            )
        if kind == "retrain" and not cutting & set(before):
            if cutting & set(after):
                return f"step {number}, {method.name}, has nothing to recover from yet: put it behind what is cut"
            if "quantize" not in after:
                return f"step {number}, {method.name}, has nothing to recover from: put a prune step before it or a quantization behind it"
        if kind == "prune" and "sparsify" in before:
            return f"step {number}, {method.name}, would undo the zeros before it: what is cut moves weights between fours; put it before"
        if kind == "smooth" and "quantize" not in after:
            return f"step {number}, {method.name}, changes nothing but how well a quantization goes: put one behind it"
    return None


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
    if problem := order_problem([step.method for step in steps]):
        raise CompactMindError(problem)
    return steps


def idle_problem(steps: Sequence[Step]) -> str | None:
    """Return which step would change nothing because all before it left what the model computes as it was, None if all do something."""
    for number, step in enumerate(steps, start=1):
        if step.method.idle and step.method.idle(step.recipe):
            return (
                f"step {number}, {step.method.name}, would change nothing: it learns from the dense model alone, which the model before it "
                "still equals; set alpha below 1, or put a prune step before it"
            )
        if step.method.kind != "smooth":
            return None
    return None


def check_steps(steps: Sequence[Step], dense: PreTrainedModel) -> None:
    """Raise CompactMindError if a step cannot be done to this model, as far as the models' shapes tell: nothing is computed."""
    if problem := idle_problem(steps):
        raise CompactMindError(problem)
    shapes_are_known, zeros = True, None
    for step in steps:
        if zeros and step.method.fills_zeros and (why := step.method.fills_zeros(step.recipe)):
            raise CompactMindError(f"{step.method.name} would undo the zeros that {zeros} has made: {why}")
        zeros = step.method.name if step.method.kind == "sparsify" else zeros
        if step.method.check:
            step.method.check(dense, step.recipe, shapes_are_known)
        shapes_are_known = shapes_are_known and step.method.kind != "prune"


def pipeline_name(steps: Sequence[Step]) -> str:
    """Return the methods of a pipeline in order, e.g. `prune > retrain > w8a8`."""
    return " > ".join(step.method.name for step in steps)


# ------------------------------------------------------------------------------------------------------------------ running
def run_pipeline(
    steps: Sequence[Step],
    resources: Resources,
    measure: Measure,
    *,
    cache: PrefixCache | None = None,
    check: Callable[[int, list[dict[str, Any]]], None] = lambda *_: None,
    show: bool = True,
) -> Compressed:
    """Run checked steps on a fresh copy of the dense model and `measure` after each; the text it reads must be none that a method sees.

    What cannot be done to this model is refused before anything is computed. With a cache the longest beginning of the pipeline that has
    been run before is not run again; its rows are those of then,
    marked `cached`. `check` gets the number of steps that are done and their rows; what it raises ends the pipeline there, with those steps
    in the cache.
    """
    identities = [step.identity() for step in steps]
    resources.before = resources.kinds_before = ()

    def of_dense() -> dict[str, Any]:
        check_steps(steps, resources.teacher())
        return measure.of(resources.teacher())

    measured = resources.remember(measure.name, of_dense)
    model, rows = _load_cached_prefix(steps, identities, measure, cache, resources.device) if cache else (None, [])
    done = len(rows)
    for step in steps[done:]:
        if step.method.beforehand:
            step.method.beforehand(resources, step.recipe)
    resources.release_teacher()
    if model is None:
        model = resources.dense()
        check_steps(steps, model)
    rows = [{"method": "dense", "params": {}, "done": {}, "seconds": 0.0, **measured}, *rows]
    if done:
        check(done, rows)
    kind = next((step.method.result for step in reversed(steps[:done]) if step.method.result), "dense")
    quantization = next((row["done"] for step, row in zip(steps, rows[1:], strict=False) if step.method.kind == "quantize"), None)
    for number, step in enumerate(steps[done:], start=done + 1):
        if show:
            print(f"{step.method.name} {json.dumps(step.described()['params'])} ...", flush=True)
        started = time.perf_counter()
        resources.before = tuple(identities[: number - 1])
        resources.kinds_before = tuple(earlier.method.kind for earlier in steps[: number - 1])
        model, description = step.method.apply(model, resources, step.recipe)
        kind = step.method.result or kind
        if step.method.kind == "quantize":
            quantization = description
        if step.method.kind != "smooth":  # what is smoothed waits for the next step: rounding it would be a loss of its own
            _round(model, kind, resources.released)
        if kind in ("dense", "pruned") and not is_small(model):
            widen(model)  # another class of model has linears of its own
        seconds = time.perf_counter() - started
        row, measured = {**step.described(), "done": description, "seconds": seconds}, measure.of(model)
        rows.append(row | measured)
        if cache:
            cache.save(identities[:number], model, kind, row, resources.released)
            cache.add_measured(identities[:number], measure.name, measured)
        check(number, rows)
        if show and "perplexity" in rows[-1]:
            print(f"{step.method.name:<10} perplexity {rows[-1]['perplexity']:9.3f} ({seconds:.0f} s)", flush=True)
    return Compressed(model, kind, quantization, rows)


def _load_cached_prefix(
    steps: Sequence[Step], identities: list[str], measure: Measure, cache: PrefixCache, device: str
) -> tuple[PreTrainedModel | None, list[dict[str, Any]]]:
    """Return the model after the longest beginning in the cache and the rows of its steps, measured now where they have not been."""
    for count in range(len(steps), 0, -1):
        beginnings = [identities[:number] for number in range(1, count + 1)]
        records = [cache.record(beginning) for beginning in beginnings]
        if None in records:
            continue
        model, rows = cache.model(identities[:count], device), []
        for beginning, record in zip(beginnings, records, strict=True):
            if measure.name not in record["measured"]:
                earlier = model if len(beginning) == count else cache.model(beginning, device)
                if earlier is None:
                    model = None
                    break
                record["measured"][measure.name] = measure.of(earlier)
                cache.add_measured(beginning, measure.name, record["measured"][measure.name])
            rows.append({**record["row"], **record["measured"][measure.name], "cached": True})
        if model is not None:
            return model, rows
    return None, []


def interaction(
    steps: Sequence[Step], resources: Resources, measure: Measure, rows: Sequence[dict[str, Any]], cache: PrefixCache | None = None
) -> float | None:
    """Return the loss of the whole minus the sum of the losses of its parts, in nats; None unless it ends in a quantization of something.

    The last step is run alone on the dense model for it; `rows` are those of the whole and carry a `loss` from `measure`.
    """
    if len(steps) < 2 or steps[-1].method.kind != "quantize":
        return None
    alone = run_pipeline(steps[-1:], resources, measure, cache=cache, show=False).steps[-1]["loss"]
    dense, before, whole = rows[0]["loss"], rows[-2]["loss"], rows[-1]["loss"]
    return (whole - dense) - ((before - dense) + (alone - dense))


def _round(model: PreTrainedModel, kind: str, dtype: torch.dtype) -> None:
    """Give, in place, every weight the value that the file will hold: what is measured is what is saved."""
    for name, parameter in model.named_parameters():
        if FORMATS[kind].as_released(name, parameter):
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)


@contextmanager
def store_as_released(compressed: Compressed, dtype: torch.dtype) -> Iterator[None]:
    """Inside the `with` block the weights are of the dtype that the file will hold; the values stay, as every step rounded them."""
    stored = [
        (parameter, parameter.dtype)
        for name, parameter in compressed.model.named_parameters()
        if FORMATS[compressed.kind].as_released(name, parameter)
    ]
    for parameter, _ in stored:
        parameter.data = parameter.data.to(dtype)
    try:
        yield
    finally:
        for parameter, before in stored:
            parameter.data = parameter.data.to(before)


def stored_bytes(compressed: Compressed, dtype: torch.dtype) -> int:
    """Return the bytes of the tensors the weight file will hold."""
    saved = bytes_to_save(compressed.model)
    for name, parameter in compressed.model.named_parameters():  # tied ones once
        if FORMATS[compressed.kind].as_released(name, parameter):
            saved -= parameter.numel() * (parameter.element_size() - dtype.itemsize)
    return saved


@torch.no_grad()
def layer_errors(dense: PreTrainedModel, model: PreTrainedModel, windows: torch.Tensor) -> list[float] | None:
    """Return ||h - h_dense|| / ||h_dense|| of the residual stream after every block; None if their numbers of blocks differ."""
    if len(dense.model.layers) != len(model.model.layers):
        return None
    errors = torch.zeros(len(dense.model.layers), dtype=torch.float64)
    sizes = torch.zeros_like(errors)
    for window in windows:
        ids = window[None]
        dense_states, states = (_states(each, ids.to(each.device)) for each in (dense, model))
        for index, (right, state) in enumerate(zip(dense_states, states, strict=True)):
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


def measure_or_none(what: str, measure: Callable[[], Any]) -> Any:
    """Return what `measure` does; None and a printed line if it fails: nothing is lost for what is only to be known of a model."""
    try:
        return measure()
    except Exception as error:  # noqa: BLE001  whatever it is, the model is there
        print(f"{what} could not be measured and is left out: {type(error).__name__}: {first_line(error)}", flush=True)
        return None
