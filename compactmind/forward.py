"""Plain forward passes over much text: what training, methods and evaluation ask a model, before anybody makes a metric of it."""

import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from compactmind.data import EncodedSentences, model_inputs, require_same_texts
from compactmind.errors import CompactMindError
from compactmind.files import replace_file
from compactmind.limits import require_known_ids, rows_at_a_time
from compactmind.precision import is_small

LARGEST_LOSS = 700.0
"""Nats per token above which a model counts as damaged: guessing evenly costs 11, and exp(710) is no number any more."""

LOGITS_TO_KEEP = 2**31
"""Bytes of logits that are kept in memory instead of made again of what the head reads: 10,000 tokens of 50,000 words."""
MEMORY_TO_KEEP = 2**28
"""Bytes of anything else that is kept in memory; what is larger lies in a temporary file."""
STATES = "states"
"""The tensor of a file of what a head has read."""
SAME_STATES = 1e-4
"""Relative difference up to which two readings of a window are the same: sums are in another order."""
CHUNK = 64
"""Tokens whose probabilities are looked at in one go: 64 of a vocabulary of 128,000 take 33 MB a tensor."""


@torch.inference_mode()
def predict_logits(model: nn.Module, sentences: EncodedSentences, batch_size: int) -> torch.Tensor:
    """Return the logits of every sentence in its original order, float32 on the CPU: (rows, classes).

    The model is put into evaluation mode and left there. Sentences go one at a time where padding would change the answer. Raises
    CompactMindError on a sentence without tokens or with one that the model does not know.
    """
    model.eval()
    require_same_texts(model, sentences)
    logits = None
    for batch in sentences.evaluation_batches(rows_at_a_time(model, sentences.pad_token_id, batch_size)):
        empty = batch["rows"][batch["attention_mask"].sum(1) == 0].tolist()
        if empty:
            raise CompactMindError(f"sentence {empty[0] + 1} of {len(sentences)} has no tokens")
        require_known_ids(model, batch["input_ids"])
        out = model(**model_inputs(batch, model)).logits.float().cpu()
        logits = out.new_empty(len(sentences), out.shape[1]) if logits is None else logits
        logits[batch["rows"]] = out
    return logits


@torch.no_grad()  # not inference_mode: weights that are gathered for it (retraining/sharding.py) could not be trained afterwards
def window_losses(model: PreTrainedModel, windows: torch.Tensor) -> torch.Tensor:
    """Return the mean negative log-likelihood in nats of each window's predicted tokens.

    `windows`: (windows, seq_len) token ids; the result is float64 of shape (windows,). One window at a time: the logits of a
    large vocabulary are the largest tensor of the whole pass.
    """
    return torch.stack([loss_of(next_token_logits(model, window), window) for window in windows])


@torch.no_grad()
def next_token_logits(model: PreTrainedModel, window: torch.Tensor) -> torch.Tensor:
    """Return the logits that predict every token but the first of a window (seq_len,): (seq_len - 1, vocabulary), on the model's device."""
    return model(input_ids=window[None].to(model.device), use_cache=False).logits[0, :-1]


