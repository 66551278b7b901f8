"""NF4 of a Llama: what rounding costs is made up for block by block, tables are integers, and the file reloads with equal logits."""

import helpers
import pytest
import torch

from compactmind.checkpoint import load_checkpoint, save_checkpoint
from compactmind.errors import CompactMindError
from compactmind.methods.quantization.grouped import GroupedEmbedding
from compactmind.methods.quantization.nf4_model import NF4Recipe, quantize_nf4

WINDOWS = helpers.example_windows(8, 64)


@torch.no_grad()
def error(model):
    dense = helpers.make_llama(num_hidden_layers=2)
    return (model(WINDOWS).logits - dense(WINDOWS).logits).square().mean().item()


def made(**recipe):
    model = helpers.make_llama(num_hidden_layers=2)
    return model, quantize_nf4(model, WINDOWS, NF4Recipe(**recipe))


def test_compensation_leaves_less_error_on_the_text_it_has_seen():
    compensated, rounded = (made(compensation=each, embeddings="as_released")[0] for each in (True, False))
    assert error(compensated) < 0.9 * error(rounded)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("embeddings", ["as_released", "int8", "int4"])
def test_a_file_reloads_with_equal_logits(tmp_path, tied, embeddings):
    model = helpers.make_llama(tie_word_embeddings=tied)
    description = quantize_nf4(model, WINDOWS, NF4Recipe(embeddings=embeddings))
    wanted, directory = model(WINDOWS).logits, tmp_path / "nf4"
    save_checkpoint(
        directory,
        model,
        helpers.make_byte_tokenizer(),
        kind="nf4",
        parent=None,
        stage={"script": "x"},
        quantization=description,
    )
    found = load_checkpoint(directory)
    assert torch.equal(found.model(WINDOWS).logits, wanted)
    assert len(description["tables"]) == (0 if embeddings == "as_released" else 1 if tied else 2)
    assert isinstance(found.model.get_input_embeddings(), GroupedEmbedding) == (embeddings != "as_released")
    assert found.manifest["parameters"] == sum(
        each.numel() for each in helpers.make_llama(tie_word_embeddings=tied).parameters()
    )


def test_small_tables_make_a_small_file(tmp_path):
    sizes = {}
    for embeddings in ("as_released", "int8", "int4"):
        model, description = made(embeddings=embeddings)
        save_checkpoint(
            tmp_path / embeddings,
            model,
            helpers.make_byte_tokenizer(),
            kind="nf4",
            parent=None,
            stage={},
            quantization=description,
        )
        sizes[embeddings] = (tmp_path / embeddings / "model.safetensors").stat().st_size
    assert sizes["int4"] < sizes["int8"] < sizes["as_released"]


def test_what_cannot_be_is_refused_before_anything_is_changed():
    with pytest.raises(ValueError, match="int7.*as_released, int8"):
        NF4Recipe(embeddings="int7")
    model, _ = made()
    with pytest.raises(CompactMindError, match="quantized already"):
        quantize_nf4(model, WINDOWS, NF4Recipe())
    broken = helpers.make_llama()
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(CompactMindError, match="layers.1.mlp.up_proj"):
        quantize_nf4(broken, WINDOWS, NF4Recipe())
    assert isinstance(broken.model.layers[0].mlp.up_proj, torch.nn.Linear)
