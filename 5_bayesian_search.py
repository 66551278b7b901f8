"""Run a pipeline of compression methods on a Llama: prune along its dependency graph, retrain it, quantize it.

Papers: see compactmind/methods/pruning/llama_importance.py, .../llama_pruning.py and .../retraining/causal_lm.py.
Run:   python 5_bayesian_search.py              (after python download_model.py; every setting: --help)
       python 5_bayesian_search.py --strategy fixed --output models/llama_small --pipeline \\
           '[{"method": "prune", "params": {"sparsity": 0.3}}, {"method": "retrain"}, {"method": "w8a8"}]'
Reads: models/llama, wikitext_data/{train,validation,test}.jsonl
Writes: models/llama_pruned        what the pipeline gives (--output), with perplexity after every step in its manifest
        results/pipeline_<name>.json    the same in one file
Time:  about 15 minutes on 2 CPU cores with the default pipeline (embedded profile), most of it retraining.
"""

import json
from pathlib import Path

import torch

from common import PROFILE, SearchConfig, parse_command_line, run_stage
from compactmind.checkpoint import identity_of, is_up_to_date, load_as_released, save_checkpoint
from compactmind.data import data_fingerprint, read_dataset_description
from compactmind.errors import CompactMindError
from compactmind.evaluation.perplexity import paired_ratio
from compactmind.files import write_json_atomically
from compactmind.methods.registry import Resources
from compactmind.search.compressor import layer_errors, read_pipeline, run_pipeline
from compactmind.text import load_documents, token_windows
from compactmind.training import TrainingState

# ------------------------------------------------------------------------------------------------------------ constants
# Every field, its reason and its range: common.SearchConfig. For example: for_profile(PROFILE, eval_windows=8)
CONFIG = SearchConfig.for_profile(PROFILE)

ERROR_WINDOWS = 2
"""Windows of validation text on which the error of every layer is measured."""


# ----------------------------------------------------------------------------------------------------------------- main
def check(config: SearchConfig) -> None:
    """Raise CompactMindError on a setting that makes no sense, before anything is loaded."""
    for name, least in (
        ("calibration_windows", 1),
        ("train_windows", 0),
        ("seq_len", 2),
        ("eval_windows", 0),
        ("held_out_windows", 1),
    ):
        if getattr(config, name) < least:
            raise CompactMindError(f"{name} {getattr(config, name)} is not at least {least}: for example --{name} 16")


def main(config: SearchConfig) -> None:
    check(config)
    steps = read_pipeline(config.pipeline)
    source = Path(config.model_path) if config.model_path else config.models_dir / "llama"
    output = Path(config.output) if config.output else config.models_dir / "llama_pruned"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fingerprint = data_fingerprint(config.text_dir)
    stage = {
        "script": "5_bayesian_search.py",
        "config": {
            **config.relevant("seed", "calibration_windows", "train_windows", "held_out_windows", "seq_len"),
            "text": fingerprint,
            "pipeline": [step.described() for step in steps],
        },
        "inputs": {"model": identity_of(source)},
    }
    if not config.force and is_up_to_date(output, stage):
        print(f"{output} is up to date: skipped (--force True makes it again)")
        return

    # ---- model and text
    model, tokenizer = load_as_released(source)
    released = model.dtype
    del model

    def dense():
        return load_as_released(source)[0].to(device).float()

    text = read_dataset_description(config.text_dir)["source"]["source"]

    def windows(split: str, count: int) -> torch.Tensor:
        return token_windows(tokenizer, load_documents(config.text_dir, split), config.seq_len, count)

    train = windows("train", config.train_windows)
    retrained = sum(step.method.kind == "retrain" for step in steps)  # two could not tell their states apart
    resources = Resources(
        calibration=train[: config.calibration_windows], train=train, held_out=windows("validation", config.held_out_windows),
        dense=dense, released=released, resume=TrainingState(output, stage) if retrained == 1 else None,
    )  # fmt: skip
    print(f"{len(train)} windows of {config.seq_len} tokens to train on, {len(resources.calibration)} of them to calibrate on")

    # ---- run and save
    found = run_pipeline(steps, resources, windows("test", config.eval_windows), f"{text}, test")
    errors = layer_errors(dense(), found.model, resources.held_out[:ERROR_WINDOWS])
    dense_losses = found.steps[0]["losses"]
    for row in found.steps:
        row["against_dense"] = paired_ratio(row.pop("losses"), dense_losses)
    record = {"pipeline": found.steps, "interaction": found.interaction, "layer_errors": errors}
    save_checkpoint(
        output, found.model, tokenizer, kind=found.kind, parent=source.name, stage=stage, quantization=found.quantization,
        data_fingerprint=fingerprint, extra=record, dtype=str(found.model.dtype).removeprefix("torch."),
    )  # fmt: skip
    if resources.resume:
        resources.resume.clear()
    path = config.results_dir / f"pipeline_{output.name}.json"
    write_json_atomically(path, record)

    # ---- show
    print(f"\n{'step':<12}{'perplexity':>12}{'against dense [95%, paired]':>32}{'seconds':>10}")
    for row in found.steps:
        low, high = (bound - 1 for bound in row["against_dense"]["interval"])
        against = f"{row['against_dense']['ratio'] - 1:+.2%} [{low:+.2%}, {high:+.2%}]"
        print(f"{row['method']:<12}{row['perplexity']:>12.3f}{against:>32}{row['seconds']:>10.0f}")
    if found.interaction is not None:
        print(f"interaction of quantization with the rest: {found.interaction:+.4f} nats")
    print(f"{json.dumps(found.steps[0]['protocol'])}\nsaved to {output}, steps in {path}")


if __name__ == "__main__":
    run_stage(main, parse_command_line(CONFIG))
