"""2:4 sparsity: the pattern, its scores, zeros that stay through training and quantization, what may come after it."""

import copy

import helpers
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from compactmind.checkpoint import load_checkpoint, save_checkpoint
from compactmind.errors import CompactMindError
from compactmind.methods.llama import LINEARS, llama_blocks
from compactmind.methods.memory import Sizes
from compactmind.methods.pruning.encoder import block_linears, encoder_layers
from compactmind.methods.pruning.sparse24 import Sparse24Recipe, sparsify_llama
from compactmind.methods.pruning.two_of_four import (
    apply_pattern,
    is_two_of_four,
    keep_two_of_four,
    share_of_zeros,
    sparse_weight_names,
    takes_sparse_kernel,
    with_sparse_kernels,
)
from compactmind.methods.quantization.packed_model import quantize_model
from compactmind.methods.quantization.w8a8_encoder import quantize_encoder
from compactmind.methods.registry import METHODS, Resources
from compactmind.methods.retraining.causal_lm import retrain_causal_lm
from compactmind.methods.retraining.recipe import RetrainRecipe
from compactmind.report.zeros import is_two_of_four as said_to_be
from compactmind.report.zeros import zeros_sentences
from compactmind.search.compressor import check_steps, read_pipeline


def linears_of(model) -> dict[str, nn.Linear]:
    return {f"{block.name}.{field}": getattr(block, field) for block in llama_blocks(model) for field in LINEARS}


@torch.no_grad()
def dequantized(layer: nn.Module) -> torch.Tensor:
    """Return the weight (out, in) that a layer multiplies with; the rows of the identity are rounded to themselves."""
    eye = torch.eye(layer.in_features)[None]
    return (layer(eye) - layer(torch.zeros_like(eye)))[0].T


# ----------------------------------------------------------------------------------------------------------------- pattern
def test_two_of_every_four_along_a_row_stay_and_they_are_the_best():
    scores = torch.tensor([[4.0, 1, 3, 2, 0, 0, 0, 0], [1, 2, 3, 4, 8, 7, 6, 5]])
    kept = keep_two_of_four(scores)
    assert kept[0, :4].tolist() == [True, False, True, False] and kept[0, 4:].sum() == 2  # ties too
    assert kept[1].tolist() == [False, False, True, True, True, True, False, False]
    random = torch.rand(7, 24)
    kept = keep_two_of_four(random).view(7, 6, 4)
    assert (kept.sum(-1) == 2).all()
    fours = random.view(7, 6, 4)
    assert (fours.masked_fill(~kept, 9).amin(-1) >= fours.masked_fill(kept, -9).amax(-1)).all()
    with pytest.raises(ValueError, match="6 inputs are no multiple of 4"):
        keep_two_of_four(torch.rand(2, 6))


def test_the_pattern_is_told_from_others():
    weight = torch.tensor([[1.0, 0, 2, 0, 0, 0, 0, 3]])
    assert is_two_of_four(weight)
    assert not is_two_of_four(torch.tensor([[1.0, 5, 2, 0, 0, 0, 0, 3]]))
    assert not is_two_of_four(torch.tensor([[1.0, 0, 2, 0, 5, 0]]))  # no fours
    assert not is_two_of_four(weight.T) and not is_two_of_four(torch.zeros(2, 4)) and not is_two_of_four(torch.zeros(4))


def test_weights_that_cannot_be_divided_into_fours_are_named_before_anything_is_changed(distilbert):
    linears = block_linears(distilbert)
    linears["layer 0, down"] = nn.Linear(6, 8)
    before = copy.deepcopy(distilbert.state_dict())
    with pytest.raises(CompactMindError, match="layer 0, down has 6 inputs, no multiple of 4.*--round_to 64"):
        apply_pattern(linears)
    assert all(torch.equal(tensor, before[name]) for name, tensor in distilbert.state_dict().items())


