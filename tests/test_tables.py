"""Embedding tables as integers of 4 to 8 bits, for every quantizer: smaller, read back equally, and said to nobody who cannot read them."""

import copy
import json

import helpers
import pytest
import torch
from safetensors.torch import load_file, save_file

from compactmind.checkpoint import load_checkpoint, save_checkpoint
from compactmind.errors import CompactMindError
from compactmind.files import WEIGHTS
from compactmind.formats.table import parameters_of
from compactmind.methods.quantization.grouped import GroupedEmbedding
from compactmind.methods.quantization.packed_model import EMBEDDINGS, HalfEmbedding, embedding_tables, quantize_model
from compactmind.methods.quantization.tables import INTEGERS, TABLE_GROUP, table_bits, table_grid
from compactmind.methods.quantization.w8a8_encoder import quantize_encoder
from compactmind.methods.quantization.w8a8_model import W8A8Recipe, calibrate_llama, quantize_llama

METHODS = ("nf4", "int8", "w8a8")
TIED = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def quantize(model, method: str, embeddings: str):
    return quantize_encoder(model, embeddings) if method == "w8a8" else quantize_model(model, method, embeddings=embeddings)


def bytes_of(directory) -> int:
    return (directory / WEIGHTS).stat().st_size


def said_of(directory) -> dict | None:
    return helpers.read_json(directory / "config.json").get("quantization_config")


# ---------------------------------------------------------------------------------------------------------- classifiers
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", sorted(helpers.MAKERS))
def test_a_classifier_reloads_with_equal_logits_whatever_its_tables(tmp_path, tokenizer, architecture, method):
    sizes = {}
    for embeddings in EMBEDDINGS:
        model, directory = helpers.MAKERS[architecture](vocab_size=400), tmp_path / embeddings
        count, tables = parameters_of(model), dict(embedding_tables(model))
        description = quantize(model, method, embeddings)
        save_checkpoint(directory, model, tokenizer, kind=method, parent=None, stage={}, quantization=description)
        loaded = load_checkpoint(directory)
        assert torch.equal(helpers.logits_of(loaded.model), helpers.logits_of(model))
        assert count == parameters_of(model) == parameters_of(loaded.model) == loaded.manifest["parameters"]
        for name in tables:
            kind = {"fp16": HalfEmbedding, "float32": torch.nn.Embedding}.get(embeddings, GroupedEmbedding)
            made, read = model.get_submodule(name), loaded.model.get_submodule(name)
            assert type(made) is type(read) is kind and made.padding_idx == read.padding_idx == tables[name].padding_idx
        assert description["embeddings"] == embeddings
        assert list(description["tables"]) == (list(tables) if embeddings in INTEGERS else [])
        sizes[embeddings] = bytes_of(directory)
    order = ["float32", "fp16", *INTEGERS]
    assert [sizes[each] for each in order] == sorted(set(sizes.values()), reverse=True)


@pytest.mark.parametrize("embeddings", INTEGERS)
def test_the_error_of_a_table_is_within_half_a_step_of_its_group(embeddings):
    model = helpers.make_bert(hidden_size=128, vocab_size=200)
    tables = {name: table.weight.detach().clone() for name, table in embedding_tables(model)}
    quantize(model, "nf4", embeddings)
    for name, table in tables.items():
        error = (model.get_submodule(name)(torch.arange(len(table))) - table).unflatten(1, (-1, TABLE_GROUP))
        largest = table.unflatten(1, (-1, TABLE_GROUP)).abs().amax(2)
        # scales are chosen by the error of all: at most that of the extremes, a step of which is largest / (levels / 2 - 1)
        step = largest / (2 ** (table_grid(embeddings).bits - 1) - 1)
        assert (error.square().mean(2) <= (step / 2).square()).all() and error.abs().max() > 0


@pytest.mark.parametrize("method", METHODS)
def test_a_table_beyond_float16_fits_integers(method):
    model = helpers.make_distilbert()
    model.distilbert.embeddings.position_embeddings.weight.data[40, 3] = 7e4
    with pytest.raises(CompactMindError, match="position_embeddings.*--embeddings float32"):
        quantize(copy.deepcopy(model), method, "fp16")
    quantize(model, method, "int8")
    assert model.distilbert.embeddings.position_embeddings(torch.tensor([40]))[0, 3] == pytest.approx(7e4, rel=0.01)


@pytest.mark.parametrize("method", METHODS)
def test_an_unknown_word_changes_nothing_and_names_the_known_ones(distilbert, method):
    before = helpers.logits_of(distilbert)
    with pytest.raises(ValueError, match="'int7'.*fp16, float32, int8, int6, int5, int4"):
        quantize(distilbert, method, "int7")
    assert torch.equal(helpers.logits_of(distilbert), before)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_file_written_before_is_read_as_before(tmp_path, tokenizer, distilbert, method, half):
    description = quantize(distilbert, method, "fp16" if half else "float32")
    before = {name: value for name, value in description.items() if name not in ("embeddings", "tables")}
    description = before | {"half_precision_embeddings": half}
    save_checkpoint(tmp_path / "m", distilbert, tokenizer, kind=method, parent=None, stage={}, quantization=description)
    assert torch.equal(helpers.logits_of(load_checkpoint(tmp_path / "m").model), helpers.logits_of(distilbert))


