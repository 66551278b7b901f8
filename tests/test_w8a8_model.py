"""W8A8 of a Llama as a file: any setting reloads, here and with compressed-tensors; what cannot be quantized is named."""

import copy
import json

import helpers
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compactmind import kernels
from compactmind.checkpoint import load_checkpoint, save_checkpoint
from compactmind.errors import CompactMindError
from compactmind.files import sha256_of
from compactmind.kernels import KERNEL_VARIABLE
from compactmind.methods.llama import llama_blocks
from compactmind.methods.quantization.w8a8_encoder import quantize_encoder
from compactmind.methods.quantization.w8a8_linear import ACTIVATIONS, W8A8Linear
from compactmind.methods.quantization.w8a8_model import (
    Int8Embedding,
    W8A8Recipe,
    calibrate_llama,
    float32_block_by_block,
    quantize_llama,
    rotate_stream_for,
)

TIED = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
EMBEDDINGS = ("as_released", "int8")  # integers of fewer bits: tests/test_tables.py
SETTINGS = [pytest.mark.parametrize("activations", ACTIVATIONS), pytest.mark.parametrize("embeddings", EMBEDDINGS), TIED]


def every_setting(test):
    for mark in SETTINGS:
        test = mark(test)
    return test


def release(tied: bool):
    return helpers.released_llama(helpers.make_llama(tie_word_embeddings=tied, scale=0.5))


@pytest.fixture(scope="module")
def statistics():
    """What calibration sees of the two models of `release`: tied -> statistics."""
    return {tied: calibrate_llama(release(tied), helpers.example_windows(4, 32)) for tied in (False, True)}


def save(directory, model, statistics, **recipe):
    """Quantize a model in place, save it, and return what was saved."""
    description = quantize_llama(model, statistics, W8A8Recipe(**{"alpha": 0.5, **recipe}))
    settings = {"kind": "w8a8", "parent": None, "stage": {}, "quantization": description, "dtype": "bfloat16"}
    save_checkpoint(directory, model, helpers.make_byte_tokenizer(), **settings)
    return model


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model(helpers.example_windows()).logits.float()


# ---------------------------------------------------------------------------------------------------------------- files
@every_setting
def test_a_file_reloads_with_equal_logits_also_one_written_before(tmp_path, statistics, activations, embeddings, tied):
    saved = save(tmp_path / "m", release(tied), statistics[tied], activations=activations, embeddings=embeddings)
    expected = logits_of(saved.float())
    assert torch.equal(logits_of(load_checkpoint(tmp_path / "m").model), expected)
    weights = tmp_path / "m" / "model.safetensors"
    state = load_file(weights)
    static = {name for name in state if name.endswith("input_scale")}
    assert len(static) == (14 if activations == "per_tensor_static" else 0)
    assert all(state[name].shape == (1,) for name in static)  # as compressed-tensors has it
    for name in static:
        state[name] = state[name].reshape(1, 1)
    if tied:
        assert "lm_head.weight" not in state
        state.pop("lm_head.weight_scale", None)
    save_file(state, weights, metadata={"format": "pt"})
    manifest = helpers.read_json(tmp_path / "m" / "manifest.json")
    manifest["files"]["model.safetensors"]["bytes"] = weights.stat().st_size
    manifest["files"]["model.safetensors"]["sha256"] = sha256_of(weights)
    (tmp_path / "m" / "manifest.json").write_text(json.dumps(manifest))
    assert torch.equal(logits_of(load_checkpoint(tmp_path / "m").model), expected)


@pytest.mark.parametrize("embeddings", EMBEDDINGS)
@pytest.mark.parametrize("rotations", [("o",), ("o", "down"), ("qkv", "o", "gate_up", "down")], ids=" ".join)
@TIED
def test_a_file_of_a_turned_stream_has_no_rotation_before_what_reads_it(tmp_path, tied, rotations, embeddings):
    recipe = W8A8Recipe(0.5, rotations=rotations, embeddings=embeddings, stream_rotation=True)
    model, dense = release(tied), logits_of(release(tied).float())
    rotate_stream_for(model, recipe)
    description = quantize_llama(model, calibrate_llama(model, helpers.example_windows(4, 32)), recipe)
    assert description["stream_rotation"] and set(description["rotations"]) == {"o", "down"} & set(rotations)
    settings = {"kind": "w8a8", "parent": None, "stage": {}, "quantization": description, "dtype": "bfloat16"}
    save_checkpoint(tmp_path / "m", model, helpers.make_byte_tokenizer(), **settings)
    expected = logits_of(model.float())
    assert 0 < (expected - dense).norm() < 0.2 * dense.norm()
    assert torch.equal(logits_of(load_checkpoint(tmp_path / "m").model), expected)
    config, state = helpers.read_json(tmp_path / "m" / "config.json"), load_file(tmp_path / "m" / "model.safetensors")
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(state) and not config["tie_word_embeddings"]
    rotated = {name.split(".")[-3] for name in state if name.endswith("hadamard_input.weight")}
    assert rotated == ({"down_proj"} if "down" in rotations else set())
    assert ("transform_config" in config["quantization_config"]) == bool(rotated)
    assert ("With transformers and compressed-tensors:" in (tmp_path / "m" / "README.md").read_text()) == (not rotated)


