"""Packed weights stay within the bound of their number format, and heads and norms are left alone."""

import math

import helpers
import pytest
import torch
from bitsandbytes import functional as bnb_functional
from torch import nn

from compactmind.checkpoint import load_checkpoint, save_checkpoint
from compactmind.errors import CompactMindError
from compactmind.files import WEIGHTS
from compactmind.formats.table import parameters_of
from compactmind.methods.pruning.masks import compact
from compactmind.methods.quantization.error_compensation import (
    SHRINK,
    compensate_rounding,
    compensation_of,
    input_second_moments,
    smaller_scales,
)
from compactmind.methods.quantization.packed_linear import NF4Linear, compute_dtype_for
from compactmind.methods.quantization.packed_model import (
    PACKINGS,
    HalfEmbedding,
    linears_to_quantize,
    quantize_model,
)
from compactmind.methods.quantization.w8a8_encoder import quantize_encoder

BLOCK = 64


@torch.no_grad()
def weight_in_use(linear) -> torch.Tensor:
    """Return the weight a packed linear multiplies with, seen from outside: (out_features, in_features)."""
    return (linear(torch.eye(linear.in_features)) - linear(torch.zeros(1, linear.in_features))).T


def absmax_of_blocks(weight: torch.Tensor) -> torch.Tensor:
    """Return the largest absolute value of every block of 64 weights of a row, whose last may be shorter: (rows, blocks)."""
    padded = nn.functional.pad(weight.abs(), (0, -weight.shape[1] % BLOCK))
    return padded.view(len(weight), -1, BLOCK).amax(dim=2)


def nf4_bound(weight: torch.Tensor, double_quantization: bool) -> torch.Tensor:
    """Return the largest error each weight may have: half the widest gap between NF4 levels times its block's absmax.

    Double quantization moves the absmax itself by up to half the widest gap between the 256 levels of its own 8-bit format.
    """
    levels = bnb_functional.get_4bit_type("nf4", device="cpu")
    assert len(levels) == 16
    absmax = absmax_of_blocks(weight)
    bound = (levels[1:] - levels[:-1]).max() / 2 * absmax
    if double_quantization:
        codes = bnb_functional.create_dynamic_map().sort().values
        bound = bound + (codes[1:] - codes[:-1]).max() / 2 * (absmax - absmax.mean()).abs().max()
    return bound.repeat_interleave(BLOCK, dim=1)[:, : weight.shape[1]]


