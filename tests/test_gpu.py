"""What a GPU computes is what the CPU computes, and every stage runs on one. Skipped where there is none."""

import copy
import json

import helpers
import pytest
import scripts
import torch

from compactmind.checkpoint import load_checkpoint, save_checkpoint
from compactmind.methods.quantization.error_compensation import compensate_rounding, compensation_of
from compactmind.methods.quantization.gptq import columns_in_order, inverse_factor, round_compensated, round_nearest
from compactmind.methods.quantization.gptq_model import GPTQRecipe, quantize_gptq
from compactmind.methods.quantization.grid import Grid
from compactmind.methods.quantization.grouped import GroupedLinear, pack, unpack
from compactmind.methods.quantization.nf4_model import NF4Recipe, quantize_nf4
from compactmind.methods.quantization.packed_model import quantize_model
from compactmind.methods.quantization.w8a8_model import W8A8Recipe, calibrate_llama, quantize_llama
from compactmind.methods.retraining.causal_lm import retrain_causal_lm
from compactmind.methods.retraining.recipe import RetrainRecipe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GRIDS = [Grid(4, 32), Grid(3, 64, "integer"), Grid(2, 32, "float"), Grid(8, -1)]


def llama():
    model = helpers.make_llama(tie_word_embeddings=True, hidden_size=64, intermediate_size=128, scale=0.5)
    return helpers.released_llama(model).float()  # as it will be loaded: what differs is no rounding of the activations


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model(helpers.example_windows().to(model.device)).logits.float().cpu()


def relative(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((actual - wanted).norm() / wanted.norm())


def example_moment(width: int) -> torch.Tensor:
    x = torch.randn(4 * width, width, generator=torch.Generator().manual_seed(1)) @ torch.randn(
        width, width, generator=torch.Generator().manual_seed(2)
    )
    return x.t() @ x / len(x)


# -------------------------------------------------------------------------------------------------------------- rounding
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_columns_are_rounded_as_on_a_cpu(grid):
    """From recorded kernels, twice: the second weight has the shape of the first and runs what was recorded for it."""
    moment = example_moment(96)
    order = columns_in_order(moment, grid, "activation")
    factor = inverse_factor(moment[order][:, order], 0.05)
    for seed in range(3):
        weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(seed))
        wanted = round_compensated(weight, factor, order, grid)
        result = round_compensated(weight.cuda(), factor.cuda(), order.cuda(), grid)
        assert (result.q.cpu() == wanted.q).float().mean() > 0.99  # a weight in the middle between two levels may go either way
        assert relative(result.scale.cpu(), wanted.scale) < 1e-2
        near = round_nearest(weight, grid)
        assert (round_nearest(weight.cuda(), grid).q.cpu() == near.q).float().mean() > 0.999


