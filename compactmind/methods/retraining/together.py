"""Retraining by several processes, one of which does everything else.

Under `accelerate launch` the main process runs a pipeline, and what is scored, cut, rounded, measured and written is so once: no two
processes can come to different models. The others wait. When a retraining is due, the main process sends them all it works with, and
every process trains on its share of each batch on a device of its own (causal_lm.py), with all of the model or with its share of that too
(sharding.py).

What is sent is pickled without its tensors; these follow one by one, as bytes, by gloo, whatever connects the GPUs: little is in memory
twice, and who waits keeps no GPU busy. The processes are one run's own, so nothing is unpickled that somebody else has made.
"""

import functools
import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from compactmind.devices import is_main_process, number_of_processes
from compactmind.errors import CompactMindError
from compactmind.methods.retraining.causal_lm import retrain_causal_lm
from compactmind.methods.retraining.loss import TeacherStates
from compactmind.training import make_accelerator

PATIENCE = timedelta(days=7)
"""So long the others wait for the next retraining; they need not wait for a main process that has ended."""


def retrain_together(model, windows, held_out, recipe, *, teacher=None, teacher_states=None, resume=None) -> dict[str, Any]:
    """Do what `retrain_causal_lm` does, by all processes of this run; the others are in `help_to_retrain`.

    Each gets the model whole, also where it goes on to keep a share only, and either the teacher or all that it has read.
    """
    if number_of_processes() > 1:
        task = {"model": model, "windows": windows, "held_out": held_out, "recipe": recipe, "teacher": teacher, "resume": resume}
        task["teacher_states"] = TeacherStates() if teacher is not None else teacher_states  # which know all of it where nobody is to ask
        from_main_process(task)
    return retrain_causal_lm(model, windows, held_out, recipe, teacher=teacher, teacher_states=teacher_states, resume=resume)


@contextmanager
def helped_by_the_others() -> Iterator[None]:
    """Inside the `with` block of the main process the others are in `help_to_retrain`; at its end they are told that this was all."""
    several = number_of_processes() > 1
    if several:
        _connection()
    yield
    if several:
        from_main_process(None)


def help_to_retrain() -> None:
    """Take part in every retraining of the main process, until it says that this was all. Raises CompactMindError if it ends before."""
    while _help_once():
        pass


def _help_once() -> bool:
    try:
        task = from_main_process()
    except RuntimeError:
        raise CompactMindError("the main process has ended early: its message, or the launcher's, says why") from None
    if task is not None:
        retrain_causal_lm(**task)
    return task is not None


# -------------------------------------------------------------------------------------------------------------- messages
@functools.cache
def _connection() -> dist.ProcessGroup:
    """Return the way between the processes, made on the first call; all must make it at the same point."""
    make_accelerator(may_shard=True)  # one process, one device: what is "cuda" from here on is this process's own
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def from_main_process(value: Any = None) -> Any:
    """Return the main process's `value` in every process, with its tensors in main memory; all must call it at the same point."""
    connection, file = _connection(), io.BytesIO()
    if is_main_process():
        pickler = _WithoutTensors(file)
        pickler.dump(value)
        described = [(each.dtype, each.shape, isinstance(each, nn.Parameter), each.requires_grad) for each in pickler.tensors]
        dist.broadcast_object_list([file.getvalue(), described], group=connection)
        for tensor in pickler.tensors:
            if tensor.numel():
                dist.broadcast(_as_bytes(tensor.detach().cpu().contiguous()), 0, group=connection)
        return value
    message = [None, None]
    dist.broadcast_object_list(message, group=connection)
    tensors = []
    for dtype, shape, is_parameter, requires_grad in message[1]:
        tensor = torch.empty(shape, dtype=dtype)
        if tensor.numel():
            dist.broadcast(_as_bytes(tensor), 0, group=connection)
        tensors.append(nn.Parameter(tensor, requires_grad) if is_parameter else tensor)
    return _WithTensors(io.BytesIO(message[0]), tensors).load()


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


class _WithoutTensors(pickle.Pickler):
    """Pickles all but tensors, which it collects: one that stands in two places, as tied weights do, once."""

    def __init__(self, file):
        super().__init__(file)
        self.tensors, self.numbers = [], {}

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, torch.Tensor):
            return None
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.tensors)
            self.tensors.append(value)
        return self.numbers[id(value)]


class _WithTensors(pickle.Unpickler):
    """Puts the tensors back where `_WithoutTensors` took them out."""

    def __init__(self, file, tensors: list[torch.Tensor]):
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, number: int) -> torch.Tensor:
        return self.tensors[number]
