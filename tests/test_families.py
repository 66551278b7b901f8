"""Families of pruned classifiers: layers without attention or FFN, choices within a budget, tables of cost, the script that makes them."""

import itertools
import re
import shutil

import helpers
import pytest
import scripts
import torch
from test_onnx_export import difference, needs_onnx
from transformers import AutoModelForSequenceClassification

import compactmind.evaluation.cost
import compactmind.evaluation.cost_table
import compactmind.training
from compactmind.checkpoint import load_checkpoint, save_checkpoint
from compactmind.evaluation.cost import gflops
from compactmind.evaluation.cost_table import gflops_table, latency_table
from compactmind.manifest import read_manifest
from compactmind.methods.first_token import read_first_token_only
from compactmind.methods.pruning.budget import BUCKETS, CostTable, choose_masks_within
from compactmind.methods.pruning.encoder import encoder_layers, layer_shapes
from compactmind.methods.pruning.importance import ImportanceScorer, LayerScores, head_parameters, neuron_parameters
from compactmind.methods.pruning.masks import LayerMask, apply_masks, compact, full_masks, of_widths
from compactmind.methods.pruning.targets import CostTarget
from compactmind.methods.quantization.packed_model import quantize_model
from compactmind.methods.quantization.w8a8_encoder import quantize_encoder
from compactmind.onnx_export import FILE, export_classifier
from compactmind.report.figures import accuracy_against_gflops

LABELS = torch.tensor([0, 1, 1, 0, 1])


@pytest.fixture(params=sorted(helpers.MAKERS))
def model(request):
    return helpers.MAKERS[request.param]()


def deep_masks(model) -> list[LayerMask]:
    """Return masks that take attention from layer 0, the FFN from layer 1, both from the last, and some of what is left."""
    masks = helpers.uneven_masks(model)
    for index, parts in ((0, ("heads",)), (1, ("neurons",)), (-1, ("heads", "neurons"))):
        for part in parts:
            getattr(masks[index], part)[:] = False
    return masks


# ----------------------------------------------------------------------------------------------------------------- depth
def test_a_layer_without_attention_or_ffn_is_what_the_masked_one_computes(model):
    masks, whole = deep_masks(model), helpers.logits_of(model)
    apply_masks(model, masks)
    smaller = compact(model, masks)
    torch.testing.assert_close(helpers.logits_of(smaller), helpers.logits_of(model), atol=1e-5, rtol=0)
    assert (helpers.logits_of(model) - whole).abs().max() > 0.1
    shapes = [(shape["num_heads"], shape["intermediate_size"]) for shape in layer_shapes(smaller)]
    assert shapes == [(int(mask.heads.sum()), int(mask.neurons.sum())) for mask in masks]
    assert (shapes[0][0], shapes[1][1], shapes[-1]) == (0, 0, (0, 0))
    assert not [name for name, weight in smaller.state_dict().items() if weight.numel() == 0]
    again = full_masks(smaller)
    again[1].heads[0] = False
    apply_masks(smaller, again)
    torch.testing.assert_close(helpers.logits_of(compact(smaller, again)), helpers.logits_of(smaller), atol=1e-5, rtol=0)


def test_it_trains_is_scored_and_is_read_at_its_first_token(model):
    smaller, gradients = compact(model, deep_masks(model)), []
    for short in (False, True):
        if short:
            read_first_token_only(smaller)
        smaller.zero_grad()
        smaller(**helpers.example_batch(), labels=LABELS).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in smaller.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(gradients[1][name], gradient, atol=1e-5) for name, gradient in gradients[0].items())
    for criterion in ("taylor", "l2", "random"):
        scorer = ImportanceScorer(smaller, criterion)
        scorer.observe()
        for score, shape in zip(scorer.scores(), layer_shapes(smaller), strict=True):
            assert (len(score.heads), len(score.neurons)) == (shape["num_heads"], shape["intermediate_size"])


