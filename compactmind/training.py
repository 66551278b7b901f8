"""What every training loop needs and no technique is about: optimizer, resuming, progress lines.

The loops themselves stand in the numbered scripts.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from compactmind.files import explain_unwritable


def make_accelerator() -> Accelerator:
    """Return an Accelerator with automatic mixed precision on a GPU only: bf16 where it exists, else fp16."""
    if not torch.cuda.is_available():
        return Accelerator(cpu=True, mixed_precision="no")
    return Accelerator(mixed_precision="bf16" if torch.cuda.is_bf16_supported() else "fp16")


def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Return a fused AdamW over the trainable parameters; vectors (biases, norms) get no weight decay."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
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


class TrainingState:
    """The state of an unfinished training run, saved every so often, so that a killed run goes on where it was.

    It lies beside the checkpoint it will become (`models/.<name>.training.pt`) and is deleted with success. A state of
    another stage record (other config, other inputs) is ignored. Only tensors and plain values are stored, and it is
    loaded with `weights_only=True`: no code is ever unpickled.
    """

    def __init__(self, checkpoint_directory: Path, stage: dict[str, Any]):
        self.path = checkpoint_directory.with_name(f".{checkpoint_directory.name}.training.pt")
        self.stage = stage

    def load(self) -> dict[str, Any] | None:
        """Return what was last saved for this very stage, or None (also when the file is damaged)."""
        if not self.path.is_file():
            return None
        try:
            saved = torch.load(self.path, weights_only=True, map_location="cpu")
        except Exception:  # noqa: BLE001  any damage means the same: start from the first epoch
            print(f"{self.path} is damaged: starting this model from the beginning")
            return None
        return saved["state"] if saved["stage"] == repr(self.stage) else None

    def save(self, **state: Any) -> None:
        """Write the state, replacing the previous one only when whole."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        try:
            # Through a Python file: torch's own writer reports a full disk without the operating system's error number.
            with explain_unwritable(self.path), open(temporary, "wb") as file:
                torch.save({"stage": repr(self.stage), "state": state}, file)
            temporary.replace(self.path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def clear(self) -> None:
        """Forget the state: the checkpoint it led to has been written."""
        self.path.unlink(missing_ok=True)


def cpu_copy(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a detached copy of a state dict in main memory."""
    return {name: tensor.detach().cpu().clone() for name, tensor in state_dict.items()}


class Progress:
    """A progress bar on a terminal, and one aligned line per `log_every` steps everywhere.

    The line: step, loss (mean since the last line), lr, the caller's own fields, sentences (or another `unit`) per second, time left.
    """

    def __init__(
        self, label: str, total_steps: int, log_every: int, start_step: int = 0, enabled: bool = True, unit: str = "sentences"
    ):
        self.unit = unit
        self.label, self.total_steps, self.log_every, self.enabled = label, total_steps, log_every, enabled
        self.step = start_step
        self.losses: list[float] = []
        self.items = 0
        self.started = self.mark = time.perf_counter()
        self.first_step = start_step
        self.bar = tqdm(
            total=total_steps, initial=start_step, desc=label, unit="step", leave=False, dynamic_ncols=True,
            disable=not (enabled and sys.stderr.isatty()),
        )  # fmt: skip

    def update(self, loss: float, lr: float, items: int, **shown: float) -> None:
        """Count one optimizer step over `items` sentences (or another unit)."""
        self.step += 1
        self.losses.append(loss)
        self.items += items
        self.bar.update()
        if self.enabled and (self.step % self.log_every == 0 or self.step == self.total_steps):
            now = time.perf_counter()
            left = (now - self.started) / (self.step - self.first_step) * (self.total_steps - self.step)
            extra = "".join(f" | {name} {value:6.3f}" for name, value in shown.items())
            self.write(
                f"{self.label:<18} step {self.step:>5}/{self.total_steps} | loss {sum(self.losses) / len(self.losses):7.4f}"
                f" | lr {lr:.2e}{extra} | {self.items / (now - self.mark):5.0f} {self.unit}/s | left {clock(left)}"
            )
            self.losses, self.items, self.mark = [], 0, now

    def write(self, line: str) -> None:
        """Print a line without tearing the bar."""
        if self.enabled:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        """Take the bar away."""
        self.bar.close()


def clock(seconds: float) -> str:
    """Return seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