# Widths of pruned models are rarely multiples of the block, and bitsandbytes unpacks blocks that cross a row wrongly on a CPU.
@pytest.mark.parametrize("double_quantization", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("widths", [(64, 4, 128), (64, 4, 112), (32, 4, 64), (24, 3, 44)], ids=str)
@pytest.mark.parametrize("architecture", sorted(helpers.MAKERS))
def test_nf4_stays_within_its_bound(architecture, widths, double_quantization):
    names = {
        "bert": ("hidden_size", "num_attention_heads", "intermediate_size"),
        "distilbert": ("dim", "n_heads", "hidden_dim"),
    }
    model = helpers.MAKERS[architecture](**dict(zip(names[architecture], widths, strict=True)))
    before = {name: linear.weight.detach().clone() for name, linear in linears_to_quantize(model)}
    biases = {name: linear.bias.detach().clone() for name, linear in linears_to_quantize(model)}
    quantize_model(model, "nf4", double_quantization=double_quantization)
    packed = dict(linears_to_quantize(model))
    assert packed.keys() == before.keys()
    for name, weight in before.items():
        error = (weight_in_use(packed[name]) - weight).abs()
        assert (error <= nf4_bound(weight, double_quantization) + 1e-5).all(), name
        assert error.max() > 0.01  # the weights did become 4-bit numbers
        padded = weight.shape[0] * (weight.shape[1] + -weight.shape[1] % BLOCK)
        assert packed[name].weight.numel() == padded / 2  # two weights per byte, rows filled up to whole blocks
        assert torch.equal(packed[name].bias, biases[name])


def test_what_is_between_table_and_blocks_is_not_quantized(tokenizer, tmp_path):
    model = helpers.make_encoder("electra")
    description = quantize_model(model, "nf4")
    assert sorted(description["skipped_modules"]) == ["classifier.dense", "classifier.out_proj", "electra.embeddings_project"]
    save_checkpoint(tmp_path / "m", model, tokenizer, kind="nf4", parent=None, stage={}, quantization=description)
    assert torch.equal(helpers.logits_of(load_checkpoint(tmp_path / "m").model), helpers.logits_of(model))


@pytest.mark.parametrize("method", PACKINGS)
@pytest.mark.parametrize("architecture", sorted(helpers.MAKERS))
def test_heads_and_norms_are_not_quantized(architecture, method):
    model = helpers.MAKERS[architecture]()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    description = quantize_model(model, method)
    heads = {"bert": ["bert.pooler.dense", "classifier"], "distilbert": ["pre_classifier", "classifier"]}[architecture]
    assert sorted(description["skipped_modules"]) == sorted(heads)
    for name in heads:
        head = model.get_submodule(name)
        assert type(head) is nn.Linear and head.weight.dtype == torch.float32
        assert torch.equal(head.weight, before[f"{name}.weight"]) and torch.equal(head.bias, before[f"{name}.bias"])
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 1 + 2 * model.config.num_hidden_layers
    assert all(torch.equal(model.get_submodule(name).weight, before[f"{name}.weight"]) for name in norms)
    assert not any(type(module) is nn.Linear for name, module in model.named_modules() if name not in heads)
    assert description["method"] == method
    assert description["bits"] == {"nf4": 4, "int8": 8}[method]


def test_embeddings_are_half_precision_in_storage_and_single_in_use(bert):
    tables = {name: module.weight.detach().clone() for name, module in bert.named_modules() if isinstance(module, nn.Embedding)}
    assert len(tables) == 3
    quantize_model(bert, "nf4")
    for name, table in tables.items():
        embedding = bert.get_submodule(name)
        assert type(embedding) is HalfEmbedding and embedding.weight.dtype == torch.float16
        assert torch.equal(embedding.weight, table.half())
        looked_up = embedding(torch.tensor([[0, 1]]))
        assert looked_up.dtype == torch.float32
        torch.testing.assert_close(looked_up[0], table[:2], atol=1e-3, rtol=1e-3)
    assert bert.bert.embeddings.word_embeddings.padding_idx == 0


def test_embeddings_stay_as_they_are_when_asked(bert):
    table = bert.bert.embeddings.word_embeddings.weight.detach().clone()
    description = quantize_model(bert, "nf4", embeddings="float32")
    assert description["embeddings"] == "float32" and description["tables"] == {}
    assert torch.equal(bert.bert.embeddings.word_embeddings.weight, table)


@pytest.mark.parametrize("method", PACKINGS)
def test_the_file_of_a_model_of_mostly_embeddings_is_half_as_large(tmp_path, tokenizer, method):
    def size(model, kind, description=None) -> int:
        save_checkpoint(tmp_path / kind, model, tokenizer, kind=kind, parent=None, stage={}, quantization=description)
        return (tmp_path / kind / WEIGHTS).stat().st_size

    model = helpers.make_distilbert(vocab_size=4000, dim=64, hidden_dim=256)
    parameters = parameters_of(model)
    dense = size(model, "dense")
    description = quantize_model(model, method)
    assert dense >= 2 * size(model, method, description)
    assert parameters_of(model) == parameters


def test_int8_is_close_to_the_dense_model(distilbert):
    expected = helpers.logits_of(distilbert)
    quantize_model(distilbert, "int8", embeddings="float32")
    difference = (helpers.logits_of(distilbert) - expected).abs().max()
    assert 0 < difference < 0.05 * expected.abs().max()


def test_int8_rounds_each_row_to_its_own_scale(distilbert):
    before = {name: linear.weight.detach().clone() for name, linear in linears_to_quantize(distilbert)}
    quantize_model(distilbert, "int8")
    for name, linear in linears_to_quantize(distilbert):
        scale = before[name].abs().amax(dim=1, keepdim=True) / 127  # one per output row
        numbers = linear.weight.data.float()
        assert linear.weight.dtype == torch.int8 and numbers.abs().max() == 127
        # Half a step, and what bitsandbytes loses by rounding the weights to fp16 first.
        assert ((numbers * scale - before[name]).abs() <= 0.5 * scale + 2**-10 * before[name].abs()).all()


def test_nf4_costs_more_than_int8_and_less_than_everything():
    expected = helpers.logits_of(helpers.make_distilbert(scale=0.05))
    errors = {}
    for method in PACKINGS:
        model = helpers.make_distilbert(scale=0.05)
        quantize_model(model, method)
        errors[method] = (helpers.logits_of(model) - expected).abs().max().item()
    assert errors["int8"] < errors["nf4"] < 0.5 * expected.abs().max().item()


@pytest.mark.parametrize("method", PACKINGS)
def test_widths_that_kernels_do_not_like_work_all_the_same(tmp_path, tokenizer, method):
    model = helpers.make_distilbert(dim=24, n_heads=3, hidden_dim=44)
    masks = helpers.uneven_masks(model)
    masks[1].neurons[:] = True
    masks[1].neurons[21:] = False  # 21 neurons: not even a multiple of 2
    model = compact(model, masks)
    expected = helpers.logits_of(model)
    with torch.compiler.set_stance("force_eager"):  # bitsandbytes would compile its fallback for odd widths: half a minute
        description = quantize_model(model, method)
        packed = helpers.logits_of(model)
        save_checkpoint(tmp_path / "odd", model, tokenizer, kind=method, parent=None, stage={}, quantization=description)
        assert torch.equal(helpers.logits_of(load_checkpoint(tmp_path / "odd").model), packed)
    torch.testing.assert_close(packed, expected, atol=0.6 * expected.abs().max().item(), rtol=0)
    assert [layer.ffn.lin1.out_features for layer in model.distilbert.transformer.layer] == [40, 21, 28]


@pytest.mark.parametrize("method", ["nf3", "fp4", ""])
def test_an_unknown_method_names_the_known_ones(distilbert, method):
    before = helpers.logits_of(distilbert)
    with pytest.raises(ValueError, match=f"{method!r}.*nf4, int8"):
        quantize_model(distilbert, method)
    assert torch.equal(helpers.logits_of(distilbert), before)


QUANTIZERS = {
    "nf4": lambda model, **settings: quantize_model(model, "nf4", **settings),
    "int8": lambda model, **settings: quantize_model(model, "int8", **settings),
    "w8a8": quantize_encoder,
}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e5])
@pytest.mark.parametrize("name", ["transformer.layer.2.ffn.lin2", "embeddings.position_embeddings"])
@pytest.mark.parametrize("method", QUANTIZERS)
def test_what_a_format_cannot_hold_is_named_before_anything_is_changed(distilbert, method, name, value):
    module = distilbert.distilbert.get_submodule(name)
    with torch.no_grad():
        module.weight[7, 3] = value
    if value == 1e5 and isinstance(module, nn.Linear) and method != "int8":  # in float32 all the way
        QUANTIZERS[method](distilbert)
        assert torch.isfinite(helpers.logits_of(distilbert)).all()
        return
    before = {path: tensor.clone() for path, tensor in distilbert.state_dict().items()}
    reason = "reaches 100000, and float16 ends at 65504" if value == 1e5 else "is NaN or infinite"
    with pytest.raises(CompactMindError, match=f"distilbert.{name}: its weight {reason}"):
        QUANTIZERS[method](distilbert)
    after = distilbert.state_dict()
    assert list(after) == list(before) and all(after[path].dtype == tensor.dtype for path, tensor in before.items())
    assert all(torch.equal(after[path].nan_to_num(), tensor.nan_to_num()) for path, tensor in before.items())
    if value == 1e5 and isinstance(module, nn.Embedding):
        QUANTIZERS[method](distilbert, embeddings="float32")
        assert torch.isfinite(helpers.logits_of(distilbert)).all()


