"""The residual stream in another basis: other weights, the same logits, for every model it holds for and no other."""

import copy

import helpers
import pytest
import scripts
import torch
from transformers import (
    AutoModelForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    HeliumConfig,
    HeliumForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from compactmind.checkpoint import load_checkpoint, save_checkpoint
from compactmind.errors import CompactMindError
from compactmind.methods.llama import llama_blocks, stream_norms
from compactmind.methods.quantization import stream_rotation
from compactmind.methods.quantization.rotation import hadamard
from compactmind.methods.quantization.stream_rotation import random_orthogonal, rotate_stream

MATRICES = {"full": random_orthogonal(32, seed=1), "blocks": hadamard(16)}


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model(helpers.example_windows()).logits.float()


def other_architecture(name: str):
    """Return a small model of another family with random weights everywhere."""
    config_class, model_class, changes = {
        "granite": (
            GraniteConfig, GraniteForCausalLM,
            {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0, "tie_word_embeddings": True},
        ),
        "helium": (HeliumConfig, HeliumForCausalLM, {"head_dim": 8}),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}),
        "stablelm": (StableLmConfig, StableLmForCausalLM, {}),
    }[name]  # fmt: skip
    return helpers.randomize(model_class(config_class(**helpers.llama_settings(**changes))))


# ------------------------------------------------------------------------------------------------------------ same model
@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)
@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}, {"num_key_value_heads": 1, "head_dim": 10}],
    ids=str,
)
def test_a_turned_model_gives_the_same_logits_from_other_weights(matrix, changes):
    model = helpers.make_llama(**changes)
    expected, before = logits_of(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rotate_stream(model, matrix)
    assert (logits_of(model) - expected).abs().max() < 1e-4
    unchanged = {name for name, tensor in model.state_dict().items() if torch.allclose(tensor, before[name], atol=1e-3)}
    assert all(
        name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias", "gate_proj.bias", "up_proj.bias")) for name in unchanged
    )
    assert all(torch.equal(norm.weight, torch.ones(32)) for norm in stream_norms(model))
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("name", ["granite", "helium", "qwen2", "qwen3"])
def test_other_families_with_rms_norms_are_turned_too(name):
    model = other_architecture(name)
    expected = logits_of(model)
    rotate_stream(model, MATRICES["full"])
    assert (logits_of(model) - expected).abs().max() < 1e-4 * max(1, expected.abs().max())


def test_weights_are_turned_in_pieces(monkeypatch):
    whole, pieces = helpers.make_llama(), helpers.make_llama()
    rotate_stream(whole, MATRICES["full"])
    monkeypatch.setattr(stream_rotation, "ROWS_AT_A_TIME", 7)
    rotate_stream(pieces, MATRICES["full"])
    for (name, result), wanted in zip(pieces.named_parameters(), whole.parameters(), strict=True):
        assert torch.allclose(result, wanted, atol=1e-6), name


def test_weights_keep_their_dtype_and_lose_only_its_rounding():
    model = helpers.released_llama()
    expected = logits_of(copy.deepcopy(model).float())
    rotate_stream(model, MATRICES["full"])
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert (logits_of(model.float()) - expected).norm() < 0.05 * expected.norm()  # 8 bits of each weight, random weights


def test_large_values_of_few_channels_are_spread_over_all():
    model = helpers.make_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 3] *= 50
    rotate_stream(model, MATRICES["full"])
    table = model.model.embed_tokens.weight
    assert table.abs().amax() < 0.8 * table.norm(dim=1).max()  # before: nearly all of the norm


# -------------------------------------------------------------------------------------------------------------- the head
def tied_with_even_last_norm():
    model = helpers.make_llama(tie_word_embeddings=True)
    model.model.norm.weight.data.fill_(1.5)
    return model


