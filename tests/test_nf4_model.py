"""NF4 of a Llama: compensated block by block, table and head as released or integers; the file is as small as told and reloads."""

import copy

import helpers
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from compactmind.checkpoint import load_checkpoint, save_checkpoint
from compactmind.errors import CompactMindError
from compactmind.files import WEIGHTS
from compactmind.formats.table import parameters_of
from compactmind.methods.blockwise import walk_blocks
from compactmind.methods.llama import LINEARS, llama_blocks
from compactmind.methods.quantization.calibration import SITES
from compactmind.methods.quantization.error_compensation import compensation_of
from compactmind.methods.quantization.grouped import GroupedEmbedding, GroupedLinear, TiedHead
from compactmind.methods.quantization.nf4_model import DAMPING, NF4Recipe, quantize_nf4
from compactmind.methods.quantization.packed_linear import NF4Linear
from compactmind.methods.quantization.packed_model import quantize_model
from compactmind.methods.quantization.tables import EMBEDDINGS, table_grid
from compactmind.methods.registry import METHODS

TIED = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def llama(tied: bool = True, **changes):
    return helpers.released_llama(helpers.make_llama(tie_word_embeddings=tied, scale=0.3, **changes))


def windows(count: int = 8, length: int = 32) -> torch.Tensor:
    return helpers.example_windows(count, length)


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model(helpers.example_windows()).logits.float()


def save(directory, model, description):
    settings = {"kind": "nf4", "parent": None, "stage": {}, "quantization": description, "dtype": "bfloat16"}
    save_checkpoint(directory, model, helpers.make_byte_tokenizer(), **settings)


@pytest.mark.parametrize("compensation", [False, True], ids=["nearest", "compensated"])
@pytest.mark.parametrize("embeddings", EMBEDDINGS)
@TIED
def test_a_file_reloads_with_equal_logits_and_as_many_parameters(tmp_path, embeddings, compensation, tied):
    model = llama(tied, attention_bias=True)
    count = parameters_of(model)
    description = quantize_nf4(model, windows(), NF4Recipe(embeddings=embeddings, compensation=compensation))
    assert description["error_compensation"] == ("gptq" if compensation else None)
    save(tmp_path / "m", model, description)
    loaded = load_checkpoint(tmp_path / "m")
    assert torch.equal(logits_of(loaded.model), logits_of(model.float()))
    assert count == parameters_of(model) == parameters_of(loaded.model) == loaded.manifest["parameters"]
    state = load_file(tmp_path / "m" / WEIGHTS)
    assert any(name.startswith("lm_head.") for name in state) != tied  # what is tied is in the file once
    if embeddings == "as_released":
        assert description["tables"] == {} and state["model.embed_tokens.weight"].dtype == torch.bfloat16
        return
    names = ["model.embed_tokens"] if tied else ["model.embed_tokens", "lm_head"]
    assert description["tables"] == dict.fromkeys(names, {"bits": int(embeddings[3]), "group_size": 64, "zero": "symmetric"})
    table, head = loaded.model.get_input_embeddings(), loaded.model.get_output_embeddings()
    assert isinstance(table, GroupedEmbedding) and isinstance(head, TiedHead if tied else GroupedLinear)
    assert (getattr(head, "table", None) is table) == tied
    packed = [tensor for name, tensor in state.items() if name.startswith("model.embed_tokens.") and "shape" not in name]
    assert sum(tensor.numel() * tensor.element_size() for tensor in packed) * 8 == 264 * table_grid(embeddings).stored_bits(32)
    loaded.model.generate(helpers.example_windows()[:1], max_new_tokens=2, do_sample=False)


def test_fewer_bits_of_the_table_are_fewer_bytes_and_a_larger_error(tmp_path):
    sizes, errors = [], []
    for embeddings in EMBEDDINGS:
        model = llama()
        table = model.get_input_embeddings().weight.detach().float()
        save(tmp_path / embeddings, model, quantize_nf4(model, windows(), NF4Recipe(embeddings=embeddings)))
        sizes.append((tmp_path / embeddings / WEIGHTS).stat().st_size)
        errors.append((model.get_input_embeddings()(torch.arange(264)) - table).norm().item())
    assert sizes == sorted(set(sizes), reverse=True) and errors == sorted(set(errors)) and errors[0] == 0


