"""A model made small in one call: `from compactmind import compress`.

    small = compress("HuggingFaceTB/SmolLM2-135M-Instruct", target_compression=3, text="wiki.txt", output="models/small")
    small = compress("models/llama", method="w8a8")
    small = compress("models/student_pruned", method="w8a8")                  # a classifier

It is the compressor (compressor.py) with what it wants read from a folder and a text. What is reported is measured on text that no method
sees. A result that is there and was made from the same model, text and settings by the same code is loaded, not made again.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from compactmind.checkpoint import (
    Checkpoint,
    load_any,
    load_checkpoint,
    save_checkpoint,
    silence_libraries,
    skeleton_of,
)
from compactmind.code_version import code_version
from compactmind.data import EncodedSentences, Sentence, data_fingerprint, read_dataset_description
from compactmind.devices import default_device
from compactmind.errors import CompactMindError, first_line
from compactmind.evaluation.cost import weight_bytes
from compactmind.files import lock_directory
from compactmind.gguf_source import folder_of
from compactmind.guards import check_outputs, check_parent, check_tokenizer
from compactmind.manifest import MANIFEST, identity_of, is_up_to_date
from compactmind.methods.memory import Sizes, of_pipeline
from compactmind.methods.quantization.packed_model import quantize_model
from compactmind.methods.quantization.w8a8_encoder import quantize_encoder
from compactmind.methods.registry import METHODS, method_named
from compactmind.room import require_room
from compactmind.search.compressor import Step, check_steps, read_pipeline, run_pipeline
from compactmind.search.inputs import PipelineInputs, read_inputs, save_compressed
from compactmind.text import load_documents, read_documents, token_windows

SCRIPT = "compactmind.compress"
"""What the manifest of a result says made it."""
TEXT_DIR = Path("wikitext_data")
"""Where text is looked for if none is given: what download_model.py writes."""
CLASSIFIER_METHODS = ("w8a8", "nf4", "int8")
TRAIN_WINDOWS, HELD_OUT_WINDOWS = 2048, 4
"""Windows at most that retraining may read, and that decide which of its weights are kept."""
WANTED_OF_A_HUB = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*", "USE_POLICY*")


# ------------------------------------------------------------------------------------------------------------------- one call
def compress(
    model: str | Path,
    target_compression: float | None = None,
    text: str | Path | Sequence[str] | None = None,
    output: str | Path | None = None,
    *,
    method: str | None = None,
    pipeline: str | Sequence[dict[str, Any]] | None = None,
    seq_len: int = 512,
    calibration_windows: int = 32,
    eval_windows: int = 16,
    force: bool = False,
    **parameters: Any,
) -> Checkpoint:
    """Make a model small, save it to `output` and return it loaded, with `.model`, `.tokenizer` and `.manifest`.

    `model`: a folder, a GGUF file, or a name of the hub. A language model goes through one `method` of METHODS (gptq unless something else
    is asked for) with its `parameters`, or through a `pipeline` of them; `target_compression` is bytes of the weight file as released /
    bytes of the result, at least, and for methods that aim at a size (gptq). `text` calibrates it: a file (txt, jsonl, parquet), a list of
    documents, or a folder with train, validation and test as download_model.py writes it (wikitext_data unless something else is given); a
    part of it is held back and says in manifest["pipeline"] what was lost. A classifier takes `method` w8a8 (the default), nf4 or int8, and
    for nf4 sentences as `text`. Raises CompactMindError.
    """
    silence_libraries()
    source = _source_of(model)
    given = dict(parameters)
    if target_compression is not None:
        given["target_compression"] = target_compression
    if _is_classifier(source):
        if pipeline is not None:
            raise CompactMindError(f"{source} holds a classifier: pipelines are for language models; method is one of {CLASSIFIER_METHODS}")
        return _compress_classifier(source, method or "w8a8", given, text, output, force)
    steps = _steps_of(method, pipeline, given, target_compression)
    if output is None and pipeline is not None:
        raise CompactMindError('a pipeline has no name of its own: say where its model goes, for example output="models/small"')
    size = f"_{target_compression:g}x" if target_compression is not None else ""
    place = Path(output) if output is not None else Path("models") / f"{source.name}_{steps[0].method.name}{size}"
    check_outputs([place], SCRIPT, [source])
    read = _read_text(text)
    stage = {
        "script": SCRIPT,
        "code": code_version(__file__),
        "config": {
            "pipeline": [step.described() for step in steps], "text": read.fingerprint,
            "seq_len": seq_len, "calibration_windows": calibration_windows, "eval_windows": eval_windows,
        },
        "inputs": {"model": identity_of(source)},
    }  # fmt: skip
    with lock_directory(place):
        if not force and is_up_to_date(place, stage):
            return load_checkpoint(place, default_device())
        device = default_device()
        sizes = Sizes.of(skeleton_of(source), weight_bytes(source), calibration_windows, eval_windows, seq_len, device == "cuda")
        needs, file = of_pipeline(steps, sizes)
        require_room(needs, int(file), place, device, "fewer calibration_windows and a smaller seq_len take less")
        inputs = _inputs(source, read, device, steps, (seq_len, calibration_windows, eval_windows))
        save_compressed(place, run_pipeline(steps, inputs.resources, inputs.on_test), inputs, stage, {})
    return load_checkpoint(place, device)


def _source_of(model: str | Path) -> Path:
    """Return the folder of a model: the one that is named, one made of a GGUF file, or one fetched from the hub."""
    path = Path(model)
    if path.exists() or path.suffix.lower() == ".gguf":
        return folder_of(path, Path("models"))
    name, _, revision = str(model).partition("@")
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise CompactMindError(f"{model} is no folder, no GGUF file and no name of the hub: give one, for example owner/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(WANTED_OF_A_HUB)))
    except Exception as error:  # noqa: BLE001  no network, no such name, not allowed: each is an error class of its own
        raise CompactMindError(f"{model} is no folder and could not be fetched from the hub: {first_line(error)}") from None


def _is_classifier(source: Path) -> bool:
    if not (source / "config.json").is_file():
        raise CompactMindError(f"{source} holds no model (no config.json): give the folder of one")
    try:
        # Read as it stands: transformers would ask whether to run the modelling file of a pruned model.
        named = json.loads((source / "config.json").read_text(encoding="utf-8")).get("architectures") or [""]
    except (OSError, ValueError, AttributeError) as error:
        raise CompactMindError(f"{source / 'config.json'} could not be read ({str(error).strip()[:300]})") from None
    return named[0].endswith("ForSequenceClassification")


def _steps_of(method: str | None, pipeline: Any, given: dict[str, Any], target: float | None) -> list[Step]:
    """Return the checked steps of one method with its parameters, or of a pipeline."""
    if pipeline is not None:
        if method is not None or given:
            raise CompactMindError(f"a pipeline says all: leave out {', '.join(['method'] * bool(method) + sorted(given))}")
        return read_pipeline(pipeline)
    name = method or "gptq"
    try:
        aims = method_named(name).aim is not None
    except ValueError as error:
        raise CompactMindError(str(error)) from None
    if target is not None and not aims:
        able = ", ".join(each.name for each in METHODS.values() if each.aim)
        raise CompactMindError(f"{name} does not aim at a size: leave target_compression out, or choose {able}")
    if name == "gptq" and not {"target_compression", "bits"} & set(given):
        raise CompactMindError("say how small: target_compression=3, or bits=4 for the same width everywhere")
    return read_pipeline([{"method": name, "params": given}])


# ----------------------------------------------------------------------------------------------------------------- the text
@dataclass(frozen=True)
class _Text:
    """Documents by part, or all in one part, and what identifies them."""

    name: str
    parts: dict[str, list[str]]
    fingerprint: str


def _read_text(text: str | Path | Sequence[str] | None) -> _Text:
    if text is None and not TEXT_DIR.is_dir():
        raise CompactMindError(
            f"no text, and there is no {TEXT_DIR}/: give text=, a file or a list of documents to calibrate on and to measure with"
        )
    if text is None or (isinstance(text, (str, Path)) and Path(text).is_dir()):
        folder = Path(text or TEXT_DIR)
        name = read_dataset_description(folder)["source"]["source"]
        parts = {split: load_documents(folder, split) for split in ("train", "validation", "test")}
        return _Text(name, parts, data_fingerprint(folder))
    if isinstance(text, (str, Path)):
        if not Path(text).is_file():
            raise CompactMindError(f"text {str(text)[:80]!r} is no file and no folder: give the path of one, or a list of documents")
        name, documents = Path(text).name, read_documents(Path(text))
    else:
        name, documents = "text", list(text)
        if not all(isinstance(document, str) for document in documents):
            raise CompactMindError("text is no list of documents: each has to be a str")
    return _Text(name, {"all": documents}, hashlib.sha256(json.dumps(documents).encode()).hexdigest())


def _windows(text: _Text, tokenizer: PreTrainedTokenizerBase, seq_len: int, eval_windows: int) -> tuple[torch.Tensor, ...]:
    """Return windows to train on, to hold out and to report on: of text in one part its last quarter at most is kept back."""

    def of(part: str, count: int, choice: str) -> torch.Tensor:
        return token_windows(tokenizer, text.parts[part], seq_len, count, choice)

    if "all" not in text.parts:
        return of("train", TRAIN_WINDOWS, "first"), of("validation", HELD_OUT_WINDOWS, "spread"), of("test", eval_windows, "spread")
    every = of("all", TRAIN_WINDOWS + HELD_OUT_WINDOWS + eval_windows if eval_windows else 0, "first")
    if len(every) < 3:
        raise CompactMindError(
            f"the text has {len(every)} window(s) of {seq_len} tokens, and three are needed: to calibrate, to hold out and to measure; "
            "give more text or a smaller seq_len"
        )
    tested = min(eval_windows or len(every), max(1, len(every) // 4))
    held_out = min(HELD_OUT_WINDOWS, max(1, len(every) // 8))
    train, last = every[: -tested - held_out], every[len(every) - tested - held_out :]
    return train[:TRAIN_WINDOWS], last[:held_out], last[held_out:]


def _inputs(source: Path, text: _Text, device: str, steps: Sequence[Step], counts: tuple[int, int, int]) -> PipelineInputs:
    seq_len, calibration_windows, eval_windows = counts

    def cut(tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
        train, held_out, test = _windows(text, tokenizer, seq_len, eval_windows)
        return {"train": train, "held_out": held_out, "choose": held_out, "test": test}

    return read_inputs(
        source, device, lambda dense: check_steps(steps, dense), cut, calibration_windows,
        text=text.name, window_choice="last" if "all" in text.parts else "spread", fingerprint=text.fingerprint,
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- a classifier
def _compress_classifier(source: Path, method: str, given: dict[str, Any], text: Any, output: Any, force: bool) -> Checkpoint:
    """Quantize a classifier, on `text` (sentences or a file of them) where that helps."""
    if method not in CLASSIFIER_METHODS:
        raise CompactMindError(f"unknown method {method!r} for a classifier: choose from {', '.join(CLASSIFIER_METHODS)}")
    if given:
        raise CompactMindError(f"{method} of a classifier has no parameter {sorted(given)[0]!r}: leave it out")
    place = Path(output) if output is not None else Path("models") / f"{source.name}_{method}"
    check_outputs([place], SCRIPT, [source])
    sentences = [] if text is None else [line for part in _read_text(text).parts.values() for line in part if line.strip()]
    config = {"method": method, "text": hashlib.sha256(json.dumps(sentences).encode()).hexdigest()}
    stage = {"script": SCRIPT, "code": code_version(__file__), "config": config, "inputs": {"model": identity_of(source)}}
    with lock_directory(place):
        if not force and is_up_to_date(place, stage):
            return load_checkpoint(place, default_device())
        if (source / MANIFEST).is_file():
            check_parent(source, "model", "classifier")
        parent = load_any(source, default_device())
        check_tokenizer(parent.model, parent.tokenizer, source, padding=True)
        if method == "w8a8":
            description = quantize_encoder(parent.model)
        else:
            encoded = EncodedSentences(parent.tokenizer, [Sentence(each, 0) for each in sentences], 128) if sentences else None
            description = quantize_model(parent.model, method, calibration=encoded.evaluation_batches(32) if encoded else None)
        save_checkpoint(
            place, parent.model, parent.tokenizer, kind=method, parent=source.name, stage=stage, quantization=description,
            beside=source,
        )  # fmt: skip
    return load_checkpoint(place, default_device())
