"""Compute the teacher's logits of a training set once and keep them in a file.

The teacher is frozen and sees every sentence unchanged in every epoch, so running it in every step would compute the same
numbers again and again.
"""

import hashlib
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from compactmind.data import EncodedSentences
from compactmind.files import remove_stale_temporaries, replace_file
from compactmind.forward import predict_logits
from compactmind.methods.first_token import read_all_tokens, read_first_token_only


def cached_teacher_logits(
    teacher: torch.nn.Module,
    fingerprint: str,
    sentences: EncodedSentences,
    batch_size: int,
    cache_directory: Path,
    accelerator: Accelerator,
) -> torch.Tensor:
    """Return the teacher's logits of every sentence, (rows, classes) float32, from the cache if they are there.

    `fingerprint` identifies the teacher's weights. The cache file is named by hashes of it and of the token ids, so it can never be
    the wrong one. Those of other teachers are swept when one is written; a file that another run sweeps or has damaged is computed
    again. The teacher reads all tokens afterwards, whatever was raised.
    """
    teacher_key = hashlib.sha256(fingerprint.encode()).hexdigest()[:16]
    rows_key = hashlib.sha256()
    for ids in [*sentences.input_ids, *(sentences.token_type_ids or [])]:
        rows_key.update(torch.tensor(ids, dtype=torch.int32).numpy().tobytes() + b";")
    path = cache_directory / f".teacher_logits_{teacher_key}_{rows_key.hexdigest()[:16]}.safetensors"
    with accelerator.main_process_first():  # the others find the file
        logits = _cached(path, len(sentences))
        if logits is None:
            accelerator.print(f"computing the teacher's logits of {len(sentences)} sentences once ...")
            read_first_token_only(teacher)
            try:
                logits = predict_logits(teacher, sentences, batch_size)
            finally:
                read_all_tokens(teacher)
            if accelerator.is_main_process:
                for other in cache_directory.glob(".teacher_logits_*.safetensors"):
                    if not other.name.startswith(f".teacher_logits_{teacher_key}_"):
                        remove_stale_temporaries(other)
                        other.unlink(missing_ok=True)
                with replace_file(path) as temporary:
                    save_file({"logits": logits.contiguous()}, temporary)
    return logits


def _cached(path: Path, rows: int) -> torch.Tensor | None:
    """Return the logits in a cache file, or None if there is no whole one."""
    try:
        logits = load_file(path)["logits"]
    except (OSError, SafetensorError, KeyError):
        return None
    return logits if len(logits) == rows else None
