"""What a stage will take is told from shapes, and refused where it is not there."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import helpers
import psutil
import pytest
import torch

from compactmind import room
from compactmind.checkpoint import save_checkpoint, skeleton_of
from compactmind.errors import CompactMindError
from compactmind.methods import memory
from compactmind.methods.memory import Sizes, of_pipeline
from compactmind.methods.registry import METHODS
from compactmind.methods.retraining.recipe import BASES
from compactmind.room import free_memory, require_room
from compactmind.search.compressor import read_pipeline

GB = 1_000_000_000
SEVEN = Sizes(
    hidden=4096, inner=11008, layers=32, vocabulary=32000, blocks=6_476_005_376, parameters=6_738_415_616, itemsize=2, windows=16,
    measured=166, seq_len=2048,
)  # fmt: skip


@pytest.fixture
def plenty(monkeypatch):
    """32 GB of memory and 100 GB of disk are free."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=32 * GB))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100 * GB))


def needs_of(steps: list, sizes: Sizes = SEVEN) -> dict[str, int]:
    return of_pipeline(read_pipeline(steps), sizes)[0]


# ---------------------------------------------------------------------------------------------------------- from shapes
def test_sizes_are_those_of_the_model_and_its_file(tmp_path):
    model = helpers.make_llama(tie_word_embeddings=True)
    helpers.cast_parameters(model, torch.bfloat16)
    save_checkpoint(tmp_path / "llama", model, helpers.make_byte_tokenizer(), kind="dense", parent=None, stage={}, dtype="bfloat16")
    weights = sum(parameter.numel() for parameter in model.parameters())
    result = Sizes.of(skeleton_of(tmp_path / "llama"), (tmp_path / "llama" / "model.safetensors").stat().st_size, 4, 2, 16)
    assert (result.hidden, result.inner, result.layers, result.vocabulary) == (32, 48, 2, helpers.LLAMA_VOCABULARY)
    assert result.parameters == weights and result.itemsize == 2
    assert result.blocks == weights - helpers.LLAMA_VOCABULARY * 32 - 5 * 32  # the tied table, and five norms


def test_every_method_tells_what_it_needs_and_the_files_are_of_the_right_size():
    for name, method in METHODS.items():
        need = method.needs(SEVEN, method.parameters({}), 0)
        assert need.peak >= need.held and need.peak < 200 * GB, name
    files = {name: of_pipeline(read_pipeline([{"method": name}]), SEVEN)[1] for name in ("w8a8", "nf4", "prune")}
    assert files["w8a8"] == pytest.approx(7.0 * GB, rel=0.02)
    assert files["nf4"] == pytest.approx(3.65 * GB, rel=0.02)
    assert files["prune"] == pytest.approx(10.9 * GB, rel=0.02)
    _, file = of_pipeline(read_pipeline([{"method": "gptq", "params": {"target_compression": 4}}]), SEVEN)
    assert file == pytest.approx(13.5 * GB / 4, rel=0.15)


def test_adapters_take_what_fits_a_card_and_training_every_weight_does_not():
    pruned = {"method": "prune", "params": {"sparsity": 0.2}}
    on_gpu = replace(SEVEN, cuda=True, seq_len=512)
    lora = {"method": "retrain", "params": {"mode": "lora", "gradient_checkpointing": True}}
    everything = max(needs_of([pruned, {"method": "retrain"}], on_gpu).values())
    assert max(needs_of([pruned, lora], on_gpu).values()) < 24 * GB < 80 * GB < everything
    without = {"method": "retrain", "params": {"mode": "lora"}}
    assert needs_of([pruned, without], on_gpu)["retrain (step 2)"] > 1.2 * needs_of([pruned, lora], on_gpu)["retrain (step 2)"]


def test_a_base_of_4_bits_takes_a_quarter_of_what_is_trained_beside():
    for sizes in [replace(SEVEN, seq_len=512, cuda=True)]:
        dense = sizes.itemsize * sizes.parameters
        lora = {"mode": "lora", "gradient_checkpointing": True}
        recipes = [METHODS["retrain"].parameters({**lora, "base": base}) for base in BASES]
        whole, packed = (METHODS["retrain"].needs(sizes, recipe, dense) for recipe in recipes)
        # While it is made, the model is there as it came and one block in float32; while it is trained, 4 bits of it.
        assert dense < packed.peak < dense + 1.5 * sizes.block < whole.peak
        assert (packed.held, packed.file) == (whole.held, whole.file)
    long = replace(SEVEN, cuda=True)  # more activations than that
    whole, packed = (METHODS["retrain"].needs(long, replace(recipe, batch_size=8), dense) for recipe in recipes)
    assert whole.peak - packed.peak == pytest.approx(1.48 * long.blocks, rel=0.01)
    small = replace(SEVEN, blocks=60_000_000, parameters=100_000_000)  # waits in memory, beside its 4 bits
    whole, packed = (METHODS["retrain"].needs(small, recipe, small.held) for recipe in recipes)
    assert packed.peak - whole.peak == pytest.approx(0.52 * small.blocks, rel=0.01)


