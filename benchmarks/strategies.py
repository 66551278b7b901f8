"""Which strategy finds the best pipeline soonest? Searches in a table: every pipeline of a space, measured once. A part of search.py.

Every trial of every strategy is a look-up: it gives what was measured of that pipeline and is charged the seconds it took. Pipelines are
chosen by KL to the dense model on validation text and reported by KL on test text.
"""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from common import SearchConfig
from compactmind.checkpoint import load_as_released
from compactmind.devices import default_device
from compactmind.evaluation.cost import weight_bytes
from compactmind.evaluation.divergence import measure_windows
from compactmind.files import write_json_atomically
from compactmind.forward import LogitsOf
from compactmind.methods.registry import Resources
from compactmind.search.compressor import Measure, pipeline_name, read_pipeline, run_pipeline, stored_bytes
from compactmind.search.space import Space, make_space
from compactmind.search.strategies import key_of
from compactmind.text import load_documents, token_windows

METHODS = ("smooth", "w8a8", "nf4", "gptq")
TABLE = {
    "smooth.alpha": [0.5, 0.8],
    "w8a8.alpha": [0.5], "w8a8.rotations": [["o"]], "w8a8.activations": ["per_token"], "w8a8.embeddings": ["int8"],
    "nf4.double_quantization": [True], "nf4.compensation": [True, False], "nf4.embeddings": ["int8", "int4"],
    "gptq.zero": ["symmetric"], "gptq.damping": [0.05],
    "gptq.bits": [3, 4, 5], "gptq.group_size": [32, 128], "gptq.compensation": [True, False], "gptq.embeddings": ["int8", "int4"],
}  # fmt: skip
"""A space of quantizations, each alone and after smoothing: 87 pipelines of seconds each."""
SEQ_LEN, CALIBRATION, VALIDATION, TEST = 128, 4, 2, 6
"""Tokens of a window, and how many of them are calibrated on, chosen by and reported on."""


def measure_table(space: Space, config: Any, stage: SearchConfig, path: Path) -> dict[str, dict]:
    """Return what every point of the space gives, by `key_of`; points of an earlier run of the same kind are taken over.

    A row: its pipeline, CPU seconds of making it and of measuring it on validation text (whatever else the machine does), bytes and
    compression ratio, and on `validation` and `test` text its kl and perplexity.
    """
    source, device = config.models_dir / "llama", default_device()
    context = {"seq_len": SEQ_LEN, "windows": [CALIBRATION, VALIDATION, TEST], "bytes": weight_bytes(source), "blocks": config.blocks}
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found = known.get("points", {}) if known.get("context") == context else {}
    pipelines = {key_of(steps): steps for steps in (read_pipeline(space.pipeline(point)) for point in space.points())}
    if not pipelines.keys() - found.keys():
        return {key: found[key] for key in pipelines}
    model, tokenizer = load_as_released(source)

    def windows(split: str, count: int) -> torch.Tensor:
        choice = "first" if split == "train" else stage.window_choice
        return token_windows(tokenizer, load_documents(stage.text_dir, split), SEQ_LEN, count, choice)

    texts = {"validation": windows("validation", VALIDATION), "test": windows("test", TEST)}
    size_of_dense = sum(weight.numel() * weight.element_size() for weight in first_blocks(model, config.blocks).parameters())
    resources = Resources(
        windows("train", CALIBRATION), windows("train", CALIBRATION), texts["validation"],
        dense=lambda: first_blocks(load_as_released(source)[0], config.blocks).to(device).float(), released=model.dtype,
        released_bytes=size_of_dense, device=device,
    )  # fmt: skip
    dense = {name: LogitsOf(resources.teacher(), text) for name, text in texts.items()}

    def measured(model, name: str) -> dict[str, float]:
        each = measure_windows({"": model}, texts[name], dense[name])[""]
        return {"kl": each["divergence"]["mean"], "perplexity": math.exp(each["losses"].mean().item())}

    nothing = Measure("nothing", lambda _: {})
    for number, (key, steps) in enumerate(pipelines.items(), start=1):
        if key in found:
            continue
        begun = time.process_time()
        made = run_pipeline(steps, resources, nothing, show=False)
        validation = measured(made.model, "validation")
        seconds, size = time.process_time() - begun, stored_bytes(made, resources.released)
        row = {
            "pipeline": [step.described() for step in steps], "seconds": seconds, "bytes": size,
            "compression_ratio": size_of_dense / size, "validation": validation, "test": measured(made.model, "test"),
        }  # fmt: skip
        found[key] = row
        write_json_atomically(path, {"context": context, "points": found})
        print(
            f"{number:>4}/{len(pipelines)} {pipeline_name(steps):<16} KL {validation['kl']:.4f} {row['compression_ratio']:.2f}x "
            f"{seconds:.1f} s",
            flush=True,
        )
    return found


def first_blocks(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """Leave a Llama, in place, its first `count` blocks, 0: all; return it. What it says then is no language, but how roundings change it
    is as rugged as in the whole model, and every pipeline takes a fraction of the time."""
    if count:
        model.model.layers = model.model.layers[:count]
        model.config.num_hidden_layers = count
    return model


def table_space() -> Space:
    return make_space(METHODS, choices=TABLE)
