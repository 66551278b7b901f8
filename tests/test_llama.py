"""The parts of a Llama block, and Llama checkpoints: tied or not, in float32 or bfloat16, they come back as they were."""

import json

import helpers
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GemmaConfig, GemmaForCausalLM, MistralConfig, MistralForCausalLM, Phi3Config, Phi3ForCausalLM

from compactmind.checkpoint import load_checkpoint, save_checkpoint
from compactmind.errors import CompactMindError
from compactmind.files import WEIGHTS, sha256_of
from compactmind.manifest import MANIFEST, is_up_to_date, read_manifest
from compactmind.methods.llama import LINEARS, is_llama, llama_blocks, llama_shapes

STAGE = {"script": "download_model.py", "config": {"source": "made up"}, "inputs": {"weights": "abc"}}
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


def make_mistral():
    return helpers.randomize(MistralForCausalLM(MistralConfig(**helpers.llama_settings(head_dim=16))))


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model(helpers.example_windows()).logits


# --------------------------------------------------------------------------------------------------------------- blocks
@pytest.mark.parametrize(("key_value_heads", "groups"), [(4, 1), (2, 2), (1, 4)])
def test_blocks_know_how_many_query_heads_share_a_value_head(key_value_heads, groups):
    model = helpers.make_llama(num_key_value_heads=key_value_heads)
    blocks = llama_blocks(model)
    assert [(block.groups, block.head_dim) for block in blocks] == [(groups, 8), (groups, 8)]
    shape = {"num_heads": 4, "num_key_value_heads": key_value_heads, "head_dim": 8, "intermediate_size": 48}
    assert llama_shapes(model) == [shape, shape]


def test_heads_need_not_add_up_to_the_hidden_size():
    model = helpers.make_llama(num_key_value_heads=1, head_dim=10)
    assert [(block.groups, block.head_dim) for block in llama_blocks(model)] == [(4, 10)] * 2
    assert llama_shapes(model)[0] == {"num_heads": 4, "num_key_value_heads": 1, "head_dim": 10, "intermediate_size": 48}


