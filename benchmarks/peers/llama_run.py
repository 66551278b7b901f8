"""Language models as GGUF files run by llama.cpp itself: perplexity and KL to the first of them on the same windows, and speed.

Run:   .peers/llama_cpp/bin/python benchmarks/peers/llama_run.py --files dense=dense.gguf ours=ours.gguf q4_0=q4_0.gguf \
           --tokens test_windows.json --output results/benchmark_gguf.json
Environment: as llama_cpp.py's, numpy in it (the wheel of xllamacpp is a whole libllama, called here through its C interface)
Reads: GGUF files; windows as calibration.py writes them, for example of wiki.test.raw
Prints: a row for each file, and writes them

llama.cpp rounds what a linear reads to 8 bits, so its numbers are not those of PyTorch on the same weights. Speed: all files in turn,
medians of `--repeats` rounds after one to warm up; a prompt of 512 tokens, then 8 tokens one by one.
"""

import argparse
import ctypes
import importlib.util
import json
import math
import statistics
import time
from pathlib import Path

import numpy as np

OPAQUE = ctypes.c_byte * 1024
"""Parameters whose fields, but for the first of a context's, are left as the library fills them in."""
PLACES = {"n_ctx": (0, 512), "n_batch": (1, 2048), "n_ubatch": (2, 512), "n_threads": (7, 4), "n_threads_batch": (8, 4)}
"""Field of llama_context_params -> its place, in 32 bits, and its default, by which the place is checked."""


class Opaque(ctypes.Structure):
    _fields_ = [("bytes", OPAQUE)]


class Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


def load_library() -> ctypes.CDLL:
    folder = Path(importlib.util.find_spec("xllamacpp").origin).parent
    lib = ctypes.CDLL(str(next(folder.glob("xllamacpp*.so"))))
    lib.llama_model_default_params.restype = lib.llama_context_default_params.restype = Opaque
    lib.llama_model_load_from_file.restype = lib.llama_init_from_model.restype = ctypes.c_void_p
    lib.llama_model_load_from_file.argtypes = [ctypes.c_char_p, Opaque]
    lib.llama_init_from_model.argtypes = [ctypes.c_void_p, Opaque]
    lib.llama_get_memory.restype, lib.llama_get_memory.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    lib.llama_memory_clear.argtypes = [ctypes.c_void_p, ctypes.c_bool]
    lib.llama_decode.argtypes = [ctypes.c_void_p, Batch]
    lib.llama_get_logits.restype, lib.llama_get_logits.argtypes = ctypes.POINTER(ctypes.c_float), [ctypes.c_void_p]
    silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
    lib.quiet = silent(lambda *_: None)  # kept: the library calls it later
    lib.llama_log_set(lib.quiet, None)
    lib.llama_backend_init()
    return lib


