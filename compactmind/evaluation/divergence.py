"""How far a model's predictions are from the dense model's: the Kullback-Leibler divergence, token by token.

KL(dense || model) = sum over the vocabulary of p_dense (ln p_dense - ln p_model), in nats, at every predicted token of the windows on which
perplexity is measured, from float32 logits. Its mean says how much a model differs, its 99.9th percentile how badly it fails where it
fails, the share of equal top tokens how often greedy decoding would go on alike. The ratio of two perplexities says whether the text became
likelier: what a model loses at one token it may win at another by chance, and only the sum is seen. KL sees both, is 0 for equal models
alone, and so tells quantizations of one model apart on far fewer windows. It asks whether a model is still the same, not whether it is
good: a model that was trained further may be better and far away. Convention and percentile as in llama.cpp's `perplexity --kl-divergence`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from compactmind.evaluation.intervals import mean_interval
from compactmind.forward import divergences_of, loss_of, next_token_logits

HIGH = 0.999
"""The percentile beside the mean, as a share."""


def token_divergences(dense_logits: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return KL(dense || model) in nats of every token and whether the top tokens are equal: float32 (tokens,), bool (tokens,), on the CPU.

    Both logits: (tokens, vocabulary). Raises ValueError if their shapes differ.
    """
    if dense_logits.shape != logits.shape:
        raise ValueError(f"logits of shapes {tuple(dense_logits.shape)} and {tuple(logits.shape)}: the vocabularies differ")
    same = dense_logits.argmax(dim=-1) == logits.to(dense_logits.device).argmax(dim=-1)
    return divergences_of(dense_logits, logits), same.cpu()


@torch.inference_mode()
def measure_windows(
    models: dict[str, PreTrainedModel],
    windows: torch.Tensor,
    dense: str | Sequence[torch.Tensor] | None,
    errors: dict[str, Exception] | None = None,
) -> dict[str, dict[str, Any]]:
    """Return per model its `losses` (windows,) and its `divergence` from the dense model on the same `windows` (windows, seq_len).

    Every model reads a window before the next one comes, so that the dense model's logits are computed once and none are kept. `dense` is
    the name of one of the models, or its logits of every window, or None for no divergences. A divergence is None where there are no dense
    logits or the vocabularies differ; its keys: see `summary`. A model that raises ends the run, unless there are `errors`: then it is put
    there and left out of what is returned.
    """
    losses: dict[str, list[torch.Tensor]] = {name: [] for name in models}
    tokens: dict[str, list[tuple[torch.Tensor, torch.Tensor]] | None] = {name: [] for name in models}
    order = [dense, *(name for name in models if name != dense)] if isinstance(dense, str) else list(models)
    for index, window in enumerate(windows):
        reference = dense[index] if dense is not None and not isinstance(dense, str) else None
        for name in order:
            if errors and name in errors:
                continue
            try:
                logits = next_token_logits(models[name], window)
                reference = logits if name == dense else reference
                losses[name].append(loss_of(logits, window))
                if tokens[name] is not None and reference is not None and reference.shape == logits.shape:
                    tokens[name].append(token_divergences(reference, logits))
                else:
                    tokens[name] = None
            except Exception as error:  # any model may be measured, and whatever one raises must not cost the others
                if errors is None:
                    raise
                errors[name] = error
    return {
        name: {"losses": torch.stack(losses[name]), "divergence": summary(tokens[name]) if tokens[name] else None}
        for name in models
        if not (errors and name in errors)
    }


@torch.inference_mode()
def measure_logits(logits: Sequence[torch.Tensor], windows: torch.Tensor) -> dict[str, Any]:
    """Return what `measure_windows` says of the dense model, of its `logits` of every window: its divergence from itself is 0."""
    losses, tokens = [], []
    for each, window in zip(logits, windows, strict=True):
        losses.append(loss_of(each, window))
        tokens.append((torch.zeros(len(each)), torch.ones(len(each), dtype=torch.bool)))
    return {"losses": torch.stack(losses), "divergence": summary(tokens)}


def summary(tokens: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Any]:
    """Return what the tokens of every window say together: per window what `token_divergences` returns.

    Keys: mean (nats, over all tokens), interval (95%, see intervals.py), p999 (nats), same_top (share of equal top tokens), divergences
    (the mean of every window, for paired comparisons).
    """
    each = torch.cat([divergences for divergences, _ in tokens])
    means = torch.stack([divergences.double().mean() for divergences, _ in tokens])
    low, high = (max(0.0, bound.item()) for bound in mean_interval(means))
    return {
        "mean": means.mean().item(),
        "interval": (low, high),
        "p999": float(np.quantile(each.numpy(), HIGH)),
        "same_top": torch.cat([same for _, same in tokens]).double().mean().item(),
        "divergences": means.tolist(),
    }


def divergence(dense: PreTrainedModel, model: PreTrainedModel, windows: torch.Tensor) -> dict[str, Any]:
    """Return the divergence of a model from the dense one on `windows` (windows, seq_len); keys: see `summary`.

    Raises ValueError if their vocabularies differ.
    """
    result = measure_windows({"dense": dense, "model": model}, windows, "dense")["model"]["divergence"]
    if result is None:
        raise ValueError(f"vocabularies of {dense.config.vocab_size} and {model.config.vocab_size}: no token is another's")
    return result