@pytest.mark.parametrize("make", [helpers.make_llama, make_mistral], ids=["llama", "mistral"])
def test_a_block_holds_the_modules_of_the_model_themselves(make):
    model = make()
    assert is_llama(model)
    for index, (block, layer) in enumerate(zip(llama_blocks(model), model.model.layers, strict=True)):
        assert block.name == f"model.layers.{index}" and block.module is layer
        assert block.input_norm is layer.input_layernorm and block.post_norm is layer.post_attention_layernorm
        attention, mlp = layer.self_attn, layer.mlp
        assert [block.q, block.k, block.v, block.o] == [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        assert [block.gate, block.up, block.down] == [mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def test_mistral_is_taken_apart_like_llama():
    shape = {"num_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48}
    assert llama_shapes(make_mistral()) == [shape, shape]
    assert [block.groups for block in llama_blocks(make_mistral())] == [2, 2]


def test_the_linears_of_all_blocks_are_those_of_the_model_but_its_head():
    model = helpers.make_llama()
    named = {f"{block.name}.{LINEARS[field]}": getattr(block, field) for block in llama_blocks(model) for field in LINEARS}
    expected = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert named == {name: module for name, module in expected.items() if name != "lm_head"}
    assert len(named) == 2 * len(LINEARS)


def test_an_encoder_is_refused_by_name_with_what_was_expected(bert, distilbert):
    for model, name in {bert: "BertForSequenceClassification.*'bert'", distilbert: "DistilBert.*'distilbert'"}.items():
        assert not is_llama(model)
        with pytest.raises(CompactMindError, match=f"{name}.*has no model.layers") as caught:
            llama_blocks(model)
        for part in ("Llama-like", "input_layernorm", "post_attention_layernorm", *LINEARS.values()):
            assert part in str(caught.value)


def test_another_kind_of_decoder_is_refused_naming_the_part_it_lacks():
    model = Phi3ForCausalLM(Phi3Config(**helpers.llama_settings(pad_token_id=0)))
    with pytest.raises(CompactMindError, match="Phi3ForCausalLM.*model.layers.0.*q_proj.*expected a Llama-like"):
        llama_blocks(model)


def test_query_heads_that_do_not_share_evenly_are_refused():
    model = helpers.make_llama()
    model.model.layers[1].self_attn.k_proj = torch.nn.Linear(32, 24, bias=False)
    with pytest.raises(CompactMindError, match="model.layers.1: query heads are no multiple of key-value heads"):
        llama_blocks(model)


# ----------------------------------------------------------------------------------------------------------- checkpoints
@pytest.fixture(scope="module")
def byte_tokenizer():
    return helpers.make_byte_tokenizer()


def save(directory, model, tokenizer, **changes):
    save_checkpoint(directory, model, tokenizer, **{"kind": "dense", "parent": None, "stage": STAGE} | changes)
    return directory


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_checkpoint_comes_back_with_equal_logits(tmp_path, byte_tokenizer, tied, name):
    dtype = getattr(torch, name)
    model = helpers.cast_parameters(helpers.make_llama(tie_word_embeddings=tied), dtype)
    expected = logits_of(model)
    directory = save(tmp_path / "llama", model, byte_tokenizer, dtype=name)

    loaded = load_checkpoint(directory, dtype=dtype)
    assert not loaded.model.training and type(loaded.model) is type(model)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {dtype}
    assert torch.equal(logits_of(loaded.model), expected)
    assert (loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight) == tied
    assert loaded.tokenizer("naïve\n")["input_ids"] == byte_tokenizer("naïve\n")["input_ids"]

    again = save(tmp_path / "again", loaded.model, loaded.tokenizer, dtype=name)
    assert torch.equal(logits_of(load_checkpoint(again, dtype=dtype).model), expected)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_embeddings_that_are_also_the_head_are_written_once(tmp_path, byte_tokenizer, tied):
    model = helpers.make_llama(tie_word_embeddings=tied)
    tensors = load_file(save(tmp_path / "llama", model, byte_tokenizer) / WEIGHTS)
    assert (HEAD in tensors) == (not tied)
    assert set(tensors) | {HEAD} == set(model.state_dict())
    assert sum(tensor.numel() for tensor in tensors.values()) == sum(parameter.numel() for parameter in model.parameters())


def test_a_head_that_only_equals_the_embeddings_is_still_written(tmp_path, byte_tokenizer):
    model = helpers.make_llama()
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    directory = save(tmp_path / "llama", model, byte_tokenizer)
    assert {HEAD, EMBEDDINGS} <= set(load_file(directory / WEIGHTS))
    assert torch.equal(logits_of(load_checkpoint(directory).model), logits_of(model))


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_the_dtype_is_that_of_the_weights_and_the_configuration_says_so(tmp_path, byte_tokenizer, name):
    model = helpers.cast_parameters(helpers.make_llama(), getattr(torch, name))
    directory = save(tmp_path / "llama", model, byte_tokenizer, dtype=name)
    assert {tensor.dtype for tensor in load_file(directory / WEIGHTS).values()} == {getattr(torch, name)}
    assert helpers.read_json(directory / "config.json")["dtype"] == name


def test_weights_stored_in_bfloat16_are_computed_with_in_float32_unless_asked_otherwise(tmp_path, byte_tokenizer):
    model = helpers.cast_parameters(helpers.make_llama(), torch.bfloat16)
    loaded = load_checkpoint(save(tmp_path / "llama", model, byte_tokenizer, dtype="bfloat16")).model
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(logits_of(loaded), logits_of(helpers.cast_parameters(model, torch.float32)))


def test_the_manifest_describes_the_model(tmp_path, byte_tokenizer):
    model = helpers.make_llama(tie_word_embeddings=True)
    directory = save(tmp_path / "llama", model, byte_tokenizer)
    manifest = read_manifest(directory)
    assert (manifest["kind"], manifest["architecture"]) == ("dense", "LlamaForCausalLM")
    assert manifest["layers"] == [
        {"num_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48} for _ in range(2)
    ]
    attention, mlp, norms = 32 * 32 * 2 + 32 * 16 * 2, 3 * 32 * 48, 2 * 32
    assert manifest["parameters"] == helpers.LLAMA_VOCABULARY * 32 + 2 * (attention + mlp + norms) + 32
    assert is_up_to_date(directory, STAGE) and not is_up_to_date(directory, STAGE | {"inputs": {}})


@pytest.mark.parametrize("change", ["missing", "misshapen", "unexpected"])
def test_a_tensor_that_does_not_fit_is_refused_with_the_command_that_makes_the_model(tmp_path, byte_tokenizer, change):
    directory = save(tmp_path / "llama", helpers.make_llama(), byte_tokenizer)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(directory / WEIGHTS)
    if change == "missing":
        del tensors[name]
    elif change == "misshapen":
        tensors[name] = tensors[name][:40].clone()
    else:
        tensors["model.layers.2.mlp.up_proj.weight"] = tensors[name].clone()
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    manifest = helpers.read_json(directory / MANIFEST)
    manifest["files"][WEIGHTS] = {"bytes": (directory / WEIGHTS).stat().st_size, "sha256": sha256_of(directory / WEIGHTS)}
    (directory / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CompactMindError, match="llama could not be loaded (.|\n)*python download_model.py"):
        load_checkpoint(directory)


def test_the_same_names_with_other_norms_are_refused():
    model = GemmaForCausalLM(GemmaConfig(**helpers.llama_settings(pad_token_id=0)))
    with pytest.raises(CompactMindError, match="model_type 'gemma'.*llama, mistral"):
        llama_blocks(model)
