"""What a method may need beside the model it is given: text, the dense model, and what is known of it already."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from compactmind.methods.retraining.loss import TeacherStates
from compactmind.precision import is_small
from compactmind.training import TrainingState


@dataclass
class Resources:
    """What methods may need beside the model; all windows are (windows, seq_len) token ids."""

    calibration: torch.Tensor
    """Text on which activations and gradients are observed."""
    train: torch.Tensor
    """Text to retrain on."""
    held_out: torch.Tensor
    """Text that decides which weights of retraining are kept; never the text of a reported number."""
    dense: Callable[[], PreTrainedModel]
    """Makes a fresh copy of the dense model that computes in float32: the teacher."""
    released: torch.dtype = torch.float32
    """What the dense model's file is in, and the result's will be."""
    released_bytes: int = 0
    """Bytes of that file, which a target compression is a ratio of; 0: of the weights of the model a method is given."""
    device: str = "cpu"
    """Where `dense` puts its model."""
    resume: TrainingState | None = None
    """Where retraining keeps its state, so that a killed run goes on."""
    before: tuple[str, ...] = ()
    """What has been done to the model that comes next: one hash per step; who runs a pipeline keeps it."""
    kinds_before: tuple[str, ...] = ()
    """The kinds of these steps."""
    keep: Callable[[str, Callable[[], Any]], Any] = lambda name, make: make()
    """Returns make(), JSON that belongs to the dense model and the text, or what an earlier run kept under that name."""
    states: Callable[[torch.Tensor], Path | None] = lambda windows: None
    """Windows -> the file in which an earlier run has left what the dense model's head reads of them, or this one will: see LogitsOf."""
    remembered: dict[Any, Any] = field(default_factory=dict, repr=False)
    numbers: dict[Any, Any] = field(default_factory=dict, repr=False)
    """What is remembered and has no tensors: kept for good."""

    def remember(self, what: Any, make: Callable[[], Any], numbers: bool = False) -> Any:
        """Return make(), or what it returned when it was last asked for `what` of the model as it is now.

        What belongs to the dense model is kept, and what is `numbers` alone; of others only what belongs to the last one, so that memory
        does not grow.
        """
        key, place = (self.before, what), self.numbers if numbers else self.remembered
        if key not in place:
            for old in [old for old in self.remembered if old[0] and old[0] != self.before]:
                del self.remembered[old]
            place[key] = make()
        return place[key]

    def teacher(self) -> PreTrainedModel:
        """Return the dense model to learn from; always the same one, nobody changes it."""
        if ((), "teacher") not in self.remembered:
            self.remembered[(), "teacher"] = self.dense().eval().requires_grad_(False)
        return self.remembered[(), "teacher"]

    def is_teacher(self, model: PreTrainedModel) -> bool:
        """Tell whether `model` is the one that `teacher` returns."""
        return self.remembered.get(((), "teacher")) is model

    def release_teacher(self) -> None:
        """Let the dense model go if it is a large one: what asks for it again loads it again."""
        teacher = self.remembered.get(((), "teacher"))
        if teacher is not None and not is_small(teacher):
            del self.remembered[(), "teacher"]

    def teacher_states(self) -> TeacherStates:
        """Return what the teacher's head has read so far, for all retrainings on this text."""
        return self.remembered.setdefault(((), "teacher states"), TeacherStates())