def test_nf4_columns_are_rounded_as_on_a_cpu():
    levels = torch.linspace(-1, 1, 16)
    for seed in range(3):
        weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(seed))
        scale = weight.unflatten(1, (-1, 64)).abs().amax(-1, keepdim=True).expand(-1, -1, 64).flatten(1)
        on_cpu, on_gpu = compensation_of(example_moment(128)), compensation_of(example_moment(128).cuda())
        wanted = compensate_rounding(weight, on_cpu, levels, scale, scale)
        result = compensate_rounding(weight.cuda(), on_gpu, *(each.cuda() for each in (levels, scale, scale))).cpu()
        assert (result == wanted).float().mean() > 0.99


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_integers_are_packed_as_on_a_cpu(bits):
    q = torch.randint(0, 2**bits, (5, 77), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    packed = pack(q.cuda(), bits)
    assert packed.is_cuda and torch.equal(packed.cpu(), pack(q, bits))
    assert torch.equal(unpack(packed, bits, 77).cpu(), q)


def test_a_grouped_linear_multiplies_as_on_a_cpu():
    rounded = round_nearest(torch.randn(24, 80, generator=torch.Generator().manual_seed(0)), Grid(4, 32))
    layer = GroupedLinear.of(rounded.q, rounded.scale, rounded.zero, rounded.grid)
    x = torch.randn(3, 80, generator=torch.Generator().manual_seed(1))
    wanted = layer(x)
    assert relative(layer.cuda()(x.cuda()).cpu(), wanted) < 1e-3


# ---------------------------------------------------------------------------------------------------------- whole models
def w8a8(model, windows):
    return quantize_llama(model, calibrate_llama(model, windows), W8A8Recipe())


METHODS = {
    "w8a8": w8a8,
    "nf4": lambda model, windows: quantize_nf4(model, windows, NF4Recipe()),
    "gptq": lambda model, windows: quantize_gptq(model, windows, GPTQRecipe(bits=4)),
    "gptq to a target": lambda model, windows: quantize_gptq(model, windows, GPTQRecipe(target_compression=2.2)),
    "gptq tuned": lambda model, windows: quantize_gptq(
        model, windows, GPTQRecipe(bits=3, tuning_tokens=64), teacher=lambda: llama().to(model.device)
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_quantized_llama_computes_what_it_does_on_a_cpu_and_reloads(on_gpu, tmp_path, method):
    windows, dense = helpers.example_windows(8, 32, seed=5), logits_of(llama())
    of_cpu, of_gpu = llama(), llama().cuda()
    METHODS[method](of_cpu, windows)
    description = METHODS[method](of_gpu, windows)
    assert of_gpu.device.type == "cuda"
    wanted, result = logits_of(of_cpu), logits_of(of_gpu)
    assert relative(result, dense) < 1.5 * relative(wanted, dense) + 0.02
    kind = {"nf4": "nf4", "w8a8": "w8a8"}.get(method, "grouped")
    stage = {"script": "test", "config": {}, "inputs": {}}
    save_checkpoint(
        tmp_path / "saved", of_gpu, helpers.make_byte_tokenizer(), kind=kind, parent=None, stage=stage, dtype="bfloat16",
        quantization=description,
    )  # fmt: skip
    assert relative(logits_of(load_checkpoint(tmp_path / "saved", "cuda").model), result) < 1e-2
    assert relative(logits_of(load_checkpoint(tmp_path / "saved", "cpu").model), result) < 3e-2


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_a_quantized_classifier_computes_what_it_does_on_a_cpu(bert, method):
    batch = helpers.example_batch()
    dense = helpers.logits_of(bert, batch)
    moved = copy.deepcopy(bert).cuda()
    quantize_model(moved, method, embeddings="fp16")
    result = helpers.logits_of(moved, {name: each.cuda() for name, each in batch.items()}).float().cpu()
    assert relative(result, dense) < 0.2


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_retraining_learns_on_a_gpu(on_gpu, mode):
    model, windows = helpers.make_llama(), helpers.example_windows(16, 32)
    recipe = RetrainRecipe(mode=mode, tokens=16 * 32 * 8, batch_size=4, lr=3e-3, distillation=False)
    result = retrain_causal_lm(model, windows, windows[:4], recipe)
    assert result["loss_after"] < result["loss_before"] and model.device.type == "cuda"


# ---------------------------------------------------------------------------------------------------------------- stages
@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A directory in which run_pipeline.py has run every stage on the GPU, and what it printed."""
    folder = helpers.make_workspace(tmp_path_factory.mktemp("gpu"), train_rows=300, dev_rows=50)
    helpers.add_llama(folder, hidden_size=64, intermediate_size=128, scale=0.1)
    result = scripts.run_script("run_pipeline.py", cwd=folder, gpu=True)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return folder, result.stdout


def test_every_stage_runs_on_a_gpu_and_every_row_is_measured(reported):
    folder, _ = reported
    report = json.loads((folder / "results" / "final_report.json").read_text())
    assert [(row["name"], row.get("error")) for row in report["models"] if row["status"] != "measured"] == []
    assert torch.cuda.get_device_name() in report["environment"]["machine"]


def test_a_second_run_on_a_gpu_has_nothing_to_do(reported):
    again = scripts.run_script("run_pipeline.py", cwd=reported[0], gpu=True)
    assert again.returncode == 0 and "fetching" not in again.stdout
    for stage in ("1_distill.py", "2_prune_finetune.py", "4_smoothquant_llama.py", "5_bayesian_search.py"):
        assert stage in again.stdout
