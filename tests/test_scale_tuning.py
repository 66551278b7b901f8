"""What is trained after rounding are scales, float zeros and norms; the integers stay, and the model comes nearer to the dense one."""

import helpers
import pytest
import torch
from llamas import make_other

from compactmind.errors import CompactMindError
from compactmind.evaluation.divergence import divergence
from compactmind.methods.quantization import scale_tuning
from compactmind.methods.quantization.gptq_model import GPTQRecipe, quantize_gptq
from compactmind.methods.quantization.grouped import GroupedLinear
from compactmind.methods.quantization.scale_tuning import _backward, tune_scales
from compactmind.progress import now_and_then


def rounded(zero="symmetric", dtype=torch.float32, bits=3, make=helpers.make_llama):
    dense, windows = make(), helpers.example_windows(32, 32)
    model = make().to(dtype)
    quantize_gptq(model, windows, GPTQRecipe(bits=bits, group_size=16, zero=zero, damping=0.1))
    return dense, model.float() if dtype == torch.float32 else model, windows


def tuned(model, dense, windows, tokens, lr):
    return tune_scales(model, dense, windows[:-4], windows[-4:], tokens, lr)


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, GroupedLinear)}


@pytest.mark.parametrize(("zero", "precision"), [("symmetric", "no"), ("float", "no"), ("symmetric", "bf16"), ("float", "bf16")])
def test_the_model_comes_nearer_and_only_scales_zeros_and_norms_move(zero, precision, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    seen = []
    monkeypatch.setattr(scale_tuning, "_backward", lambda *given: seen.append(torch.is_autocast_enabled("cpu")) or _backward(*given))
    dense, model, windows = rounded(zero)
    before = {name: (layer.q.clone(), layer.scale.clone(), layer.zero.clone()) for name, layer in layers(model).items()}
    norm, away = model.model.norm.weight.detach().clone(), divergence(dense, model, windows)["mean"]
    done = tuned(model, dense, windows, tokens=60 * windows.shape[1], lr=3e-3)
    assert done["kept"] and divergence(dense, model, windows)["mean"] < 0.87 * away
    assert done["steps"] == len(done["losses"]) == 60 and done["tokens"] == 60 * windows.shape[1]
    assert set(seen) == {precision == "bf16"} and done["mixed_precision"] == precision
    blocks = [name for name in before if name.startswith("model.layers.")]
    for name in blocks:
        layer, (q, scale, old_zero) = layers(model)[name], before[name]
        assert torch.equal(layer.q, q) and layer.scale.dtype == torch.float16 and not layer.scale.requires_grad
        assert not torch.equal(layer.scale, scale)
        assert torch.equal(layer.zero, old_zero) == (zero == "symmetric")
    assert not torch.equal(model.model.norm.weight, norm)


def granite():
    return make_other("granite", logits_scaling=6.0)


@pytest.mark.parametrize("make", [helpers.make_llama, granite])
def test_gradients_block_by_block_are_those_of_the_whole_model(make):
    dense, model, windows = rounded(make=make)
    layer = model.model.layers[0].mlp.down_proj
    layer.scale = layer.scale.float().requires_grad_()
    loss = _backward(model, dense, windows[0], dense.model(windows[:1]).last_hidden_state[0].detach())
    result, layer.scale.grad = layer.scale.grad, None
    p = dense(windows[:1]).logits[0].detach().log_softmax(-1)
    whole = (p.exp() * (p - model(windows[:1]).logits[0].log_softmax(-1))).sum(-1).mean()
    whole.backward()
    assert loss == pytest.approx(whole.item(), rel=1e-4)
    torch.testing.assert_close(result, layer.scale.grad, rtol=1e-3, atol=1e-6)


def test_norms_keep_their_dtype_and_what_wanted_gradients_still_does():
    dense, model, windows = rounded(dtype=torch.bfloat16)
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    tuned(model, dense, windows, tokens=2 * windows.shape[1], lr=1e-3)
    assert model.model.norm.weight.dtype == torch.bfloat16 and model.model.norm.weight.grad is None
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == wanted


def test_what_makes_it_worse_on_held_out_text_is_not_kept():
    dense, model, windows = rounded(bits=8)
    before = {name: layer.scale.clone() for name, layer in layers(model).items()}
    norm = model.model.norm.weight.detach().clone()
    done = tuned(model, dense, windows, tokens=4 * windows.shape[1], lr=0.3)
    assert not done["kept"] and done["held_out"][1] > done["held_out"][0]
    assert all(torch.equal(layer.scale, before[name]) for name, layer in layers(model).items())
    assert torch.equal(model.model.norm.weight, norm)


def test_the_dense_model_reads_a_window_once(monkeypatch):
    def with_memory(kept: int) -> tuple[list[float], int]:
        monkeypatch.setattr(scale_tuning, "KEPT_BYTES", kept)
        dense, model, windows = rounded()
        reads = []
        dense.model.register_forward_hook(lambda *_: reads.append(1))
        return tune_scales(model, dense, windows[:8], windows[8:9], 24 * windows.shape[1], lr=1e-3)["losses"], len(reads)

    (losses, reads), (again, all_reads) = with_memory(10**9), with_memory(0)
    assert losses == again
    assert (reads, all_reads) == (8 + 2, 24 + 2)  # eight windows are trained on; the held-out one is read before and after
    window = 32 * helpers.make_llama().config.hidden_size * 4
    assert with_memory(3 * window)[1] == 3 + 5 * 3 + 2  # three fit, the other five are read in each of three rounds


def test_long_work_is_told_now_and_then():
    lines: list[str] = []
    often, never = now_and_then(0.0, lines.append), now_and_then(3600.0, lines.append)
    never("not yet")
    often("rounding"), often("learning")
    assert lines == ["rounding", "learning"]
    said: list[str] = []
    quantize_gptq(helpers.make_llama(), helpers.example_windows(4, 32), GPTQRecipe(bits=3, group_size=16, tuning_tokens=64),
                  teacher=helpers.make_llama, show=said.append)  # fmt: skip
    assert said[0] == "gptq: rounding block 1/2" and said[-1].startswith("gptq: learning 2/2 | KL ")


def test_a_loss_that_is_no_number_ends_it_with_the_setting_to_lower():
    dense, model, windows = rounded()
    dense.lm_head.weight.data[0, 0] = torch.nan
    with pytest.raises(CompactMindError, match="tuning_lr"):
        tuned(model, dense, windows, tokens=windows.shape[1], lr=1e-3)
    assert layers(model)["model.layers.0.mlp.up_proj"].scale.dtype == torch.float16  # as before