def test_a_tied_head_stays_tied_only_if_the_last_norm_has_one_weight():
    model = tied_with_even_last_norm()
    expected = logits_of(model)
    rotate_stream(model, MATRICES["full"], untie=False)
    assert (logits_of(model) - expected).abs().max() < 1e-4
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings
    assert torch.equal(model.model.norm.weight, torch.full((32,), 1.5))
    other = helpers.make_llama(tie_word_embeddings=True)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(CompactMindError, match="a table of its own"):
        rotate_stream(other, MATRICES["full"], untie=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_a_model_whose_head_came_apart_is_saved_and_read_as_such(tmp_path):
    model = helpers.make_llama(tie_word_embeddings=True)
    expected = logits_of(model)
    rotate_stream(model, MATRICES["full"])
    assert not model.config.tie_word_embeddings and "lm_head.weight" not in model.all_tied_weights_keys
    model.save_pretrained(tmp_path / "plain")
    save_checkpoint(tmp_path / "own", model, helpers.make_byte_tokenizer(), kind="dense", parent=None, stage={})
    for read in (AutoModelForCausalLM.from_pretrained(tmp_path / "plain"), load_checkpoint(tmp_path / "own").model):
        assert (logits_of(read) - expected).abs().max() < 1e-4


# --------------------------------------------------------------------------------------------------------------- refused
def test_layer_norms_are_refused_before_anything_is_changed():
    model = other_architecture("stablelm")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CompactMindError, match="model.layers.0: input_norm is no RMSNorm but a LayerNorm"):
        rotate_stream(model, MATRICES["full"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.eye(32) + 0.01, "not orthogonal"),
        (hadamard(64), r"\(64, 64\) turns no stream of 32 channels"),
        (torch.ones(32, 16), r"\(32, 16\) turns no stream"),
        (torch.full((32, 32), float("nan")), "not orthogonal"),
    ],
    ids=["skew", "too large", "not square", "no numbers"],
)
def test_a_matrix_that_does_not_fit_is_refused(matrix, message):
    with pytest.raises(ValueError, match=message):
        rotate_stream(helpers.make_llama(), matrix)


def test_a_weight_that_is_no_number_is_named():
    model = helpers.make_llama()
    llama_blocks(model)[1].down.weight.data[2, 3] = float("nan")
    with pytest.raises(CompactMindError, match=r"model\.layers\.1\.mlp\.down_proj: its weight is NaN"):
        rotate_stream(model, MATRICES["full"])


@pytest.mark.parametrize("size", [1, 7, 32])
def test_a_random_matrix_is_orthogonal_and_its_seed_decides(size):
    matrix = random_orthogonal(size, seed=3)
    assert matrix.dtype == torch.float64 and torch.allclose(matrix @ matrix.t(), torch.eye(size).double(), atol=1e-12)
    assert torch.equal(matrix, random_orthogonal(size, seed=3))
    assert size == 1 or not torch.allclose(matrix, random_orthogonal(size, seed=4))


# ----------------------------------------------------------------------------------------------- the control without a grid
def test_the_control_is_an_ordinary_folder_with_the_same_function(tmp_path, monkeypatch, capfd):
    source, output = tmp_path / "source", tmp_path / "turned"
    helpers.released_llama().save_pretrained(source)
    helpers.make_byte_tokenizer().save_pretrained(source)
    run = ("benchmarks/turned.py", "--model", source, "--output", output)
    settings = {"cwd": tmp_path, "monkeypatch": monkeypatch, "capfd": capfd}
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for dtype, bound in (("float32", 1e-5), ("as_released", 0.05)):
        status, printed = scripts.run_script_here(*run, "--dtype", dtype, **settings)
        assert status == 0, printed
        turned = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
        assert turned.dtype == {"float32": torch.float32, "as_released": torch.bfloat16}[dtype]
        assert (logits_of(turned.float()) - logits_of(dense)).norm() < bound * logits_of(dense).norm()
        assert not torch.allclose(turned.model.layers[0].mlp.up_proj.weight, dense.model.layers[0].mlp.up_proj.weight, atol=0.1)
    status, printed = scripts.run_script_here(*run[:3], "--output", source, **settings)
    assert status == 1 and "it is the model that is read" in printed
