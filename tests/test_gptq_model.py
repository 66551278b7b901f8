"""A Llama of integers: its file keeps to the target and reloads, pipelines end in it, and what cannot be quantized is named before."""

import copy

import helpers
import pytest
import torch

from compactmind.checkpoint import load_checkpoint, save_checkpoint
from compactmind.errors import CompactMindError
from compactmind.methods.llama import LINEARS, llama_blocks
from compactmind.methods.quantization.gptq_model import GPTQRecipe, quantize_gptq
from compactmind.methods.quantization.grid import BITS, ZEROS, Grid
from compactmind.methods.quantization.grouped import GroupedEmbedding, GroupedLinear, GroupedWeight
from compactmind.methods.quantization.tables import EMBEDDINGS
from compactmind.methods.registry import Resources
from compactmind.search.compressor import Measure, read_pipeline, run_pipeline, store_as_released, stored_bytes

TIED = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
WINDOWS = helpers.example_windows(4, 32)
LARGE = {"hidden_size": 128, "intermediate_size": 320, "vocab_size": 512, "num_hidden_layers": 1, "scale": 0.1}


def release(tied: bool = True, **changes):
    """Return a Llama in bf16, as it is read from a file."""
    return helpers.released_llama(helpers.make_llama(tie_word_embeddings=tied, **{"scale": 0.3} | changes))


def save(directory, model, description) -> int:
    """Save a quantized model and return the bytes of its weight file."""
    settings = {"kind": "grouped", "parent": None, "stage": {}, "quantization": description, "dtype": "bfloat16"}
    save_checkpoint(directory, model, helpers.make_byte_tokenizer(), **settings)
    return (directory / "model.safetensors").stat().st_size


def dense_bytes(directory, model) -> int:
    settings = {"kind": "dense", "parent": None, "stage": {}, "dtype": "bfloat16"}
    save_checkpoint(directory, model, helpers.make_byte_tokenizer(), **settings)
    return (directory / "model.safetensors").stat().st_size


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model(helpers.example_windows()).logits.float()


def state_of(model) -> dict:
    return {name: (each, each.data_ptr(), each.dtype, each.requires_grad) for name, each in model.named_parameters()}


def quantized_modules(model) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, GroupedWeight)}


# ------------------------------------------------------------------------------------------------------------------- target
@pytest.mark.parametrize(
    ("tied", "embeddings", "ratio"),
    [(True, "auto", 2.5), (False, "auto", 4.4), (True, "int6", 3.3), (False, "int8", 2.2), (True, "as_released", 2.2)],
)
def test_the_file_keeps_to_the_target_and_wastes_nothing(tmp_path, tied, embeddings, ratio):
    model = release(tied, **LARGE | {"num_hidden_layers": 2})
    whole = dense_bytes(tmp_path / "dense", model)
    recipe = GPTQRecipe(target_compression=ratio, embeddings=embeddings, compensation=False)
    description = quantize_gptq(model, helpers.example_windows(4, 64), recipe, released_bytes=whole)
    result = save(tmp_path / "m", model, description)
    target = int(whole / ratio)
    assert 0.995 * target <= result <= target
    assert description["target_compression"] == ratio and description["tensors"].keys() == quantized_modules(model)


@pytest.mark.parametrize("released", [torch.float32, torch.bfloat16])
def test_what_stays_as_it_is_counts_in_the_dtype_it_is_stored_in(tmp_path, released):
    """A pipeline holds its model in float32 and stores what is not packed as released."""
    model = release(True, **LARGE).float()
    whole = sum(each.numel() * released.itemsize for each in model.parameters())
    recipe = GPTQRecipe(target_compression=2.5 if released == torch.bfloat16 else 4.5, compensation=False)
    description = quantize_gptq(model, helpers.example_windows(4, 64), recipe, released=released)
    result = save(tmp_path / "m", helpers.cast_parameters(model, released), description)
    assert 0.995 * whole / recipe.target_compression <= result <= whole / recipe.target_compression


def test_a_target_larger_than_everything_takes_the_widest_and_a_smaller_one_costs_more():
    expected = []
    for ratio in (1.5, 3.0, 3.6, 4.4):
        model = release(True, **LARGE)
        description = quantize_gptq(
            model, helpers.example_windows(4, 64), GPTQRecipe(target_compression=ratio, compensation=False)
        )
        expected.append(description["expected_kl"])
        bits = {each["bits"] for name, each in description["tensors"].items()}
        assert bits == {8} if ratio == 1.5 else min(bits) < 8
    assert expected == sorted(expected) and 0 < expected[0] < expected[-1] / 10


