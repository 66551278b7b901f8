"""What a trial of the search measures: KL to the dense model and perplexity on text no method sees, bytes, and if asked for latency and
memory.

Pipelines are compared by KL (compactmind/evaluation/divergence.py): the perplexity of a few windows cannot tell good ones apart. Time is
not spent on what cannot win. A pipeline whose bytes are known beforehand to miss the target is not run. One that is so far behind the
best after a step, on the first few windows, that no such steps as are coming have ever won as much in this study (credit.py), is stopped
there; so is one that is as far behind after a short retraining, SHORT of the tokens, whatever the rest of them has ever won. Where bytes
are an objective too, the best is the best of those that are no larger than the pipeline is expected to be: it cannot be part of the front
any more. What has run to its end is looked at on twice as many windows each time, and goes on while it is in the better half (one objective
only; successive halving, Li et al. 2018, https://arxiv.org/abs/1810.05934). What stopped is told as what it would have come to, and nothing
of that is reported as measured. Where models of some sizes are asked for, bytes count in these steps: else what the sampler learns is a
front of all sizes, most of which nobody wants.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from optuna import Study
from optuna.pruners import BasePruner, SuccessiveHalvingPruner
from torch.utils.data import ConcatDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compactmind.checkpoint import save_checkpoint
from compactmind.errors import CompactMindError
from compactmind.evaluation.cost import measure_generation, peak_memory
from compactmind.evaluation.divergence import measure_windows
from compactmind.evaluation.recorded import SAME
from compactmind.formats.table import kernel_of
from compactmind.forward import LARGEST_LOSS, LogitsOf
from compactmind.methods.llama import llama_blocks
from compactmind.methods.pruning.llama_structure import prunable_parameters
from compactmind.methods.registry import Resources
from compactmind.search.cache import PrefixCache
from compactmind.search.compressor import (
    Compressed,
    Measure,
    Step,
    read_pipeline,
    run_pipeline,
    store_as_released,
    stored_bytes,
)
from compactmind.search.credit import MORE_TOKENS, Changes, Coming
from compactmind.search.front import QUALITIES
from compactmind.search.notes import Notes, Skipped, Stopped

SIMULATED = "simulated"
HOPELESS = 0.3
"""Nats per token, of KL or of the loss, behind the best finished pipeline, on the first windows, with which a pipeline is not measured on
more of them."""
OUT_OF_REACH = 0.1
"""Nats behind the best with which a pipeline is stopped even if its coming steps do what no such step has done yet in this search (see
compactmind/search/credit.py)."""
SHORT = 0.25
"""Share of the tokens of a short retraining ..."""
SHORTEST = 2048
"""... which is left out if it had fewer tokens than this."""
REDUCTION = 2
"""Successive halving: one of so many goes on, to so many times the windows."""
BEFORE_HALVING = 4
"""Measured trials before any is stopped by it."""
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
    ratios: Sequence[float] = ()
    """Ratios at which a model is asked for; none: every size is of interest."""
    objectives: Sequence[str] = ("kl",)
    cache: PrefixCache | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    """Needed for the objective memory alone, whose process loads a whole checkpoint."""
    prompt_tokens: int = 512
    skeleton: Callable[[], PreTrainedModel] | None = None
    """Makes the dense model without its weights, to count parameters; None: counted in the dense model."""
    best: float = math.inf
    """Lowest KL, or loss, on the first few windows, of what the pipeline at hand has to beat: see `learn`."""
    changes: Changes = field(default_factory=Changes, repr=False)
    """What the steps of this study did."""
    measured: int = field(default=0, repr=False)
    """Trials of the study that ran to their end."""
    sizes: tuple[int, int, int] | None = field(default=None, repr=False)
    leasts: dict[Any, tuple[float, float]] = field(default_factory=dict, repr=False)
    """Recipe -> the fewest bytes it can make of the dense model, see Method.least."""
    dense: Sequence[torch.Tensor] | None = field(default=None, repr=False)
    """The dense model's logits of the windows, once it has read them."""

    def __post_init__(self):
        self.skeleton = self.skeleton and functools.cache(self.skeleton)

    @property
    def quality(self) -> str:
        """What pipelines are compared by: kl or perplexity."""
        return quality_of(self.objectives)

    @property
    def unit(self) -> str:
        """The name of the same in nats in the row of a step: what stopping goes by."""
        return "kl" if self.quality == "kl" else "loss"

    def pruner(self) -> BasePruner:
        """Return what stops a finished pipeline that falls behind as it is looked at on more and more windows."""
        return SuccessiveHalvingPruner(min_resource=self.few, reduction_factor=REDUCTION, min_early_stopping_rate=0)

    def logits(self) -> Sequence[torch.Tensor]:
        """Return the dense model's logits of the windows, which it reads once, and of more of them only those that have been added."""
        known = 0 if self.dense is None else len(self.dense)
        if known < len(self.windows):
            more = LogitsOf(self.resources.teacher(), self.windows[known:], self.resources.states(self.windows[known:]))
            self.dense = ConcatDataset([self.dense, more]) if known else more
        return self.dense

    def learn(self, study: Study, ratio: float = 0.0) -> None:
        """Take over from the trials of a study what a good pipeline is and what the methods do.

        `ratio`: how many times smaller the pipeline at hand should be. It has to beat what has reached the target; where bytes are an
        objective, of that what is no larger than itself, or than the size it is asked for at.
        """
        self.changes, self.measured, self.best = Changes(), 0, math.inf
        least = max(self.target, self.asked(ratio) * (1 - MARGIN)) if "bytes" in self.objectives else self.target
        for trial in study.get_trials(deepcopy=False):
            rows, measured = trial.user_attrs.get("steps", []), trial.user_attrs.get("measured")
            coming = self.coming(read_pipeline(trial.user_attrs["pipeline"])) if rows else []
            for (before, row), step in zip(pairwise(rows), coming, strict=False):  # one that was stopped has fewer rows
                self.changes.add(*step, row[self.unit] - before[self.unit])
            if measured and "short" in trial.user_attrs:
                retrained = rows[_retrained(read_pipeline(trial.user_attrs["pipeline"]))]
                self.changes.add(MORE_TOKENS, 1.0, retrained[self.unit] - trial.user_attrs["short"])
            self.measured += bool(measured)
            if measured and measured["compression_ratio"] >= least:
                self.best = min(self.best, rows[-1][self.unit])

    def asked(self, ratio: float) -> float:
        """Return the largest ratio asked for that a model has which is `ratio` times smaller: what is smaller still has to beat the best of
        that size, and is worth no more. Its own where there is none."""
        return max((each for each in self.ratios if each <= ratio), default=ratio)

    def coming(self, steps: Sequence[Step], number: int = 0) -> Coming:
        """Return the steps of a pipeline after the first `number` of them as what is ahead: method and times smaller, as far as known."""
        ratios = [self.expected_ratio(steps[:end]) for end in range(number, len(steps) + 1)]
        times = [after / before if after < math.inf else 1.0 for before, after in pairwise(ratios)]
        return [(step.method.name, each) for step, each in zip(steps[number:], times, strict=True)]

    def optimistic_quality(self, nats: float, coming: Coming) -> float:
        """Return what a pipeline can hope for that is at `nats` with the steps `coming` ahead."""
        return nats + self.changes.best(coming)

    def extrapolated(self, nats: float, coming: Coming) -> float:
        """Return what a pipeline would have come to, never less than 0: its steps do what such steps usually did in this study."""
        nats = max(nats + self.changes.usual(coming), self.best if self.best < math.inf else 0.0)  # it was stopped for being worse
        return nats if self.quality == "kl" else math.exp(nats)

    @property
    def step_measure(self) -> Measure:
        """What is measured after every step."""
        return Measure(f"validation, first {self.few}, against dense", self.measure_few)

    def measure_few(self, model: PreTrainedModel) -> dict[str, Any]:
        """Return loss, perplexity and KL to the dense model on the first few windows."""
        return mean_over_windows([self._measure_windows(model, 0, self.few)])

    def _measure_windows(self, model: PreTrainedModel, start: int, end: int) -> dict[str, torch.Tensor]:
        """Return `loss` and `kl` of every window from number `start` to before `end`."""
        measured = measure_windows({"": model}, self.windows[start:end], [self.logits()[index] for index in range(start, end)])[""]
        if not measured["losses"].mean().item() < LARGEST_LOSS:
            raise CompactMindError(f"the loss is {measured['losses'].mean().item()}: the model is damaged")
        if measured["divergence"] is None:
            raise CompactMindError("the vocabulary is no longer the dense model's: no token is another's")
        return {"loss": measured["losses"], "kl": torch.tensor(measured["divergence"]["divergences"], dtype=torch.float64)}

    def shapes(self) -> PreTrainedModel:
        """Return the dense model, without its weights where that is known."""
        return self.skeleton() if self.skeleton else self.resources.teacher()

    def known_sizes(self) -> tuple[int, int, int]:
        """Return the parameters of the dense model that may be pruned, all of them, and the number of its blocks."""
        if self.sizes is None:
            model = self.shapes()
            parameters = sum(weight.numel() for weight in model.parameters())
            self.sizes = (prunable_parameters(model), parameters, len(llama_blocks(model)))
        return self.sizes

    def expected_ratio(self, steps: Sequence[Step]) -> float:
        """Return the compression ratio a pipeline should come to, from the shapes of the dense model and the bits of its methods.

        Of one whose last method aims at a ratio that is this ratio, or the largest that its narrowest widths allow.
        """
        prunable, parameters, count = self.known_sizes()
        blocks, others = prunable, parameters - prunable
        bits_of_blocks = bits_of_others = 8 * self.resources.released.itemsize
        for step in steps:
            if step.method.kind == "prune":
                if step.method.left is None or (left := step.method.left(step.recipe, count)) is None:
                    return math.inf  # its bytes are known when it has run
                blocks *= left
            if step.method.ratio and (ratio := step.method.ratio(step.recipe)):
                return min(ratio, self.largest_ratio(step, blocks / prunable))
            if step.method.bits is not None:
                bits_of_blocks, of_others = step.method.bits(step.recipe)
                bits_of_others = of_others or bits_of_others
        return self.released_bytes / (blocks * bits_of_blocks / 8 + others * bits_of_others / 8)

    def largest_ratio(self, step: Step, left: float) -> float:
        """Return the largest ratio that a method can reach which aims at one, when a share `left` of the blocks is left."""
        if step.method.least is None:
            return math.inf
        if step.recipe not in self.leasts:
            self.leasts[step.recipe] = step.method.least(self.shapes(), step.recipe, self.resources.released.itemsize)
        blocks, others = self.leasts[step.recipe]
        return self.released_bytes / (left * blocks + others)

    def wanted(self, steps: Sequence[Step]) -> float:
        """Return the ratio that a pipeline has to reach: the target, or what its last method aims at, which it cannot miss, if that is
        more."""
        return max([self.target, *(step.method.ratio(step.recipe) or 0.0 for step in steps if step.method.ratio)])

    def excess(self, steps: Sequence[Step]) -> float:
        """Return by how much a pipeline is expected to miss the ratio it has to reach; 0 or less: it may reach it."""
        return self.wanted(steps) * (1 - MARGIN) - self.expected_ratio(steps)

    def evaluate(self, trial: Notes, steps: list[Step]) -> list[float]:
        """Return the values of the objectives of a pipeline and describe it on the trial.

        Raises Stopped where it is not worth going on, Skipped before anything is run.
        """
        expected = self.expected_ratio(steps)
        self.learn(trial.study, expected)  # other workers find good ones too
        trial.set_user_attr("expected_ratio", expected)
        if self.excess(steps) > 0:
            trial.set_constraint("compression", self.wanted(steps) - expected)
            raise Skipped(f"not run: {expected:.2f} times smaller to expect, {self.wanted(steps):g} wanted")
        try:
            self.try_short_retraining(steps, trial)
            compressed = self.run(steps, trial)
            measured = self.measure(compressed, trial)
        except Stopped as stop:
            trial.set_constraint("compression", self.target - min(expected, self.target))
            size = self.released_bytes / self.asked(expected)
            stop.values = [stop.values[0] if name == self.quality else size for name in self.objectives]
            raise
        trial.set_constraint("compression", self.target - measured["compression_ratio"])
        trial.set_user_attr("measured", measured)
        trial.set_user_attr("steps", summarize_rows(compressed.steps))
        values = measured | {"bytes": self.released_bytes / self.asked(measured["compression_ratio"])}
        return [values[name] for name in self.objectives]

    def may_stop(self, trial: Notes | None) -> bool:
        """Tell whether a trial may end early: not where time or memory are compared, in which it may be ahead whatever its quality."""
        return trial is not None and set(self.objectives) <= {self.quality, "bytes"} and self.best < math.inf

    def try_short_retraining(self, steps: Sequence[Step], trial: Notes) -> None:
        """Run a pipeline as far as a part of its retraining, where that is worth it. Raises Stopped if the rest cannot win enough."""
        short = with_short_retraining(steps)
        if short is None or not self.may_stop(trial):
            return
        coming = [(MORE_TOKENS, 1.0), *self.coming(steps, len(short))]
        before = short[: _retrains(short).index(True)]
        if self.unit == "loss" and self.cache and self.behind(self.run(before, trial, steps).steps, coming) <= OUT_OF_REACH:
            return  # a retraining that makes the loss larger is undone: it could not stop here
        rows = self.run(short, trial, steps).steps
        trial.set_user_attr("short", rows[-1][self.unit])
        if (behind := self.behind(rows, coming)) > OUT_OF_REACH:
            raise Stopped(
                f"stopped after {SHORT:.0%} of the retraining: {behind:+.2f} nats against the best, at the best to be hoped for",
                [self.extrapolated(rows[-1][self.unit], coming)],
            )

    def behind(self, rows: Sequence[dict[str, Any]], coming: Coming) -> float:
        """Return by how many nats a pipeline with these rows stays behind the best if what is `coming` does all it can hope for."""
        return self.optimistic_quality(rows[-1][self.unit], coming) - self.best

    def run(self, steps: Sequence[Step], trial: Notes | None = None, whole: Sequence[Step] | None = None) -> Compressed:
        """Run a pipeline, measuring the first few windows after every step; with a trial, stop where it is hopeless.

        `whole`: the pipeline that `steps` are the beginning of, which decides what may be hoped for. A retraining they shorten tells
        less than that: nothing is stopped after one.
        """

        def check(number: int, rows: list[dict[str, Any]]) -> None:
            if not self.may_stop(trial) or (whole is not None and any(_retrains(steps[:number]))):
                return
            coming = self.coming(whole or steps, number)
            if (behind := self.behind(rows, coming)) > (OUT_OF_REACH if coming else HOPELESS):
                trial.set_user_attr("steps", summarize_rows(rows))
                hope = ", at the best to be hoped for" if coming else ""
                raise Stopped(
                    f"stopped after {rows[-1]['method']}: {behind:+.2f} nats against the best{hope}",
                    [self.extrapolated(rows[-1][self.unit], coming)],
                )

        self.logits()  # before the dense model may go
        return run_pipeline(steps, self.resources, self.step_measure, cache=self.cache, check=check, show=False)

    def measure(
        self, compressed: Compressed, trial: Notes | None = None, known: dict[str, list[float]] | None = None
    ) -> dict[str, Any]:
        """Return KL, perplexity and loss on all windows, bytes, compression ratio, kernel, and what else the objectives ask for.

        latency: ms to read a prompt of `prompt_tokens` on this machine, of a real kernel only; memory: MB at the peak of a process that
        loads the model and reads the prompt. With a trial it is looked at on more and more windows: raises Stopped where it falls behind.
        `known` is what the trial noted as `by_window` of the first windows: if the first one comes to the same again, the others of them
        are not read again. Raises CompactMindError if there is nothing real to measure.
        """
        size, looks, end = stored_bytes(compressed, self.resources.released), [], 0
        if known:
            first = self._measure_windows(compressed.model, 0, 1)
            if all(math.isclose(first[name].item(), values[0], **SAME) for name, values in known.items()):
                looks, end = [{name: torch.tensor(values, dtype=torch.float64) for name, values in known.items()}], len(known["loss"])
        while end < len(self.windows):
            start, end = end, min(REDUCTION * end or self.few, len(self.windows))
            looks.append(self._measure_windows(compressed.model, start, end))
            so_far = mean_over_windows(looks)
            if trial is None or len(self.objectives) > 1:
                continue
            trial.report(so_far[self.quality], end)
            if end < len(self.windows) and trial.should_prune() and self.measured >= BEFORE_HALVING:
                trial.set_user_attr("steps", summarize_rows(compressed.steps))
                shown = f"{so_far[self.quality]:.4g}"
                raise Stopped(f"stopped after {end} windows: {self.quality} {shown} is not in the better half", [so_far[self.quality]])
        if trial is not None:
            trial.set_user_attr("by_window", {name: torch.cat([look[name] for look in looks]).tolist() for name in looks[0]})
        measured = {
            **mean_over_windows(looks), "windows": len(self.windows), "bytes": size,
            "compression_ratio": self.released_bytes / size, "kernel": kernel_of(compressed.model, compressed.kind),
        }  # fmt: skip
        if {"latency", "memory"} & set(self.objectives) and SIMULATED in measured["kernel"]:
            raise CompactMindError(
                "this machine has no int8 kernel for it: a simulated one has neither latency nor memory to measure"
            )
        if "latency" in self.objectives:
            times = measure_generation({"model": compressed.model}, self.prompt_tokens, 3, "model")
            measured["latency"] = times["model"]["prefill"]["median_ms"]
        if "memory" in self.objectives:
            with TemporaryDirectory() as folder:
                place = Path(folder) / "model"
                with store_as_released(compressed, self.resources.released):
                    save_checkpoint(
                        place, compressed.model, self.tokenizer, kind=compressed.kind, parent=None, stage={},
                        quantization=compressed.quantization, dtype=str(self.resources.released).removeprefix("torch."),
                    )  # fmt: skip
                measured["memory"] = peak_memory(place, 1, self.prompt_tokens)
        return measured