def test_it_is_saved_and_loaded_strictly_and_by_transformers_alone(model, tokenizer, tmp_path):
    smaller, stage = compact(model, deep_masks(model)), {"script": "x", "config": {}, "inputs": {}}
    save_checkpoint(tmp_path / "m", smaller, tokenizer, kind="pruned", parent=None, stage=stage)
    loaded = load_checkpoint(tmp_path / "m")
    assert torch.equal(helpers.logits_of(loaded.model), helpers.logits_of(smaller))
    assert loaded.manifest["layers"] == layer_shapes(smaller)
    assert loaded.manifest["parameters"] == sum(p.numel() for p in smaller.parameters())
    plain, result = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "m", trust_remote_code=True, output_loading_info=True
    )
    assert torch.equal(helpers.logits_of(plain), helpers.logits_of(smaller))
    assert not any(result.values()), result


@needs_onnx
def test_it_is_exported(distilbert, tmp_path):
    smaller = compact(distilbert, deep_masks(distilbert))
    export_classifier(smaller, tmp_path / FILE)
    assert difference(smaller, tmp_path / FILE) < 1e-4


@pytest.mark.parametrize("quantize", [quantize_encoder, lambda model: quantize_model(model, "nf4")], ids=["w8a8", "nf4"])
def test_it_is_quantized(model, quantize):
    smaller = compact(model, deep_masks(model))
    before = helpers.logits_of(smaller)
    quantize(smaller)
    assert 0 < (helpers.logits_of(smaller) - before).abs().max() < 0.3 * before.abs().max()


# ---------------------------------------------------------------------------------------------------------------- budget
TABLE = CostTable("units", 5.0, (0.0, 6.0, 7.0, 9.0, 10.0), ((0, 0.0), (32, 9.0), (64, 12.0)))


def removed_importance(model, scores: list[LayerScores], masks: list[LayerMask]) -> float:
    return sum(
        (score.heads[~mask.heads].sum() * head_parameters(layer) + score.neurons[~mask.neurons].sum() * neuron_parameters(layer)).item()
        for layer, score, mask in zip(encoder_layers(model), scores, masks, strict=True)
    )  # fmt: skip


def test_a_table_adds_the_parts_up():
    assert TABLE.of([4, 0], [48, 0]) == 5.0 + 10.0 + 10.5
    assert TABLE.of_neurons(16) == 4.5


@pytest.mark.parametrize("budget", [12.3, 20.7, 33.0, 48.9])
def test_the_choice_is_the_best_of_all_that_fit(budget):
    """Against trying everything: two layers, every number of heads and every width of whole groups."""
    model = helpers.make_distilbert(n_layers=2)
    scores = helpers.random_scores(model, seed=int(budget))
    masks = choose_masks_within(model, scores, full_masks(model), TABLE, budget, round_to=16)
    assert TABLE.of_masks(masks) <= budget
    best, result = max(range(2), key=lambda index: scores[index].heads.max()), []
    for heads, groups in itertools.product(itertools.product(range(5), repeat=2), itertools.product(range(5), repeat=2)):
        if heads[best] == 0 or (cost := TABLE.of(list(heads), [16 * each for each in groups])) > budget:
            continue
        trial = full_masks(model)
        for mask, score, kept, wide in zip(trial, scores, heads, groups, strict=True):
            mask.heads[score.heads.argsort()[: 4 - kept]] = False
            mask.neurons[score.neurons.argsort()[: 64 - 16 * wide]] = False
        result.append((removed_importance(model, scores, trial), cost))
    least = min(result)[0]
    nearly = min(loss for loss, cost in result if cost <= budget * (1 - 4 / BUCKETS))  # each of four costs is rounded up to a bucket
    assert least * (1 - 1e-6) <= removed_importance(model, scores, masks) <= nearly * (1 + 1e-6)