@TIED
def test_compensated_blocks_change_their_outputs_less(tied):
    dense, text = llama(tied), windows(16)
    generator = torch.Generator().manual_seed(0)
    causes = torch.randn(264, 5, generator=generator) @ torch.randn(
        5, 32, generator=generator
    )  # inputs correlate, as real ones do
    dense.model.embed_tokens.weight.data = causes.to(torch.bfloat16)
    states = {}
    for name, compensation in (("dense", None), ("nearest", False), ("compensated", True)):
        model = copy.deepcopy(dense)
        if compensation is not None:
            quantize_nf4(model, text, NF4Recipe(compensation=compensation, embeddings="as_released"))
        with torch.no_grad():
            states[name] = model.float().model(text).last_hidden_state
    error = {name: (result - states["dense"]).norm() for name, result in states.items()}
    assert error["compensated"] < 0.9 * error["nearest"]


def test_every_linear_is_compensated_by_what_the_four_bit_blocks_before_it_write():
    model, text = llama(), windows()
    expected = copy.deepcopy(model)
    quantize_nf4(model, text, NF4Recipe())
    for _, block, moments in walk_blocks(expected, text, None):
        for site, fields in SITES.items():
            for field in fields:
                linear = getattr(block, field)
                packed = NF4Linear(linear.in_features, linear.out_features, False, "cpu", True)
                packed.pack(linear.weight, compensation_of(moments[site], DAMPING, largest_first=True), refined=True)
                expected.set_submodule(f"{block.name}.{LINEARS[field]}", packed)
    for result, wanted in zip(llama_blocks(model), llama_blocks(expected), strict=True):
        assert all(torch.equal(getattr(result, field).weight, getattr(wanted, field).weight) for field in LINEARS)


def test_rounding_to_nearest_is_what_it_was():
    result, wanted = llama(), llama().float()
    quantize_nf4(result, windows(), NF4Recipe(compensation=False, embeddings="as_released"))
    quantize_model(wanted, "nf4", embeddings="float32")
    assert torch.equal(logits_of(result.float()), logits_of(wanted))
    assert not any(type(module) is nn.Linear for name, module in result.named_modules() if name != "lm_head")


def test_what_stays_keeps_its_dtype():
    model = llama(attention_bias=True)
    quantize_nf4(model, windows(), NF4Recipe())
    floats = {name: parameter.dtype for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    assert set(floats.values()) == {torch.bfloat16} and len(floats) == 5 + 4 * 2


@pytest.mark.parametrize("method", ["nf4", "w8a8"])
def test_an_unknown_word_names_the_known_ones(method):
    with pytest.raises(ValueError, match="'int3'.*as_released, int8, int6, int5, int4"):
        METHODS[method].parameters({"embeddings": "int3"})


def test_what_cannot_be_quantized_is_named_before_anything_is_changed():
    model = llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CompactMindError, match="8 tokens of calibration text are too few for linears of 48 inputs.*12"):
        quantize_nf4(model, windows(1, 8), NF4Recipe())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    quantize_nf4(model, windows(1, 8), NF4Recipe(compensation=False))
    with pytest.raises(CompactMindError, match="q_proj is a NF4Linear: the model is quantized already"):
        quantize_nf4(model, windows(), NF4Recipe())
    broken = llama()
    broken.model.embed_tokens.weight.data[3, 3] = torch.nan
    with pytest.raises(CompactMindError, match="model.embed_tokens: its weight is NaN"):
        quantize_nf4(broken, windows(), NF4Recipe())


def test_the_bytes_told_before_are_those_of_the_file():
    assert METHODS["nf4"].bits(NF4Recipe()) == (4.13, 8.25)
    assert METHODS["nf4"].bits(NF4Recipe(embeddings="as_released", double_quantization=False)) == (4.5, None)
    w8a8 = METHODS["w8a8"]
    assert [w8a8.bits(w8a8.parameters({"embeddings": each}))[1] for each in EMBEDDINGS] == [None, 8.06, 6.25, 5.25, 4.25]
