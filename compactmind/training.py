"""What every training loop needs and no technique is about: devices, optimizer, resuming, what was learned, progress lines.

The loops themselves stand in the numbered scripts.
"""

import copy
import glob
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from scipy.stats import binomtest
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import PreTrainedModel

from compactmind.data import EncodedSentences
from compactmind.devices import YES, default_device, is_main_process, mixed_precision, number_of_processes
from compactmind.errors import CompactMindError
from compactmind.files import lock_directory, remove_stale_temporaries, replace_file
from compactmind.forward import predict_logits
from compactmind.tracking import begin_run


# --------------------------------------------------------------------------------------------------------------- devices
def trains_sharded() -> bool:
    """Tell whether this run of several processes was asked to divide the model it trains between them (FSDP).

    Asked for with the environment variable ACCELERATE_USE_FSDP, which `accelerate launch --config_file configs/fsdp.yaml` sets.
    """
    return number_of_processes() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() in YES


def make_accelerator(may_shard: bool = False) -> Accelerator:
    """Return an Accelerator in the precision that `mixed_precision` says.

    Raises CompactMindError as that does, and on a run whose model is to be divided between processes, unless the caller knows how
    (`may_shard`).
    """
    if trains_sharded() and not may_shard:
        raise CompactMindError(
            "only retraining (5_bayesian_search.py) divides a model between processes: launch this script without FSDP, "
            "`accelerate launch --multi_gpu` without its config file"
        )
    return Accelerator(cpu=default_device() != "cuda", mixed_precision=mixed_precision())


def accelerator_record(accelerator: Accelerator, batch_size: int) -> dict[str, Any]:
    """Return what decides a result beside the settings: processes, sentences per step of all of them together, precision, sharding."""
    processes = accelerator.num_processes
    return {
        "num_processes": processes,
        "effective_batch": batch_size * processes,
        "mixed_precision": accelerator.mixed_precision,
        **({"sharded": True} if trains_sharded() else {}),
    }


@contextmanager
def only_writer(directory: Path, accelerator: Accelerator) -> Iterator[None]:
    """Inside the `with` block this run, of whatever number of processes, is the only one that writes `directory`; all must enter it.

    Raises CompactMindError if another run is at it, see `lock_directory`.
    """
    with lock_directory(directory) if accelerator.is_main_process else nullcontext():
        accelerator.wait_for_everyone()  # what a killed writer left is in order: all find the same
        yield