def loss_of(logits: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    """Return the mean negative log-likelihood in nats of a window's predicted tokens, a float64 number on the CPU."""
    return F.cross_entropy(logits.float(), window[1:].to(logits.device)).double().cpu()


def divergences_of(dense_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return KL(dense || model) in nats of every token, float32 (tokens,) on the CPU; both logits: (tokens, vocabulary)."""
    each = []
    for dense, other in zip(dense_logits.split(CHUNK), logits.split(CHUNK), strict=True):
        ours, theirs = (F.log_softmax(part.to(dense.device).float(), dim=-1) for part in (other, dense))
        each.append(F.kl_div(ours, theirs, log_target=True, reduction="none").sum(dim=-1).clamp(min=0).cpu())  # below 0 by rounding alone
    return torch.cat(each)


def room_for(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a tensor of a shape to be filled: in memory, or beyond MEMORY_TO_KEEP in a file that goes with it.

    Raises OSError if the disk of temporary files is too small.
    """
    count = torch.Size(shape).numel()
    size = dtype.itemsize * count
    if size <= MEMORY_TO_KEEP or not hasattr(os, "posix_fallocate"):
        return torch.empty(shape, dtype=dtype)
    with tempfile.NamedTemporaryFile(prefix="compactmind-") as file:  # what is mapped outlives its name
        os.posix_fallocate(file.fileno(), 0, size)  # a disk that fills up later would end the process
        return torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(shape)


def logits_divisor(model: PreTrainedModel) -> float:
    """Return what a model divides its head's products by before they are logits: Granite's `logits_scaling`, 1 elsewhere."""
    return float(getattr(model.config, "logits_scaling", None) or 1.0)


class HeadInputs:
    """What the head of a language model reads, window by window, and the logits that are made of it.

    Where logits are more than the head's products, divided as Granite divides them, `head_is_all` is False; None before the first window.
    """

    def __init__(self, model: PreTrainedModel):
        self.head, self.divisor, self.head_is_all = model.get_output_embeddings(), logits_divisor(model), None

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Return logits (..., vocabulary) of what the head reads (..., channels), on its device."""
        products = self.head(states)
        return products if self.divisor == 1 else products / self.divisor

    @torch.no_grad()
    def read(self, model: PreTrainedModel, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return states (batch, tokens, channels) and logits (batch, tokens, vocabulary) of ids (batch, tokens), on the model's device."""
        seen: list[torch.Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
        try:
            logits = model(input_ids=input_ids.to(model.device), use_cache=False).logits
        finally:
            hook.remove()
        if self.head_is_all is None:
            self.head_is_all = torch.equal(self.logits(seen[0]), logits)
        return seen[0], logits


def _states_in(place: Path, first: torch.Tensor, count: int) -> torch.Tensor | None:
    """Return the states (windows, tokens, channels) of a file whose first window has those of `first` (1, tokens, channels), else None."""
    with suppress(OSError, KeyError, ValueError, SafetensorError):
        states = load_file(place)[STATES]
        if states.shape == (count, *first.shape[1:]):
            away = (states[0] - first[0].cpu()).norm() / first.norm().cpu()
            return states if away < SAME_STATES else None
    return None


def _leave_states(place: Path, states: torch.Tensor) -> None:
    """Leave states in a file for later runs; where that cannot be, they read again."""
    with suppress(OSError, CompactMindError, SafetensorError):
        place.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(place) as temporary:
            save_file({STATES: states}, temporary)


class LogitsOf(Sequence):
    """The next-token logits of a model for `windows` (windows, seq_len), which it reads once: number i is (seq_len - 1, vocabulary).

    Kept are the logits of a small model where they are few, else what the head makes them of: of the model only the head has to stay.
    `place`: a file of what the head read of these windows in an earlier run, or where this one leaves it. If the first window comes to the
    same now, the others are taken from there.
    """

    @torch.inference_mode()
    def __init__(self, model: PreTrainedModel, windows: torch.Tensor, place: Path | None = None):
        reader, self.device, self.made = HeadInputs(model), model.device, None
        few = is_small(model) and 4 * windows.numel() * model.config.get_text_config().vocab_size <= LOGITS_TO_KEEP
        known, to_leave = None, None
        for index, window in enumerate(windows):
            if known is None:
                states, logits = reader.read(model, window[None])
            else:
                states = known[index][None].to(self.device)
                logits = reader.logits(states) if few else None
            if index == 0:
                self.made = None if few or not reader.head_is_all else reader.logits
                like = logits if self.made is None else states
                self.kept = [None] * len(windows) if few else room_for(len(windows), *like.shape[1:])
                if place and reader.head_is_all and (known := _states_in(place, states, len(windows))) is None:
                    to_leave = room_for(len(windows), *states.shape[1:])
            self.kept[index] = logits[0] if self.made is None else states[0]
            if to_leave is not None:
                to_leave[index] = states[0]
        if to_leave is not None:
            _leave_states(place, to_leave)

    def __len__(self) -> int:
        return len(self.kept)

    @torch.inference_mode()
    def __getitem__(self, index: int) -> torch.Tensor:
        kept = self.kept[index].to(self.device)
        return (kept if self.made is None else self.made(kept[None])[0])[:-1]
