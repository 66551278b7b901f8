"""Training one model that is divided between two processes: on a CPU, by the code that a GPU runs."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import helpers
import pytest
import scripts
import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from tiny_retraining import STAGE, timeless

from compactmind.checkpoint import load_checkpoint
from compactmind.errors import CompactMindError
from compactmind.methods.retraining import causal_lm
from compactmind.methods.retraining.causal_lm import retrain_causal_lm
from compactmind.methods.retraining.recipe import RetrainRecipe
from compactmind.methods.retraining.sharding import check_sharding, own_share
from compactmind.precision import widen
from compactmind.search.compressor import check_steps, read_pipeline
from compactmind.training import TrainingState, make_accelerator, trains_sharded

SEQ_LEN = 16
ODD = {"tie_word_embeddings": True, "intermediate_size": 45, "vocab_size": 265}
"""Rows that two processes cannot share evenly."""
KINDS = {"": {}, "_odd": ODD, "_bf16": {}, "_held": {}, "_sgd": {}, "_clipped": {}}
"""_bf16: in mixed precision; _held: weights that came in bf16; _sgd, _clipped: AdamW would hide gradients of the wrong size."""
CASES = {f"{name}{kind}": settings for kind, settings in KINDS.items() for name in ("whole", "divided")}
SCRIPT = """
import sys
sys.path[:0] = sys.argv[1:3]
import test_sharding
test_sharding.of_two_processes(sys.argv[3])
"""


# ------------------------------------------------------------------------------------------------------- in two processes
def of_two_processes(folder: str) -> None:
    """Train every case in one of two processes; write what came out, and what this process held, into `folder`."""
    os.environ["FSDP_VERSION"] = "2"
    for name, settings in CASES.items():
        train(folder, name, settings)
    train(folder, "whole_nf4", {})
    train(folder, "killed", {}, lambda calls: calls == 4)  # before retraining, two evaluations, and then
    train(folder, "resumed", {}, resume="killed")
    train(folder, "apart", {}, lambda calls: calls == 4)
    if os.environ["RANK"] == "1":  # killed between the parts: this one is of an earlier step
        own = TrainingState(helpers.Path(folder) / "apart", STAGE).part(1, 2, lambda: None)
        own.save(**own.load() | {"step": 2})
    train(folder, "anew", {}, resume="apart")


def train(folder: str, name: str, settings: dict, kill=lambda calls: False, resume: str | None = None) -> None:
    divided = not name.startswith("whole")
    AcceleratorState._reset_state(reset_partial_state=False)
    if PartialState._shared_state:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
    os.environ["ACCELERATE_USE_FSDP"] = str(divided).lower()
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if name.endswith("bf16") else "no"
    accelerator = make_accelerator(may_shard=True)
    if divided:  # accelerate says so on GPUs only, and does some things otherwise then
        for state in (PartialState, AcceleratorState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin()
        assert accelerator.distributed_type == DistributedType.FSDP and accelerator.is_fsdp2
    windows, teacher = helpers.example_windows(12, SEQ_LEN), helpers.make_llama(seed=1, **settings)
    recipe = RetrainRecipe(tokens=8 * 4 * SEQ_LEN, batch_size=1, accumulation=2, lr=1e-3, gradient_checkpointing=True, alpha=0.3)
    if name.endswith(("_sgd", "_clipped")):
        recipe = replace(recipe, lr=0.1, max_grad_norm=0.1 if name.endswith("_clipped") else 1e6)
    if name.endswith("_nf4"):
        recipe = replace(recipe, mode="lora", base="nf4", lr=2e-2)
    model = helpers.make_llama(**settings)
    if name.endswith("_held"):
        model = widen(helpers.released_llama(model))
    if name == "whole_held":
        model.float()
    if not settings:
        model.model.norm.weight.requires_grad_(False)
    held, measure, make, calls = {"types": []}, causal_lm.held_out_loss, causal_lm.make_optimizer, []

    def look(trained, *arguments):
        calls.append(1)
        if kill(len(calls)):
            raise KeyboardInterrupt
        held["weights"] = sum(own_share(each).numel() for each in trained.parameters())
        held["given"] = sum(each.numel() for each in model.parameters())
        return measure(trained, *arguments)

    def optimizer_of(trained, *arguments):
        held["optimizer"] = make(trained, *arguments)
        if name.endswith(("_sgd", "_clipped")):
            held["optimizer"] = torch.optim.SGD([each for each in trained.parameters() if each.requires_grad], lr=recipe.lr)
        trained.lm_head.register_forward_hook(
            lambda module, _, output: held["types"].append(f"{'training' if module.training else 'evaluation'} {output.dtype}")
        )
        return held["optimizer"]

    causal_lm.held_out_loss, causal_lm.make_optimizer = look, optimizer_of
    state = TrainingState(helpers.Path(folder) / (resume or name), STAGE)
    try:
        result = retrain_causal_lm(model, windows, windows[:2], recipe, teacher=teacher, accelerator=accelerator, resume=state)
    except KeyboardInterrupt:
        return
    finally:
        causal_lm.held_out_loss, causal_lm.make_optimizer = measure, make
    moments = [own_share(each) for its in held.pop("optimizer").state.values() for each in its.values()]
    held["moments"] = sum(each.numel() for each in moments if each.ndim)
    held["left"] = sum(each.numel() for each in model.parameters())
    held["kind"], held["types"], held["calls"] = type(model).__name__, sorted(set(held["types"])), len(calls)
    helpers.Path(folder, f"{name}_{accelerator.process_index}.json").write_text(json.dumps(held))
    if accelerator.is_main_process:
        torch.save(model.state_dict(), f"{folder}/{name}_model.pt")
        helpers.Path(folder, f"{name}.json").write_text(json.dumps(result))


# ------------------------------------------------------------------------------------------------------------- the tests
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return what two processes have printed, where their files are, and for every case the result, the weights and what each held."""
    folder = tmp_path_factory.mktemp("sharding")
    (folder / "two.py").write_text(SCRIPT)
    ended = scripts.run_python(folder / "two.py", helpers.REPOSITORY, helpers.REPOSITORY / "tests", folder, cwd=folder, processes=2)
    assert ended.returncode == 0, ended.stderr

    def of(name: str):
        weights = torch.load(folder / f"{name}_model.pt", weights_only=True)
        return helpers.read_json(folder / f"{name}.json"), weights, [helpers.read_json(folder / f"{name}_{rank}.json") for rank in (0, 1)]

    return ended.stdout, folder, {name: of(name) for name in [*CASES, "whole_nf4", "resumed", "anew"]}


