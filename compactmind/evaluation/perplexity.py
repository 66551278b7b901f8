"""Perplexity of a causal language model on windows of held-out text, with the protocol that makes the number mean something.

Protocol: the documents joined with a blank line, tokenized once, cut into non-overlapping windows of `seq_len` tokens (an
incomplete last window is dropped); the mean negative log-likelihood is over *predicted* tokens, seq_len - 1 per window, and
perplexity is its exponential. Llama-2-7B has 5.47 on WikiText-2 this way with seq_len 2048; other joins, window lengths and
denominators give anything from 5.1 to 61 for the same model, so a number without its protocol cannot be compared.
"""

import math
from typing import Any

import torch
from transformers import PreTrainedModel

from compactmind.errors import CompactMindError
from compactmind.forward import LARGEST_LOSS, window_losses

RESAMPLES = 2000
"""Bootstrap resamples of the windows for the 95% interval."""


def perplexity(model: PreTrainedModel, windows: torch.Tensor, text: str) -> dict[str, Any]:
    """Return the perplexity on `windows` (windows, seq_len) with a 95% interval and its protocol.

    `text` names where the windows come from. Keys: perplexity, interval (bootstrap over windows), loss (nats), losses (per
    window), protocol. Raises CompactMindError if the loss is not a number or beyond all reason.
    """
    losses = window_losses(model, windows)
    damaged = ~(losses < LARGEST_LOSS)
    if damaged.any():
        bad = int(damaged.nonzero()[0])
        raise CompactMindError(f"the loss of window {bad} of {text} is {losses[bad].item()}: the model is damaged")
    return {
        "perplexity": math.exp(losses.mean()),
        "interval": bootstrap_interval(losses),
        "loss": losses.mean().item(),
        "losses": losses.tolist(),
        "protocol": {
            "text": text,
            "join": "\n\n",
            "seq_len": windows.shape[1],
            "windows": len(windows),
            "predicted_tokens": windows.shape[0] * (windows.shape[1] - 1),
        },
    }


def bootstrap_interval(losses: torch.Tensor, seed: int = 0) -> tuple[float, float]:
    """Return the 95% interval of exp(mean loss): percentiles over resamples of the windows (Efron 1979)."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(losses), (RESAMPLES, len(losses)), generator=generator)
    means = losses[drawn].mean(dim=1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=means.dtype)).exp().tolist()
    return low, high


def paired_ratio(losses: list[float], reference: list[float]) -> dict[str, Any]:
    """Return perplexity / reference perplexity on the same windows, with the paired bootstrap's 95% interval.

    The windows' difficulty cancels, so this tells two models apart long before their own intervals do. Raises ValueError if
    the two lists are not of one length.
    """
    if len(losses) != len(reference):
        raise ValueError(f"{len(losses)} windows against {len(reference)}: both models must see the same ones")
    difference = torch.tensor(losses, dtype=torch.float64) - torch.tensor(reference, dtype=torch.float64)
    return {"ratio": math.exp(difference.mean()), "interval": bootstrap_interval(difference)}