def test_four_bit_weights_are_multiplied_in_what_the_device_multiplies(distilbert, monkeypatch):
    assert compute_dtype_for("cpu") == torch.float32
    for has_bf16, wanted in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has_bf16: has or including_emulation)
        assert compute_dtype_for("cuda:0") == wanted
    quantize_model(distilbert, "nf4")
    assert {linear.compute_dtype for _, linear in linears_to_quantize(distilbert)} == {torch.float32}


def calibration_batches(model, rows=24, length=11):
    """Return batches of random tokens, some of them padded, and the same tokens as one tensor of kept inputs."""
    generator = torch.Generator().manual_seed(3)
    batches = []
    for start in range(0, rows, 8):
        ids = torch.randint(5, model.config.vocab_size, (8, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[:, length - start // 8 :] = 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def test_second_moments_are_those_of_the_unpadded_inputs():
    model = helpers.MAKERS["distilbert"]().eval()
    name = "distilbert.transformer.layer.0.ffn.lin2"
    batches = calibration_batches(model)
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0]))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    tokens = torch.cat([x[b["attention_mask"].bool()] for x, b in zip(seen, batches, strict=True)]).double()
    moment = input_second_moments(model, [name], batches)[name]
    torch.testing.assert_close(moment.double(), tokens.T @ tokens / len(tokens), rtol=1e-4, atol=1e-6)
    assert not model.get_submodule(name)._forward_pre_hooks  # nothing stays behind


