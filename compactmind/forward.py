"""Plain forward passes over much text: what training, methods and evaluation ask a model, before anybody makes a metric of it."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from compactmind.data import EncodedSentences
from compactmind.errors import CompactMindError
from compactmind.limits import require_known_ids, rows_at_a_time

LARGEST_LOSS = 700.0
"""Nats per token above which a model counts as damaged: guessing evenly costs 11, and exp(710) is no number any more."""


@torch.inference_mode()
def predict_logits(model: nn.Module, sentences: EncodedSentences, batch_size: int) -> torch.Tensor:
    """Return the logits of every sentence in its original order, float32 on the CPU: (rows, classes).

    The model is put into evaluation mode and left there. Sentences go one at a time where padding would change the answer. Raises
    CompactMindError on a sentence without tokens or with one that the model does not know.
    """
    model.eval()
    device = next(model.parameters()).device
    logits = None
    for batch in sentences.evaluation_batches(rows_at_a_time(model, sentences.pad_token_id, batch_size)):
        empty = batch["rows"][batch["attention_mask"].sum(1) == 0].tolist()
        if empty:
            raise CompactMindError(f"sentence {empty[0] + 1} of {len(sentences)} has no tokens")
        require_known_ids(model, batch["input_ids"])
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        out = model(**inputs).logits.float().cpu()
        logits = out.new_empty(len(sentences), out.shape[1]) if logits is None else logits
        logits[batch["rows"]] = out
    return logits


@torch.inference_mode()
def window_losses(model: PreTrainedModel, windows: torch.Tensor) -> torch.Tensor:
    """Return the mean negative log-likelihood in nats of each window's predicted tokens.

    `windows`: (windows, seq_len) token ids; the result is float64 of shape (windows,). One window at a time: the logits of a
    large vocabulary are the largest tensor of the whole pass.
    """
    return torch.stack([loss_of(next_token_logits(model, window), window) for window in windows])


@torch.inference_mode()
def next_token_logits(model: PreTrainedModel, window: torch.Tensor) -> torch.Tensor:
    """Return the logits that predict every token but the first of a window (seq_len,): (seq_len - 1, vocabulary), on the model's device."""
    return model(input_ids=window[None].to(model.device), use_cache=False).logits[0, :-1]


def loss_of(logits: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    """Return the mean negative log-likelihood in nats of a window's predicted tokens, a float64 number on the CPU."""
    return F.cross_entropy(logits.float(), window[1:].to(logits.device)).double().cpu()