def test_a_recipe_for_a_turned_stream_wants_it_turned_first(statistics):
    model = release(True)
    with pytest.raises(ValueError, match=r"call rotate_stream_for\(model, recipe\) first"):
        quantize_llama(model, statistics[True], W8A8Recipe(0.5, stream_rotation=True))
    assert not any(isinstance(module, W8A8Linear) for module in model.modules())
    before = copy.deepcopy(model.state_dict())
    rotate_stream_for(model, W8A8Recipe(0.5))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_files_do_not_depend_on_the_kernel_of_the_machine(tmp_path, monkeypatch, statistics, tokenizer):
    monkeypatch.delenv(KERNEL_VARIABLE, raising=False)
    written = []
    for kernel in ("int_mm", "avx2", "simulated"):
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda kernel=kernel: kernel == "int_mm")
        monkeypatch.setattr(kernels, "available", lambda kernel=kernel: kernel == "avx2")
        llama = save(tmp_path / "llama", release(True), statistics[True])
        encoder = helpers.make_bert()
        description = quantize_encoder(encoder)
        save_checkpoint(tmp_path / "bert", encoder, tokenizer, kind="w8a8", parent=None, stage={}, quantization=description)
        for model in (llama, encoder):
            assert {module.kernel for module in model.modules() if isinstance(module, W8A8Linear)} == {kernel}
        files = {path.relative_to(tmp_path): path.read_bytes() for path in sorted(tmp_path.glob("*/*"))}
        for name in ("llama", "bert"):
            manifest = helpers.read_json(tmp_path / name / "manifest.json")
            created = manifest["created"].encode()
            files = {
                path: content.replace(created, b"now") if path.parts[0] == name else content for path, content in files.items()
            }
        written.append(files)
    assert len(written[0]) > 8 and written[0] == written[1] == written[2]


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("embeddings", EMBEDDINGS)
def test_compressed_tensors_alone_reads_the_file_of_a_turned_stream(tmp_path, embeddings, tied):
    pytest.importorskip("compressed_tensors")
    dense, model = logits_of(release(tied).float()), release(tied)
    recipe = W8A8Recipe(0.5, rotations=("o",), embeddings=embeddings, stream_rotation=True)
    rotate_stream_for(model, recipe)
    save(tmp_path / "m", model, calibrate_llama(model, helpers.example_windows(4, 32)), **vars(recipe))
    theirs, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32, output_loading_info=True)
    assert not any(loading.values())
    ours = logits_of(load_checkpoint(tmp_path / "m").model)
    assert (logits_of(theirs) - ours).norm() < 1.5 * (ours - dense).norm() < 0.5 * dense.norm()