@TIED
def test_a_target_out_of_reach_is_refused_before_anything_is_changed(tied):
    model = release(tied, **LARGE)
    before = state_of(model)
    recipe = GPTQRecipe(target_compression=12, compensation=False)
    with pytest.raises(
        CompactMindError, match=r"the smallest that these widths can make .* MB, more than the .* target_compression"
    ):
        quantize_gptq(model, helpers.example_windows(4, 64), recipe)
    assert state_of(model) == before and not quantized_modules(model)


# ------------------------------------------------------------------------------------------------------------------- files
@TIED
@pytest.mark.parametrize("bits", BITS)
def test_a_file_reloads_with_equal_logits_in_every_width(tmp_path, bits, tied):
    for number, zero in enumerate(ZEROS):
        model = release(tied)
        words = [word for word in EMBEDDINGS if word != "as_released"]
        recipe = GPTQRecipe(
            bits=bits, zero=zero, group_size=(32, 64, -1)[number], embeddings=words[(bits + number) % 4], compensation=False
        )
        save(tmp_path / zero, model, quantize_gptq(model, WINDOWS, recipe))
        expected = logits_of(model.float())
        result = load_checkpoint(tmp_path / zero).model
        assert torch.equal(logits_of(result), expected) and quantized_modules(result) == quantized_modules(model)
        in_bf16 = load_checkpoint(tmp_path / zero, dtype=torch.bfloat16).model
        assert (logits_of(in_bf16) - expected).norm() < 0.1 * expected.norm()


@TIED
@pytest.mark.parametrize("embeddings", EMBEDDINGS)
def test_tables_are_as_they_are_asked_for(tied, embeddings):
    model = release(tied)
    table = model.get_input_embeddings().weight.detach().clone()
    description = quantize_gptq(model, WINDOWS, GPTQRecipe(embeddings=embeddings, compensation=False))
    names = {"model.embed_tokens"} | (set() if tied else {"lm_head"})
    if embeddings == "as_released":
        assert not names & description["tensors"].keys() and torch.equal(model.get_input_embeddings().weight, table)
        return
    assert isinstance(model.get_input_embeddings(), GroupedEmbedding)
    assert {description["tensors"][name]["bits"] for name in names} == {int(embeddings.removeprefix("int"))}
    assert (model.get_input_embeddings().dequantize() - table).norm() < 0.1 * table.float().norm()


def test_a_model_in_bf16_keeps_its_norms_and_biases_in_bf16():
    model = release(True, attention_bias=True)
    norms = {name: each.detach().clone() for name, each in model.named_parameters() if "norm" in name or name.endswith("bias")}
    quantize_gptq(model, WINDOWS, GPTQRecipe())
    assert len(norms) == 5 + 8 and norms.keys() == dict(model.named_parameters()).keys()
    for name, each in model.named_parameters():
        assert each.dtype == torch.bfloat16 and torch.equal(each, norms[name])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@TIED
def test_biases_stay_and_are_computed_with(tmp_path, tied):
    model = release(tied, attention_bias=True, mlp_bias=True)
    dense = logits_of(copy.deepcopy(model).float())
    save(tmp_path / "m", model, quantize_gptq(model, WINDOWS, GPTQRecipe(bits=8)))
    result = load_checkpoint(tmp_path / "m").model
    assert all(getattr(block, field).bias is not None for block in llama_blocks(result) for field in LINEARS)
    assert torch.equal(logits_of(result), logits_of(model.float()))
    assert (logits_of(result) - dense).norm() < 0.1 * dense.norm()


# ------------------------------------------------------------------------------------------------------------------ quality
@pytest.mark.parametrize("order", ["index", "activation"])
def test_compensation_brings_the_blocks_nearer_to_the_dense_model(order):
    windows, errors = helpers.example_windows(16, 64), {}
    dense = helpers.make_llama(scale=0.3)
    for compensation in (False, True):
        model = copy.deepcopy(dense)
        recipe = GPTQRecipe(bits=3, compensation=compensation, order=order, weigh_tokens=False, embeddings="as_released")
        quantize_gptq(model, windows, recipe)
        errors[compensation] = float((logits_of_all(model, windows) - logits_of_all(dense, windows)).norm())
    assert errors[True] < 0.97 * errors[False]