@pytest.mark.parametrize(
    ("case", "share"), [("", 0.02), ("_odd", 0.02), ("_bf16", 0.25), ("_held", 0.02), ("_sgd", 1e-3), ("_clipped", 1e-3)]
)
def test_a_divided_model_is_trained_like_a_whole_one(trained, case, share):
    (result, weights, _), (wanted, expected, held) = (trained[2][name + case] for name in ("divided", "whole"))
    rel = 1e-2 if case == "_bf16" else 1e-5
    assert result["kept_step"] == wanted["kept_step"] == 8 and result["stopped"] is None and len(result["history"]) == 4
    assert result["loss_before"] == pytest.approx(wanted["loss_before"], rel=1e-6)
    for ours, theirs in zip(result["history"], wanted["history"], strict=True):
        for loss in ("loss", "held_out_loss"):
            assert ours[loss] == pytest.approx(theirs[loss], rel=rel)
    assert list(weights) == list(expected)
    start = helpers.make_llama(**CASES["divided" + case]).state_dict()
    if case == "_held":
        assert {str(each.dtype) for name, each in weights.items() if "norm" not in name} == {"torch.bfloat16"}
        start = {name: tensor.bfloat16().float() for name, tensor in start.items()}
        weights, expected = ({name: each[name].bfloat16().float() for name in each} for each in (weights, expected))
    for name, tensor in expected.items():
        assert (tensor - weights[name]).norm() <= share * (tensor - start[name]).norm(), name
    assert (start["lm_head.weight"] - weights["lm_head.weight"]).abs().max() > 1e-4


@pytest.mark.parametrize("case", ["", "_odd", "_bf16", "_held"])
def test_each_process_holds_half_of_weights_and_moments(trained, case):
    (_, _, whole), (_, _, divided) = (trained[2][name + case] for name in ("whole", "divided"))
    model = helpers.make_llama(**CASES["divided" + case])
    count = sum(each.numel() for each in model.parameters())
    learning = count if case == "_odd" else count - 32  # of the norm that is frozen
    assert [(each["weights"], each["moments"], each["left"]) for each in whole] == [(count, 2 * learning, count)] * 2
    for held in divided:
        assert held["weights"] == pytest.approx(count / 2, rel=0.02) and held["moments"] == pytest.approx(learning, rel=0.02)
        assert held["given"] == 0 and held["kind"] == "LlamaForCausalLM"
    assert sum(each["weights"] for each in divided) == count
    assert [each["left"] for each in divided] == [count, 0]  # whole again in the main process


