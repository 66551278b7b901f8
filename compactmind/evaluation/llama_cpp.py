"""GGUF files run by llama.cpp itself, called like a causal language model of transformers: the tool a user would otherwise pick.

The wheel of xllamacpp (requirements-llama_cpp.txt) is a whole libllama, called here through its C interface. llama.cpp rounds what a linear
reads to 8 bits, so its numbers are not those of PyTorch on the same weights.
"""

import ctypes
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from compactmind.errors import CompactMindError

PACKAGE = "xllamacpp"
OPAQUE = ctypes.c_byte * 1024
"""Parameters whose fields, but for the first of a context's, are left as the library fills them in."""
PLACES = {"n_ctx": (0, 512), "n_batch": (1, 2048), "n_ubatch": (2, 512), "n_threads": (7, 4), "n_threads_batch": (8, 4)}
"""Field of llama_context_params -> its place, in 32 bits, and its default, by which the place is checked."""


def installed() -> str | None:
    """Return the version of llama.cpp's wheel, None if there is none."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None


class _Opaque(ctypes.Structure):
    _fields_ = [("bytes", OPAQUE)]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


_library: ctypes.CDLL | None = None


def _load_library() -> ctypes.CDLL:
    """Return libllama, silent. Raises CompactMindError if it is not installed."""
    global _library
    if _library is not None:
        return _library
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        raise CompactMindError("llama.cpp is not installed: `pip install -r requirements-llama_cpp.txt`")
    lib = ctypes.CDLL(str(next(Path(spec.origin).parent.glob(f"{PACKAGE}*.so"))))
    lib.llama_model_default_params.restype = lib.llama_context_default_params.restype = _Opaque
    lib.llama_model_load_from_file.restype = lib.llama_init_from_model.restype = ctypes.c_void_p
    lib.llama_model_load_from_file.argtypes = [ctypes.c_char_p, _Opaque]
    lib.llama_init_from_model.argtypes = [ctypes.c_void_p, _Opaque]
    lib.llama_free.argtypes = lib.llama_model_free.argtypes = [ctypes.c_void_p]
    lib.llama_get_memory.restype, lib.llama_get_memory.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    lib.llama_memory_clear.argtypes = [ctypes.c_void_p, ctypes.c_bool]
    lib.llama_decode.argtypes = [ctypes.c_void_p, _Batch]
    lib.llama_get_logits.restype, lib.llama_get_logits.argtypes = ctypes.POINTER(ctypes.c_float), [ctypes.c_void_p]
    silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
    lib.quiet = silent(lambda *_: None)  # kept: the library calls it later
    lib.llama_log_set(lib.quiet, None)
    lib.llama_backend_init()
    _library = lib
    return lib


@dataclass
class Output:
    """What a call returns: logits (1, tokens, vocabulary) float32, and how many tokens are remembered."""

    logits: torch.Tensor
    past_key_values: int


class LlamaCpp:
    """A GGUF file, loaded; called as `model(input_ids=..., past_key_values=...)`, one text at a time, it returns an Output.

    `tokens`: how many it can remember; `vocabulary`: rows of its table. Raises CompactMindError if llama.cpp does not take the file.
    """

    device = torch.device("cpu")

    def __init__(self, path: Path, tokens: int, vocabulary: int, threads: int):
        lib = self._lib = _load_library()
        self.config = SimpleNamespace(vocab_size=vocabulary)
        self._context, self._model = None, lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        if not self._model:
            raise CompactMindError(f"llama.cpp does not load {path}")
        settings = lib.llama_context_default_params()
        fields = ctypes.cast(ctypes.byref(settings), ctypes.POINTER(ctypes.c_uint32))
        if any(fields[place] != default for place, default in PLACES.values()):
            raise CompactMindError(
                f"{PACKAGE} {installed()} has other context parameters than are known here: `pip install -r requirements-llama_cpp.txt`"
            )
        for name, value in {"n_ctx": tokens, "n_batch": tokens, "n_threads": threads, "n_threads_batch": threads}.items():
            fields[PLACES[name][0]] = value
        self._context = lib.llama_init_from_model(self._model, settings)
        if not self._context:
            raise CompactMindError(f"llama.cpp makes no context of {tokens} tokens for {path}")

    def close(self) -> None:
        """Give its memory back; it cannot be called any more."""
        for free, what in ((self._lib.llama_free, self._context), (self._lib.llama_model_free, self._model)):
            if what:
                free(what)
        self._context = self._model = None

    def __call__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
        past_key_values: int | None = None,
    ) -> Output:
        """Read tokens (1, tokens) behind the `past_key_values` that are remembered (None: of a new text)."""
        tokens, start = input_ids[0].tolist(), past_key_values or 0
        if not start:
            self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        count, rows = len(tokens), logits_to_keep or len(tokens)
        zero = (ctypes.c_int32 * 1)(0)
        batch = _Batch(
            count, (ctypes.c_int32 * count)(*tokens), None, (ctypes.c_int32 * count)(*range(start, start + count)),
            (ctypes.c_int32 * count)(*[1] * count), (ctypes.POINTER(ctypes.c_int32) * count)(*[zero] * count),
            (ctypes.c_int8 * count)(*[0] * (count - rows), *[1] * rows),
        )  # fmt: skip
        if self._lib.llama_decode(self._context, batch):
            raise CompactMindError(f"llama.cpp cannot read {count} tokens behind {start}")
        size = rows * self.config.vocab_size
        logits = np.ctypeslib.as_array(self._lib.llama_get_logits(self._context), (size,)).copy()
        return Output(torch.from_numpy(logits).view(1, rows, -1), start + count)