def test_masks_shrink_the_most_important_head_stays_and_what_cannot_be_is_refused():
    model = helpers.make_bert()
    scores, masks = helpers.random_scores(model), full_masks(model)
    for budget in (60.0, 30.0, 15.0, 11.0):
        tighter = choose_masks_within(model, scores, masks, TABLE, budget, 8)
        assert all(not (new.heads & ~old.heads).any() and not (new.neurons & ~old.neurons).any()
                   for old, new in zip(masks, tighter, strict=True))  # fmt: skip
        masks = tighter
    best = max(range(4), key=lambda index: scores[index].heads.max())
    assert [int(mask.heads.sum()) for mask in masks] == [int(index == best) for index in range(4)]
    assert masks[best].heads[scores[best].heads.argmax()]
    with pytest.raises(ValueError, match=r"10.9 units cannot be reached: at least 11 is left"):
        choose_masks_within(model, scores, full_masks(model), TABLE, 10.9)


# ---------------------------------------------------------------------------------------------------------------- tables
def test_operations_by_the_table_are_those_counted(model):
    table, count = gflops_table(model, 16), len(layer_shapes(model))
    for heads, neurons in (([4] * count, [64] * count), ([0, 3] + [1] * (count - 2), [24, 0] + [64] * (count - 2))):
        assert table.of(heads, neurons) == pytest.approx(gflops(of_widths(model, heads, neurons), 16), rel=1e-9)


def fake_clock(models, batch_size, sequence_length, repeats, reference, **_):
    """Time as operations would have it, with a constant part."""
    ms = {name: 1 + 1e3 * gflops(model, sequence_length) for name, model in models.items()}
    return {name: {"low_ms": each, "speedup": ms[reference] / each} for name, each in ms.items()}


def test_a_table_of_times_fits_the_whole_model_and_is_measured_once(model, tmp_path, monkeypatch):
    monkeypatch.setattr(compactmind.evaluation.cost_table, "measure_latency", fake_clock)
    table, count = latency_table(model, 2, 16, 1, tmp_path), len(layer_shapes(model))
    assert table.of([4] * count, [64] * count) == pytest.approx(1 + 1e3 * gflops(model, 16))
    narrow = of_widths(model, [1] * count, [24] * count)
    assert table.of([1] * count, [24] * count) == pytest.approx(1 + 1e3 * gflops(narrow, 16))
    monkeypatch.setattr(compactmind.evaluation.cost_table, "measure_latency", None)
    assert latency_table(model, 2, 16, 1, tmp_path) == table
    with pytest.raises(TypeError):
        latency_table(model, 3, 16, 1, tmp_path)  # another protocol
    (file,) = tmp_path.iterdir()
    file.write_text("{")
    with pytest.raises(TypeError):
        latency_table(model, 2, 16, 1, tmp_path)


def test_a_table_is_stretched_to_what_the_whole_model_takes(distilbert, tmp_path, monkeypatch):
    def clock(models, *protocol, **names):
        result = fake_clock(models, *protocol, **names)
        result["whole"]["low_ms"] += 7.0
        result["neurons/24"]["low_ms"] = result["neurons/16"]["low_ms"] - 0.001  # noise: wider and faster
        return result

    monkeypatch.setattr(compactmind.evaluation.cost_table, "measure_latency", clock)
    table = latency_table(distilbert, 2, 16, 1, tmp_path)
    assert table.of([4] * 3, [64] * 3) == pytest.approx(8 + 1e3 * gflops(distilbert, 16))
    assert table.of_neurons(24) == pytest.approx(table.of_neurons(16)) and table.of_neurons(8) > 0


def test_a_real_clock_gives_a_rising_table(distilbert, tmp_path):
    table = latency_table(distilbert, 2, 16, 3, tmp_path)
    for costs in (table.heads, [cost for _, cost in table.neurons]):
        assert costs[0] == 0 and list(costs) == sorted(costs)
    assert table.rest > 0