def test_held_out_losses_are_float32_whatever_training_is(trained):
    for case, dtype in (("_bf16", "torch.bfloat16"), ("", "torch.float32")):
        for name in ("whole", "divided"):
            assert trained[2][name + case][2][0]["types"] == ["evaluation torch.float32", f"training {dtype}"]


def test_adapters_beside_4_bits_are_trained_by_several_processes(trained):
    result, weights, held = trained[2]["whole_nf4"]
    assert result["kept_step"] > 0 and result["loss_after"] < result["loss_before"] != result["loss_of_base"]
    assert held[0] == held[1] and list(weights) == list(helpers.make_llama().state_dict())


def test_a_divided_training_goes_on_where_it_was_killed(trained):
    printed, folder, cases = trained
    (result, weights, held), (wanted, expected, _) = cases["resumed"], cases["divided"]
    assert printed.count("going on after step 4 of 8") == 1 and [each["calls"] for each in held] == [2, 2]
    assert timeless(result) == timeless(wanted)
    assert [name for name in expected if not torch.equal(weights[name], expected[name])] == []
    sizes = [each.stat().st_size for each in folder.glob(".killed.training.*of2.pt")]
    assert len(sizes) == 2 and not (folder / ".killed.training.pt").exists()
    assert max(sizes) < 0.65 * (folder / ".whole.training.pt").stat().st_size


def test_parts_of_different_steps_are_not_used(trained):
    printed, _, cases = trained
    assert "the parts of the unfinished run there are of the steps [4, 2]: starting anew" in printed
    assert timeless(cases["anew"][0]) == timeless(cases["divided"][0]) and cases["anew"][2][0]["calls"] == 5


def test_all_parts_are_forgotten_together(tmp_path):
    state = TrainingState(tmp_path / "model", STAGE)
    parts, other = [state.part(number, 2, lambda: None) for number in range(2)], TrainingState(tmp_path / "model2", STAGE)
    for each in (state, *parts, other):
        each.save(step=3)
    assert [each.load() for each in (state, *parts)] == [{"step": 3}] * 3
    state.clear()
    assert [each.load() for each in (state, *parts, other)] == [None] * 3 + [{"step": 3}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lora", "adamw"), "mode 'lora' is not divided between processes .FSDP., only full"),
        (("full", "adamw_8bit"), "optimizer 'adamw_8bit' is not divided.*only adamw: choose that, or launch without FSDP"),
        (("full", "adamw", "fp16"), "mixed precision 'fp16' is not divided.*only no or bf16"),
    ],
)
def test_what_is_not_divided_is_refused_with_the_way_out(arguments, message):
    with pytest.raises(CompactMindError, match=message):
        check_sharding(*arguments)


def test_a_script_that_cannot_divide_its_model_refuses_to(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert not trains_sharded()  # one process
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert trains_sharded()
    with pytest.raises(CompactMindError, match="only retraining .5_bayesian_search.py. divides a model.*without FSDP"):
        make_accelerator()


def launched(folder, *arguments) -> subprocess.CompletedProcess:
    """Run stage 5 as the configuration of the repository launches it."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(helpers.REPOSITORY / "configs" / "fsdp.yaml")]
    command += ["--main_process_port", "0", str(helpers.REPOSITORY / "5_bayesian_search.py"), "--profile", "smoke", "--strategy", "fixed"]
    return subprocess.run(
        [*command, *arguments], cwd=folder, env=scripts.environment(folder), stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=scripts.PATIENCE,
    )  # fmt: skip


def test_stage_5_is_launched_with_the_configuration_of_the_repository(tmp_path):
    helpers.add_llama(tmp_path)
    ended = launched(tmp_path)
    assert ended.returncode == 0 and ended.stdout.count("retrain: the model is divided between 2 processes") == 1, ended.stderr
    record = helpers.read_json(tmp_path / "models" / "llama_pruned" / "manifest.json")
    result = {"num_processes": 2, "effective_batch": 4, "mixed_precision": "bf16", "sharded": True}
    assert record["stage"]["config"]["retraining"] == [result]
    assert record["pipeline"][2]["done"]["kept_step"] > 0
    assert sorted(each.name for each in (tmp_path / "models").iterdir() if "training" in each.name) == []
    loaded = load_checkpoint(tmp_path / "models" / "llama_pruned").model
    assert all(torch.isfinite(each).all() and each.numel() for each in loaded.parameters())


def test_what_is_not_divided_is_refused_before_anything_is_done(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    steps = read_pipeline([{"method": "prune", "params": {"round_to": 8}}, {"method": "retrain", "params": {"mode": "lora"}}])
    with pytest.raises(CompactMindError, match="mode 'lora' is not divided"):
        check_steps(steps, helpers.make_llama())
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    check_steps(steps, helpers.make_llama())