# ---------------------------------------------------------------------------------------------------------------- llama
@torch.no_grad()
def outputs_of(model) -> torch.Tensor:
    return model(helpers.example_windows()).logits.float()


@TIED
@pytest.mark.parametrize("embeddings", [each for each in INTEGERS if each != "int8"])
def test_a_w8a8_llama_has_small_tables(tmp_path, embeddings, tied):
    model = helpers.released_llama(helpers.make_llama(tie_word_embeddings=tied, scale=0.3))
    count, dense = parameters_of(model), copy.deepcopy(model)
    statistics = calibrate_llama(model, helpers.example_windows(4, 32))
    settings = {"kind": "w8a8", "parent": None, "stage": {}, "dtype": "bfloat16"}
    for name, other in (("small", embeddings), ("int8", "int8")):
        model = copy.deepcopy(dense)
        description = quantize_llama(model, statistics, W8A8Recipe(0.5, embeddings=other))
        save_checkpoint(tmp_path / name, model, helpers.make_byte_tokenizer(), quantization=description, **settings)
        loaded = load_checkpoint(tmp_path / name)
        assert torch.equal(outputs_of(loaded.model), outputs_of(model.float()))
        assert count == parameters_of(loaded.model)
        assert (said_of(tmp_path / name) is None) == (name == "small")
        assert ("no other library" in (tmp_path / name / "README.md").read_text()) == (name == "small")
    assert bytes_of(tmp_path / "small") < bytes_of(tmp_path / "int8")
    loaded = load_checkpoint(tmp_path / "small").model
    table, head = loaded.get_input_embeddings(), loaded.get_output_embeddings()
    assert (getattr(head, "table", None) is table) == tied
    assert any(name.startswith("lm_head.") for name in load_file(tmp_path / "small" / WEIGHTS)) != tied


@TIED
@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_a_packed_llama_has_small_tables_too(tmp_path, method, tied):
    model = helpers.make_llama(tie_word_embeddings=tied)
    count, description = parameters_of(model), quantize_model(model, method, embeddings="int5")
    settings = {"kind": method, "parent": None, "stage": {}, "quantization": description}
    save_checkpoint(tmp_path / "m", model, helpers.make_byte_tokenizer(), **settings)
    loaded = load_checkpoint(tmp_path / "m").model
    assert torch.equal(outputs_of(loaded), outputs_of(model)) and count == parameters_of(loaded)


# ------------------------------------------------------------------------------------------------------ what others read
@pytest.mark.parametrize("method", METHODS)
def test_a_plain_reader_is_told_nothing_it_would_read_wrongly(tmp_path, tokenizer, method):
    for embeddings in ("float32", "int4"):
        model = helpers.make_distilbert(dim=64, hidden_dim=128)
        description = quantize(model, method, embeddings)
        save_checkpoint(tmp_path / embeddings, model, tokenizer, kind=method, parent=None, stage={}, quantization=description)
    assert (said_of(tmp_path / "float32") is None) == (method == "int8")
    assert said_of(tmp_path / "int4") is None
    assert "With transformers" not in (tmp_path / "int4" / "README.md").read_text()


def test_a_table_that_is_missing_or_too_short_is_named(tmp_path, tokenizer, distilbert):
    description, directory = quantize_encoder(distilbert, "int4"), tmp_path / "m"
    save_checkpoint(directory, distilbert, tokenizer, kind="w8a8", parent=None, stage={}, quantization=description)
    name = "distilbert.embeddings.word_embeddings.weight_scale"
    for change in (lambda state: state.pop(name), lambda state: state.update({name: state[name][:-1]})):
        state = load_file(directory / WEIGHTS)
        before = (directory / WEIGHTS).read_bytes()
        change(state)
        save_file(state, directory / WEIGHTS, metadata={"format": "pt"})
        manifest = helpers.read_json(directory / "manifest.json")
        manifest["files"][WEIGHTS]["bytes"] = bytes_of(directory)
        (directory / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(CompactMindError, match="could not be loaded .*(weight_scale|other tensors)"):
            load_checkpoint(directory, verify=False)
        (directory / WEIGHTS).write_bytes(before)


def test_words_and_bits():
    assert [table_grid(word).bits for word in INTEGERS] == [8, 6, 5, 4]
    assert [table_bits(word) for word in INTEGERS] == [8.25, 6.25, 5.25, 4.25]
    assert {table_grid(word) for word in ("as_released", "fp16", "float32")} == {None}
