"""Llamas as GGUF files: gguf's own code reads what was computed with, transformers reads the model back, and what cannot be is named."""

import json

import gguf
import helpers
import numpy
import pytest
import scripts
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from compactmind.checkpoint import load_checkpoint, save_checkpoint
from compactmind.errors import CompactMindError
from compactmind.gguf_blocks import encoded
from compactmind.gguf_export import export_gguf, largest_difference, rope_order
from compactmind.gguf_source import LLAMA3, PRE_TOKENIZERS, QWEN2, folder_of, read_gguf
from compactmind.gguf_tokenizer import pre_tokenizer_of
from compactmind.methods.llama import LINEARS, llama_blocks
from compactmind.methods.pruning.llama_masks import PruneRecipe
from compactmind.methods.pruning.llama_pruning import prune_llama
from compactmind.methods.quantization.gptq import round_nearest
from compactmind.methods.quantization.gptq_model import GPTQRecipe, quantize_gptq
from compactmind.methods.quantization.grid import BITS, GGUF_TYPES, ZEROS, Grid
from compactmind.methods.quantization.grouped import GroupedWeight

GRIDS = [Grid(bits, size, zero) for bits in BITS for zero in ZEROS for size in (32, 64, -1)]


def llama(tied: bool = True, **changes):
    model = helpers.make_llama(tie_word_embeddings=tied, **({"hidden_size": 64, "intermediate_size": 96} | changes))
    return helpers.cast_parameters(model, torch.bfloat16)


def in_integers(tied: bool = True, **recipe):
    model = helpers.released_llama(helpers.make_llama(tie_word_embeddings=tied, hidden_size=64, intermediate_size=96))
    quantize_gptq(model, helpers.example_windows(4, 32), GPTQRecipe(compensation=False, **recipe))
    return model


def byte_level() -> PreTrainedTokenizerFast:
    """Return a tokenizer as GPT-2 has it: bytes, two of which have been merged, and a token in front of each text."""
    vocabulary = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "ab"]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(vocabulary)}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def export(model, path, tokenizer=None, **more):
    return export_gguf(model, tokenizer or byte_level(), path, "tiny", **more)


def tensors(path) -> dict:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def values(path) -> dict:
    result = gguf.GGUFReader(path).fields
    return {name: field.contents() for name, field in result.items()}


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model.float()(helpers.example_windows()).logits


# ----------------------------------------------------------------------------------------------------------------- weights
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_blocks_are_the_weights_they_stand_for(grid):
    """Read by the gguf package, an independent writing of the layouts."""
    result = round_nearest(torch.randn(5, 192, generator=torch.Generator().manual_seed(0)) + 0.2, grid)
    weight = GroupedWeight.of(result.q, result.scale, result.zero, grid)
    if grid.gguf_type is None:
        assert grid.zero == "integer" or (grid.zero == "float" and grid.bits > 5)
        with pytest.raises(ValueError, match="no GGUF type holds rows of 192 weights in"):
            encoded(weight)
        return
    data, kind = encoded(weight)
    read = torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]))
    assert torch.allclose(read, weight.dequantize(), rtol=0, atol=3e-7 * float(read.abs().max()))
    if grid.zero == "symmetric":
        assert torch.equal(read, weight.dequantize())
    if grid.is_gguf:
        assert data.nbytes == grid.stored_bits(192) * 5 // 8 and GGUF_TYPES[grid.zero, grid.bits] == kind
    backwards, _ = encoded(weight, torch.arange(4, -1, -1))
    assert numpy.array_equal(backwards, data[::-1])


def test_a_row_that_is_no_multiple_of_a_block_is_refused():
    result = round_nearest(torch.randn(5, 72), Grid(4, 32))
    with pytest.raises(ValueError, match="rows of 72 weights"):
        encoded(GroupedWeight.of(result.q, result.scale, result.zero, result.grid))