@torch.no_grad()
def logits_of_all(model, windows) -> torch.Tensor:
    return model(windows).logits


def test_more_bits_are_nearer_to_the_dense_model():
    dense, errors = logits_of(release().float()), []
    for bits in BITS:
        model = release()
        quantize_gptq(model, WINDOWS, GPTQRecipe(bits=bits, embeddings="as_released"))
        errors.append(float((logits_of(model.float()) - dense).norm() / dense.norm()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.05


def test_the_same_model_and_text_make_the_same_integers():
    result = []
    for _ in range(2):
        model = release()
        description = quantize_gptq(model, WINDOWS, GPTQRecipe(target_compression=3))
        result.append((description, model.state_dict()))
    assert result[0][0] == result[1][0] and all(torch.equal(each, result[1][1][name]) for name, each in result[0][1].items())


def test_channels_that_are_always_zero_are_no_reason_to_refuse():
    model = release(scale=0.2)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:20] = 0  # inputs of down_proj that never are anything else
        model.model.layers[1].input_layernorm.weight[3] = 0
        model.model.layers[1].self_attn.v_proj.weight.zero_()  # all inputs of o_proj
    dense = logits_of(copy.deepcopy(model).float())
    quantize_gptq(model, WINDOWS, GPTQRecipe(bits=8))
    assert (logits_of(model.float()) - dense).norm() < 0.1 * dense.norm()
    again = release(scale=0.2)
    with torch.no_grad():
        again.model.layers[0].mlp.up_proj.weight.zero_()
    assert quantize_gptq(again, WINDOWS, GPTQRecipe(target_compression=2.2))["expected_kl"] > 0


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_turned_stream_has_no_outliers_to_round(tmp_path, tied):
    """One input of the readers of the stream with weights twenty times the others' takes the levels of its group; turned, it is gone."""
    model = release(tied, scale=0.2).float()
    with torch.no_grad():
        for block in model.model.layers:
            for norm, readers in (
                (block.input_layernorm, [block.self_attn.v_proj]),
                (block.post_attention_layernorm, [block.mlp.gate_proj, block.mlp.up_proj]),
            ):
                norm.weight[3] /= 20
                for reader in readers:
                    reader.weight[:, 3] *= 20
    dense, turned = logits_of(copy.deepcopy(model)), copy.deepcopy(model)
    quantize_gptq(model, WINDOWS, GPTQRecipe(bits=4))
    description = quantize_gptq(turned, WINDOWS, GPTQRecipe(bits=4, stream_rotation=True))
    plain, result = ((logits_of(each) - dense).norm() / dense.norm() for each in (model, turned))
    assert result < 0.5 * plain and description["stream_rotation"] and set(description["tensors"]) >= {"lm_head"}
    save(tmp_path / "m", turned, description)
    assert torch.equal(logits_of(load_checkpoint(tmp_path / "m").model), logits_of(turned))


# --------------------------------------------------------------------------------------------------------- in a pipeline
@pytest.mark.parametrize("params", [{"bits": 3, "group_size": 64}, {"target_compression": 1.6}], ids=str)
def test_pruned_retrained_and_then_quantized(tmp_path, params):
    windows = helpers.example_windows(6, 24)
    resources = Resources(windows, windows, windows[:2], lambda: helpers.make_llama(tie_word_embeddings=True), torch.bfloat16)
    steps = read_pipeline([
        {"method": "prune", "params": {"sparsity": 0.3, "round_to": 8}}, {"method": "retrain", "params": {"tokens": 96}},
        {"method": "gptq", "params": params},
    ])  # fmt: skip
    result = run_pipeline(steps, resources, Measure("nothing", lambda model: {}), show=False)
    assert result.kind == "grouped" and [row["method"] for row in result.steps] == ["dense", "prune", "retrain", "gptq"]
    expected = logits_of(result.model)
    with store_as_released(result, torch.bfloat16):
        size = save(tmp_path / "m", result.model, result.quantization)
    assert 0 < size - stored_bytes(result, torch.bfloat16) < 10_000  # the head of the file
    again = load_checkpoint(tmp_path / "m")
    assert torch.equal(logits_of(again.model), expected) and again.manifest["quantization"] == result.quantization
    assert again.model.config.intermediate_size < 48


# ---------------------------------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("model.layers.1.mlp.down_proj", "model.layers.1.mlp.down_proj"),
        ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
        ("model.embed_tokens", "model.embed_tokens"),
        ("lm_head", "lm_head"),
    ],
    ids=lambda value: value.rpartition(".")[2],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named_before_anything_is_changed(path, name, value):
    model = release(False)
    with torch.no_grad():
        model.get_submodule(path).weight[2, 3] = value
    before = state_of(model)
    with pytest.raises(CompactMindError, match=f"^{name}: its weight is NaN or infinite"):
        quantize_gptq(model, WINDOWS, GPTQRecipe())
    assert state_of(model) == before


