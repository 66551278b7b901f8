"""What a pipeline reads beside the model: texts, resources, what is measured; and how what came out of one is saved."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compactmind.checkpoint import load_as_released, save_checkpoint
from compactmind.data import far_first
from compactmind.errors import CompactMindError
from compactmind.evaluation.cost import weight_bytes
from compactmind.evaluation.divergence import measure_logits, measure_windows
from compactmind.evaluation.perplexity import paired_ratio, perplexity_of
from compactmind.evaluation.recorded import quality_record
from compactmind.forward import LogitsOf
from compactmind.methods.registry import Resources
from compactmind.precision import work_in_float32
from compactmind.search.cache import Kept
from compactmind.search.compressor import Compressed, Measure, store_as_released
from compactmind.text import calibration_of, load_documents, token_windows


@dataclass
class PipelineInputs:
    """What every pipeline reads, and what identifies it."""

    source: Path
    tokenizer: PreTrainedTokenizerBase
    resources: Resources
    choose: torch.Tensor
    """Windows (windows, seq_len) on which models are chosen between."""
    test: torch.Tensor
    """Windows of what is reported."""
    text: str
    """What the text is called."""
    window_choice: str
    fingerprint: str
    """Of the text."""

    @cached_property
    def dense_on_test(self) -> LogitsOf:
        """The dense model's logits of every window of test text."""
        return LogitsOf(self.resources.teacher(), self.test, self.resources.states(self.test))

    @property
    def on_test(self) -> Measure:
        """Perplexity and KL to the dense model on test text: of what is saved, and of nothing that is chosen between."""

        def measure(model) -> dict:
            known = self.dense_on_test
            dense = self.resources.is_teacher(model)
            measured = measure_logits(known, self.test) if dense else measure_windows({"": model}, self.test, known)[""]
            far = measured["divergence"]
            measured = perplexity_of(measured["losses"], self.test.shape[1], f"{self.text}, test", self.window_choice)
            return {**{name: measured[name] for name in ("perplexity", "loss", "losses", "protocol")}, "divergence": far}

        return Measure(f"test, {len(self.test)} windows, {self.window_choice}", measure)


def windows_of_folder(
    tokenizer: PreTrainedTokenizerBase, folder: Path, seq_len: int, window_choice: str,
    *, train_windows: int, held_out_windows: int, confirm_windows: int, eval_windows: int,
) -> dict[str, torch.Tensor]:
    """Return windows (windows, seq_len) of a folder of text by what they are for: train, held_out and choose (both of validation), test.

    Validation windows are in an order of which every beginning is spread over them: held_out are the first, and a search looks at the
    first few of choose before the rest. Raises CompactMindError if the validation text has not one each.
    """

    def windows(split: str, count: int, choice: str) -> torch.Tensor:
        return token_windows(tokenizer, load_documents(folder, split), seq_len, count, choice)

    train = windows("train", train_windows, "first")
    validation = windows("validation", held_out_windows + confirm_windows, window_choice)
    if len(validation) < 2:
        raise CompactMindError(
            f"the validation text has {len(validation)} window(s) of {seq_len} tokens: retraining and choosing need one each; use more "
            "text or a smaller --seq_len"
        )
    validation = validation[far_first(len(validation))]
    held_out = min(held_out_windows, len(validation) // 2)  # a short text is shared
    test = windows("test", eval_windows, window_choice)
    return {"train": train, "held_out": validation[:held_out], "choose": validation[held_out:], "test": test}


def read_inputs(
    source: Path,
    device: str,
    check: Callable[[PreTrainedModel], None],
    cut: Callable[[PreTrainedTokenizerBase], dict[str, torch.Tensor]],
    calibration_windows: int,
    *,
    text: str,
    window_choice: str,
    fingerprint: str,
    keep: Kept | None = None,
) -> PipelineInputs:
    """Load the tokenizer of a model and cut the text; the model itself is loaded whenever a fresh one is wanted.

    `check` looks at the dense model first: it raises CompactMindError if what is to be done to it cannot be done. `cut` returns windows
    of tokens (windows, seq_len) by what they are for: train, of which some calibrate, held_out, choose and test. `keep`: what
    is kept between runs.
    """
    model, tokenizer = load_as_released(source)
    check(model)
    released = model.dtype
    del model
    windows = cut(tokenizer)
    train, calibration = windows["train"], calibration_of(windows["train"], calibration_windows)
    print(f"{len(train)} windows of {train.shape[1]} tokens to train on, {len(calibration)} of them to calibrate on")
    resources = Resources(
        calibration=calibration, train=train, held_out=windows["held_out"], released=released,
        dense=lambda: work_in_float32(load_as_released(source)[0].to(device)), released_bytes=weight_bytes(source), device=device,
        **({"keep": keep, "states": keep.states} if keep else {}),
    )  # fmt: skip
    return PipelineInputs(source, tokenizer, resources, windows["choose"], windows["test"], text, window_choice, fingerprint)


def save_compressed(
    output: Path, compressed: Compressed, inputs: PipelineInputs, stage: dict[str, Any], extra: dict[str, Any]
) -> dict[str, Any]:
    """Save what came out of a pipeline that was measured by `on_test`; return what its manifest says of that.

    That is `pipeline`, a row per step with `against_dense` (ratio of perplexities, 95% interval, paired), and `extra`. The manifest
    also keeps the losses and divergences of every window: see compactmind/evaluation/recorded.py.
    """
    dense_losses, last = compressed.steps[0]["losses"], compressed.steps[-1]
    kept = quality_record(inputs.test, stage.get("inputs", {}).get("model"), last["losses"], last["divergence"])
    for row in compressed.steps:
        row["against_dense"] = paired_ratio(row.pop("losses"), dense_losses)
        row["divergence"] = {name: value for name, value in row["divergence"].items() if name != "divergences"}
    record = {"pipeline": compressed.steps, **extra}
    with store_as_released(compressed, inputs.resources.released):
        save_checkpoint(
            output, compressed.model, inputs.tokenizer, kind=compressed.kind, parent=inputs.source.name, stage=stage,
            quantization=compressed.quantization, data_fingerprint=inputs.fingerprint, extra=record | kept,
            dtype=str(inputs.resources.released).removeprefix("torch."), beside=inputs.source,
        )  # fmt: skip
    return record
