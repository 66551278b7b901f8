"""The models of a report by name: which of them are in memory is decided here."""

from collections.abc import Callable, Iterator, Mapping

import torch
from transformers import PreTrainedTokenizerBase

from compactmind.checkpoint import Checkpoint
from compactmind.formats.table import parameters_of
from compactmind.methods.llama import is_llama
from compactmind.precision import SMALL_BYTES


class Checkpoints(Mapping[str, Checkpoint]):
    """Checkpoints by name, loaded when they are asked for: small ones stay in memory, of large ones only the last.

    `load`: name -> what loads it. Whoever holds a large one on holds it in memory.
    """

    def __init__(self, load: Mapping[str, Callable[[], Checkpoint]]):
        self._load, self._kept = dict(load), {}
        self._tokenizers: dict[str, PreTrainedTokenizerBase] = {}
        self._large: dict[str, bool] = {}

    def __getitem__(self, name: str) -> Checkpoint:
        if name not in self._kept:
            self.release_large()
            loaded = self._kept[name] = self._load[name]()
            self._tokenizers[name] = loaded.tokenizer
            self._large[name] = is_llama(loaded.model) and 4 * parameters_of(loaded.model) > SMALL_BYTES
        return self._kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._load)

    def __len__(self) -> int:
        return len(self._load)

    def discard(self, name: str) -> None:
        """Take one out, which could not be loaded."""
        del self._load[name]
        self._kept.pop(name, None)

    def tokenizer(self, name: str) -> PreTrainedTokenizerBase:
        """Return the tokenizer of a checkpoint; the model need not be in memory for it."""
        return self._tokenizers[name] if name in self._tokenizers else self[name].tokenizer

    def is_large(self, name: str) -> bool:
        """Tell whether a checkpoint is a language model of more than SMALL_BYTES in float32."""
        if name not in self._large:
            self[name]
        return self._large[name]

    def release_large(self) -> None:
        """Forget the large one that is in memory, if there is one."""
        self._kept = {name: kept for name, kept in self._kept.items() if not self._large[name]}
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
