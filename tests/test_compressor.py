"""The compressor: what is legal, what is measured after each step, and how the errors of two steps add up."""

import helpers
import pytest
import torch

from compactmind.checkpoint import load_checkpoint, save_checkpoint
from compactmind.errors import CompactMindError
from compactmind.evaluation.perplexity import perplexity
from compactmind.methods.llama import llama_shapes
from compactmind.methods.quantization.w8a8_linear import W8A8Linear
from compactmind.methods.registry import METHODS, Resources, method_named
from compactmind.search.compressor import EXAMPLE, layer_errors, read_pipeline, run_pipeline

PRUNE = {"method": "prune", "params": {"sparsity": 0.3, "round_to": 8}}
RETRAIN = {"method": "retrain", "params": {"tokens": 96}}
W8A8, NF4 = {"method": "w8a8"}, {"method": "nf4"}


@pytest.fixture(scope="module")
def windows():
    return helpers.example_windows(count=6, length=24)


@pytest.fixture(scope="module")
def resources(windows):
    return Resources(windows, windows, windows[:2], helpers.make_llama, torch.bfloat16)


# ---------------------------------------------------------------------------------------------------------------- legality
@pytest.mark.parametrize(
    ("pipeline", "expected"),
    [
        ("{", "no JSON"),
        ("{}", "no list of steps"),
        ([], "no list of steps"),
        (["prune"], "step 1.*keys method and params"),
        ([{"method": "prune", "parameters": {}}], "step 1.*keys method and params"),
        ([{"method": "shrink"}], "step 1.*unknown method 'shrink': choose from prune, retrain, w8a8, nf4"),
        ([{"method": "prune", "params": {"amount": 0.2}}], "step 1.*no parameter 'amount': choose from .*sparsity"),
        ([{"method": "prune", "params": {"sparsity": 2}}], r"step 1.*sparsity 2 is not in \[0, 1\)"),
        ([PRUNE, {"method": "w8a8", "params": {"alpha": 3}}], r"step 2.*alpha 3 is not in \[0, 1\]"),
        ([W8A8, PRUNE], "step 2, prune, comes after a quantization"),
        ([PRUNE, NF4, RETRAIN], "step 3, retrain, comes after a quantization"),
        ([W8A8, NF4], "step 2, nf4, comes after a quantization"),
        ([RETRAIN], "step 1, retrain, has nothing to recover from"),
    ],
    ids=str,
)
def test_an_illegal_pipeline_is_refused_before_anything_runs(pipeline, expected):
    with pytest.raises(CompactMindError, match=expected):
        read_pipeline(pipeline)


def test_the_example_in_the_messages_is_legal_and_described_with_every_parameter():
    steps = read_pipeline(EXAMPLE)
    assert [step.method.name for step in steps] == ["prune", "retrain", "w8a8"]
    assert steps[0].described()["params"]["sparsity"] == 0.2 and steps[0].described()["params"]["criterion"] == "taylor"
    assert read_pipeline([step.described() for step in steps]) == steps


def test_the_table_of_methods_names_itself():
    assert all(name == method.name and method_named(name) is method for name, method in METHODS.items())
    assert {method.kind for method in METHODS.values()} == {"prune", "retrain", "quantize"}


# --------------------------------------------------------------------------------------------------------------- running
def test_every_step_is_measured_and_errors_add_up_but_for_the_interaction(resources, windows):
    found = run_pipeline(read_pipeline([PRUNE, W8A8]), resources, windows, "made up")
    assert [row["method"] for row in found.steps] == ["dense", "prune", "w8a8"] and found.kind == "w8a8"
    assert found.steps[0]["loss"] == pytest.approx(perplexity(helpers.make_llama(), windows, "x")["loss"])
    alone = run_pipeline(read_pipeline([W8A8]), resources, windows, "made up")
    dense, pruned, whole = (row["loss"] for row in found.steps)
    assert found.interaction == pytest.approx((whole - dense) - (pruned - dense) - (alone.steps[1]["loss"] - dense), abs=1e-9)
    assert alone.interaction is None
    assert found.steps[1]["done"]["sparsity"] == pytest.approx(0.3, abs=0.01)
    assert found.quantization["method"] == "smoothquant"


@pytest.mark.parametrize("last", [[], [W8A8], [NF4]], ids=["pruned", "w8a8", "nf4"])
@pytest.mark.parametrize("scope", ["uniform", "global"])
def test_what_is_measured_is_what_is_saved(resources, windows, last, scope, tmp_path):
    prune = {
        "method": "prune",
        "params": {"sparsity": 0.3, "round_to": 16, "scope": scope, "structures": ["channels", "groups"]},
    }
    prune["params"]["round_to"] = 8 if scope == "uniform" else 4
    found = run_pipeline(read_pipeline([prune, *last]), resources, windows, "made up")
    save_checkpoint(
        tmp_path / "small", found.model, helpers.make_byte_tokenizer(), kind=found.kind, parent="x",
        stage={"script": "x", "config": {}, "inputs": {}}, quantization=found.quantization,
    )  # fmt: skip
    again = load_checkpoint(tmp_path / "small")
    assert perplexity(again.model, windows, "x")["loss"] == pytest.approx(found.steps[-1]["loss"], rel=1e-5)
    widths = {shape["intermediate_size"] for shape in again.manifest["layers"]}
    assert max(widths) <= 48 and again.manifest["layers"] == llama_shapes(again.model)
    assert any(isinstance(module, W8A8Linear) for module in again.model.modules()) == (last == [W8A8])


def test_retraining_is_given_the_dense_model_and_never_makes_it_worse(resources, windows):
    found = run_pipeline(read_pipeline([PRUNE, RETRAIN]), resources, windows, "made up")
    done = found.steps[2]["done"]
    assert found.kind == "pruned" and done["tokens_seen"] >= 96
    assert done["loss_after"] <= done["loss_before"]


@torch.no_grad()
def test_the_error_of_every_layer_is_relative_to_the_dense_model(windows):
    dense, other = helpers.make_llama(), helpers.make_llama()
    assert layer_errors(dense, other, windows) == [0, 0]
    other.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    first, second = layer_errors(dense, other, windows)
    expected = dense(windows, output_hidden_states=True).hidden_states[1]
    assert first == 0 and second > 0.01 and expected.shape == (6, 24, 32)
    assert layer_errors(dense, helpers.make_llama(num_hidden_layers=1), windows) is None
