"""The compressor: what is legal, what is measured after each step, and how the errors of two steps add up."""

import copy
import json

import helpers
import pytest
import torch

from compactmind.checkpoint import bytes_to_save, load_checkpoint, save_checkpoint
from compactmind.errors import CompactMindError
from compactmind.evaluation.perplexity import perplexity
from compactmind.methods import registry
from compactmind.methods.llama import llama_blocks, llama_shapes
from compactmind.methods.quantization import gptq_model
from compactmind.methods.quantization.gptq_model import SENSITIVITY_WINDOWS
from compactmind.methods.quantization.w8a8_linear import W8A8Linear
from compactmind.methods.registry import METHODS, Resources, method_named
from compactmind.search.compressor import (
    EXAMPLE,
    Measure,
    idle_problem,
    interaction,
    layer_errors,
    read_pipeline,
    run_pipeline,
    store_as_released,
    stored_bytes,
)
from compactmind.search.space import make_space

PRUNE = {"method": "prune", "params": {"sparsity": 0.3, "round_to": 8}}
RETRAIN = {"method": "retrain", "params": {"tokens": 96}}
W8A8, NF4, SMOOTH = {"method": "w8a8"}, {"method": "nf4"}, {"method": "smooth", "params": {"alpha": 0.6}}


@pytest.fixture(scope="module")
def windows():
    return helpers.example_windows(count=6, length=24)


@pytest.fixture(scope="module")
def resources(windows):
    return Resources(windows, windows, windows[:2], helpers.make_llama, torch.bfloat16)


@pytest.fixture
def measure(windows):
    return Measure(
        "made up", lambda model: {name: perplexity(model, windows, "made up")[name] for name in ("loss", "perplexity")}
    )