def prepare_for_training(
    accelerator: Accelerator, model: PreTrainedModel, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return the model as training steps call it, inside `accelerator.autocast()`, and the optimizer.

    `model` itself goes on computing in float32, as it will from its file: `accelerator.prepare` leaves a forward pass in mixed
    precision on it, which is taken off again, for what is measured in that pass is not the model that is saved.
    """
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    return wrapped, optimizer


# ------------------------------------------------------------------------------------------------ optimizer and schedule


def make_optimizer(model: nn.Module, lr: float, weight_decay: float, eight_bit: bool = False) -> torch.optim.Optimizer:
    """Return a fused AdamW over the trainable parameters; vectors (biases, norms) get no weight decay.

    `eight_bit`: both moments of a weight take 2 bytes instead of 8 (Dettmers et al. 2021, https://arxiv.org/abs/2110.02861).
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if eight_bit:
        from bitsandbytes.optim import AdamW8bit  # here, because importing it takes seconds

        return AdamW8bit(groups, lr=lr)
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def linear_decay_with_warmup(optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int) -> LambdaLR:
    """Return a schedule rising from 0 to the peak over `warmup_steps`, then falling linearly to 0 at `total_steps`."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        return max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))

    return LambdaLR(optimizer, factor)


def freeze_word_embeddings(model: nn.Module) -> None:
    """Stop, in place, the gradient of the word embedding table."""
    model.get_input_embeddings().weight.requires_grad_(False)


def set_dropout(model: nn.Module, probability: float) -> None:
    """Set, in place, the probability of every dropout layer, attention's included."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability


class WeightAverage:
    """Exponential moving average of a model's trainable weights, to be evaluated and kept instead of the last step's.

    The average of the steps generalises better than any one of them (Polyak & Juditsky 1992, https://doi.org/10.1137/0330046; with
    exponential weights Tarvainen & Valpola 2017, https://arxiv.org/abs/1703.01780), and it does not matter which step was the
    last. The first steps count less: the decay is min(decay, step / (step + 10)). With decay 0 it is the model itself.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.step = decay, 0
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the weights of one more optimizer step into the average."""
        self.step += 1
        decay = min(self.decay, self.step / (self.step + 10))
        parameters = dict(model.named_parameters())
        for name, average in self.weights.items():
            average.lerp_(parameters[name], 1 - decay)

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Inside the `with` block the model has the averaged weights, afterwards its own again."""
        self._exchange(model)
        try:
            yield
        finally:
            self._exchange(model)

    @torch.no_grad()
    def _exchange(self, model: nn.Module) -> None:
        parameters = dict(model.named_parameters())
        for name, average in self.weights.items():
            own = parameters[name].clone()
            parameters[name].copy_(average)
            average.copy_(own)

    def state_dict(self) -> dict[str, Any]:
        """Return the average and the number of steps in it, for `load_state_dict`."""
        return {"step": self.step, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; the weights go to the device of the current ones."""
        self.step = state["step"]
        for name, average in self.weights.items():
            average.copy_(state["weights"][name])


# -------------------------------------------------------------------------------------------------------------- resuming
class TrainingState:
    """The state of an unfinished training run, saved every so often, so that a killed run goes on where it was.

    It lies beside the checkpoint it will become (`models/.<name>.training.pt`) and is deleted with success. A state of
    another stage record (other config, other inputs, another number of processes) is not used, and a line says so. Only tensors
    and plain values are stored, and it is loaded with `weights_only=True`: no code is ever unpickled.
    """

    def __init__(self, checkpoint_directory: Path, stage: dict[str, Any]):
        self.path = checkpoint_directory.with_name(f".{checkpoint_directory.name}.training.pt")
        self.stage = json.dumps(stage, sort_keys=True, default=str)
        self.ready: Callable[[], None] | None = None

    def part(self, number: int, parts: int, ready: Callable[[], None]) -> "TrainingState":
        """Return the place of part `number` of a state that `parts` processes keep, each its own.

        `ready` is called when one has been written and before it replaces the previous one: it waits for the others, so that a kill
        hardly ever leaves parts of different steps; who loads them compares.
        """
        own = copy.copy(self)
        own.path = self.path.with_name(f"{self.path.stem}.{number + 1}of{parts}{self.path.suffix}")
        own.ready = ready
        return own

    def load(self) -> dict[str, Any] | None:
        """Return what was last saved for this very stage, or None (also when the file is damaged)."""
        remove_stale_temporaries(self.path)
        if not self.path.is_file():
            return None
        try:
            saved = torch.load(self.path, weights_only=True, map_location="cpu")
            stage, state = saved["stage"], saved["state"]
        except Exception:  # noqa: BLE001  any damage means the same: start from the first epoch
            self._say("is damaged")
            return None
        if stage == self.stage:
            return state
        self._say(f"is of another run ({_differences(stage, self.stage)})")
        return None

    def _say(self, what: str) -> None:
        if is_main_process():
            print(f"{self.path} {what}: starting this model from the beginning")

    def save(self, **state: Any) -> None:
        """Write the state, replacing the previous one only when whole."""
        # Through a Python file: torch's own writer reports a full disk without the operating system's error number.
        with replace_file(self.path) as temporary, open(temporary, "wb") as file:
            torch.save({"stage": self.stage, "state": state}, file)
            if self.ready:
                file.flush()
                os.fsync(file.fileno())
                self.ready()

    def clear(self) -> None:
        """Forget the state, with all parts of it: the checkpoint it led to has been written."""
        for part in self.path.parent.glob(f"{glob.escape(self.path.stem)}.*of*{self.path.suffix}"):
            part.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


def _differences(saved: str, wanted: str) -> str:
    """Return in words where two stage records, as JSON, differ; those of an earlier version may be no JSON."""
    try:
        saved, wanted = ({**each.pop("config"), **each.pop("inputs"), **each} for each in map(json.loads, (saved, wanted)))
    except (ValueError, TypeError, AttributeError, KeyError):
        return "of an earlier version"
    keys = [key for key in sorted(saved.keys() | wanted.keys()) if saved.get(key) != wanted.get(key)]
    return ", ".join(f"{key} {saved.get(key)} instead of {wanted.get(key)}" for key in keys)


def cpu_copy(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a detached copy of a state dict in main memory."""
    return {name: tensor.detach().cpu().clone() for name, tensor in state_dict.items()}


# ------------------------------------------------------------------------------------------------------ what was learned
def are_finite(weights: dict[str, torch.Tensor]) -> bool:
    """Tell whether every weight is a number."""
    return all(torch.isfinite(tensor).all().item() for tensor in weights.values())


def mean_loss(losses: list[torch.Tensor], accelerator: Accelerator, first_step: int, label: str, lr_setting: str) -> float:
    """Return the mean of losses (a scalar per step, from step `first_step` on) over steps and processes; all must call it.

    Looking at the losses makes the processor wait for the GPU, so it is done now and then. Raises CompactMindError if one is not
    finite, naming `label` (the model and its phase), the step, and `lr_setting`, for example "teacher_lr 5e-05", as what to lower.
    """
    per_step = accelerator.reduce(torch.stack(losses), reduction="mean")  # (steps,)
    bad = (~torch.isfinite(per_step)).nonzero()
    if len(bad):
        index = int(bad[0])
        raise CompactMindError(
            f"{label}: the loss became {per_step[index].item()} at step {first_step + index}, nothing was saved: "
            f"{_too_high(lr_setting)}"
        )
    return per_step.mean().item()


def validation_logits(
    model: PreTrainedModel, sentences: EncodedSentences, batch_size: int, accelerator: Accelerator, label: str, lr_setting: str
) -> torch.Tensor:
    """Return the logits of the main process, float32 on the CPU, (rows, classes), in every process; all must call it.

    What follows from them (which epoch is kept, when to stop) is then the same everywhere, whatever the rounding of each device.
    Raises CompactMindError if one is not finite or a weight is not, naming `label` and `lr_setting` as `mean_loss` does.
    """
    if accelerator.is_main_process:
        logits = predict_logits(model, sentences, batch_size).to(accelerator.device)
    else:
        logits = torch.empty(len(sentences), model.config.num_labels, device=accelerator.device)
    logits = broadcast(logits).cpu()
    if not torch.isfinite(logits).all() or not are_finite(model.state_dict()):
        raise CompactMindError(
            f"{label}: logits or weights are not finite after its last step, nothing was saved: {_too_high(lr_setting)}"
        )
    return logits


def _too_high(lr_setting: str) -> str:
    return f"{lr_setting} is probably too high, use a smaller --{lr_setting.split()[0]}"


def warn_of_chance(label: str, accuracy: float, labels: torch.Tensor, accelerator: Accelerator) -> None:
    """Print a warning if an accuracy (share in [0, 1] of the rows of `labels`) may be that of always saying the more frequent class.

    May be: that share is not below the 95% Wilson interval of the accuracy.
    """
    rows, majority = len(labels), labels.bincount().max().item() / len(labels)
    low = binomtest(round(accuracy * rows), rows).proportion_ci(0.95, method="wilson").low
    if low <= majority:
        accelerator.print(
            f"warning: {label} may be no better than chance: validation accuracy {accuracy:.2%} (at least {low:.2%} with 95% "
            f"confidence), while always saying the more frequent class is right in {majority:.2%}"
        )


# -------------------------------------------------------------------------------------------------------------- progress
class Progress:
    """A progress bar on a terminal, and one aligned line per `log_every` steps everywhere.

    The line: step, loss (mean since the last line, of this process's batches), lr, the caller's own fields, sentences (or another
    `unit`) per second of all processes, time left. A tracker (tracking.py) is told what the line says.
    """

    def __init__(
        self, label: str, total_steps: int, log_every: int, start_step: int = 0, enabled: bool = True, unit: str = "sentences"
    ):
        self.unit = unit
        self.label, self.total_steps, self.log_every, self.enabled = label, total_steps, log_every, enabled
        self.step = start_step
        self.losses: list[float | torch.Tensor] = []
        self.items = 0
        self.started = self.mark = time.perf_counter()
        self.first_step = start_step
        self.run = begin_run(label) if enabled else None
        self.bar = tqdm(
            total=total_steps, initial=start_step, desc=label, unit="step", leave=False, dynamic_ncols=True,
            disable=not (enabled and sys.stderr.isatty()),
        )  # fmt: skip

    def update(self, loss: float | torch.Tensor, lr: float, items: int, **shown: float) -> None:
        """Count one optimizer step over `items` sentences (or another unit); a loss on a GPU is fetched when a line is due only."""
        self.step += 1
        self.bar.update()
        if not self.enabled:
            return
        self.losses.append(loss)
        self.items += items
        if self.step % self.log_every == 0 or self.step == self.total_steps:
            now = time.perf_counter()
            left = (now - self.started) / (self.step - self.first_step) * (self.total_steps - self.step)
            extra = "".join(f" | {name} {value:6.3f}" for name, value in shown.items())
            loss = float(sum(self.losses) / len(self.losses))
            self.track("step", {"loss": loss, "lr": lr, **shown})
            self.write(
                f"{self.label:<18} step {self.step:>5}/{self.total_steps} | loss {loss:7.4f}"
                f" | lr {lr:.2e}{extra} | {self.items / (now - self.mark):5.0f} {self.unit}/s | left {clock(left)}"
            )
            self.losses, self.items, self.mark = [], 0, now

    def write(self, line: str) -> None:
        """Print a line without tearing the bar."""
        if self.enabled:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def track(self, kind: str, row: dict[str, Any]) -> None:
        """Tell the tracker, if the run has one, the numbers of a row as <kind>/<name>, at the current step."""
        if self.run:
            self.run.log({f"{kind}/{name}": value for name, value in row.items()}, self.step)

    def close(self) -> None:
        """Take the bar away, and end the tracker's run."""
        self.bar.close()
        if self.run:
            self.run.finish()


def clock(seconds: float) -> str:
    """Return seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