def test_what_is_divided_between_processes_is_divided_in_what_is_told():
    recipe = METHODS["retrain"].parameters({"gradient_checkpointing": True})
    on_gpu = replace(SEVEN, cuda=True, seq_len=512)
    one, two, eight = (METHODS["retrain"].needs(replace(on_gpu, processes=count), recipe, 0).peak for count in (1, 2, 8))
    states = (4 + 4 * 4) * SEVEN.parameters  # weights, gradients, two moments, the best so far
    assert one > states and two - eight == pytest.approx(states * (1 / 2 - 1 / 8), rel=0.01)
    gathered = 4 * (SEVEN.parameters - SEVEN.blocks) + 2 * SEVEN.block
    assert one - two == pytest.approx(states / 2 - gathered, rel=0.01)
    on_cpu = replace(SEVEN, processes=64, seq_len=512)  # whole before it is divided
    assert METHODS["retrain"].needs(on_cpu, recipe, 0).peak == 2 * SEVEN.parameters
    lora = METHODS["retrain"].parameters({"mode": "lora"})
    peaks = {METHODS["retrain"].needs(replace(on_gpu, processes=count), lora, 0).peak for count in (1, 8)}
    assert len(peaks) == 1  # adapters are not divided


def test_more_text_takes_more_and_a_gpu_holds_the_weights_too():
    for steps in ([{"method": "prune"}], [{"method": "gptq"}], [{"method": "nf4"}]):
        few, many = (max(needs_of(steps, replace(SEVEN, windows=count)).values()) for count in (4, 64))
        assert many - few >= 60 * 2048 * 4096 * 4
    assert max(needs_of([{"method": "w8a8"}], replace(SEVEN, cuda=True)).values()) > 2 * SEVEN.parameters


def test_a_small_model_is_reckoned_with_as_float32_beside_the_dense_one(monkeypatch):
    small = replace(SEVEN, blocks=100_000_000, parameters=130_000_000, hidden=576, inner=1536, vocabulary=49152)
    assert small.held == 4 * small.parameters
    beside = needs_of([{"method": "w8a8"}], small)["w8a8 (step 1)"]
    assert beside > 8 * small.parameters - 3 * small.blocks
    monkeypatch.setattr(memory, "SMALL_BYTES", 0)
    assert small.held == 0 and needs_of([{"method": "w8a8"}], small)["w8a8 (step 1)"] < beside


# ------------------------------------------------------------------------------------------------------------ what there is
def test_what_fits_is_said_and_what_does_not_is_refused_with_the_way_out(plenty, tmp_path, capsys):
    needs = {"dense": 2 * GB, "w8a8 (step 1)": 30 * GB}
    require_room(needs, 7 * GB, tmp_path, "cpu", "less text takes less")
    assert capsys.readouterr().out == (
        "memory: 30.0 GB at the peak, w8a8 (step 1); 32.0 GB are free. Disk: 7.0 GB of 100.0 GB\n"
    )
    require_room({"dense": 36 * GB}, 0, tmp_path, "cpu", "")  # what is told may be too high
    with pytest.raises(CompactMindError, match=r"\(step 1\) needs 40.0 GB of memory, and 32.0 GB are free: less text takes less, or"):
        require_room(needs | {"w8a8 (step 1)": 40 * GB}, 0, tmp_path, "cpu", "less text takes less")
    with pytest.raises(CompactMindError, match="what is written takes 101.0 GB, and 100.0 GB are free on the disk of .*: make room"):
        require_room(needs, 101 * GB, tmp_path, "cpu", "")


def test_a_container_with_less_memory_than_its_machine_counts(plenty, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "CGROUP", tmp_path)
    assert free_memory("cpu") == 32 * GB  # no container
    for name, text in {"memory.max": f"{16 * GB}", "memory.current": f"{6 * GB}", "memory.stat": f"anon 1\nfile {2 * GB}\n"}.items():
        (tmp_path / name).write_text(text + "\n")
    assert free_memory("cpu") == 12 * GB
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory("cpu") == 32 * GB