# ---------------------------------------------------------------------------------------------------------------- legality
@pytest.mark.parametrize(
    ("pipeline", "expected"),
    [
        ("{", "no JSON"),
        ("{}", "no list of steps"),
        ([], "no list of steps"),
        (["prune"], "step 1.*keys method and params"),
        ([{"method": "prune", "parameters": {}}], "step 1.*keys method and params"),
        ([{"method": "shrink"}], "step 1.*unknown method 'shrink': choose from prune, sparse24, retrain, smooth, w8a8, nf4"),
        ([{"method": "prune", "params": {"amount": 0.2}}], "step 1.*no parameter 'amount': choose from .*sparsity"),
        ([{"method": "prune", "params": {"sparsity": 2}}], r"step 1.*sparsity 2 is not in \[0, 1\)"),
        ([PRUNE, {"method": "w8a8", "params": {"alpha": 3}}], r"step 2.*alpha 3 is not in \[0, 1\]"),
        ([W8A8, PRUNE], "step 2, prune, comes after a quantization"),
        ([PRUNE, NF4, RETRAIN], "step 3, retrain, comes after a quantization"),
        ([W8A8, {"method": "gptq"}], "step 2, gptq, comes after a quantization"),
        ([{"method": "gptq"}, NF4], "step 2, nf4, comes after a quantization"),
        ([W8A8, NF4], "step 2, nf4, comes after a quantization"),
        ([RETRAIN], "step 1, retrain, has nothing to recover from: .* a quantization behind it"),
        ([RETRAIN, PRUNE], "step 1, retrain, has nothing to recover from yet: put it behind"),
        ([RETRAIN, PRUNE, NF4], "step 1, retrain, has nothing to recover from yet: put it behind"),
        ([PRUNE, SMOOTH], "step 2, smooth, changes nothing but how well a quantization goes"),
        ([W8A8, SMOOTH], "step 1, w8a8|step 2, smooth"),
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
    assert {method.kind for method in METHODS.values()} == {"prune", "sparsify", "retrain", "smooth", "quantize"}


# --------------------------------------------------------------------------------------------------------------- running
def test_every_step_is_measured_and_errors_add_up_but_for_the_interaction(resources, measure, windows):
    steps = read_pipeline([PRUNE, W8A8])
    result = run_pipeline(steps, resources, measure)
    assert [row["method"] for row in result.steps] == ["dense", "prune", "w8a8"] and result.kind == "w8a8"
    assert result.steps[0]["loss"] == pytest.approx(perplexity(helpers.make_llama(), windows, "x")["loss"])
    alone = run_pipeline(read_pipeline([W8A8]), resources, measure)
    dense, pruned, whole = (row["loss"] for row in result.steps)
    expected = (whole - dense) - (pruned - dense) - (alone.steps[1]["loss"] - dense)
    assert interaction(steps, resources, measure, result.steps) == pytest.approx(expected, abs=1e-9)
    assert interaction(steps[:1], resources, measure, result.steps[:2]) is None
    assert result.steps[1]["done"]["sparsity"] == pytest.approx(0.3, abs=0.01)
    assert result.quantization["method"] == "smoothquant"


@pytest.mark.parametrize("order", [[SMOOTH, PRUNE, NF4], [PRUNE, SMOOTH, NF4], [PRUNE, RETRAIN, SMOOTH, W8A8]], ids=str)
def test_smoothing_changes_nothing_by_itself_wherever_it_stands(resources, measure, order):
    result = run_pipeline(read_pipeline(order), resources, measure)
    at = [row["method"] for row in result.steps].index("smooth")
    assert result.steps[at]["loss"] == pytest.approx(result.steps[at - 1]["loss"], abs=1e-4)
    assert result.kind == order[-1]["method"]


def test_a_stream_is_turned_for_the_step_that_wants_it_alone(resources, measure):
    turned = {"method": "w8a8", "params": {"alpha": 0.5, "rotations": ["o"], "stream_rotation": True}}
    plain, result, again = (run_pipeline(read_pipeline([step]), resources, measure) for step in (W8A8, turned, W8A8))
    assert result.quantization["stream_rotation"] and not plain.quantization["stream_rotation"]
    assert abs(result.steps[1]["loss"] - result.steps[0]["loss"]) < 0.05 and result.steps[1]["loss"] != plain.steps[1]["loss"]
    assert again.steps[1]["loss"] == plain.steps[1]["loss"]


def test_what_is_known_of_the_dense_model_is_computed_once_and_of_others_forgotten(resources, measure, monkeypatch):
    calls = []
    for name in ("score", "calibrate_llama"):
        original = getattr(registry, name)
        monkeypatch.setattr(registry, name, lambda *args, f=original, n=name, **options: calls.append(n) or f(*args, **options))
    mine = Resources(resources.calibration, resources.train, resources.held_out, helpers.make_llama, torch.bfloat16)
    for sparsity in (0.3, 0.4):
        prune = {"method": "prune", "params": {"sparsity": sparsity, "round_to": 8}}
        first, second = (run_pipeline(read_pipeline([prune, W8A8]), mine, measure) for _ in range(2))
        assert first.steps[-1]["loss"] == second.steps[-1]["loss"]
    run_pipeline(read_pipeline([W8A8]), mine, measure)
    run_pipeline(read_pipeline([{"method": "w8a8", "params": {"alpha": 0.7}}]), mine, measure)
    assert calls.count("score") == 1  # one for the dense model, whatever its sparsity
    assert calls.count("calibrate_llama") == 3  # two pruned models, once each, and the dense one
    assert len([key for key in mine.remembered if key[0]]) <= 1


def test_numbers_are_remembered_of_every_model(resources, measure, monkeypatch):
    calls, original = [], registry.tensor_choices
    monkeypatch.setattr(registry, "tensor_choices", lambda *args, **options: calls.append(1) or original(*args, **options))
    for alpha in (0.5, 0.7, 0.5, 0.7):
        smooth = {"method": "smooth", "params": {"alpha": alpha}}
        run_pipeline(read_pipeline([smooth, {"method": "gptq", "params": {"target_compression": 3}}]), resources, measure, show=False)
    assert len(calls) == 2


def test_what_cuts_cost_is_measured_once_for_all_sparsities_and_kept(resources, measure, monkeypatch):
    calls, kept, original = [], {}, registry.losses_for
    monkeypatch.setattr(registry, "losses_for", lambda *args: calls.append(1) or original(*args))
    for resources.keep in (lambda name, make: kept.setdefault(name, json.loads(json.dumps(make()))), lambda name, make: kept[name]):
        resources.numbers.clear()
        results = []
        for sparsity in (0.2, 0.4):
            prune = {"method": "prune", "params": {"sparsity": sparsity, "round_to": 4, "scope": "measured"}}
            results.append(run_pipeline(read_pipeline([prune]), resources, measure, show=False).steps[-1]["done"])
        assert [done["sparsity"] for done in results] == [pytest.approx(0.2, abs=0.01), pytest.approx(0.4, abs=0.01)]
    assert len(calls) == len(kept) == 1


@pytest.mark.parametrize("last", [[], [W8A8], [NF4]], ids=["pruned", "w8a8", "nf4"])
@pytest.mark.parametrize("scope", ["uniform", "global"])
def test_what_is_measured_is_what_is_saved(resources, windows, measure, last, scope, tmp_path):
    prune = {
        "method": "prune",
        "params": {"sparsity": 0.3, "round_to": 16, "scope": scope, "structures": ["channels", "groups"]},
    }
    prune["params"]["round_to"] = 8 if scope == "uniform" else 4
    result = run_pipeline(read_pipeline([prune, *last]), resources, measure)
    size = stored_bytes(result, resources.released)
    with store_as_released(result, resources.released):
        assert size == bytes_to_save(result.model)
        save_checkpoint(
            tmp_path / "small", result.model, helpers.make_byte_tokenizer(), kind=result.kind, parent="x",
            stage={"script": "x", "config": {}, "inputs": {}}, quantization=result.quantization,
        )  # fmt: skip
    again = load_checkpoint(tmp_path / "small")
    assert perplexity(again.model, windows, "x")["loss"] == pytest.approx(result.steps[-1]["loss"], rel=1e-5)
    widths = {shape["intermediate_size"] for shape in again.manifest["layers"]}
    assert max(widths) <= 48 and again.manifest["layers"] == llama_shapes(again.model)
    assert any(isinstance(module, W8A8Linear) for module in again.model.modules()) == (last == [W8A8])


ORDERS = (
    *make_space(tuple(name for name in METHODS if name != "sparse24"), max_length=4).orders,
    ("sparse24",), ("sparse24", "retrain", "w8a8"), ("prune", "sparse24", "nf4"),
)  # fmt: skip
SETTINGS = {
    "prune": {"sparsity": 0.3, "round_to": 8},
    "retrain": {"tokens": 96, "lr": 0.01},
    "smooth": {"alpha": 0.8},
    "w8a8": {"embeddings": "int8"},
}
"""Retraining at a rate at which it changes the weights; a smoothing that is far from 1."""
WITH_ZEROS = {"w8a8": {"rotations": []}, "nf4": {"compensation": False}}
"""What leaves the zeros that are there."""


def check_that_the_file_holds_what_is_measured(steps, resources, windows, folder):
    measured = []

    def logits_of(model) -> torch.Tensor:
        with torch.no_grad():
            return model(windows).logits

    look = Measure("logits", lambda model: measured.append(logits_of(model)) or {})
    result = run_pipeline(steps, resources, look, show=False)
    with store_as_released(result, resources.released):
        save_checkpoint(
            folder, result.model, helpers.make_byte_tokenizer(), kind=result.kind, parent="x", quantization=result.quantization,
            stage={"script": "x", "config": {}, "inputs": {}},
        )  # fmt: skip
    assert torch.equal(logits_of(load_checkpoint(folder).model), measured[-1])
    assert torch.equal(logits_of(result.model), measured[-1])  # and what is in memory is as it was


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("order", ORDERS, ids=" > ".join)
def test_the_file_of_every_legal_pipeline_gives_the_very_logits_that_were_measured(windows, order, tied, tmp_path):
    dense = helpers.released_llama(helpers.make_llama(tie_word_embeddings=tied, attention_bias=True, scale=0.5)).float
    resources = Resources(windows, windows, windows[:2], lambda: copy.deepcopy(dense()), torch.bfloat16)
    settings = WITH_ZEROS if "sparse24" in order else {}
    steps = read_pipeline([{"method": name, "params": SETTINGS.get(name, {}) | settings.get(name, {})} for name in order])
    check_that_the_file_holds_what_is_measured(steps, resources, windows, tmp_path / "small")


@pytest.mark.parametrize("activations", ["per_token", "per_tensor", "per_tensor_static"])
@pytest.mark.parametrize("embeddings", ["as_released", "int8"])
@pytest.mark.parametrize("before", [["smooth"], ["prune"]], ids=str)
def test_the_file_of_every_w8a8_gives_the_very_logits_that_were_measured(windows, before, embeddings, activations, tmp_path):
    resources = Resources(windows, windows, windows[:2], lambda: helpers.released_llama().float(), torch.bfloat16)
    last = {"method": "w8a8", "params": {"embeddings": embeddings, "activations": activations, "alpha": 0.6}}
    steps = read_pipeline([*({"method": name, "params": SETTINGS[name]} for name in before), last])
    check_that_the_file_holds_what_is_measured(steps, resources, windows, tmp_path / "small")


def test_retraining_is_given_the_dense_model_and_never_makes_it_worse(resources, measure):
    result = run_pipeline(read_pipeline([PRUNE, RETRAIN]), resources, measure)
    done = result.steps[2]["done"]
    assert result.kind == "pruned" and done["tokens_seen"] >= 96
    assert done["loss_after"] <= done["loss_before"]


@pytest.mark.parametrize("before", [[], [SMOOTH]], ids=str)
def test_what_would_learn_from_the_model_that_it_still_equals_is_refused(resources, measure, before):
    alone = {**RETRAIN, "params": {**RETRAIN["params"], "alpha": 1.0}}
    message = f"step {len(before) + 1}, retrain, would change nothing: .* set alpha below 1, or put a prune step before it"
    with pytest.raises(CompactMindError, match=message):
        run_pipeline(read_pipeline([*before, alone, NF4]), resources, measure)
    for some in ([*before, RETRAIN, NF4], [*before, PRUNE, alone, NF4]):
        assert idle_problem(read_pipeline(some)) is None
    rounded = {**alone, "params": {**alone["params"], "mode": "lora", "base": "nf4"}}
    assert idle_problem(read_pipeline([*before, rounded, NF4])) is None  # beside weights that were rounded there is something to learn


@pytest.mark.parametrize(
    ("before", "params", "expected"),
    [
        ([], {}, True),
        ([PRUNE, RETRAIN], {}, True),
        ([{"method": "prune", "params": {"sparsity": 0.0, "blocks": 1}}], {}, False),  # another number of blocks
        ([SMOOTH], {}, False),  # of every row other channels are rounded worse
        ([], {"stream_rotation": True}, False),  # channels are mixed
        ([], {"sensitivity": "gradients"}, None),
    ],
    ids=str,
)
def test_errors_cost_what_they_do_in_the_dense_model_where_channels_are_its_own(windows, measure, monkeypatch, before, params, expected):
    given, original = [], gptq_model.measured_costs
    monkeypatch.setattr(gptq_model, "measured_costs", lambda *all, known: given.append(known) or original(*all, known=known))
    kept, resources = {}, Resources(windows, windows, windows[:2], helpers.make_llama, torch.bfloat16)
    resources.keep = lambda name, make: kept.setdefault(name, make())
    last = {"method": "gptq", "params": {"target_compression": 1.5, **params}}
    result = run_pipeline(read_pipeline([*before, last]), resources, measure)
    assert result.quantization["expected_kl"] > 0
    of_dense = next((kept[name] for name in kept if name.startswith(f"sensitivities, {SENSITIVITY_WINDOWS} windows")), None)
    if expected:
        assert given == [of_dense] and all(value > 0 for value in of_dense.values())
    else:
        assert given == ([{}] if expected is False else [])


def test_tokens_are_told_apart_by_the_gradients_of_the_dense_model_measured_once(windows, measure, monkeypatch):
    measured, original = [], registry.measure_gradients
    monkeypatch.setattr(registry, "measure_gradients", lambda model, text: measured.append(model) or original(model, text))
    resources = Resources(windows, windows, windows[:2], helpers.make_llama, torch.bfloat16)
    last = {"method": "gptq", "params": {"bits": 3, "weigh_tokens": True}}
    for before in ([], [PRUNE, RETRAIN], [SMOOTH]):
        run_pipeline(read_pipeline([*before, last]), resources, measure)
    assert len(measured) == 1 and measured[0] is resources.teacher()
    run_pipeline(read_pipeline([{"method": "prune", "params": {"sparsity": 0.0, "blocks": 1}}, last]), resources, measure)
    assert len(measured) == 2 and len(llama_blocks(measured[1])) == len(llama_blocks(measured[0])) - 1  # one less: its own


def test_what_learns_after_rounding_reads_the_text_of_retraining(windows, measure, monkeypatch):
    read = []
    monkeypatch.setattr(gptq_model, "tune_scales", lambda model, teacher, *text_and_more: read.append(text_and_more[:2]) or {})
    steps = read_pipeline([{"method": "gptq", "params": {"tuning_tokens": 24}}])
    for train, held_out in ((windows[2:5], windows[5:]), (windows[:0], windows[5:])):
        run_pipeline(steps, Resources(windows[:2], train, held_out, helpers.make_llama, torch.bfloat16), measure)
    (train, held_out), (of_calibration, last) = read
    assert torch.equal(train, windows[2:5]) and torch.equal(held_out, windows[5:])
    assert torch.equal(of_calibration, windows[:1]) and torch.equal(last, windows[1:2])  # where there is no other text


@torch.no_grad()
def test_the_error_of_every_layer_is_relative_to_the_dense_model(windows):
    dense, other = helpers.make_llama(), helpers.make_llama()
    assert layer_errors(dense, other, windows) == [0, 0]
    other.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    first, second = layer_errors(dense, other, windows)
    expected = dense(windows, output_hidden_states=True).hidden_states[1]
    assert first == 0 and second > 0.01 and expected.shape == (6, 24, 32)
    assert layer_errors(dense, helpers.make_llama(num_hidden_layers=1), windows) is None
