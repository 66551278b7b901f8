"""Every row of FORMATS says of its models what they are; one more row is all that a new format takes."""

import json

import helpers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from compactmind.checkpoint import bytes_to_save, load_any, load_checkpoint, save_checkpoint
from compactmind.errors import CompactMindError
from compactmind.files import WEIGHTS
from compactmind.formats.loading import require_every_tensor, uninitialized_model
from compactmind.formats.table import FORMATS, Format, is_quantized, kernel_of, parameters_of
from compactmind.guards import check_parent
from compactmind.kernels import KERNEL_VARIABLE
from compactmind.methods.pruning.masks import compact
from compactmind.methods.quantization.gptq_model import GPTQRecipe, quantize_gptq
from compactmind.methods.quantization.packed_model import linears_to_quantize, quantize_model
from compactmind.methods.quantization.w8a8_encoder import quantize_encoder
from compactmind.methods.quantization.w8a8_linear import ACTIVATIONS
from compactmind.methods.quantization.w8a8_model import EMBEDDINGS, W8A8Recipe, calibrate_llama, quantize_llama
from compactmind.search.compressor import Compressed, store_as_released, stored_bytes

HEAD = {"bert": "classifier.weight", "llama": "lm_head.weight"}


# ----------------------------------------------------------------------------------------------------------- a made-up format
class NibbleLinear(nn.Module):
    """y = x W^T + b, W integers from -8 to 7 times a scale, two in a byte."""

    def __init__(self, in_features: int, out_features: int, bias: bool):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("packed", torch.zeros(out_features, in_features // 2, dtype=torch.uint8))
        self.register_buffer("scale", torch.ones(()))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def pack(self, linear: nn.Linear) -> "NibbleLinear":
        self.scale = linear.weight.detach().abs().max() / 7
        low, high = ((linear.weight.detach() / self.scale).round() + 8).to(torch.uint8).unflatten(1, (-1, 2)).unbind(2)
        self.packed, self.bias = low + 16 * high, linear.bias
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = torch.stack([self.packed % 16, self.packed // 16], 2).flatten(1).float() - 8
        return functional.linear(x, self.scale * weight, self.bias)


def empty_nibbles(model, _):
    for name, linear in linears_to_quantize(model):
        model.set_submodule(name, NibbleLinear(linear.in_features, linear.out_features, linear.bias is not None))


def pack_nibbles(model):
    plain = dict(linears_to_quantize(model))
    empty_nibbles(model, None)
    for name, linear in plain.items():
        model.get_submodule(name).pack(linear)
    return {"method": "nibbles", "bits": 4}


def load_nibbles(directory, model_class, quantization, device, dtype):
    model = uninitialized_model(model_class, model_class.config_class.from_pretrained(directory))
    empty_nibbles(model, quantization)
    require_every_tensor(model_class, *model.load_state_dict(load_file(directory / WEIGHTS), strict=False))
    return model


@pytest.fixture
def nibbles(monkeypatch):
    """The one row that the made-up format takes."""
    row = Format(
        "nibbles", "two weights in a byte", load_nibbles,
        quantization_config=lambda model, quantization: {"quant_method": "nibbles", "bits": quantization["bits"]},
        weights=lambda module: [(module.packed, 2 * module.packed.numel())] if isinstance(module, NibbleLinear) else [],
        kernel=lambda model: "nibble kernel", as_released=lambda name, parameter: "bias" not in name,
        caveat=lambda quantization: f"Nothing else reads {quantization['bits']} bits like these.",
    )  # fmt: skip
    monkeypatch.setitem(FORMATS, "nibbles", row)


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_a_row_is_all_that_a_new_format_takes(tmp_path, tokenizer, nibbles, architecture):
    model = helpers.make_llama() if architecture == "llama" else helpers.make_bert()
    tokenizer = helpers.make_byte_tokenizer() if architecture == "llama" else tokenizer
    parameters, dense_bytes = sum(parameter.numel() for parameter in model.parameters()), bytes_to_save(model)
    description = pack_nibbles(model)
    expected, config = outputs_of(model), model.config.to_dict()
    directory = tmp_path / "small"
    settings = {"kind": "nibbles", "parent": "big", "stage": {"script": "x.py"}, "quantization": description}
    save_checkpoint(directory, model, tokenizer, **settings)
    assert model.config.to_dict() == config  # what the file says of itself is not said of the model

    loaded = load_any(directory)
    assert torch.equal(outputs_of(loaded.model), expected)
    assert loaded.manifest["kind"] == "nibbles" and loaded.manifest["quantization"] == description
    assert loaded.manifest["parameters"] == parameters_of(loaded.model) == parameters_of(model) == parameters
    assert kernel_of(loaded.model, "nibbles") == "nibble kernel"
    assert helpers.read_json(directory / "config.json")["quantization_config"] == {"quant_method": "nibbles", "bits": 4}
    card = (directory / "README.md").read_text()
    assert "two weights in a byte" in card and "Nothing else reads 4 bits like these." in card and "With " not in card

    task = {"bert": "classifier", "llama": "language model"}[architecture]
    with pytest.raises(
        CompactMindError, match=r"is quantized already \(nibbles\): --parent .* dense or pruned, for example big"
    ):
        check_parent(directory, "--parent", task)
    compressed = Compressed(model, "nibbles", description, [])
    with store_as_released(compressed, torch.bfloat16):
        assert model.get_parameter(HEAD[architecture]).dtype == torch.bfloat16
        assert all(parameter.dtype == torch.float32 for name, parameter in model.named_parameters() if "bias" in name)
        assert bytes_to_save(model) == stored_bytes(Compressed(model, "nibbles", description, []), torch.bfloat16)
    assert stored_bytes(compressed, torch.bfloat16) < bytes_to_save(model) < dense_bytes

    tensors = load_file(directory / WEIGHTS)
    tensors.pop(next(name for name in tensors if name.endswith(".packed")))
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    manifest = helpers.read_json(directory / "manifest.json")
    manifest["files"][WEIGHTS]["bytes"] = (directory / WEIGHTS).stat().st_size
    (directory / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CompactMindError, match="missing .*packed"):
        load_checkpoint(directory, verify=False)


@torch.no_grad()
def outputs_of(model) -> torch.Tensor:
    if hasattr(model, "lm_head"):
        return model.eval()(helpers.example_windows()).logits
    return helpers.logits_of(model.eval())


# ------------------------------------------------------------------------------------------------------------ the real ones
def quantized(kind: str, llama: bool):
    """Return a tiny model of a kind and the description of what was done to it."""
    model = helpers.make_llama() if llama else helpers.make_bert(hidden_size=64, intermediate_size=128)
    if kind == "pruned":
        return compact(model, helpers.uneven_masks(model)), None
    if kind == "grouped":
        return model, quantize_gptq(model, helpers.example_windows(4, 32), GPTQRecipe())
    if kind == "w8a8" and llama:
        return model, quantize_llama(model, calibrate_llama(model, helpers.example_windows()), W8A8Recipe())
    if kind == "w8a8":
        return model, quantize_encoder(model)
    return model, None if kind == "dense" else quantize_model(model, kind, embeddings="float32" if llama else "fp16")


KERNELS = {"dense": "float32", "pruned": "float32", "nf4": "bitsandbytes", "int8": "bitsandbytes", "w8a8": "simulated"}
KERNELS["grouped"] = "dequantized"
CASES = [(kind, False) for kind in FORMATS if kind != "grouped"] + [(kind, True) for kind in FORMATS if kind != "pruned"]


@pytest.mark.parametrize(("kind", "llama"), CASES, ids=[f"{kind} {'llama' if llama else 'bert'}" for kind, llama in CASES])
def test_every_kind_says_what_multiplies_it_and_what_its_file_is(tmp_path, monkeypatch, tokenizer, kind, llama):
    monkeypatch.setenv(KERNEL_VARIABLE, "simulated")
    assert FORMATS.keys() == KERNELS.keys() and all(name == each.name for name, each in FORMATS.items())
    model, description = quantized(kind, llama)
    assert kernel_of(model, kind) == KERNELS[kind]
    assert is_quantized(kind) == (description is not None)
    config = model.config.to_dict()
    directory = tmp_path / "model"
    settings = {"kind": kind, "parent": None, "stage": {}, "quantization": description}
    save_checkpoint(directory, model, helpers.make_byte_tokenizer() if llama else tokenizer, **settings)
    assert model.config.to_dict() == config
    said = helpers.read_json(directory / "config.json").get("quantization_config", {}).get("quant_method")
    filled_up = kind == "nf4" and llama  # rows of 4-bit weights to whole blocks, which transformers does not know of
    assert said == (None if filled_up else {"nf4": "bitsandbytes", "w8a8": "compressed-tensors"}.get(kind))
    card = (directory / "README.md").read_text()
    assert FORMATS[kind].words in card
    assert (f"With {FORMATS[kind].libraries}" in card) == (kind in ("dense", "pruned", "w8a8"))
    assert ("logits are wrong" in card) == (kind == "int8")


def test_a_foreign_model_multiplies_in_its_dtype_and_is_called_nothing(bert):
    assert kernel_of(bert.bfloat16(), "foreign") == "bfloat16" and not is_quantized("foreign")
    assert parameters_of(bert) == sum(parameter.numel() for parameter in bert.parameters())


# ----------------------------------------------------------------------------------------------------------- parameters
def same_count_once_packed(model, pack, folder, kind: str, tokenizer) -> None:
    """Pack a model, save it and load it: each time it has as many parameters as before."""
    expected = sum(parameter.numel() for parameter in model.parameters())
    description = pack(model)
    assert parameters_of(model) == expected
    save_checkpoint(folder, model, tokenizer, kind=kind, parent=None, stage={}, quantization=description)
    result = load_checkpoint(folder)
    assert result.manifest["parameters"] == parameters_of(result.model) == expected


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("embeddings", EMBEDDINGS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_w8a8_llama_has_the_parameters_of_the_dense_one(tmp_path, tied, embeddings, activations):
    model = helpers.make_llama(tie_word_embeddings=tied, attention_bias=True)
    statistics = calibrate_llama(model, helpers.example_windows())
    recipe = W8A8Recipe(activations=activations, embeddings=embeddings)
    same_count_once_packed(
        model, lambda model: quantize_llama(model, statistics, recipe), tmp_path / "m", "w8a8", helpers.make_byte_tokenizer()
    )


@pytest.mark.parametrize("method", ["nf4", "int8"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_packed_llama_has_the_parameters_of_the_dense_one(tmp_path, tied, method):
    same_count_once_packed(
        helpers.make_llama(tie_word_embeddings=tied),
        lambda model: quantize_model(model, method, embeddings="float32"),
        tmp_path / "m", method, helpers.make_byte_tokenizer(),
    )  # fmt: skip


@pytest.mark.parametrize("half_precision", [False, True])
@pytest.mark.parametrize("method", ["nf4", "int8", "w8a8"])
@pytest.mark.parametrize("architecture", sorted(helpers.MAKERS))
def test_a_packed_classifier_has_the_parameters_of_the_pruned_one(tmp_path, tokenizer, architecture, method, half_precision):
    def pack(model):
        if method == "w8a8":
            return quantize_encoder(model, "fp16" if half_precision else "float32")
        return quantize_model(model, method, embeddings="fp16" if half_precision else "float32")

    model = helpers.MAKERS[architecture]()
    same_count_once_packed(compact(model, helpers.uneven_masks(model)), pack, tmp_path / "m", method, tokenizer)