def test_the_halves_of_a_head_take_turns():
    assert rope_order(8, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_a_dense_model_comes_back(tmp_path, tied, dtype):
    model = llama(tied)
    counts = export(model, tmp_path / "x.gguf", dtype=dtype)
    assert counts == {dtype: 15 + (not tied), "F32": 5} if dtype != "F32" else {"F32": 20 + (not tied)}
    again, tokenizer = read_gguf(tmp_path / "x.gguf")
    assert again.config.tie_word_embeddings == tied and again.config.num_key_value_heads == model.config.num_key_value_heads
    assert torch.allclose(
        logits_of(again), logits_of(model), rtol=1e-3 if dtype == "F16" else 0, atol=1e-2 if dtype == "F16" else 0
    )
    assert byte_level().get_vocab().items() <= tokenizer.get_vocab().items()  # transformers adds tokens of its own


@pytest.mark.parametrize(
    "recipe", [{"bits": 4}, {"bits": 5, "zero": "float", "embeddings": "int4"}, {"bits": 8}, {"target_compression": 2.5}]
)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_model_in_the_grids_of_gguf_keeps_its_levels_and_its_bytes(tmp_path, tied, recipe):
    model = in_integers(tied, layout="gguf", **recipe)
    export(model, tmp_path / "x.gguf")
    assert largest_difference(model, tmp_path / "x.gguf") == ""
    held = tensors(tmp_path / "x.gguf")
    modules = [module for module in model.modules() if isinstance(module, GroupedWeight)]
    assert sum(held[name].n_bytes for name in held if held[name].tensor_type.name != "F32") == sum(
        module.grid.stored_bits(module.shape[1]) * module.shape[0] // 8 for module in modules
    )
    assert ("output.weight" in held) != tied
    again, _ = read_gguf(tmp_path / "x.gguf")
    assert (logits_of(again) - logits_of(model)).norm() / logits_of(model).norm() < 0.02  # read as bfloat16


def test_wider_grids_go_into_wider_types_and_lose_nothing(tmp_path):
    model = in_integers(bits=3, group_size=64, embeddings="int6")
    assert export(model, tmp_path / "x.gguf") == {"Q8_0": 1, "Q4_0": 14, "F32": 5}
    assert largest_difference(model, tmp_path / "x.gguf") == ""


def test_a_file_that_is_not_the_model_is_told(tmp_path):
    model = in_integers(layout="gguf")
    export(model, tmp_path / "x.gguf")
    other = in_integers(layout="gguf")
    other.model.layers[1].self_attn.k_proj.scale[3, 0] *= 1.01
    assert largest_difference(other, tmp_path / "x.gguf").startswith("blk.1.attn_k.weight by ")


@pytest.mark.parametrize(
    "part", ["model.norm.weight", "lm_head.weight", "model.layers.0.self_attn.k_proj.bias", "model.layers.1.input_layernorm.weight"]
)
def test_all_of_a_model_is_compared(tmp_path, part):
    model = llama(False, attention_bias=True)
    export(model, tmp_path / "x.gguf")
    assert largest_difference(model, tmp_path / "x.gguf") == ""
    with torch.no_grad():
        model.get_parameter(part).mul_(1.5)
    assert " by " in largest_difference(model, tmp_path / "x.gguf")
    assert "output.weight: in one of both alone" in largest_difference(llama(), tmp_path / "x.gguf")


# ---------------------------------------------------------------------------------------------------------------- metadata
def test_the_file_says_how_to_run_it(tmp_path):
    tokenizer = byte_level()
    tokenizer.chat_template = "{{ messages }}"
    model = llama(num_key_value_heads=2)
    model.config.rms_norm_eps = 1e-5
    export(model, tmp_path / "x.gguf", tokenizer)
    text = values(tmp_path / "x.gguf")
    config = model.config
    expected = {
        "general.architecture": "llama", "general.name": "tiny", "llama.block_count": 2, "llama.embedding_length": 64,
        "llama.feed_forward_length": 96, "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": 2, "llama.context_length": config.max_position_embeddings,
        "llama.rope.freq_base": config.rope_parameters["rope_theta"], "llama.rope.dimension_count": config.head_dim,
        "llama.attention.key_length": config.head_dim, "llama.vocab_size": config.vocab_size,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.bos_token_id": 256, "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ messages }}", "general.file_type": gguf.LlamaFileType.MOSTLY_BF16,
    }  # fmt: skip
    assert {name: text[name] for name in expected} == expected
    assert text["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    tokens, types = text["tokenizer.ggml.tokens"], text["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == config.vocab_size and tokens[256] == "<s>" and types[256] == gguf.TokenType.CONTROL
    assert tokens[260] == "[PAD260]" and types[260] == gguf.TokenType.UNUSED and types[65] == gguf.TokenType.NORMAL


def test_a_mistral_and_a_llama_3_1_are_llamas_to_it(tmp_path):
    settings = helpers.llama_settings(head_dim=16, hidden_size=64, intermediate_size=96)
    model = helpers.cast_parameters(helpers.randomize(MistralForCausalLM(MistralConfig(**settings))), torch.bfloat16)
    export(model, tmp_path / "m.gguf")
    assert torch.equal(logits_of(read_gguf(tmp_path / "m.gguf")[0]), logits_of(model))
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16, "rope_theta": 10000.0}  # fmt: skip
    model = llama(rope_parameters=rope)
    export(model, tmp_path / "x.gguf")
    factors = torch.from_numpy(tensors(tmp_path / "x.gguf")["rope_freqs.weight"].data.copy())
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    assert torch.allclose(plain / factors, helpers.make_llama(rope_parameters=rope, hidden_size=64).model.rotary_emb.inv_freq)
    assert factors.min() < 2 and factors.max() == pytest.approx(8)


