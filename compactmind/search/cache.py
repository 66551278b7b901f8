"""Models half way through a pipeline or at its end, found again by what was done to them: pipelines that begin alike share that beginning.
And measurements of the dense model, by name.

An entry is a directory named by the hash of its context (model, data, windows) and its steps: weights as a checkpoint holds them,
configuration, and the row of the last step. Weights whose values a half-precision file holds exactly are stored in that dtype. The
entries used longest ago go when the directory grows beyond its limit.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from compactmind.attention import with_attention_kernel
from compactmind.checkpoint import model_class_named, without_tied_copies, write_model
from compactmind.errors import CompactMindError
from compactmind.files import replace_directory, write_json_atomically
from compactmind.formats.table import FORMATS, parameters_of
from compactmind.precision import dtype_to_hold, widen

RECORD = "record.json"


class PrefixCache:
    """A directory of models by what was done to them; several processes may use it at once.

    What is measured of a model is kept beside it, by the name of the measure: the same model may be looked at on several texts.
    """

    def __init__(self, directory: Path, context: dict[str, Any], limit_bytes: int):
        self.directory, self.context, self.limit_bytes = directory, json.dumps(context, sort_keys=True), limit_bytes
        self.complained = False

    def place(self, steps: Sequence[str]) -> Path:
        """Return where the model after the steps with these identities lies, or would lie."""
        return self.directory / hashlib.sha256(f"{self.context} {' '.join(steps)}".encode()).hexdigest()[:24]

    def record(self, steps: Sequence[str]) -> dict[str, Any] | None:
        """Return what is known of the last of these steps: `row`, and `measured` by measure; None if it is not there or damaged."""
        try:
            record = json.loads((self.place(steps) / RECORD).read_text(encoding="utf-8"))
            record["architecture"], record["parameters"], record["kind"], record["row"]["done"], record["measured"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return record

    def model(self, steps: Sequence[str], device: str = "cpu") -> PreTrainedModel | None:
        """Return the model after these steps in evaluation mode, computing in float32; None if it is not there or damaged."""
        record, place = self.record(steps), self.place(steps)
        if record is None:
            return None
        try:
            model_class, form = model_class_named(record["architecture"]), FORMATS[record["kind"]]
            held = dtype_to_hold(record["architecture"], record["parameters"])
            model = with_attention_kernel(form.load(place, model_class, record["row"]["done"], device, held))
            if held is None:
                widen(model)
            os.utime(place)  # used just now
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError):
            return None
        return model.to(device).eval()

    def save(self, steps: Sequence[str], model: PreTrainedModel, kind: str, row: dict[str, Any], released: torch.dtype) -> None:
        """Keep a model of a `kind` (a key of FORMATS) and the row of its last step, then make room; one beyond the limit is not kept."""
        form = FORMATS[kind]
        floats = {name: weight for name, weight in model.named_parameters() if form.as_released(name, weight)}
        exact = all(torch.equal(weight, weight.to(released).to(weight.dtype)) for weight in floats.values())
        state = {
            name: (tensor.to(released) if exact and name in floats else tensor).detach().cpu().contiguous()
            for name, tensor in without_tied_copies(model.state_dict()).items()
        }
        size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        if size > self.limit_bytes:
            if not self.complained:
                print(
                    f"models half way through pipelines are not kept (said once): {size / 1e9:.1f} GB are more than --cache_gb "
                    f"{self.limit_bytes / 1e9:g}", flush=True,
                )  # fmt: skip
            self.complained = True
            return
        record = {
            "architecture": type(model).__name__, "parameters": parameters_of(model), "kind": kind, "row": row, "measured": {},
        }  # fmt: skip
        try:
            with replace_directory(self.place(steps), needed_bytes=size + 1_000_000) as temporary:
                write_model(temporary, model, state, form, row["done"], "float32")
                write_json_atomically(temporary / RECORD, record)
            self.evict()
        except (OSError, CompactMindError, SafetensorError) as error:  # a full disk, or another process at the same entry
            if not self.complained:
                print(f"the search goes on, but a model half way through was not kept (said once): {error}", flush=True)
            self.complained = True

    def add_measured(self, steps: Sequence[str], measure: str, values: dict[str, Any]) -> None:
        """Keep what was measured of the model after these steps, if it is there."""
        if record := self.record(steps):
            record["measured"][measure] = values
            with suppress(OSError, CompactMindError):
                write_json_atomically(self.place(steps) / RECORD, record)

    def evict(self) -> None:
        """Remove the entries used longest ago until the rest is within the limit."""
        entries = sorted((path.stat().st_mtime, path) for path in self.directory.iterdir() if (path / RECORD).is_file())
        sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for _, path in entries}
        for _, path in entries[:-1]:
            if sum(sizes.values()) <= self.limit_bytes:
                return
            shutil.rmtree(path, ignore_errors=True)
            del sizes[path]


class Kept:
    """What an earlier run has found out about the dense model, by name, in a directory, as long as it belongs to the same.

    `again`: nothing is taken from there. Whatever is wrong with a file, what it holds is made again.
    """

    def __init__(self, place: Path, belongs_to: dict[str, Any], again: bool):
        self.place, self.belongs_to, self.again = place, belongs_to, again

    def __call__(self, name: str, make: Callable[[], Any]) -> Any:
        """Return the value of that name, JSON, or what `make` returns, which is kept."""
        path = self.place / f"{re.sub(r'[^a-z0-9.]+', '_', name)}.json"
        with suppress(OSError, ValueError, KeyError, TypeError):
            known = json.loads(path.read_text(encoding="utf-8"))
            if not self.again and known["belongs_to"] == self.belongs_to:
                print(f"{name}: measured by an earlier run, {path}")
                return known["value"]
        value = make()
        self.place.mkdir(parents=True, exist_ok=True)
        write_json_atomically(path, {"belongs_to": self.belongs_to, "value": value})
        return value

    def states(self, windows: torch.Tensor) -> Path | None:
        """Return where states of the dense model on `windows` (windows, seq_len) are, or go: see LogitsOf; None with `again`."""
        digest = hashlib.sha256(f"{self.belongs_to['model']} {tuple(windows.shape)}".encode() + windows.cpu().numpy().tobytes())
        return None if self.again else self.place / f"states_{digest.hexdigest()[:16]}.safetensors"