def test_what_is_too_slow_when_measured_is_made_smaller(distilbert):
    target = CostTarget(TABLE, 0.5, 8, distilbert, distilbert)
    scores = helpers.random_scores(distilbert)
    start = target.tightened(distilbert, scores, full_masks(distilbert), target.end)
    whole, asked = TABLE.of_masks(full_masks(distilbert)), []

    def measure(masks):  # what is measured is a fifth more than the table says
        asked.append(1.2 * TABLE.of_masks(masks) / whole)
        return asked[-1]

    masks, reached = target.settled(distilbert, scores, start, measure, attempts=4)
    assert asked[0] > 0.5 >= reached == asked[-1] and len(asked) <= 4
    torch.testing.assert_close(helpers.logits_of(compact(distilbert, masks)), helpers.logits_of(distilbert), atol=1e-5, rtol=0)
    asked.clear()
    assert target.settled(distilbert, scores, masks, lambda _: asked.append(0.6) or 0.6, attempts=2)[1] == 0.6
    assert len(asked) == 2
    assert target.settled(distilbert, scores, masks, lambda _: 99.0, attempts=9) == (masks, 99.0)  # out of reach
    target.tightened(distilbert, scores, masks, target.end)  # what is aimed at can still be reached


# ---------------------------------------------------------------------------------------------------------------- script
GFLOPS = ("--target_gflops", 0.3, 0.7, "--batch_size", 32, "--prune_every", 1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A directory with a student of three layers."""
    folder = helpers.make_workspace(tmp_path_factory.mktemp("finished"), 200, 40)
    scripts.run_scripts(("download_model.py",), ("1_distill.py", "--student_layers", 3, "--student_epochs", 1), cwd=folder)
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("hf_home"))
    return folder


def weights_of(folder, name: str) -> str:
    return read_manifest(folder / "models" / name)["files"]["model.safetensors"]["sha256"]


def test_one_run_makes_a_model_for_every_share_of_operations_and_a_killed_one_the_same(copy, tmp_path, run_here, monkeypatch):
    whole = tmp_path / "whole"
    shutil.copytree(copy, whole)
    names = ["student_pruned_gflops0.7", "student_pruned_gflops0.3"]
    status, output = run_here("2_prune_finetune.py", *GFLOPS, cwd=whole)
    assert status == 0, output
    dense, left = load_checkpoint(whole / "models" / "student_distilled"), 1.0
    for name, share, parent in zip(names, (0.7, 0.3), ("student_distilled", names[0]), strict=True):
        checkpoint = load_checkpoint(whole / "models" / name)
        counted = gflops(checkpoint.model, 16) / gflops(dense.model, 16)
        metrics = checkpoint.manifest["metrics"]
        assert metrics["gflops_share"] == counted <= share < counted + 0.15 and counted < left
        assert checkpoint.manifest["parent"] == parent and checkpoint.manifest["kind"] == "pruned"
        removed = 1 - sum(layer["num_heads"] * 8 * 131 + layer["intermediate_size"] * 65 for layer in checkpoint.manifest["layers"]) / (
            3 * (4 * 8 * 131 + 64 * 65)
        )
        assert metrics["sparsity"] == pytest.approx(removed)
        assert metrics["kept_epoch"] >= 2 and metrics["masked_against_compacted"] <= 1e-5
        assert (whole / "results" / f"{name}_history.png").is_file()
        left = counted
    assert not (whole / "models" / "student_pruned").exists()
    status, output = run_here("2_prune_finetune.py", *GFLOPS, cwd=whole)
    assert status == 0 and output.count("is up to date") == 2

    # Killed after every single epoch of both models.
    save = compactmind.training.TrainingState.save

    def save_and_die(self, **state):
        save(self, **state)
        raise KeyboardInterrupt

    monkeypatch.setattr(compactmind.training.TrainingState, "save", save_and_die)
    runs = 0
    while (result := run_here("2_prune_finetune.py", *GFLOPS, cwd=copy))[0]:
        runs += 1
        assert "stopped. Finished checkpoints are whole" in result[1] and runs <= 6, result[1]
    assert runs == 6
    assert {name: weights_of(copy, name) for name in names} == {name: weights_of(whole, name) for name in names}


def test_speed_ups_are_measured_and_hidden_states_kept(copy, run_here, monkeypatch):
    """By a clock that counts operations: what it says is recorded, and the target is reached by it."""
    for module in (compactmind.evaluation.cost, compactmind.evaluation.cost_table):
        monkeypatch.setattr(module, "measure_latency", fake_clock)
    arguments = ("--target_speedups", 1.05, "--hidden_loss_weight", 0.5, "--batch_size", 32, "--prune_every", 1, "--epochs", 2)
    status, output = run_here("2_prune_finetune.py", *arguments, cwd=copy)
    assert status == 0, output
    checkpoint, dense = (load_checkpoint(copy / "models" / name) for name in ("student_pruned_1.05x", "student_distilled"))
    both = {"dense": dense.model, "small": checkpoint.model}
    speedup = fake_clock(both, 32, 16, 1, "dense")["small"]["speedup"]
    assert checkpoint.manifest["metrics"]["speedup_measured"] == pytest.approx(speedup) and speedup >= 1.05
    assert re.search(r"student_pruned_1.05x: .* removed, speedup_measured 1.0", output)
    assert checkpoint.manifest["stage"]["config"]["goal"] == {"name": "1.05x", "measured": True, "share": 1 / 1.05}


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--target_speedups", 2, "--target_gflops", 0.5), "by target_speedups or by target_gflops, not by both"),
        (("--target_speedups", 1), "target_speedups 1 is not in (1, inf)"),
        (("--target_gflops", 0.5, 1), "target_gflops 1 is not in (0, 1)"),
        (("--target_gflops", 0.7, 0.001), "cannot be reached: at least"),
    ],
    ids=str,
)
def test_targets_that_make_no_sense_are_refused(copy, run_here, arguments, part):
    before = sorted(copy.glob("[mr]*/[!.]*"))
    status, output = run_here("2_prune_finetune.py", *arguments, cwd=copy)
    assert status == 1 and "error: " in output and part in output, output
    assert sorted(copy.glob("[mr]*/[!.]*")) == before


def test_several_processes_do_not_measure_times(copy, run_here, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    status, output = run_here("2_prune_finetune.py", "--target_speedups", 2, cwd=copy)
    assert status == 1 and "run without a launcher, or use --target_gflops" in output


def test_the_report_joins_the_members_of_a_family():
    def row(name: str, value: float, goal: dict | None) -> dict:
        stage = {"config": {"goal": goal} if goal else {}}
        return {"name": name, "track": "encoder", "status": "measured", "gflops": value, "accuracy": value / 4, "size_mb": 1.0,
                "accuracy_interval": [0.0, 1.0], "stage": stage}  # fmt: skip

    goals = {"4x": 1.0, "2x": 2.0}
    rows = [row(f"mine_{name}", value, {"name": name, "measured": True, "share": 0.5}) for name, value in goals.items()]
    report = {"models": [row("dense", 3.0, None), *rows, {**row("own", 1.5, None), "stage": None}], "settings": {"cost_length": 16}}
    figure = accuracy_against_gflops(report)
    joined = [line for line in figure.axes[0].lines if line.get_color() == "#999999"]
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in joined] == [([2.0, 1.0], [50.0, 25.0])]

    report["models"].append(row("as_many", 2.0, None))  # drawn side by side: the line goes to where the member is drawn
    axes = accuracy_against_gflops(report).axes[0]
    points = [tuple(points.get_offsets()[0]) for points in axes.collections if len(points.get_offsets())]
    (line,) = [line for line in axes.lines if line.get_color() == "#999999"]
    assert list(line.get_xdata()) != [2.0, 1.0] and {tuple(map(float, end)) for end in line.get_xydata()} <= set(points)
