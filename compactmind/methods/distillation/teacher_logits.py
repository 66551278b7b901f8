"""Compute the teacher's logits of a training set once and keep them in a file.

The teacher is frozen and sees every sentence unchanged in every epoch, so running it in every step would compute the same
numbers again and again.
"""

import hashlib
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from compactmind.checkpoint import weights_fingerprint
from compactmind.data import EncodedSentences
from compactmind.evaluation.accuracy import predict_logits
from compactmind.files import explain_unwritable
from compactmind.methods.first_token import read_all_tokens, read_first_token_only


def cached_teacher_logits(
    teacher_directory: Path,
    teacher: torch.nn.Module,
    sentences: EncodedSentences,
    batch_size: int,
    cache_directory: Path,
    accelerator: Accelerator,
) -> torch.Tensor:
    """Return the teacher's logits of every sentence, (rows, classes) float32, from the cache if they are there.

    The cache file is named by a hash of the teacher's weights and the token ids, so it can never be the wrong one.
    """
    key = hashlib.sha256(weights_fingerprint(teacher_directory).encode())
    for ids in sentences.input_ids:
        key.update(torch.tensor(ids, dtype=torch.int32).numpy().tobytes() + b";")
    path = cache_directory / f".teacher_logits_{key.hexdigest()[:16]}.safetensors"
    with accelerator.main_process_first():
        if not path.is_file():
            accelerator.print(f"computing the teacher's logits of {len(sentences)} sentences once ...")
            read_first_token_only(teacher)
            logits = predict_logits(teacher, sentences, batch_size)
            read_all_tokens(teacher)
            if accelerator.is_main_process:
                for stale in cache_directory.glob(".teacher_logits_*.safetensors"):
                    stale.unlink()
                temporary = path.with_suffix(".tmp")
                try:
                    with explain_unwritable(path):
                        save_file({"logits": logits.contiguous()}, temporary)
                    temporary.replace(path)
                finally:
                    temporary.unlink(missing_ok=True)
            return logits
    return load_file(path)["logits"]