def quality_of(objectives: Sequence[str]) -> str:
    """Return what pipelines are compared by among these objectives: kl, unless it is perplexity."""
    return next((name for name in objectives if name in QUALITIES), QUALITIES[0])


def mean_over_windows(looks: Sequence[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Return loss, perplexity and KL over the windows of several looks, each with `loss` and `kl` of every window."""
    loss, kl = (torch.cat([look[name] for look in looks]).mean().item() for name in ("loss", "kl"))
    return {"loss": loss, "perplexity": math.exp(loss), "kl": kl}


def with_short_retraining(steps: Sequence[Step]) -> list[Step] | None:
    """Return the beginning of a pipeline, to its last retraining, with SHORT of the tokens; None if there is none, or one that is short
    already. What is behind it is the same after more tokens: it would be run twice, and rounding takes longer than a short retraining."""
    end = _retrained(steps)
    if SHORT * max((step.recipe.tokens for step in steps[:end] if step.method.kind == "retrain"), default=0) < SHORTEST:
        return None
    return [
        Step(step.method, replace(step.recipe, tokens=int(SHORT * step.recipe.tokens))) if step.method.kind == "retrain" else step
        for step in steps[:end]
    ]


def _retrains(steps: Sequence[Step]) -> list[bool]:
    return [step.method.kind == "retrain" for step in steps]


def _retrained(steps: Sequence[Step]) -> int:
    """Return the number of steps up to the last retraining, which is that of its row too; 0 without one."""
    return max((number for number, retrains in enumerate(_retrains(steps), start=1) if retrains), default=0)


def summarize_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what a study keeps of the rows of a pipeline: method, what was seen on the first windows, seconds, cached or not."""
    kept = ("method", "loss", "perplexity", "kl", "seconds", "cached")
    return [{name: row[name] for name in kept if name in row} for row in rows]
