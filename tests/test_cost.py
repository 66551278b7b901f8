"""Operations, bytes, latency and memory are what a second, independent way of counting says."""

import importlib
import json
import multiprocessing
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver

import helpers
import pytest

from compactmind.checkpoint import save_checkpoint
from compactmind.errors import CompactMindError
from compactmind.evaluation import cost
from compactmind.evaluation.cost import gflops, gmacs_thop, measure_latency, peak_memory, summaries, weight_bytes
from compactmind.files import sha256_of, weight_files
from compactmind.manifest import identity_of
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


@pytest.fixture
def sharded(tmp_path):
    """A folder as transformers writes a large model: shards and the index that names them."""
    helpers.MAKERS["distilbert"]().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    return tmp_path


def test_other_files_beside_the_shards_are_no_weights(sharded):
    shards = sorted(sharded.glob("model-*.safetensors"))
    size, identity = weight_bytes(sharded), identity_of(sharded)
    assert size == sum(path.stat().st_size for path in shards)
    for name in ("consolidated.safetensors", "adapter_model.safetensors", "pytorch_model.bin", "training_args.bin"):
        (sharded / name).write_bytes(b"the same weights in another format")
    assert weight_files(sharded) == shards
    assert weight_bytes(sharded) == size and identity_of(sharded) == identity


def test_the_weights_are_the_files_that_transformers_would_load(sharded):
    def renamed(text: str) -> str:
        return text.replace("model-", "pytorch_model-").replace("safetensors", "bin")

    for path in sharded.glob("model-*.safetensors"):
        path.rename(path.with_name(renamed(path.name)))
    index = sharded / "model.safetensors.index.json"
    (sharded / "pytorch_model.bin.index.json").write_text(renamed(index.read_text()))
    index.unlink()
    pickled = sorted(sharded.glob("pytorch_model-*.bin"))
    assert weight_files(sharded) == pickled and len(pickled) > 1
    for name in ("pytorch_model.bin", "model.safetensors"):  # each goes before what was there
        (sharded / name).write_bytes(b"whole")
        assert weight_files(sharded) == [sharded / name]
    assert identity_of(sharded) == sha256_of(sharded / "model.safetensors")


def test_shards_that_are_not_there_are_named(sharded):
    gone = sorted(sharded.glob("model-*.safetensors"))[-1]
    gone.unlink()
    for ask in (weight_bytes, identity_of):
        with pytest.raises(CompactMindError, match=f"names {gone.name}, which is not there"):
            ask(sharded)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": ["a"]}))
    with pytest.raises(CompactMindError, match="is no index of weight files"):
        weight_files(sharded)
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(CompactMindError, match="holds no weights"):
        weight_bytes(sharded)


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


@pytest.mark.parametrize("before", [None, "somewhere"])
def test_threads_that_start_the_server_leave_the_environment_as_it_was(monkeypatch, before):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    if before:
        monkeypatch.setenv("PYTHONPATH", before)
    seen = []

    def ensure_running():
        seen.append(os.environ["PYTHONPATH"])
        time.sleep(0.02)

    monkeypatch.setattr(forkserver, "ensure_running", ensure_running)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: cost._start_server(multiprocessing.get_context("forkserver")), range(8)))
    assert os.environ.get("PYTHONPATH") == before
    assert seen == [os.pathsep.join(filter(None, [str(helpers.REPOSITORY), before]))] * 8


def test_peak_memory_grows_with_the_model(tmp_path, tokenizer):
    peaks = []
    for name, width in (("small", 32), ("large", 512)):
        model = helpers.MAKERS["distilbert"](dim=width, hidden_dim=16 * width)
        save_checkpoint(tmp_path / name, model, tokenizer, kind="dense", parent=None, stage={})
        peaks.append(peak_memory(tmp_path / name, 2, 8))
        weights = sum(parameter.numel() for parameter in model.parameters()) * 4 / 1e6
    assert peaks[1] - peaks[0] > 0.8 * weights


def test_a_failing_measurement_says_why(tmp_path):
    with pytest.raises(CompactMindError, match="memory of .* failed: .*not found"):
        peak_memory(tmp_path / "absent", 1, 4)


def test_a_measurement_that_was_killed_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "_peak_of_this_process", killed)
    with pytest.raises(CompactMindError, match="process was killed: most likely the memory was not enough"):
        peak_memory(tmp_path, 1, 4)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every process imports for itself")
def test_a_process_finds_imported_what_a_model_needs_wherever_the_script_was_started(tmp_path, monkeypatch):
    (tmp_path / "looks.py").write_text("import sys\nFOUND = 'compactmind.checkpoint' in sys.modules\ndef look(*_): return FOUND\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "")
    forkserver._forkserver._stop()  # one that an earlier test has started
    monkeypatch.setattr(cost, "_peak_of_this_process", importlib.import_module("looks").look)
    assert peak_memory(tmp_path, 1, 4) is True
    assert os.environ["PYTHONPATH"] == ""


def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("rounds", [1, 2, 5, 6, 11])
def test_the_percentiles_are_as_far_from_both_ends(rounds):
    """The times mirrored are the same times: 10th and 90th percentile mirror each other, whatever the number of rounds."""
    times = [0.001 * (1 + round_index**2) for round_index in range(rounds)]
    mirrored = [-value for value in times]
    result, turned = (summaries({"a": values}, {})["a"] for values in (times, mirrored))
    assert result["low_ms"] == pytest.approx(-turned["high_ms"]) and result["high_ms"] == pytest.approx(-turned["low_ms"])
    assert result["median_ms"] == pytest.approx(-turned["median_ms"])


def test_the_percentiles_of_six_rounds_lie_between_ranks():
    result = summaries({"a": [0.001, 0.002, 0.003, 0.004, 0.005, 0.006]}, {})["a"]
    assert (result["low_ms"], result["high_ms"]) == (pytest.approx(1.5), pytest.approx(5.5))