@pytest.mark.parametrize(
    ("path", "name", "recipe"),
    [
        ("model.layers.0.mlp.up_proj", "model.layers.0", {}),
        ("model.layers.0.mlp.up_proj", "model.layers.0", {"weigh_tokens": True}),
        ("model.layers.1.input_layernorm", "model.layers.1", {"weigh_tokens": True}),
        ("model.layers.1.input_layernorm", "model.layers.1", {"target_compression": 2.0}),
        ("model.layers.1.input_layernorm", "model.layers.1", {"target_compression": 2.0, "sensitivity": "gradients"}),
        ("model.norm", "prediction", {"weigh_tokens": True}),
        ("model.norm", "prediction", {"target_compression": 2.0}),
    ],
)
def test_weights_that_are_numbers_and_make_none_end_in_one_line(path, name, recipe):
    model = release(False)
    with torch.no_grad():
        model.get_submodule(path).weight.mul_(1e38)
    with pytest.raises(CompactMindError, match=f"{name}: .*NaN or infinite"):
        quantize_gptq(model, WINDOWS, GPTQRecipe(**recipe))


def test_too_little_text_is_refused():
    model = release(True, intermediate_size=480)
    before = state_of(model)
    with pytest.raises(CompactMindError, match="32 tokens of calibration text are too few for linears of 480 inputs, .* 120"):
        quantize_gptq(model, WINDOWS[:1], GPTQRecipe())
    with pytest.raises(CompactMindError, match="0 tokens of calibration text"):
        quantize_gptq(model, WINDOWS[:0], GPTQRecipe())
    assert state_of(model) == before


def test_a_model_of_integers_is_not_quantized_again():
    model = release(True)
    quantize_gptq(model, WINDOWS, GPTQRecipe(compensation=False))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CompactMindError, match="q_proj is a GroupedLinear: the model is quantized already; give the dense one"):
        quantize_gptq(model, WINDOWS, GPTQRecipe())
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_a_model_of_another_layout_is_refused():
    with pytest.raises(CompactMindError, match="expected a Llama-like causal LM"):
        quantize_gptq(helpers.make_bert(), WINDOWS, GPTQRecipe())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bits": 7}, "bits 7: choose one of 2, 3, 4, 5, 6, 8"),
        ({"zero": "none"}, "zero 'none': choose one of symmetric"),
        ({"group_size": 0}, "group_size 0: choose 32"),
        ({"embeddings": "int3"}, "embeddings 'int3': choose one of auto, as_released, int8"),
        ({"order": "random"}, "order 'random': choose one of activation, index"),
        ({"target_compression": 0.5}, r"target_compression 0.5 is not in \(1, 16\), and not 0 for none"),
        ({"target_compression": 20}, r"target_compression 20 is not in \(1, 16\)"),
        ({"damping": 0}, r"damping 0 is not in \(0, 1\]"),
        ({"damping": 1.5}, r"damping 1.5 is not in \(0, 1\]"),
    ],
    ids=str,
)
def test_a_recipe_out_of_range_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        GPTQRecipe(**given)


def test_a_recipe_tells_its_bits_before_it_runs():
    assert GPTQRecipe(bits=4, group_size=32).bits_per_weight == (4.5, 8.25)
    assert GPTQRecipe(bits=3, group_size=64, zero="float", embeddings="as_released").bits_per_weight == (3.5, None)
    model = release(True, **LARGE)
    quantize_gptq(model, helpers.example_windows(4, 64), GPTQRecipe(bits=5, group_size=32, compensation=False))
    linears = [module for module in model.modules() if isinstance(module, GroupedLinear)]
    stored = sum(
        8 * each.numel() * each.element_size()
        for module in linears
        for name, each in module.tensors().items()
        if "shape" not in name
    )
    assert stored == 5.5 * sum(module.q.numel() for module in linears) and linears[0].grid == Grid(5, 32)
