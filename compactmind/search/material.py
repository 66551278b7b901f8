"""What a pipeline works on, beside the model: texts, resources, what is measured; and how what came out of one is saved."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from compactmind.checkpoint import save_checkpoint
from compactmind.evaluation.divergence import measure_logits, measure_windows
from compactmind.evaluation.perplexity import paired_ratio, perplexity_of
from compactmind.forward import LogitsOf
from compactmind.methods.registry import Resources
from compactmind.search.compressor import Compressed, Measure, store_as_released


@dataclass
class Material:
    """What every pipeline works on, and what identifies it."""

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
        return LogitsOf(self.resources.teacher(), self.test)

    @property
    def on_test(self) -> Measure:
        """Perplexity and KL to the dense model on test text: of what is saved, and of nothing that is chosen between."""

        def measure(model) -> dict:
            known = self.dense_on_test
            dense = self.resources.is_teacher(model)
            found = measure_logits(known, self.test) if dense else measure_windows({"": model}, self.test, known)[""]
            far = {name: found["divergence"][name] for name in ("mean", "interval", "p999", "same_top")}
            found = perplexity_of(found["losses"], self.test.shape[1], f"{self.text}, test", self.window_choice)
            return {**{name: found[name] for name in ("perplexity", "loss", "losses", "protocol")}, "divergence": far}

        return Measure(f"test, {len(self.test)} windows, {self.window_choice}", measure)


def save_compressed(output: Path, found: Compressed, material: Material, stage: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """Save what came out of a pipeline that was measured by `on_test`; return what its manifest says of that.

    That is `pipeline`, a row per step with `against_dense` (ratio of perplexities, 95% interval, paired), and `extra`.
    """
    dense_losses = found.steps[0]["losses"]
    for row in found.steps:
        row["against_dense"] = paired_ratio(row.pop("losses"), dense_losses)
    record = {"pipeline": found.steps, **extra}
    with store_as_released(found, material.resources.released):
        save_checkpoint(
            output, found.model, material.tokenizer, kind=found.kind, parent=material.source.name, stage=stage,
            quantization=found.quantization, data_fingerprint=material.fingerprint, extra=record,
            dtype=str(material.resources.released).removeprefix("torch."), beside=material.source,
        )  # fmt: skip
    return record
