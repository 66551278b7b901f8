"""The epoch loop of the classifiers, once: steps, weight average, evaluation, the epoch that is kept, resuming, stopping early.

What is special to a stage, its loss and what it does to the weights between steps, stands in its script, between these calls:

    loop = EpochLoop("student", directory, stage, accelerator, train, validation, LastNotWorse(), epochs=3, ...)
    loop.begin(model, lr_setting=("lr", 1e-4), schedule=..., average_steps=100)
    for epoch in loop.epochs("finetune", 3):
        for batch in loop.batches():
            with accelerator.autocast():
                loss = ... loop.wrapped(**model_inputs(batch, model)) ...
            loop.backward(loss)
            loop.step()
    model = loop.finish()

A killed run goes on after its last finished epoch and ends with the same weights to the last bit: only the number of an epoch decides
its order of sentences and its dropout, and everything a step changes is in the saved state.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel

from compactmind.data import EncodedSentences
from compactmind.evaluation.accuracy import accuracy_of, score_of
from compactmind.training import (
    Progress,
    TrainingState,
    WeightAverage,
    cpu_copy,
    make_optimizer,
    mean_loss,
    prepare_for_training,
    validation_logits,
    warn_of_chance,
)


# --------------------------------------------------------------------------------------------------- which epoch is kept
@dataclass(frozen=True)
class LastNotWorse:
    """Keep the last epoch whose validation score is within one standard error of the best so far.

    Weights trained at a falling rate are better the lower it is, and the validation sentences are too few to see differences below that.
    """

    metric: str = "accuracy"
    """What the score is, see `score_of`."""

    def keeps(self, score: float, error: float, earlier: list[tuple[float, float]], kept: float | None) -> bool:
        """Tell whether an epoch is kept: its score with standard error, those of all before it, the score of the one kept so far."""
        best, its_error = max([*earlier, (score, error)], key=lambda each: each[0])
        return score >= best - its_error

    def __str__(self) -> str:
        return f"last epoch within one standard error of the best{_by(self.metric)}"


@dataclass(frozen=True)
class FirstBest:
    """Keep the epoch with the best validation score, and of those that differ by no more than `min_delta` the first."""

    min_delta: float = 0.0
    metric: str = "accuracy"

    def keeps(self, score: float, error: float, earlier: list[tuple[float, float]], kept: float | None) -> bool:
        """See LastNotWorse."""
        return kept is None or score > kept + self.min_delta

    def __str__(self) -> str:
        return f"first epoch that no other is better than by more than {self.min_delta:g}{_by(self.metric)}"


def _by(metric: str) -> str:
    return "" if metric == "accuracy" else f" by {metric}"


# -------------------------------------------------------------------------------------------------------------- the loop
class EpochLoop:
    """One training run of a classifier over sentences, see the top of this file.

    `stage`: what the result depends on; the state of another stage is not resumed. `own` may be set by the script to values and tensors
    of its own that belong to the state; after a resume it holds them again (None in a run from the beginning). `history`: a row per
    finished epoch. `kept`: accuracy, score, epoch and weights of the epoch that `selection` has kept, of those from `first_kept` on.
    """

    def __init__(
        self,
        name: str,
        directory: Path,
        stage: dict[str, Any],
        accelerator: Accelerator,
        train: EncodedSentences,
        validation: EncodedSentences,
        selection: LastNotWorse | FirstBest,
        *,
        epochs: int,
        batch_size: int,
        eval_batch_size: int,
        seed: int,
        weight_decay: float,
        max_grad_norm: float,
        log_every: int,
        first_kept: int = 1,
    ):
        self.name, self.accelerator, self.train, self.validation, self.selection = name, accelerator, train, validation, selection
        self.total_epochs, self.batch_size, self.eval_batch_size, self.seed = epochs, batch_size, eval_batch_size, seed
        self.weight_decay, self.max_grad_norm, self.log_every = weight_decay, max_grad_norm, log_every
        self.first_kept = first_kept
        self.steps_per_epoch = math.ceil(len(train) / (batch_size * accelerator.num_processes))
        self.total_steps = epochs * self.steps_per_epoch

        self.state = TrainingState(directory, stage)
        self._saved = self.state.load()
        self.history: list[dict] = []
        self.kept: dict[str, Any] = {"accuracy": -1.0, "score": None, "epoch": 0, "weights": None}
        self.own: dict[str, Any] | None = None
        if self._saved:
            self.history, self.kept, self.own = (self._saved[key] for key in ("history", "kept", "own"))
            accelerator.print(f"{name}: going on after epoch {len(self.history)} of {epochs}")
        done = len(self.history) * self.steps_per_epoch
        self.progress = Progress(name, self.total_steps, log_every, done, accelerator.is_main_process)

    @property
    def fraction(self) -> float:
        """Which share of all steps is done, in [0, 1]."""
        return self.progress.step / self.total_steps

    def begin(
        self,
        model: PreTrainedModel,
        lr_setting: tuple[str, float],
        schedule: Callable[[torch.optim.Optimizer], LRScheduler],
        average_steps: float = 0.0,
    ) -> None:
        """Train `model`, in place, from here on, with a new optimizer and a new average.

        `lr_setting`: the name of the setting the peak learning rate is from, and its value. The average reaches back over about
        `average_steps` steps; 0: the weights as they are. What a resumed run had is put into all of them; `model` must have the shape it
        had then.
        """
        self.accelerator.free_memory()
        self.model, self.lr_setting = model, f"{lr_setting[0]} {lr_setting[1]:g}"
        optimizer = make_optimizer(model, lr_setting[1], self.weight_decay)
        self.scheduler = schedule(optimizer)
        saved, self._saved = self._saved, None
        if saved:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            self.scheduler.load_state_dict(saved["scheduler"])
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(saved["scaler"])
        self.average = WeightAverage(model, decay=1 - 1 / max(1, average_steps))
        if saved:
            self.average.load_state_dict(saved["average"])
        self.wrapped, self.optimizer = prepare_for_training(self.accelerator, model, optimizer)

    def epochs(self, phase: str, last: int, patience: int | None = None) -> Iterator[int]:
        """Yield the number of each epoch from the next one to `last`, counted from 1, and end each: evaluate, keep, record, save.

        `patience`: stop once so many epochs have not been kept. A loss, a validation logit or a weight that is not finite ends the run
        with a CompactMindError that names the learning rate. The script writes what it knows of an epoch into `row`: sparsity,
        temperature, alpha.
        """
        self.phase = phase
        while (epoch := len(self.history) + 1) <= last:
            if patience is not None and len(self.history) - self.kept["epoch"] >= patience:
                self.progress.write(f"{self.name:<18} stopped early: no better validation {self.selection.metric} for {patience} epochs")
                return
            self._started, self._losses, self._first_step = time.perf_counter(), [], self.progress.step + 1
            self._label = f"{self.name}, epoch {epoch} ({phase})"
            self.row = {"epoch": epoch, "phase": phase, "loss": None, "accuracy": None, "sparsity": 0.0, "lr": None}
            self.row |= {"temperature": None, "alpha": None, "seconds": None}
            set_seed(self.seed + epoch, device_specific=True)  # a resumed run is the same run: only the epoch decides
            yield epoch
            self._end(epoch)

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the batches of an epoch; the script calls `backward` and `step` with each, and the average takes the weights it leaves."""
        loader = self.train.training_batches(self.batch_size, self.seed + self.row["epoch"], self.accelerator.num_processes)
        batches = self.accelerator.prepare(loader)
        self.wrapped.train()
        for batch in batches:
            self._items = len(batch["labels"]) * self.accelerator.num_processes
            yield batch
            self.average.update(self.model)
            if self.progress.step % self.log_every == 0:
                self._mean_loss()
        self.row["loss"] = self._mean_loss()

    def backward(self, loss: torch.Tensor) -> None:
        """Give the weights the gradients of a loss (a scalar, of this process's batch), times `loss_scale`."""
        self.accelerator.backward(loss)
        self._losses.append(loss.detach())

    @property
    def loss_scale(self) -> float:
        """What the gradients were multiplied with (fp16)."""
        return self.accelerator.scaler.get_scale() if self.accelerator.scaler else 1.0

    def step(self, **shown: float) -> None:
        """Clip the gradients, update the weights with them and forget them; the progress line shows `shown` too."""
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.progress.update(self._losses[-1], self.scheduler.get_last_lr()[0], self._items, **shown)

    def finish(self) -> PreTrainedModel:
        """Return the model with the weights of the epoch that was kept; `clear` when it is saved."""
        self.progress.close()
        self.model.load_state_dict(self.kept["weights"])
        self.accelerator.free_memory()
        return self.model

    def metrics(self) -> dict[str, Any]:
        """Return what a manifest says of the epoch that was kept."""
        score = {} if self.selection.metric == "accuracy" else {f"validation_{self.selection.metric}": self.kept["score"]}
        return {"validation_accuracy": self.kept["accuracy"], **score, "kept_epoch": self.kept["epoch"]}

    def clear(self, directory: Path) -> None:
        """Forget the state, by the process that saved the model in `directory`, and say where it is and how good."""
        self.state.clear()
        accuracy = self.kept["accuracy"]
        print(f"{self.name}: saved to {directory} (validation accuracy {accuracy:.2%}, epoch {self.kept['epoch']})")
        warn_of_chance(self.name, accuracy, self.validation.labels, self.accelerator)

    # ---- the end of an epoch
    def _mean_loss(self) -> float:
        return mean_loss(self._losses, self.accelerator, self._first_step, self._label, self.lr_setting)

    def _end(self, epoch: int) -> None:
        earlier, metric = [(row["score"], row["standard_error"]) for row in self.history], self.selection.metric
        with self.average.applied_to(self.model):
            logits = validation_logits(
                self.model, self.validation, self.eval_batch_size, self.accelerator, self._label, self.lr_setting
            )
            accuracy = accuracy_of(logits, self.validation.labels)
            score, error = score_of(logits, self.validation.labels, metric)
            if epoch >= self.first_kept and self.selection.keeps(score, error, earlier, self.kept["score"]):
                self.kept = {"accuracy": accuracy, "score": score, "epoch": epoch, "weights": cpu_copy(self.model.state_dict())}
        seconds, lr = time.perf_counter() - self._started, self.scheduler.get_last_lr()[0]
        self.row |= {"accuracy": accuracy, "score": score, "standard_error": error, "lr": lr, "seconds": seconds}
        self.history.append(self.row)
        self.progress.track("epoch", self.row)
        sparsity = f"sparsity {self.row['sparsity']:6.2%} | " if self.row["sparsity"] else ""
        judged = "" if metric == "accuracy" else f"{metric} {score:.3f} | "
        self.progress.write(
            f"{self.name:<18} epoch {epoch}/{self.total_epochs} {self.phase} | loss {self.row['loss']:7.4f} | "
            f"validation accuracy {accuracy:6.2%} | {judged}{sparsity}{seconds:.0f} s"
        )
        if self.accelerator.is_main_process:
            self.state.save(
                model=self.model.state_dict(), average=self.average.state_dict(), optimizer=self.optimizer.state_dict(),
                scheduler=self.scheduler.state_dict(), history=self.history, kept=self.kept, own=self.own,
                scaler=self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            )  # fmt: skip
