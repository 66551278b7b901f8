"""From a pipeline to a saved model and what there is to know of it: the model first, so that no measurement can lose it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compactmind.checkpoint import load_checkpoint
from compactmind.manifest import add_to_manifest, is_up_to_date, read_manifest
from compactmind.search.cache import PrefixCache
from compactmind.search.compressor import Step, interaction, layer_errors, measure_or_none, run_pipeline
from compactmind.search.inputs import PipelineInputs, save_compressed
from compactmind.training import TrainingState

ERROR_WINDOWS = 2
"""Windows of held-out text on which the error of every layer is measured."""
DIAGNOSES = ("interaction", "layer_errors")


def known_record(output: Path, stage: dict[str, Any], extra: Sequence[str] = (), verify: bool = True) -> dict[str, Any] | None:
    """Return what the manifest of a model says of the pipeline it was made by, None if it is not there or was made of something else.

    The record lacks DIAGNOSES where the process was killed between saving and measuring. `extra`: what else `make_pipeline` was given.
    """
    if not is_up_to_date(output, stage, verify):
        return None
    manifest = read_manifest(output)
    return {name: manifest[name] for name in ("pipeline", *extra, *DIAGNOSES) if name in manifest}


def make_pipeline(
    output: Path, steps: Sequence[Step], inputs: PipelineInputs, cache: PrefixCache | None, stage: dict[str, Any],
    known: dict[str, Any] | None, extra: dict[str, Any],
) -> dict[str, Any]:
    """Run a pipeline, save its model in `output`, then measure the error of every layer and of the steps together.

    Return the record, which the manifest holds too: that of `save_compressed`, `interaction` and `layer_errors`. A model that is there
    (`known`: its record) is measured only. Whoever calls holds the lock of `output`.
    """
    resources = inputs.resources
    if known:
        record, model = known, load_checkpoint(output, resources.device).model
    else:
        if sum(step.method.kind == "retrain" for step in steps) == 1:  # two could not tell their states apart
            resources.resume = TrainingState(output, stage)
        compressed = run_pipeline(steps, resources, inputs.on_test, cache=cache)
        record = save_compressed(output, compressed, inputs, stage, extra)
        if resources.resume:
            resources.resume.clear()
        model = compressed.model
        del compressed
    errors = measure_or_none(
        "the error of every layer",
        lambda model=model: layer_errors(resources.teacher(), model, resources.held_out[:ERROR_WINDOWS]),
    )
    del model
    resources.release_teacher()
    together = measure_or_none("the interaction", lambda: interaction(steps, resources, inputs.on_test, record["pipeline"], cache))
    record |= {"interaction": together, "layer_errors": errors}
    add_to_manifest(output, record)
    return record