class Model:
    """A GGUF file, loaded."""

    def __init__(self, lib: ctypes.CDLL, path: Path, threads: int, tokens: int, vocabulary: int):
        self.lib, self.vocabulary = lib, vocabulary
        self.model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"error: llama.cpp does not load {path}")
        settings = lib.llama_context_default_params()
        fields = ctypes.cast(ctypes.byref(settings), ctypes.POINTER(ctypes.c_uint32))
        if any(fields[place] != default for place, default in PLACES.values()):
            raise SystemExit("error: this llama.cpp has other context parameters than this script knows")
        for name, value in {"n_ctx": tokens, "n_batch": 512, "n_threads": threads, "n_threads_batch": threads}.items():
            fields[PLACES[name][0]] = value
        self.context = lib.llama_init_from_model(self.model, settings)
        if not self.context:
            raise SystemExit(f"error: llama.cpp makes no context for {path}")

    def forget(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def logits(self, tokens: list[int], start: int = 0, last_only: bool = False) -> np.ndarray:
        """Return the logits behind each token, or behind the last, float32 (rows, vocabulary)."""
        count = len(tokens)
        zero = (ctypes.c_int32 * 1)(0)
        told = [0] * (count - 1) + [1] if last_only else [1] * count
        batch = Batch(
            count, (ctypes.c_int32 * count)(*tokens), None, (ctypes.c_int32 * count)(*range(start, start + count)),
            (ctypes.c_int32 * count)(*[1] * count), (ctypes.POINTER(ctypes.c_int32) * count)(*[zero] * count),
            (ctypes.c_int8 * count)(*told),
        )  # fmt: skip
        if self.lib.llama_decode(self.context, batch):
            raise SystemExit("error: llama_decode failed")
        rows = 1 if last_only else count
        return (
            np.ctypeslib.as_array(self.lib.llama_get_logits(self.context), (rows * self.vocabulary,)).reshape(rows, -1).copy()
        )


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits -= logits.max(1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def quality(models: dict[str, Model], windows: list[list[int]]) -> dict[str, dict]:
    """Return the perplexity of each, its KL to the first and the share of equal likeliest tokens."""
    losses = {name: [] for name in models}
    far = {name: [] for name in models}
    same = {name: [] for name in models}
    for window in windows:
        wanted = None
        for name, model in models.items():
            model.forget()
            found = log_softmax(model.logits(window))[:-1]
            losses[name].append(-float(found[np.arange(len(window) - 1), window[1:]].mean()))
            wanted = found if wanted is None else wanted
            far[name].append(float((np.exp(wanted) * (wanted - found)).sum(1).mean()))
            same[name].append(float((wanted.argmax(1) == found.argmax(1)).mean()))
    return {
        name: {"perplexity": math.exp(np.mean(losses[name])), "losses": losses[name], "kl": float(np.mean(far[name])),
               "same_top": float(np.mean(same[name]))}
        for name in models
    }  # fmt: skip


def speed(models: dict[str, Model], prompt: list[int], repeats: int, new_tokens: int = 8) -> dict[str, dict]:
    """Return the median ms of reading a prompt and of a token after it."""
    taken = {name: ([], []) for name in models}
    for turn in range(-1, repeats):
        for name, model in models.items():
            model.forget()
            started = time.perf_counter()
            token = int(model.logits(prompt, last_only=True)[0].argmax())
            read = time.perf_counter()
            for number in range(new_tokens):
                token = int(model.logits([token], len(prompt) + number, last_only=True)[0].argmax())
            if turn >= 0:
                taken[name][0].append(read - started)
                taken[name][1].append((time.perf_counter() - read) / new_tokens)
    return {
        name: {"prefill_ms": 1e3 * statistics.median(reads), "decode_ms": 1e3 * statistics.median(each)}
        for name, (reads, each) in taken.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", nargs="+", required=True, help="name=file, the first is what the others are compared with")
    parser.add_argument("--tokens", type=Path, help="windows of token ids (JSON); without them only speed is measured")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="rounds of the measurement of speed; 0: none")
    parser.add_argument("--output", type=Path, required=True)
    asked = parser.parse_args()
    import gguf

    lib, files = load_library(), dict(each.split("=", 1) for each in asked.files)
    fields = gguf.GGUFReader(next(iter(files.values()))).fields
    vocabulary = len(fields["tokenizer.ggml.tokens"].data)
    windows = json.loads(asked.tokens.read_text())[: asked.windows] if asked.tokens else []
    models = {name: Model(lib, Path(path), asked.threads, 1024, vocabulary) for name, path in files.items()}
    found = quality(models, windows) if windows else {name: {} for name in models}
    prompt = windows[0] if windows else list(range(5, 517))
    for name, each in (speed(models, prompt[:512], asked.repeats) if asked.repeats else {}).items():
        found[name] |= each
    for name, path in files.items():
        found[name] |= {"file": Path(path).name, "bytes": Path(path).stat().st_size}
        types = [tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors]
        found[name]["types"] = {kind: types.count(kind) for kind in sorted(set(types))}
        print(name, {key: value for key, value in found[name].items() if key != "losses"})
    asked.output.write_text(json.dumps({"library": "xllamacpp", "threads": asked.threads, "models": found}, indent=1))


if __name__ == "__main__":
    main()
