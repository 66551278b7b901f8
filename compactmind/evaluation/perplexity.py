"""Perplexity of a causal language model on windows of held-out text, with the protocol that makes the number mean something.

Protocol: the documents joined with a blank line, tokenized once, cut into non-overlapping windows of `seq_len` tokens (an
incomplete last window is dropped); the mean negative log-likelihood is over *predicted* tokens, seq_len - 1 per window, and
perplexity is its exponential. Llama-2-7B has 5.47 on WikiText-2 this way with seq_len 2048; other joins, window lengths and
denominators give anything from 5.1 to 61 for the same model, so a number without its protocol cannot be compared.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from compactmind.errors import CompactMindError
from compactmind.evaluation.intervals import mean_interval

LARGEST_LOSS = 700.0
"""Nats per token above which a model counts as damaged: guessing evenly costs 11, and exp(710) is no number any more."""


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


def perplexity(model: PreTrainedModel, windows: torch.Tensor, text: str, windows_from: str = "first") -> dict[str, Any]:
    """Return the perplexity of a model on `windows` (windows, seq_len), as `perplexity_of` has it."""
    return perplexity_of(window_losses(model, windows), windows.shape[1], text, windows_from)


def perplexity_of(losses: torch.Tensor, seq_len: int, text: str, windows_from: str = "first") -> dict[str, Any]:
    """Return the perplexity from the losses of windows of `seq_len` tokens, with a 95% interval and its protocol.

    `text` names where the windows come from, `windows_from` says which of its windows they are, see compactmind/text.py. Keys: perplexity,
    interval, loss (nats), losses (per window), protocol. Raises CompactMindError if the loss is not a number or beyond all reason.
    """
    damaged = ~(losses < LARGEST_LOSS)
    if damaged.any():
        bad = int(damaged.nonzero()[0])
        raise CompactMindError(f"the loss of window {bad} of {text} is {losses[bad].item()}: the model is damaged")
    return {
        "perplexity": math.exp(losses.mean()),
        "interval": perplexity_interval(losses),
        "loss": losses.mean().item(),
        "losses": losses.tolist(),
        "protocol": {
            "text": text,
            "join": "\n\n",
            "seq_len": seq_len,
            "windows": len(losses),
            "windows_from": windows_from,
            "predicted_tokens": len(losses) * (seq_len - 1),
        },
    }


def perplexity_interval(losses: torch.Tensor) -> tuple[float, float]:
    """Return the 95% interval of exp(mean loss) from the losses of windows in the order of the text: see intervals.py."""
    low, high = mean_interval(losses)
    return math.exp(low), math.exp(min(high.item(), LARGEST_LOSS))


def paired_ratio(losses: list[float], reference: list[float]) -> dict[str, Any]:
    """Return perplexity / reference perplexity on the same windows, with the 95% interval of the paired difference.

    The windows' difficulty cancels, so this tells two models apart long before their own intervals do. Raises ValueError if
    the two lists are not of one length.
    """
    if len(losses) != len(reference):
        raise ValueError(f"{len(losses)} windows against {len(reference)}: both models must see the same ones")
    difference = torch.tensor(losses, dtype=torch.float64) - torch.tensor(reference, dtype=torch.float64)
    return {"ratio": math.exp(difference.mean()), "interval": perplexity_interval(difference)}
