"""What a trial of the search measures: perplexity on text no method sees, bytes, and if asked for latency and memory.

Time is not spent on what cannot win: a pipeline whose bytes can be told beforehand to miss the target is not run, and one that is so far
behind the best after a step, on the first few windows, that none of the coming steps has ever won as much in this study, is stopped there.
Nothing of that is reported as measured.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from optuna import Study
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compactmind.checkpoint import save_checkpoint
from compactmind.errors import CompactMindError
from compactmind.evaluation.cost import measure_generation, peak_memory
from compactmind.formats.table import kernel_of
from compactmind.forward import LARGEST_LOSS, window_losses
from compactmind.methods.pruning.llama_structure import prunable_parameters
from compactmind.methods.registry import Resources
from compactmind.search.cache import PrefixCache
from compactmind.search.compressor import Compressed, Measure, Step, run_pipeline, store_as_released, stored_bytes
from compactmind.search.engine import Notes, Skipped, Stopped

OBJECTIVES = ("perplexity", "bytes", "latency", "memory")
SIMULATED = "simulated"
HOPELESS = 0.3
"""Nats per token behind the best finished pipeline, on the first windows, with which a pipeline is not measured on more of them."""
OUT_OF_REACH = 0.1
"""Nats behind the best with which a pipeline is stopped even if its coming steps do what no such step has done yet in this search ..."""
OPTIMISM = 0.25
"""... which is this share better than the best one did: a loss that falls by so much more, or rises by so much less."""
BEFORE_ANY = {"retrain": -1.0}
"""Change of the loss that a method is given credit for while fewer than FEW_STEPS of its steps have been seen, 0 for the others."""
FEW_STEPS = 2
MARGIN = 0.01
"""A pipeline is run unless its bytes are expected to miss the target by more than this share: widths are rounded, so that is not exact."""


@dataclass
class TrialRunner:
    """Runs the pipelines of one search; `evaluate` is what the engine calls."""

    resources: Resources
    windows: torch.Tensor
    """(windows, seq_len) of text to choose on: seen by no method, and not the text of the reported numbers."""
    few: int
    """How many of them are looked at after every step."""
    released_bytes: int
    """Bytes of the dense model's weight file: what a compression ratio is a ratio to."""
    target: float
    """Compression ratio that has to be reached."""
    objectives: Sequence[str] = ("perplexity",)
    cache: PrefixCache | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    """Needed for the objective memory alone, whose process loads a whole checkpoint."""
    prompt_tokens: int = 512
    best: float = math.inf
    """Lowest loss of a finished pipeline that reached the target, on the first few windows."""
    changes: dict[str, list[float]] = field(default_factory=dict, repr=False)
    """By method: by how much each of its steps in this study changed the loss."""
    sizes: tuple[int, int] | None = field(default=None, repr=False)

    def learn(self, study: Study) -> None:
        """Take over from the trials of a study what a good loss is and what the methods do to it."""
        self.changes = {}
        for trial in study.get_trials(deepcopy=False):
            rows, measured = trial.user_attrs.get("steps", []), trial.user_attrs.get("measured")
            for before, row in pairwise(rows):
                self.changes.setdefault(row["method"], []).append(row["loss"] - before["loss"])
            if measured and measured["compression_ratio"] >= self.target:
                self.best = min(self.best, rows[-1]["loss"])

    def within_reach(self, loss: float, coming: Sequence[Step]) -> float:
        """Return the loss a pipeline can hope for that is at `loss` with the steps `coming` ahead."""
        for name in (step.method.name for step in coming):
            seen = self.changes.get(name, [])
            change = min(seen) if len(seen) >= FEW_STEPS else BEFORE_ANY.get(name, 0.0)
            loss += change - OPTIMISM * abs(change)
        return loss

    @property
    def first_look(self) -> Measure:
        """What is measured after every step."""
        return Measure(f"validation, first {self.few}", self.measure_few)

    def measure_few(self, model: PreTrainedModel) -> dict[str, Any]:
        """Return loss and perplexity on the first few windows."""
        loss = window_losses(model, self.windows[: self.few]).mean().item()
        if not loss < LARGEST_LOSS:
            raise CompactMindError(f"the loss is {loss}: the model is damaged")
        return {"loss": loss, "perplexity": math.exp(loss)}

    def expected_ratio(self, steps: Sequence[Step]) -> float:
        """Return the compression ratio a pipeline should come to, from the shapes of the dense model and the bits of its methods."""
        if self.sizes is None:
            teacher = self.resources.teacher()
            self.sizes = (prunable_parameters(teacher), sum(weight.numel() for weight in teacher.parameters()))
        blocks, others = self.sizes[0], self.sizes[1] - self.sizes[0]
        bits_of_blocks = bits_of_others = 8 * self.resources.released.itemsize
        for step in steps:
            if step.method.kind == "prune" and not step.recipe.blocks and not step.recipe.hidden_sparsity:
                blocks *= 1 - step.recipe.sparsity
            elif step.method.kind == "prune":
                return math.inf  # its bytes are known when it has run
            if step.method.ratio and (ratio := step.method.ratio(step.recipe)):
                return ratio
            if step.method.bits is not None:
                bits_of_blocks, of_others = step.method.bits(step.recipe)
                bits_of_others = of_others or bits_of_others
        return self.released_bytes / (blocks * bits_of_blocks / 8 + others * bits_of_others / 8)

    def evaluate(self, trial: Notes, steps: list[Step]) -> list[float]:
        """Return the values of the objectives of a pipeline and describe it on the trial.

        Raises Stopped where it is not worth going on, Skipped before anything is run.
        """
        self.learn(trial.study)  # other workers find good ones too
        expected = self.expected_ratio(steps)
        trial.set_user_attr("expected_ratio", expected)
        if expected < self.target * (1 - MARGIN):
            trial.set_constraint("compression", self.target - expected)
            raise Skipped(f"not run: {expected:.2f} times smaller to expect, {self.target:g} wanted")
        try:
            compressed = self.run(steps, trial)
        except Stopped:
            trial.set_constraint("compression", self.target - min(expected, self.target))
            raise
        measured = self.measure(compressed)
        trial.set_constraint("compression", self.target - measured["compression_ratio"])
        trial.set_user_attr("measured", measured)
        trial.set_user_attr("steps", brief(compressed.steps))
        return [measured[name] for name in self.objectives]

    def run(self, steps: Sequence[Step], trial: Notes | None = None) -> Compressed:
        """Run a pipeline, measuring the first few windows after every step; with a trial, stop where it is hopeless.

        Among several objectives nothing is: what is far behind in perplexity may be ahead in another one.
        """
        may_stop = trial is not None and tuple(self.objectives) == ("perplexity",)

        def check(number: int, rows: list[dict[str, Any]]) -> None:
            if not may_stop or not self.best < math.inf:
                return
            coming = steps[number:]
            behind = self.within_reach(rows[-1]["loss"], coming) - self.best
            if behind > (OUT_OF_REACH if coming else HOPELESS):
                trial.set_user_attr("steps", brief(rows))
                hope = ", at the best to be hoped for" if coming else ""
                raise Stopped(
                    f"stopped after {rows[-1]['method']}: {behind:+.2f} nats against the best{hope}", rows[-1]["perplexity"]
                )

        return run_pipeline(steps, self.resources, self.first_look, cache=self.cache, check=check, show=False)

    def measure(self, compressed: Compressed) -> dict[str, Any]:
        """Return perplexity and loss on all windows, bytes, compression ratio, kernel, and what else the objectives ask for.

        latency: ms to read a prompt of `prompt_tokens` on this machine, of a real kernel only; memory: MB at the peak of a process that
        loads the model and reads the prompt. Raises CompactMindError if there is nothing real to measure.
        """
        size = stored_bytes(compressed, self.resources.released)
        loss = window_losses(compressed.model, self.windows).mean().item()
        found = {
            "perplexity": math.exp(loss), "loss": loss, "windows": len(self.windows), "bytes": size,
            "compression_ratio": self.released_bytes / size, "kernel": kernel_of(compressed.model, compressed.kind),
        }  # fmt: skip
        if {"latency", "memory"} & set(self.objectives) and SIMULATED in found["kernel"]:
            raise CompactMindError(
                "this machine has no int8 kernel for it: a simulated one has neither latency nor memory to measure"
            )
        if "latency" in self.objectives:
            times = measure_generation({"model": compressed.model}, self.prompt_tokens, 3, "model")
            found["latency"] = times["model"]["prefill"]["median_ms"]
        if "memory" in self.objectives:
            with TemporaryDirectory() as folder:
                place = Path(folder) / "model"
                with store_as_released(compressed, self.resources.released):
                    save_checkpoint(
                        place, compressed.model, self.tokenizer, kind=compressed.kind, parent=None, stage={},
                        quantization=compressed.quantization, dtype=str(self.resources.released).removeprefix("torch."),
                    )  # fmt: skip
                found["memory"] = peak_memory(place, 1, self.prompt_tokens)
        return found


def brief(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what a study keeps of the rows of a pipeline: method, loss and perplexity on the first windows, seconds, cached or not."""
    kept = ("method", "loss", "perplexity", "seconds", "cached")
    return [{name: row[name] for name in kept if name in row} for row in rows]
