"""What a manifest has recorded of perplexity and KL is taken where one window confirms it, and measured where it does not."""

import json
from types import SimpleNamespace

import helpers
import pytest
import torch

from compactmind.evaluation.divergence import measure_windows
from compactmind.evaluation.recorded import quality_record, recorded_quality
from compactmind.forward import LogitsOf


def measured(seed: int = 1):
    """Return a dense model's logits, another model, windows, what is measured of it, and a manifest that has recorded that."""
    dense, model, windows = helpers.make_llama(), helpers.make_llama(seed=seed), helpers.example_windows(4, 16)
    logits = LogitsOf(dense, windows)
    result = measure_windows({"": model}, windows, logits)[""]
    manifest = json.loads(json.dumps(quality_record(windows, "base", result["losses"], result["divergence"])))
    return logits, model, windows, result, manifest


def test_one_window_confirms_what_was_recorded_of_all():
    logits, model, windows, result, manifest = measured()
    read = []
    model.register_forward_pre_hook(lambda *_: read.append(1))
    known = recorded_quality(SimpleNamespace(model=model, manifest=manifest), windows, "base", logits)
    assert torch.equal(known["losses"], result["losses"]) and len(read) == 1
    assert json.dumps(known["divergence"]) == json.dumps(result["divergence"])


@pytest.mark.parametrize("other", ["weights", "windows", "base", "no base", "nothing", "no divergence", "a loss less", "no list"])
def test_what_is_of_something_else_is_not_taken(other):
    logits, model, windows, _, manifest = measured()
    base = {"base": "another", "no base": None}.get(other, "base")
    if other == "weights":  # the file does not load as it was saved
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight *= 1.1
    if other == "windows":
        windows = windows.flip(0)
    if other == "nothing":
        manifest = {}
    if other == "no divergence":
        manifest["quality"]["divergence"] = None
    if other == "a loss less":
        manifest["quality"]["losses"].pop()
    if other == "no list":
        del manifest["quality"]["divergence"]["divergences"]
    assert recorded_quality(SimpleNamespace(model=model, manifest=manifest), windows, base, logits) is None