def other(kind: str, **changes):
    settings = helpers.llama_settings(hidden_size=64, intermediate_size=96, num_key_value_heads=2, **changes)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    return helpers.cast_parameters(helpers.randomize(model), torch.bfloat16)


@pytest.mark.parametrize("rounded", [False, True], ids=["dense", "gptq"])
@pytest.mark.parametrize(("kind", "changes"), [("qwen2", {}), ("qwen3", {"head_dim": 128})])
def test_a_qwen_keeps_its_rows_its_biases_and_its_norms(tmp_path, kind, changes, rounded):
    model = other(kind, **changes)
    if rounded:
        model = helpers.released_llama(model.float())
        quantize_gptq(model, helpers.example_windows(4, 32), GPTQRecipe(compensation=False, layout="gguf"))
    export(model, tmp_path / "x.gguf", dtype="F32")
    assert values(tmp_path / "x.gguf")["general.architecture"] == kind
    again = read_gguf(tmp_path / "x.gguf")[0]
    if not rounded:
        assert torch.equal(logits_of(again), logits_of(model))
    for own, read in zip(llama_blocks(model), llama_blocks(again), strict=True):
        for field in LINEARS:
            weight = getattr(own, field).dequantize() if rounded else getattr(own, field).weight
            assert torch.equal(weight.bfloat16(), getattr(read, field).weight.bfloat16())


def test_a_granite_says_what_its_numbers_are_multiplied_by(tmp_path):
    scales = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.25, "logits_scaling": 2.0}
    export(other("granite", **scales), tmp_path / "x.gguf")
    text, names = values(tmp_path / "x.gguf"), ("embedding_scale", "residual_scale", "attention.scale", "logit_scale")
    assert [text[f"granite.{name}"] for name in names] == list(scales.values())


def test_a_window_of_attention_is_what_the_file_gives_as_its_context(tmp_path):
    export(other("mistral", sliding_window=24), tmp_path / "x.gguf")
    assert values(tmp_path / "x.gguf")["llama.context_length"] == 24


# --------------------------------------------------------------------------------------------------------------- tokenizers
def split_by(pattern: str) -> dict:
    """Return what tokenizer.json says of a split by a pattern, then into bytes."""
    parts = [{"type": "Split", "pattern": {"Regex": pattern}}, {"type": "ByteLevel", "use_regex": False}]
    return {"type": "Sequence", "pretokenizers": parts}


