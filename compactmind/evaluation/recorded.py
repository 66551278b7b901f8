"""Perplexity and KL as the stage that made a model has measured them: its manifest keeps them, so that a report need not read all again.

They are of these very weights, whose SHA-256 the manifest has, and of windows and a dense model that are identified by hashes. They hold
only if the first window, which the model of the file reads now, gives the same: with another kernel, on another device, or of a file that
does not load as it was saved, all windows are measured.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch

from compactmind.checkpoint import Checkpoint
from compactmind.evaluation.divergence import measure_windows

RECORD = "quality"
"""The key of a manifest."""
SAME = {"rel_tol": 1e-3, "abs_tol": 1e-6}
"""How near two measurements of one model are on one kind of machine: sums are in another order."""


def quality_record(windows: torch.Tensor, base: str | None, losses: Sequence[float], divergence: dict[str, Any] | None) -> dict[str, Any]:
    """Return what a manifest keeps, under RECORD: losses and divergence on `windows` (windows, seq_len); `base`: hash of the dense one."""
    return {RECORD: {"windows": _hash_of(windows), "base": base, "losses": list(map(float, losses)), "divergence": divergence}}


def recorded_quality(
    checkpoint: Checkpoint, windows: torch.Tensor, base: str | None, dense: Sequence[torch.Tensor]
) -> dict[str, Any] | None:
    """Return what `measure_windows` says of a model if its manifest knows that of these windows and this base, else None.

    `dense`: the base's logits of every window. None also where the first window, read now, does not give what the record says.
    """
    record = checkpoint.manifest.get(RECORD) or {}
    if not base or record.get("base") != base or record.get("windows") != _hash_of(windows):
        return None
    losses, divergence = record.get("losses"), record.get("divergence")
    if not divergence or not losses or not len(losses) == len(windows) == len(divergence.get("divergences", ())):
        return None  # another vocabulary than the base's, or a manifest that somebody has edited
    now = measure_windows({"": checkpoint.model}, windows[:1], [dense[0]])[""]
    if now["divergence"] is None:
        return None
    pairs = ((now["losses"][0].item(), losses[0]), (now["divergence"]["divergences"][0], divergence["divergences"][0]))
    if not all(math.isclose(one, other, **SAME) for one, other in pairs):
        return None
    return {"losses": torch.tensor(losses, dtype=torch.float64), "divergence": divergence}


def _hash_of(windows: torch.Tensor) -> str:
    return hashlib.sha256(f"{tuple(windows.shape)}".encode() + windows.to(torch.int64).cpu().numpy().tobytes()).hexdigest()