# -------------------------------------------------------------------------------------------------------------- classifiers
@pytest.mark.parametrize("family", sorted(helpers.MAKERS))
def test_a_classifier_keeps_its_larger_weights_and_its_zeros_while_it_trains(family):
    model = helpers.MAKERS[family]()
    before, linears = copy.deepcopy(model.state_dict()), block_linears(model)
    assert len(linears) == 6 * len(encoder_layers(model))
    held = apply_pattern(linears)
    assert share_of_zeros(linears.values()) == 0.5
    zero = {name: linear.weight == 0 for name, linear in linears.items()}
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert len(changed) == len(linears) == len(sparse_weight_names(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        model(**helpers.example_batch(), labels=torch.tensor([0, 1, 1, 0, 1])).loss.backward()
        optimizer.step()
        assert not is_two_of_four(next(iter(linears.values())).weight)  # the step itself fills them
        held.zero_again()
    for name, linear in linears.items():
        assert torch.equal(linear.weight == 0, zero[name])


def test_a_classifier_reloads_as_it_was_and_on_a_cpu_stays_dense(distilbert, tokenizer, tmp_path):
    apply_pattern(block_linears(distilbert))
    save_checkpoint(tmp_path / "m", distilbert, tokenizer, kind="dense", parent=None, stage={}, extra={"sparsity_pattern": "2:4"})
    loaded = load_checkpoint(tmp_path / "m", sparse_kernels=True)
    assert torch.equal(helpers.logits_of(loaded.model), helpers.logits_of(distilbert))
    assert sparse_weight_names(loaded.model) == sparse_weight_names(distilbert) != [] and loaded.manifest["sparsity_pattern"] == "2:4"
    assert with_sparse_kernels(loaded.model) == []
    assert {type(linear.weight) for linear in block_linears(loaded.model).values()} == {nn.Parameter}


@pytest.mark.parametrize("quantize", [quantize_encoder, lambda model: quantize_model(model, "nf4")], ids=["w8a8", "nf4"])
def test_rounding_a_classifier_leaves_the_zeros(distilbert, quantize):
    apply_pattern(block_linears(distilbert))
    zero = {name: linear.weight == 0 for name, linear in block_linears(distilbert).items()}
    quantize(distilbert)
    for name, layer in block_linears(distilbert).items():
        assert dequantized(layer)[zero[name]].abs().max() == 0, name


def test_what_the_kernels_take():
    weight = torch.rand(32, 64).masked_fill(~keep_two_of_four(torch.rand(32, 64)), 0).half()
    assert takes_sparse_kernel(weight) and takes_sparse_kernel(weight.bfloat16())
    assert not takes_sparse_kernel(weight.float())  # no dtype of theirs
    assert not takes_sparse_kernel(weight[:24]) and not takes_sparse_kernel(weight[:, :32])
    assert not takes_sparse_kernel(torch.rand(32, 64).half())


# ------------------------------------------------------------------------------------------------------------------ Llamas
@pytest.fixture
def llama():
    return helpers.make_llama(scale=0.3)


def test_magnitude_keeps_the_larger_weights_of_a_llama(llama):
    before = copy.deepcopy(llama)
    done = sparsify_llama(llama, torch.empty(0, 8, dtype=torch.long), Sparse24Recipe("magnitude"))
    assert done == {"pattern": "2:4", "criterion": "magnitude", "zeros": 0.5}
    for (name, linear), old in zip(linears_of(llama).items(), linears_of(before).values(), strict=True):
        kept = keep_two_of_four(old.weight.abs())
        assert torch.equal(linear.weight, old.weight * kept), name
    own = {f"{block.name}.{path}.weight" for block in llama_blocks(llama) for path in LINEARS.values()}
    for name, tensor in llama.state_dict().items():
        assert name in own or torch.equal(tensor, before.state_dict()[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wanda_ranks_by_weight_times_norm_of_the_input_of_the_sparse_model(llama, dtype):
    """Beside a direct computation: every linear watched with all before it sparse already."""
    model = helpers.cast_parameters(llama, dtype)
    dense, windows = copy.deepcopy(model), helpers.example_windows(count=3, length=16)
    done = sparsify_llama(model, windows, Sparse24Recipe())
    assert done["criterion"] == "wanda" and done["zeros"] == 0.5
    assert {linear.weight.dtype for linear in linears_of(model).values()} == {dtype}
    check = copy.deepcopy(dense).float()
    differs = 0
    for index, block in enumerate(llama_blocks(check)):
        seen: dict[str, list] = {}
        handles = []
        for field in LINEARS:
            rows = seen[field] = []
            handles.append(getattr(block, field).register_forward_hook(lambda _, inputs, __, rows=rows: rows.append(inputs[0])))
        with torch.no_grad():
            for window in windows:
                check.model(input_ids=window[None], use_cache=False)
        for handle in handles:
            handle.remove()
        ours = llama_blocks(model)[index]
        for field in LINEARS:
            inputs = torch.cat([each[0] for each in seen[field]])  # (tokens, in)
            weight = getattr(block, field).weight
            kept = keep_two_of_four(weight.abs() * inputs.norm(dim=0))
            assert torch.equal(getattr(ours, field).weight != 0, kept & (weight != 0)), (index, field)
            assert torch.equal(getattr(ours, field).weight.float(), weight * kept)
            differs += int((kept != keep_two_of_four(weight.abs())).sum())
            weight.data.mul_(kept)
    assert differs > 0  # magnitude would have chosen others


def test_wanda_without_text_is_refused(llama):
    with pytest.raises(CompactMindError, match="Wanda reads calibration text and there is none"):
        sparsify_llama(llama, torch.empty(0, 8, dtype=torch.long), Sparse24Recipe())
    with pytest.raises(ValueError, match="criterion 'taylor' is not one of wanda, magnitude"):
        Sparse24Recipe("taylor")


def test_retraining_holds_the_zeros_and_adapters_are_refused(llama):
    teacher, windows = copy.deepcopy(llama), helpers.example_windows(count=8, length=16)
    sparsify_llama(llama, windows, Sparse24Recipe())
    before = {name: linear.weight.clone() for name, linear in linears_of(llama).items()}
    recipe = RetrainRecipe(tokens=16 * 8 * 3, lr=3e-3, evaluations=2)
    done = retrain_causal_lm(llama, windows, windows, recipe, teacher=teacher, accelerator=Accelerator(cpu=True))
    assert done["kept_step"] > 0 and done["loss_after"] < done["loss_before"]
    for name, linear in linears_of(llama).items():
        assert not torch.equal(linear.weight, before[name])
        assert torch.equal(linear.weight == 0, before[name] == 0), name


# --------------------------------------------------------------------------------------------------------------- pipelines
@pytest.mark.parametrize(
    ("step", "why"),
    [
        ({"method": "retrain", "params": {"mode": "lora"}}, "set mode to full"),
        ({"method": "w8a8"}, "rotations mix the weights"),
        ({"method": "w8a8", "params": {"rotations": [], "stream_rotation": True}}, "rotations mix the weights"),
        ({"method": "nf4"}, "set compensation to false"),
        ({"method": "gptq"}, "compensated rounding"),
        ({"method": "retrain"}, None),
        ({"method": "w8a8", "params": {"rotations": []}}, None),
        ({"method": "nf4", "params": {"compensation": False}}, None),
    ],
    ids=str,
)
def test_what_would_fill_the_zeros_is_refused_by_name(llama, step, why):
    steps = read_pipeline([{"method": "sparse24"}, step])
    if why is None:
        check_steps(steps, llama)
        return
    with pytest.raises(CompactMindError, match=f"{step['method']} would undo the zeros that sparse24 has made: .*{why}"):
        check_steps(steps, llama)
    check_steps(steps[1:], llama)


def test_orders():
    with pytest.raises(CompactMindError, match="step 2, prune, would undo the zeros before it"):
        read_pipeline([{"method": "sparse24"}, {"method": "prune"}])
    assert len(read_pipeline([{"method": "prune"}, {"method": "sparse24"}, {"method": "retrain"}])) == 3


@pytest.mark.parametrize("method", [("w8a8", {"rotations": (), "embeddings": "as_released"}), ("nf4", {"compensation": False})], ids=str)
def test_what_is_allowed_leaves_the_zeros(llama, method):
    windows = helpers.example_windows(count=8, length=16)
    sparsify_llama(llama, windows, Sparse24Recipe())
    zero = {name: linear.weight == 0 for name, linear in linears_of(llama).items()}
    name, settings = method
    resources = Resources(windows, windows, windows[:2], helpers.make_llama)
    quantized, _ = METHODS[name].apply(llama, resources, METHODS[name].parameters(settings))
    for each, layer in linears_of(quantized).items():
        assert dequantized(layer)[zero[each]].abs().max() == 0, each


def test_its_memory_is_told(llama):
    need = METHODS["sparse24"].needs(Sizes.of(llama, 10_000, 8, 8, 16), Sparse24Recipe(), 40_000)
    assert need.held == 40_000 < need.peak and need.file > 0


def test_the_report_says_what_zeros_save_on_a_cpu():
    rows = [
        {"name": "a", "status": "measured", "stage": {"config": {"pattern": "2:4"}}},
        {"name": "b", "status": "measured", "stage": {"config": {}}, "pipeline": [{"method": "sparse24"}, {"method": "retrain"}]},
        {"name": "c", "status": "measured", "stage": None, "pipeline": [{"method": "prune"}]},
        {"name": "d", "status": "not run", "stage": {"config": {"pattern": "2:4"}}},
    ]
    assert [said_to_be(row) for row in rows] == [True, True, False, True]
    (sentence,) = zeros_sentences({"models": rows, "environment": {"gpu": None}})
    assert sentence.startswith("a, b: two of every four") and "saves no time and no bytes here" in sentence and "a CPU has no" in sentence
    assert zeros_sentences({"models": rows[2:], "environment": {}}) == []
