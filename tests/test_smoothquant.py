"""SmoothQuant: what calibration saw is what is there, and smoothing changes the activations but not the model."""

import math
import weakref

import helpers
import pytest
import torch

from compactmind.errors import CompactMindError
from compactmind.methods.llama import llama_blocks
from compactmind.methods.quantization.calibration import SITES, calibrate
from compactmind.methods.quantization.smoothquant import (
    check_alpha,
    fold,
    readers_of,
    site_scale,
    smooth_block,
    smoothing_scale,
)
from compactmind.methods.quantization.w8a8_linear import W8A8Linear
from compactmind.methods.quantization.w8a8_model import W8A8Recipe, quantize_llama

PATHS = {
    "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "o": ["self_attn.o_proj"],
    "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "down": ["mlp.down_proj"],
}


@pytest.fixture(scope="module")
def windows():
    return helpers.example_windows(count=5, length=24)


@torch.no_grad()
def logits_of(model, windows: torch.Tensor) -> torch.Tensor:
    return model(windows).logits


@torch.no_grad()
def inputs_by_reader(model, windows: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Return, per block, the input of each linear over all windows at once: (tokens, channels)."""
    seen, handles = [{} for _ in model.model.layers], []
    for layer, record in zip(model.model.layers, seen, strict=True):
        for path in sum(PATHS.values(), []):
            handles.append(
                layer.get_submodule(path).register_forward_hook(
                    lambda _, inputs, __, record=record, path=path: record.update({path: inputs[0].flatten(0, 1)})
                )
            )
    model(windows)
    for handle in handles:
        handle.remove()
    return seen


def smooth(model, windows: torch.Tensor, alphas: dict[str, float]):
    """Calibrate a model, smooth it, and return the statistics that smoothing left."""
    statistics = calibrate(model, windows)
    for block, seen in zip(llama_blocks(model), statistics, strict=True):
        smooth_block(block, seen, alphas)
    return statistics


def weights_of(model, site: str) -> list[torch.Tensor]:
    return [linear.weight.clone() for block in llama_blocks(model) for linear in readers_of(block, site)]


# ---------------------------------------------------------------------------------------------------------- calibration
@pytest.mark.parametrize("key_value_heads", [4, 2])
def test_absmax_is_that_of_every_input_of_every_linear(windows, key_value_heads):
    model = helpers.make_llama(num_key_value_heads=key_value_heads)
    expected = inputs_by_reader(model, windows)
    statistics = calibrate(model, windows)
    assert [list(seen) for seen in statistics] == [list(SITES)] * 2
    for seen, inputs in zip(statistics, expected, strict=True):
        for site, paths in PATHS.items():
            for path in paths:
                assert torch.allclose(seen[site].absmax, inputs[path].abs().amax(dim=0), rtol=1e-5), (site, path)


@torch.no_grad()
def test_absmax_of_the_first_input_is_the_norm_of_the_embeddings(windows):
    model = helpers.make_llama()
    embeddings = model.model.embed_tokens.weight[windows.flatten()].double()
    normalized = embeddings / (embeddings.square().mean(dim=1, keepdim=True) + model.config.rms_norm_eps).sqrt()
    expected = (normalized * model.model.layers[0].input_layernorm.weight).abs().amax(dim=0)
    assert torch.allclose(calibrate(model, windows)[0]["qkv"].absmax.double(), expected, rtol=1e-5)


def test_absmax_does_not_depend_on_how_the_windows_are_grouped(windows):
    model = helpers.make_llama()
    together = calibrate(model, windows)
    parts = [calibrate(model, part) for part in windows.split([1, 3, 1])]
    for index, seen in enumerate(together):
        for site in SITES:
            expected = torch.stack([part[index][site].absmax for part in parts]).amax(dim=0)
            assert torch.equal(seen[site].absmax, expected)
            assert torch.equal(calibrate(model, windows.flip(0))[index][site].absmax, expected)


@pytest.mark.parametrize("count", [1, 2, 5, 12])
@pytest.mark.parametrize("rows", [1, 6, 64])
def test_no_more_rows_are_kept_than_asked_for_however_many_windows_there_are(rows, count):
    windows = helpers.example_windows(count, length=10)
    for seen in calibrate(helpers.make_llama(), windows, rows=rows):
        for site, statistics in seen.items():
            channels = len(statistics.absmax)
            assert channels == {"qkv": 32, "o": 32, "gate_up": 32, "down": 48}[site]
            assert statistics.rows.shape[1] == channels
            assert 1 <= len(statistics.rows) <= min(rows, windows.numel())


def test_rows_are_inputs_that_occurred_and_every_window_has_its_share():
    model = helpers.make_llama()
    windows = torch.randperm(helpers.LLAMA_VOCABULARY, generator=torch.Generator().manual_seed(0))[: 5 * 24].view(5, 24)
    statistics = calibrate(model, windows, rows=20)
    for seen, inputs in zip(statistics, inputs_by_reader(model, windows), strict=True):
        for site, (path, *_) in PATHS.items():
            distances = torch.cdist(seen[site].rows, inputs[path], compute_mode="donot_use_mm_for_euclid_dist")
            closest = distances.min(dim=1)
            assert closest.values.max() < 1e-5
            assert [int((closest.indices // 24 == window).sum()) for window in range(5)] == [4] * 5
            assert (seen[site].rows.abs() <= seen[site].absmax).all()


def test_calibration_leaves_no_hooks_and_no_change(windows):
    model = helpers.make_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calibrate(model, windows)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_input_that_is_no_number_is_named_by_block_linears_and_channel(windows, value):
    model = helpers.make_llama()
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[3] = value
    with pytest.raises(CompactMindError, match=r"model.layers.1: the input of gate/up is NaN or infinite \(channel 3"):
        calibrate(model, windows)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_no_windows_are_refused(windows):
    with pytest.raises(CompactMindError, match="no calibration windows.*--seq_len"):
        calibrate(helpers.make_llama(), windows[:0])


# ----------------------------------------------------------------------------------------------------------- the scales
def test_the_scale_is_the_formula_of_the_paper():
    activation, weight = torch.tensor([4.0, 16.0, 9.0]), torch.tensor([1.0, 4.0, 0.25])
    for alpha, expected in {0: [1.0, 0.25, 4.0], 0.5: [2.0, 2.0, 6.0], 1: [4.0, 16.0, 9.0]}.items():
        assert smoothing_scale(activation, weight, alpha).tolist() == pytest.approx(expected)
    assert smoothing_scale(torch.tensor([16.0]), torch.tensor([16.0]), 0.75).item() == pytest.approx(16**0.75 / 16**0.25)


@pytest.mark.parametrize("alpha", [0, 0.5, 0.8, 1])
def test_the_scale_of_a_dead_channel_is_positive_and_finite(alpha):
    scale = smoothing_scale(torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.0, 1.0, 0.0]), alpha)
    assert torch.isfinite(scale).all() and (scale > 0).all()


@pytest.mark.parametrize("alpha", [-0.1, 1.001, 5, math.nan])
def test_an_alpha_that_is_no_share_is_refused(windows, alpha):
    for refuse in (check_alpha, lambda value: smoothing_scale(torch.ones(2), torch.ones(2), value)):
        with pytest.raises(ValueError, match=rf"alpha {alpha} is not in \[0, 1\]"):
            refuse(alpha)
    model = helpers.make_llama()
    before = weights_of(model, "qkv")
    with pytest.raises(ValueError, match="alpha"):
        smooth(model, windows, {"qkv": alpha})
    assert all(torch.equal(*pair) for pair in zip(weights_of(model, "qkv"), before, strict=True))


def test_the_scale_of_an_input_weighs_all_linears_that_read_it(windows):
    model = helpers.make_llama()
    statistics = calibrate(model, windows)
    for layer, block, seen in zip(model.model.layers, llama_blocks(model), statistics, strict=True):
        for site in ("qkv", "gate_up", "down"):
            weight = torch.cat([layer.get_submodule(path).weight for path in PATHS[site]])  # (all outputs, channels)
            expected = seen[site].absmax.sqrt() / weight.abs().amax(dim=0).sqrt()
            assert torch.allclose(site_scale(block, site, seen[site], 0.5), expected, rtol=1e-5)


@pytest.mark.parametrize("key_value_heads", [1, 2, 4])
def test_query_heads_that_share_a_value_head_share_its_scale(windows, key_value_heads):
    model = helpers.make_llama(num_key_value_heads=key_value_heads)
    for block, seen in zip(llama_blocks(model), calibrate(model, windows), strict=True):
        scale = site_scale(block, "o", seen["o"], 0.5)
        weight = block.o.weight.abs().amax(dim=0)
        for value_head in range(key_value_heads):
            query_heads = [h for h in range(4) if h // block.groups == value_head]
            for channel in range(8):
                places = [8 * head + channel for head in query_heads]
                expected = (seen["o"].absmax[places].max() / weight[places].max()).sqrt()
                assert torch.allclose(scale[places], expected.expand(len(places)), rtol=1e-5)
        distinct = 8 * key_value_heads
        assert len(set(scale.tolist())) == distinct


# -------------------------------------------------------------------------------------------------------- same function
@pytest.mark.parametrize("alpha", [0, 0.5, 1])
@pytest.mark.parametrize("sites", [*([site] for site in SITES), list(SITES)], ids="+".join)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("key_value_heads", [4, 2], ids=["all heads", "grouped heads"])
def test_smoothing_preserves_the_logits(windows, key_value_heads, tied, sites, alpha):
    model = helpers.make_llama(num_key_value_heads=key_value_heads, tie_word_embeddings=tied)
    expected, before = logits_of(model, windows), {site: weights_of(model, site) for site in sites}
    smooth(model, windows, dict.fromkeys(sites, alpha))
    assert torch.allclose(logits_of(model, windows), expected, atol=1e-5)
    for site in sites:
        assert not any(torch.allclose(*pair, rtol=0.01) for pair in zip(weights_of(model, site), before[site], strict=True))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_smoothing_preserves_the_logits_of_text_that_was_not_calibrated_on(windows):
    model = helpers.make_llama()
    other = helpers.example_windows(count=4, length=30, seed=1)
    expected = logits_of(model, other)
    smooth(model, windows, {"qkv": 0.8, "o": 0.3, "gate_up": 0.6, "down": 0.5})
    assert torch.allclose(logits_of(model, other), expected, atol=1e-5)


def test_smoothing_preserves_the_logits_of_a_model_with_biases(windows):
    model = helpers.make_llama(attention_bias=True, mlp_bias=True)
    expected = logits_of(model, windows)
    biases = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.endswith("bias")}
    statistics = smooth(model, windows, dict.fromkeys(SITES, 0.5))
    assert torch.allclose(logits_of(model, windows), expected, atol=1e-5)
    changed = {name for name, tensor in model.state_dict().items() if name in biases and not torch.equal(tensor, biases[name])}
    assert {name.split(".", 3)[3] for name in changed} == {"self_attn.v_proj.bias", "mlp.up_proj.bias"}
    assert_fresh(model, windows, statistics)


def test_a_norm_with_a_bias_is_divided_whole():
    block = llama_blocks(helpers.make_llama())[0]
    norm = helpers.randomize(torch.nn.LayerNorm(32))
    readers = [block.gate, block.up]
    hidden_states = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    expected = [reader(norm(hidden_states)) for reader in readers]
    object.__setattr__(block, "post_norm", norm)
    fold(block, "gate_up", torch.linspace(0.2, 5, 32))
    for reader, output in zip(readers, expected, strict=True):
        assert torch.allclose(reader(norm(hidden_states)), output, atol=1e-5)


def test_sites_that_are_not_named_stay_as_they_were(windows):
    model = helpers.make_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    smooth(model, windows, {"down": 0.5})
    changed = {name.split(".", 3)[3] for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"mlp.up_proj.weight", "mlp.down_proj.weight"}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    smooth(model, windows, {})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# --------------------------------------------------------------------------------------------------- other activations
def make_outliers(model, site: str, channel: int = 5, factor: float = 40.0) -> None:
    """Make, in place, one channel of an input of every block far larger than the others."""
    producers = {"qkv": "input_layernorm", "gate_up": "post_attention_layernorm"}
    producers |= {"o": "self_attn.v_proj", "down": "mlp.up_proj"}
    with torch.no_grad():
        for layer in model.model.layers:
            layer.get_submodule(producers[site]).weight[channel] *= factor


def unevenness(model, windows: torch.Tensor, site: str) -> list[float]:
    """Return, per block, max / median over the channels' absmax of one input."""
    maxima = [inputs[PATHS[site][0]].abs().amax(dim=0) for inputs in inputs_by_reader(model, windows)]
    return [(absmax.max() / absmax.median()).item() for absmax in maxima]


@pytest.mark.parametrize("site", SITES)
def test_smoothing_takes_the_outliers_out_of_the_activations(windows, site):
    model = helpers.make_llama()
    make_outliers(model, site)
    before, expected = unevenness(model, windows, site), logits_of(model, windows)
    smooth(model, windows, {site: 0.5})
    for rough, even in zip(before, unevenness(model, windows, site), strict=True):
        assert rough > 15
        assert even < 2 * math.sqrt(rough)
    assert torch.allclose(logits_of(model, windows), expected, atol=1e-4)


@pytest.mark.parametrize("site", ["qkv", "gate_up", "down"])
def test_alpha_one_makes_all_channels_of_the_activations_equal(windows, site):
    model = helpers.make_llama()
    smooth(model, windows, {site: 1.0})
    assert unevenness(model, windows, site) == pytest.approx([1, 1], abs=1e-3)


@pytest.mark.parametrize("site", ["qkv", "gate_up", "down"])
def test_alpha_zero_makes_all_channels_of_the_weights_equal(windows, site):
    model = helpers.make_llama()
    smooth(model, windows, {site: 0.0})
    for block in llama_blocks(model):
        absmax = torch.cat([linear.weight for linear in readers_of(block, site)]).abs().amax(dim=0)
        assert torch.allclose(absmax, torch.ones_like(absmax), rtol=1e-5)


def assert_fresh(model, windows: torch.Tensor, statistics) -> None:
    """Assert that statistics are those a calibration of the model as it is now would give."""
    for left, fresh in zip(statistics, calibrate(model, windows), strict=True):
        for site in SITES:
            assert torch.allclose(left[site].absmax, fresh[site].absmax, rtol=1e-4), site
            assert torch.allclose(left[site].rows, fresh[site].rows, rtol=1e-3, atol=1e-4), site


@pytest.mark.parametrize("sites", [*([site] for site in SITES), list(SITES)], ids="+".join)
def test_the_statistics_follow_the_model(windows, sites):
    model = helpers.make_llama()
    unsmoothed = calibrate(model, windows)
    statistics = smooth(model, windows, dict.fromkeys(sites, 0.5))
    assert_fresh(model, windows, statistics)
    for before, after in zip(unsmoothed, statistics, strict=True):
        assert {site for site in SITES if not torch.equal(before[site].absmax, after[site].absmax)} == set(sites)


@pytest.mark.parametrize("alpha", [0, 0.5, 1])
def test_dead_channels_do_no_harm(windows, alpha):
    model = helpers.make_llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[1] = 0  # dead as activations
            layer.post_attention_layernorm.weight[2] = 0
            layer.self_attn.v_proj.weight[3] = 0
            layer.mlp.up_proj.weight[4] = 0
            for path in sum(PATHS.values(), []):
                layer.get_submodule(path).weight[:, 6] = 0  # dead as weights
                layer.get_submodule(path).weight[:, 1] = 0  # dead as both, where the input is
    expected = logits_of(model, windows)
    statistics = smooth(model, windows, dict.fromkeys(SITES, alpha))
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert torch.allclose(logits_of(model, windows), expected, atol=1e-5)
    assert_fresh(model, windows, statistics)


@torch.no_grad()
def test_rows_that_join_the_residual_stream_count_by_its_size_there(windows):
    model = helpers.make_llama()
    states = {}
    layer = model.model.layers[1]
    layer.input_layernorm.register_forward_pre_hook(lambda _, inputs: states.setdefault("o", []).append(inputs[0][0]))
    layer.post_attention_layernorm.register_forward_pre_hook(
        lambda _, inputs: states.setdefault("down", []).append(inputs[0][0])
    )
    layer.self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: states.setdefault("x", []).append(inputs[0][0]))
    seen = calibrate(model, windows, rows=20)[1]
    for site in ("o", "down"):
        sizes = torch.cat(states[site]).square().mean(dim=1).sqrt()
        assert all((1 / sizes - weight).abs().min() < 1e-5 for weight in seen[site].row_weights)
    rows, sizes = torch.cat(states["x"]), torch.cat(states["o"]).square().mean(dim=1).sqrt()
    for row, weight in zip(seen["o"].rows, seen["o"].row_weights, strict=True):  # each row with its own weight
        assert 1 / sizes[(rows - row).abs().sum(dim=1).argmin()] == pytest.approx(weight.item(), rel=1e-4)
    assert seen["qkv"].row_weights.eq(1).all() and seen["gate_up"].row_weights.eq(1).all()


def test_no_more_than_one_block_is_in_float_at_a_time(windows, monkeypatch):
    model = helpers.make_llama(num_hidden_layers=4)
    statistics, alive = calibrate(model, windows), []
    seen: list[weakref.ref] = []
    make = W8A8Linear.from_linear.__func__

    def watched(cls, linear, *arguments):
        seen.append(weakref.ref(linear))
        alive.append(sum(reference() is not None for reference in seen))
        return make(cls, linear, *arguments)

    monkeypatch.setattr(W8A8Linear, "from_linear", classmethod(watched))
    quantize_llama(model, statistics, W8A8Recipe())
    assert len(alive) == 28 and max(alive) <= 8  # seven linears of a block, and one more until its module is replaced