@pytest.mark.slow
@pytest.mark.parametrize("rotations", [(), ("o",), ("qkv", "o", "gate_up", "down")], ids=["not rotated", "o", "all rotated"])
@every_setting
def test_compressed_tensors_reads_the_file(tmp_path, statistics, activations, embeddings, tied, rotations):
    """With `pip install compressed-tensors==0.20.0`, which transformers uses to read such files without this project.

    transformers 5.23 leaves the rotation of the file's `transform_config` to its caller. Their activations with a scale of their own
    are rounded to absmax / 127.5, ours to absmax / 127: two draws of the same noise, about 1% of a linear's output each.
    """
    transform = pytest.importorskip("compressed_tensors.transform")
    dense = logits_of(release(tied).float())
    recipe = {"activations": activations, "embeddings": embeddings, "rotations": rotations}
    save(tmp_path / "m", release(tied), statistics[tied], **recipe)
    theirs, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32, output_loading_info=True)
    ours = load_checkpoint(tmp_path / "m").model
    config = helpers.read_json(tmp_path / "m" / "config.json")["quantization_config"].get("transform_config")
    assert (config is not None) == (len(rotations) == 4 and activations != "per_tensor_static")
    left_over = loading.pop("unexpected_keys")
    assert not any(loading.values()) and all(name.endswith(".hadamard_input.weight") for name in left_over)
    assert bool(left_over) == (config is not None)
    if config:
        (scheme,) = config["config_groups"].values()
        scheme["apply"] = [part for part in scheme["apply"] if part["location"] == "input"]  # the weights have been rotated
        transform.apply_transform_config(theirs, transform.TransformConfig(**config))
    assert not any(isinstance(module, (W8A8Linear, Int8Embedding)) for module in theirs.modules())
    noise, difference = (logits_of(ours) - dense).norm(), (logits_of(theirs) - logits_of(ours)).norm()
    assert difference < (0.1 if activations == "per_tensor_static" else 1.5) * noise < 0.5 * dense.norm()
    for path, module in ours.named_modules():
        if isinstance(module, (W8A8Linear, Int8Embedding)):  # theirs was unpacked by the first forward pass
            assert torch.allclose(theirs.get_submodule(path).weight, module.weight * module.weight_scale), path
        if isinstance(module, W8A8Linear):
            x = torch.randn(64, module.in_features, generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                assert (theirs.get_submodule(path)(x) - module(x)).norm() < 0.02 * module(x).norm(), path


@pytest.mark.parametrize("activations", ["per_token", "per_tensor_static"])
@pytest.mark.parametrize("rotations", [("o",), ("o", "down")], ids=" ".join)
def test_the_card_says_who_reads_the_file(tmp_path, statistics, rotations, activations):
    save(tmp_path / "m", release(True), statistics[True], rotations=rotations, activations=activations)
    card = (tmp_path / "m" / "README.md").read_text()
    running = "down" in rotations and activations == "per_token"
    assert ("transform_config" in helpers.read_json(tmp_path / "m" / "config.json")["quantization_config"]) == running
    assert ("the inputs of down are rotated" in card and "its logits are wrong" in card) == running
    assert ("With transformers and compressed-tensors:" in card and "AutoModelForCausalLM.from_pretrained" in card) != running


# ------------------------------------------------------------------------------------------- what is refused, what is undone
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("model.layers.1.mlp.down_proj", "model.layers.1.mlp.down_proj"),  # nothing reads its output: no calibration sees it
        ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
        ("model.embed_tokens", "the embedding table"),
        ("lm_head", "the head"),
    ],
    ids=lambda value: value.rpartition(".")[2],
)
def test_a_weight_that_is_no_number_is_named_before_anything_is_changed(statistics, path, name, value):
    model = release(False)
    with torch.no_grad():
        model.get_submodule(path).weight[2, 3] = value
    before = copy.deepcopy(model)
    with pytest.raises(CompactMindError, match=f"{name}: its weight is NaN or infinite"):
        quantize_llama(model, statistics[False], W8A8Recipe(0.5, embeddings="int8"))
    assert not any(isinstance(module, W8A8Linear) for module in model.modules())
    for (_, result), (_, kept) in zip(model.named_parameters(), before.named_parameters(), strict=True):
        assert result.dtype == kept.dtype and torch.equal(result.nan_to_num(), kept.nan_to_num())


def test_a_row_of_zeros_is_no_reason_to_refuse(statistics):
    model = release(False)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[5] = 0
    dense = logits_of(copy.deepcopy(model).float())
    quantize_llama(model, statistics[False], W8A8Recipe(0.5))
    assert (logits_of(model) - dense).norm() < 0.3 * dense.norm()


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["mlp", "post_attention_layernorm", "self_attn.o_proj"])
def test_a_block_that_fails_in_the_middle_leaves_the_model_as_it_was(stop, where):
    model = release(True)
    before = {name: (parameter, parameter.data_ptr(), parameter.dtype) for name, parameter in model.named_parameters()}

    def fail(*_):
        raise stop("in the middle")

    failing = model.model.layers[1].get_submodule(where).register_forward_pre_hook(fail)
    with pytest.raises(stop, match="in the middle"):
        calibrate_llama(model, helpers.example_windows())
    failing.remove()
    after = {name: (parameter, parameter.data_ptr(), parameter.dtype) for name, parameter in model.named_parameters()}
    assert after.keys() == before.keys()
    assert all(
        left[0] is right[0] and left[1:] == right[1:] for left, right in zip(after.values(), before.values(), strict=True)
    )
    assert {dtype for _, _, dtype in after.values()} == {torch.bfloat16}
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert not any(hasattr(module, "released") for module in model.modules())


@torch.no_grad()
def test_blocks_are_in_float32_only_while_they_run():
    model, seen = release(True), []
    for block in llama_blocks(model):
        block.down.register_forward_pre_hook(lambda module, _: seen.append({p.dtype for p in model.model.layers.parameters()}))
    with float32_block_by_block(model):
        model.model(helpers.example_windows()[:1], use_cache=False)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert seen == [{torch.float32, torch.bfloat16}] * 2
