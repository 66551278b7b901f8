"""Operations, bytes, latency and memory are what a second, independent way of counting says."""

import helpers
import pytest

from compactmind.checkpoint import save_checkpoint
from compactmind.evaluation.cost import gflops, gmacs_thop, measure_latency, peak_memory, weight_bytes
from compactmind.methods.pruning.encoder import encoder_layers
from compactmind.methods.pruning.masks import compact, full_masks
from compactmind.methods.quantization.packed_model import quantize_model


def macs_by_hand(model, length: int, attention: bool) -> int:
    """Count multiply-accumulates of the linears and, on demand, of both attention matmuls, from the widths alone."""
    hidden = model.config.hidden_size
    total = 0
    for layer in encoder_layers(model):
        heads = layer.num_heads * layer.head_dim
        total += length * (4 * hidden * heads + 2 * hidden * layer.intermediate_size)
        if attention:
            total += 2 * length * length * heads
    return total + hidden * hidden + hidden * model.config.num_labels  # pooler or pre_classifier, classifier: first token


def pruned(model):
    masks = full_masks(model)
    masks[0].heads[1] = False
    masks[-1].neurons[:24] = False
    return compact(model, masks)


@pytest.mark.parametrize("length", [8, 33])
@pytest.mark.parametrize("architecture", sorted(helpers.MAKERS))
def test_gflops_equal_the_count_by_hand(architecture, length):
    model = helpers.MAKERS[architecture]()
    for candidate in (model, pruned(model)):
        assert gflops(candidate, length) == pytest.approx(2 * macs_by_hand(candidate, length, attention=True) / 1e9, rel=1e-9)
    assert gflops(pruned(model), length) < gflops(model, length)


def test_thop_leaves_attention_out_and_the_model_clean():
    model = helpers.MAKERS["distilbert"]()
    before = set(model.state_dict())
    counted = gmacs_thop(model, 40) * 1e9
    linears, everything = (macs_by_hand(model, 40, attention) for attention in (False, True))
    assert linears <= counted < everything  # thop adds norms to the linears, never the attention matmuls
    assert set(model.state_dict()) == before


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_quantization_does_not_change_the_count(method):
    model = pruned(helpers.MAKERS["distilbert"]())
    expected = gflops(model, 16), gmacs_thop(model, 16)
    quantize_model(model, method)
    assert (gflops(model, 16), gmacs_thop(model, 16)) == expected
    assert expected[1] > 0


def test_size_is_that_of_the_weight_files(tmp_path, tokenizer):
    model = helpers.MAKERS["distilbert"]()
    save_checkpoint(tmp_path / "m", model, tokenizer, kind="dense", parent=None, stage={})
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert weight_bytes(tmp_path / "m") == pytest.approx(4 * parameters, rel=0.1)


def test_latency_times_every_model_on_the_same_rounds():
    models = {name: helpers.MAKERS[name]().eval() for name in sorted(helpers.MAKERS)}
    calls = dict.fromkeys(models, 0)

    def counted(name):
        def hook(*_):
            calls[name] += 1

        return hook

    for name, model in models.items():
        model.register_forward_hook(counted(name))
    times = measure_latency(models, 2, 8, repeats=4, reference="bert", warmup=1)
    assert calls == dict.fromkeys(models, 5)
    for measured in times.values():
        assert 0 < measured["low_ms"] <= measured["median_ms"] <= measured["high_ms"]
    assert times["bert"]["speedup"] == 1.0
    assert measure_latency(models, 1, 4, repeats=1, reference="absent")["bert"]["speedup"] is None


def test_peak_memory_grows_with_the_model(tmp_path, tokenizer):
    peaks = []
    for name, width in (("small", 32), ("large", 512)):
        model = helpers.MAKERS["distilbert"](dim=width, hidden_dim=16 * width)
        save_checkpoint(tmp_path / name, model, tokenizer, kind="dense", parent=None, stage={})
        peaks.append(peak_memory(tmp_path / name, 2, 8))
        weights = sum(parameter.numel() for parameter in model.parameters()) * 4 / 1e6
    assert peaks[1] - peaks[0] > 0.8 * weights


def test_a_failing_measurement_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="not found"):
        peak_memory(tmp_path / "absent", 1, 4)