@pytest.mark.parametrize(
    ("pre_tokenizer", "name"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), "gpt-2"),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]), "smollm"),
        (split_by(LLAMA3), "llama-bpe"),
        (split_by(QWEN2), "qwen2"),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), None),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(False), pre_tokenizers.ByteLevel(add_prefix_space=False)]), None),
        (split_by("x"), None),
        (pre_tokenizers.Whitespace(), None),
    ],
    ids=["gpt-2", "smollm", "llama-bpe", "qwen2", "a space in front", "digits together", "another pattern", "words"],
)  # fmt: skip
def test_ways_to_cut_text_are_known_by_name(pre_tokenizer, name):
    if not isinstance(pre_tokenizer, dict):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizer
        pre_tokenizer = json.loads(tokenizer.to_str())["pre_tokenizer"]
    assert pre_tokenizer_of({"pre_tokenizer": pre_tokenizer}) == name


@pytest.mark.parametrize("way", PRE_TOKENIZERS)
def test_a_tokenizer_that_comes_back_cuts_text_as_it_did(tmp_path, way):
    tokenizer = byte_level()
    vocabulary = tokenizer.get_vocab() | {"12": 258, "34": 259, "'s": 260}
    model = models.BPE(vocabulary, [("a", "b"), ("1", "2"), ("3", "4"), ("'", "s")])
    tokenizer.backend_tokenizer.model, tokenizer.backend_tokenizer.pre_tokenizer = model, PRE_TOKENIZERS[way]()
    export(llama(), tmp_path / "x.gguf", tokenizer)
    assert values(tmp_path / "x.gguf")["tokenizer.ggml.pre"] == way
    text = "It's 12345\n\n ab12 34"
    again = read_gguf(tmp_path / "x.gguf")[1]
    assert again(text, add_special_tokens=False)["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
    cut = {"gpt-2": ["12", "34", "5"], "smollm": list("12345"), "llama-bpe": ["12", *"345"], "qwen2": list("12345")}[way]
    assert again.tokenize("12345") == cut


def pieces() -> PreTrainedTokenizerFast:
    """Return a tokenizer as Llama 2 has it: pieces of SentencePiece, bytes for what it does not know."""
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "ab", "\u2581ab"]
    tokenizer = Tokenizer(
        models.BPE(
            {token: number for number, token in enumerate(vocabulary)},
            [("a", "b"), ("\u2581", "ab")],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_pieces_of_sentencepiece_have_scores_and_bytes(tmp_path):
    export(llama(), tmp_path / "x.gguf", pieces())
    text = values(tmp_path / "x.gguf")
    assert text["tokenizer.ggml.model"] == "llama" and text["tokenizer.ggml.add_space_prefix"] is True
    types, scores = text["tokenizer.ggml.token_type"], text["tokenizer.ggml.scores"]
    assert types[:4] == [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL, gguf.TokenType.BYTE]
    assert types[259] == gguf.TokenType.NORMAL and scores == sorted(scores, reverse=True)
    assert "tokenizer.ggml.merges" not in text and text["tokenizer.ggml.eos_token_id"] == 2


# --------------------------------------------------------------------------------------------------------------- bad input
def w8a8():
    from compactmind.methods.quantization.w8a8_model import W8A8Recipe, calibrate_llama, quantize_llama

    model = helpers.make_llama()
    quantize_llama(model, calibrate_llama(model, helpers.example_windows()), W8A8Recipe())
    return model


def uneven():
    model = llama()
    mlp = model.model.layers[1].mlp
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = nn.Linear(64, 64, False), nn.Linear(64, 64, False), nn.Linear(64, 64, False)
    return model


def pruned(scope: str):
    recipe = PruneRecipe(0.3, "l2", scope, ("channels", "groups"), round_to=8, compensate=False)
    model = helpers.make_llama(hidden_size=64, intermediate_size=96, num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    return helpers.cast_parameters(prune_llama(model, recipe, helpers.example_windows(6, 24))[0], torch.bfloat16)


def with_a(value: float):
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = value
    return model


def lowercase() -> PreTrainedTokenizerFast:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    return tokenizer


def words() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")), unk_token="[UNK]"
    )


@pytest.mark.parametrize(
    ("make", "tokenizer", "said"),
    [
        (w8a8, None, "is a W8A8Linear: dense and gptq models are exported to GGUF; make one with `python 5_bayesian"),
        (uneven, None, "64 x 64, 96 x 64 in different blocks.*prune so with `python 5_bayesian_search.py --strategy fixed .*uniform"),
        (lambda: pruned("global"), None, "in different blocks.*prune so with `python 5_bayesian_search.py --strategy fixed .*uniform"),
        (lambda: pruned("uniform"), None, None),
        (lambda: with_a(float("nan")), None, "up_proj.weight holds NaN or infinite numbers"),
        (lambda: llama(vocab_size=100), None, "as number 257 and the table 100 rows: they do not belong together"),
        (llama, lowercase, r"changes texts first \(Lowercase\)"),
        (lambda: in_integers(bits=4, zero="integer"), None, 'no GGUF type holds.*"layout": "gguf"'),
        (lambda: llama(intermediate_size=100), None, None),
        (lambda: in_integers(bits=4, group_size=24), None, "no GGUF type holds rows of 64 weights in 4b g24"),
        (lambda: llama(hidden_act="gelu"), None, "hidden_act 'gelu'"),
        (
            lambda: llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
            None,
            "rope_type 'dynamic'",
        ),
        (lambda: helpers.make_bert(), None, "a bert model .* is not exported to GGUF: llama, mistral, granite, qwen2, qwen3 are"),
        (llama, words, "WordLevel.*is none that GGUF has a name for"),
    ],
    ids=[
        "w8a8",
        "uneven",
        "pruned globally",
        "pruned uniformly",
        "nan",
        "small table",
        "lowercase",
        "integer zero",
        "any width when dense",
        "other groups",
        "gelu",
        "rope",
        "another family",
        "tokenizer",
    ],
)
def test_what_cannot_be_written_is_named_and_nothing_is_left(tmp_path, make, tokenizer, said):
    path = tmp_path / "x.gguf"
    path.write_text("older")
    if said is None:
        export(make(), path)
        assert tensors(path)
        return
    with pytest.raises(CompactMindError, match=said):
        export(make(), path, tokenizer and tokenizer())
    assert path.read_text() == "older" and list(tmp_path.iterdir()) == [path]


def test_a_number_beyond_f16_is_named(tmp_path):
    with pytest.raises(CompactMindError, match="blk.0.ffn_up: 9.99e.05 is beyond F16, which ends at 65504; write it as BF16"):
        export(with_a(1e6), tmp_path / "x.gguf", dtype="F16")


def test_a_layout_of_gguf_is_for_models_that_go_into_one():
    model = helpers.released_llama(other("smollm3").float())
    for layout in ("gguf", "gguf_k"):
        with pytest.raises(CompactMindError, match=f"layout {layout} is for models that go into a GGUF file: llama, .*, not smollm3"):
            quantize_gptq(model, helpers.example_windows(4, 32), GPTQRecipe(compensation=False, layout=layout))


@pytest.mark.parametrize(
    "changed",
    [{"bits": 3}, {"bits": 6}, {"group_size": 64}, {"zero": "integer"}, {"bits": 8, "zero": "float"}, {"embeddings": "int6"}],
)
def test_a_layout_that_gguf_has_not_is_refused_before_any_work(changed):
    with pytest.raises(ValueError, match="layout gguf has no .*choose one of 4 bits symmetric.*groups of 32"):
        GPTQRecipe(layout="gguf", **changed)
    with pytest.raises(ValueError, match="layout 'ggml': choose one of any, gguf"):
        GPTQRecipe(layout="ggml")
    assert GPTQRecipe(layout="gguf", target_compression=3.0).table_of(576) == Grid(8, 32)


# -------------------------------------------------------------------------------------------------------------- as a source
def test_a_gguf_file_is_a_source_and_says_what_it_is(tmp_path):
    model, said = in_integers(layout="gguf", bits=4), []
    export(model, tmp_path / "tiny.q4.gguf")
    assert folder_of(tmp_path, tmp_path / "models") == tmp_path
    folder = folder_of(tmp_path / "tiny.q4.gguf", tmp_path / "models", said.append)
    assert folder == tmp_path / "models" / "tiny_q4" and "dequantized" in said[0] and "16 levels per 32 weights" in said[-1]
    checkpoint = load_checkpoint(folder)
    assert checkpoint.manifest["published_as"]["file"] == "tiny.q4.gguf" and checkpoint.manifest["kind"] == "dense"
    weights = {f"{block.name}.{LINEARS[field]}": getattr(block, field) for block in llama_blocks(model) for field in LINEARS}
    for name, linear in weights.items():
        assert torch.equal(checkpoint.model.get_submodule(name).weight, linear.dequantize().bfloat16().float())
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert folder_of(tmp_path / "tiny.q4.gguf", tmp_path / "models", said.append) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written and len(said) == 3
    export(in_integers(layout="gguf", bits=5), tmp_path / "tiny.q4.gguf")
    folder_of(tmp_path / "tiny.q4.gguf", tmp_path / "models", said.append)
    assert (folder / "model.safetensors").stat().st_mtime_ns != written


@pytest.mark.parametrize(
    ("content", "said"), [(None, "is not there"), (b"", "no whole GGUF"), (b"GGUF" + b"x" * 50, "no whole GGUF")]
)
def test_a_file_that_is_no_gguf_is_refused_in_one_line(tmp_path, content, said):
    path = tmp_path / "x.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CompactMindError, match=said):
        folder_of(path, tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_heads_that_transformers_reads_from_no_gguf_are_told(tmp_path):
    export(pruned("uniform"), tmp_path / "x.gguf")
    with pytest.raises(CompactMindError, match="6 heads for 64 channels.*give the folder that it was made from"):
        folder_of(tmp_path / "x.gguf", tmp_path / "models")


def test_a_tokenizer_of_another_kind_is_told(tmp_path, monkeypatch):
    said = []
    export(llama(), tmp_path / "x.gguf")
    monkeypatch.setattr("compactmind.gguf_source.pre_tokenizer_name", lambda path: "tekken")
    folder_of(tmp_path / "x.gguf", tmp_path / "models", said.append)
    assert "cuts text (tekken) is not known here" in said[-1]


def test_a_name_that_another_model_has_is_not_taken(tmp_path):
    export(llama(), tmp_path / "mine.gguf")
    settings = {"kind": "dense", "parent": None, "stage": {"script": "another.py"}}
    save_checkpoint(tmp_path / "models" / "mine", llama(), byte_level(), **settings)
    with pytest.raises(CompactMindError, match="mine cannot be written to"):
        folder_of(tmp_path / "mine.gguf", tmp_path / "models")


def test_scripts_take_and_make_them(tmp_path):
    settings = {"kind": "dense", "parent": None, "stage": {}, "dtype": "bfloat16"}
    save_checkpoint(tmp_path / "models" / "tiny", llama(), byte_level(), **settings)
    done = scripts.run_script("export_gguf.py", "--model", "models/tiny", "--output", "out.gguf", cwd=tmp_path)
    assert "out.gguf 0.2 MB with tokenizer" in done.stdout and "15 BF16, 5 F32" in done.stdout
    text = scripts.run_python(
        helpers.REPOSITORY / "generate.py", "--model", "out.gguf", "--max_new_tokens", "3", "--json", "abc", cwd=tmp_path
    )
    assert json.loads(text.stdout)["new_tokens"] <= 3 and "is that file in another format" in text.stderr
    done = scripts.run_script("export_gguf.py", "--model", "out.gguf", "--dtype", "Q8_0", "--output", "again.gguf", cwd=tmp_path)
    assert "again.gguf" in done.stdout and "Q8_0" in done.stdout