@pytest.mark.parametrize("width", [64, 128, 80])
def test_smaller_scales_and_the_largest_inputs_first_change_outputs_less_still(width):
    generator = torch.Generator().manual_seed(0)
    causes = torch.randn(4000, width // 4, generator=generator) @ torch.randn(width // 4, width, generator=generator)
    inputs = (causes + 0.1 * torch.randn(4000, width, generator=generator)) * torch.logspace(
        0, 1.5, width
    )  # the last are the largest
    plain, errors = nn.Linear(width, 96), {}
    moment = inputs.T @ inputs / len(inputs)
    for refined in (False, True):
        packed = NF4Linear(width, 96, True, "cpu", double_quantization=True)
        packed.bias = plain.bias
        packed.pack(plain.weight, compensation_of(moment, 0.05 if refined else 0.01, largest_first=refined), refined=refined)
        with torch.no_grad():
            errors[refined] = (packed(inputs) - plain(inputs)).square().mean().sqrt().item()
    assert errors[True] < 0.9 * errors[False]


def test_smaller_scales_never_err_more_and_cut_outliers_off():
    levels = bnb_functional.get_4bit_type("nf4", device="cpu")
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(1))
    cut = smaller_scales(weight, torch.ones(128), levels, BLOCK)
    scales = [absmax_of_blocks(each).repeat_interleave(BLOCK, 1) for each in (weight, cut)]
    error = [
        ((levels[(weight / scale)[..., None].sub(levels).abs().argmin(-1)] * scale - weight).square()).view(32, 2, BLOCK).sum(2)
        for scale in scales
    ]
    assert (error[1] <= error[0] + 1e-5).all() and error[1].sum() < 0.95 * error[0].sum()
    ratio = (absmax_of_blocks(cut) / absmax_of_blocks(weight)).unique()
    assert all(min(abs(each - share) for share in SHRINK) < 1e-5 for each in ratio.tolist())
    inside = cut.abs() < scales[1] - 1e-6
    assert torch.equal(cut[inside], weight[inside])


@pytest.mark.parametrize("width", [64, 128, 80])
def test_compensated_rounding_changes_outputs_less_and_survives_packing(width):
    generator = torch.Generator().manual_seed(0)
    causes = torch.randn(4000, width // 4, generator=generator) @ torch.randn(width // 4, width, generator=generator)
    inputs = causes + 0.1 * torch.randn(4000, width, generator=generator)  # correlated, as real activations are
    plain = nn.Linear(width, 96)
    moment = inputs.T @ inputs / len(inputs)
    errors = {}
    for compensated in (False, True):
        packed = NF4Linear(width, 96, True, "cpu", double_quantization=True)
        packed.bias = plain.bias
        packed.pack(plain.weight, compensation_of(moment) if compensated else None)
        with torch.no_grad():
            errors[compensated] = (packed(inputs) - plain(inputs)).square().mean().sqrt().item()
    assert errors[True] < 0.7 * errors[False]


def test_compensated_weights_are_levels_times_their_scale():
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    levels = bnb_functional.get_4bit_type("nf4", device="cpu")
    scale = weight.abs().amax(dim=1, keepdim=True).expand_as(weight)
    moment = torch.eye(64) + 0.5
    rounded = compensate_rounding(weight, compensation_of(moment), levels, scale, scale)
    distance = (rounded[..., None] / scale[..., None] - levels).abs().amin(dim=-1)
    assert distance.max() < 1e-6
    torch.testing.assert_close(rounded.abs().amax(dim=1), weight.abs().amax(dim=1))  # an encoder finds the same scales
    # Uncorrelated inputs of one size leave nothing to compensate: nearest level, as without.
    alone = compensate_rounding(weight, compensation_of(torch.eye(64)), levels, scale, scale)
    nearest = levels[(weight / scale)[..., None].sub(levels).abs().argmin(dim=-1)] * scale
    assert torch.equal(alone, nearest)


@pytest.mark.parametrize("architecture", sorted(helpers.MAKERS))
def test_a_calibrated_model_reloads_with_equal_logits(architecture, tmp_path, tokenizer):
    model = helpers.MAKERS[architecture]().eval()
    batches = calibration_batches(model)
    description = quantize_model(model, "nf4", calibration=batches)
    assert description["error_compensation"] == "gptq"
    with torch.no_grad():
        before = model(**batches[0]).logits
        save_checkpoint(tmp_path / "m", model, tokenizer, kind="nf4", parent=None, stage={}, quantization=description)
        assert torch.equal(load_checkpoint(tmp_path / "m").model(**batches[0]).logits, before)
