"""llama.cpp as a model beside ours: its rows where its wheel is installed, none and no trouble where it is not."""

import gguf
import helpers
import pytest
import torch
from test_gguf import byte_level, llama, logits_of, other, tensors

from compactmind.checkpoint import load_any, save_checkpoint
from compactmind.errors import CompactMindError
from compactmind.evaluation import language, llama_cpp
from compactmind.evaluation.divergence import measure_windows
from compactmind.evaluation.language import measure_in_llama_cpp
from compactmind.evaluation.llama_cpp import LlamaCpp, installed
from compactmind.gguf_export import ROUNDED, export_gguf, largest_difference
from compactmind.report.as_shipped import row_of_llama_cpp

needs_it = pytest.mark.skipif(installed() is None, reason="pip install -r requirements-llama_cpp.txt")
WINDOWS = helpers.example_windows(2, 32)


# ------------------------------------------------------------------------------------------------------------ rounded types
@pytest.mark.parametrize("dtype", ROUNDED)
def test_a_dense_model_is_rounded_as_llama_cpp_does(tmp_path, dtype):
    model = llama()
    counts = export_gguf(model, byte_level(), tmp_path / "x.gguf", "tiny", dtype)
    assert counts == {"Q8_0": 15, "F32": 5} if dtype == "Q8_0" else counts == {"Q8_0": 1, dtype: 14, "F32": 5}
    assert largest_difference(model, tmp_path / "x.gguf", dtype) == ""
    held = tensors(tmp_path / "x.gguf")["blk.1.ffn_down.weight"]
    read = torch.from_numpy(gguf.quants.dequantize(held.data, held.tensor_type).copy())
    wanted = model.model.layers[1].mlp.down_proj.weight.detach().float()
    error = float((read - wanted).norm() / wanted.norm())
    assert 0 < error < {"8": 0.01, "5": 0.06, "4": 0.12}[dtype[1]]


def test_widths_that_blocks_do_not_fill_are_refused_and_nothing_is_written(tmp_path):
    model = llama(intermediate_size=72)
    with pytest.raises(
        CompactMindError, match="blk.0.ffn_down: Q4_0 is for rows of a multiple of 32 weights, not 72; write it as BF16"
    ):
        export_gguf(model, byte_level(), tmp_path / "x.gguf", "tiny", "Q4_0")
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------------- the program
@needs_it
def test_it_computes_what_pytorch_does(tmp_path):
    model = llama()
    export_gguf(model, byte_level(), tmp_path / "x.gguf", "tiny", "F32")
    run = LlamaCpp(tmp_path / "x.gguf", 64, model.config.vocab_size, threads=1)
    windows = helpers.example_windows()
    with torch.no_grad():
        wanted = model.float()(windows[:1]).logits
    result = run(input_ids=windows[:1])
    assert torch.allclose(result.logits, wanted, atol=0.02 * float(wanted.std()))
    first = run(input_ids=windows[:1, :5], logits_to_keep=1)  # a token at a time, from the beginning again
    assert first.logits.shape == (1, 1, model.config.vocab_size) and first.past_key_values == 5
    for place in range(5, windows.shape[1]):
        first = run(input_ids=windows[:1, place : place + 1], past_key_values=first.past_key_values)
    assert torch.allclose(first.logits[0, 0], wanted[0, -1], atol=0.02 * float(wanted.std()))
    assert logits_of(model).shape  # the model is as it was
    with pytest.raises(CompactMindError, match="llama.cpp cannot read 1 tokens behind 64"):
        run(input_ids=windows[:1, :1], past_key_values=64)
    run.close()


GRANITE = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.25, "logits_scaling": 2.0}
GRANITE |= {"attention_bias": True}


@needs_it
@pytest.mark.parametrize(
    ("kind", "changes"), [("mistral", {"head_dim": 16}), ("qwen2", {}), ("qwen3", {"head_dim": 128}), ("granite", GRANITE)]
)
def test_it_computes_other_families_as_pytorch_does(tmp_path, kind, changes):
    model, windows = other(kind, **changes), helpers.example_windows()
    export_gguf(model, byte_level(), tmp_path / "x.gguf", "tiny", "F32")
    run = LlamaCpp(tmp_path / "x.gguf", 64, model.config.vocab_size, threads=1)
    wanted = logits_of(model)[:1]
    assert torch.allclose(run(input_ids=windows[:1]).logits, wanted, atol=0.02 * float(wanted.std()))
    run.close()


@needs_it
def test_a_file_it_does_not_take_is_named(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF, but not really")
    with pytest.raises(CompactMindError, match="llama.cpp does not load .*x.gguf"):
        LlamaCpp(tmp_path / "x.gguf", 64, 8, threads=1)


@needs_it
def test_another_llama_cpp_is_refused_rather_than_misread(tmp_path, monkeypatch):
    export_gguf(llama(), byte_level(), tmp_path / "x.gguf", "tiny", "F32")
    monkeypatch.setitem(llama_cpp.PLACES, "n_batch", (1, 4096))
    with pytest.raises(CompactMindError, match="other context parameters than are known here: .pip install"):
        LlamaCpp(tmp_path / "x.gguf", 64, 8, threads=1)


def test_without_it_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(llama_cpp, "_library", None)
    monkeypatch.setattr(llama_cpp, "PACKAGE", "no_such_package")
    assert installed() is None
    with pytest.raises(CompactMindError, match="pip install -r requirements-llama_cpp.txt"):
        LlamaCpp(tmp_path / "x.gguf", 64, 8, threads=1)


# ------------------------------------------------------------------------------------------------------------------ the rows
@pytest.fixture
def dense(tmp_path):
    model = llama()
    save_checkpoint(tmp_path / "llama", model, byte_level(), kind="dense", parent=None, stage={})
    checkpoint = load_any(tmp_path / "llama")
    losses = measure_windows({"llama": checkpoint.model}, WINDOWS, None)["llama"]["losses"]
    row = {
        "name": "llama", "track": "llm", "kind": "dense", "status": "measured", "directory": str(tmp_path / "llama"), "size_mb": 0.4,
        "identity": "abc", "measured_with": {"weights": "abc"}, "losses": losses.tolist(), "parameters": 7, "machine": "this one",
        "protocol": {"text": "held-out", "windows_from": "spread"}, "not_measured": {"load_seconds": "no"}, "published_as": {"file": "x"},
    }  # fmt: skip
    return row, checkpoint


@needs_it
def test_its_rows_have_what_those_of_our_models_have(dense):
    base, checkpoint = dense
    rows = [row_of_llama_cpp(base, kind, "1.2") for kind in ("Q8_0", "Q4_0")]
    measure_in_llama_cpp(rows, checkpoint, base, WINDOWS, prompt_tokens=16, repeats=2)
    eight, four = rows
    assert [row["name"] for row in rows] == ["llama.cpp Q8_0", "llama.cpp Q4_0"]
    assert all(row["status"] == "measured" and row["kernel"] == "llama.cpp (1.2)" and row["directory"] is None for row in rows)
    assert eight["divergence"]["mean"] < four["divergence"]["mean"] < 0.5 and eight["size_mb"] > four["size_mb"]
    assert abs(eight["against_dense"]["ratio"] - 1) < 0.05 and four["compression_ratio"] == base["size_mb"] / four["size_mb"]
    for row in rows:
        assert row["generation"]["decode"]["median_ms"] > 0 and row["generation"]["prefill"]["speedup"] > 0
        assert row["load_seconds"] > 0 and row["peak_memory_mb"] is None
        assert row["measured_with"] == {"weights": "abc", "llama.cpp": "1.2"}
        assert not {"not_measured", "published_as"} & row.keys()


@needs_it
def test_one_that_fails_fails_alone(dense, monkeypatch):
    base, checkpoint = dense
    real = language.export_gguf

    def export(model, tokenizer, path, name, dtype):
        if dtype == "Q4_0":
            raise OSError("no room for it")
        return real(model, tokenizer, path, name, dtype)

    monkeypatch.setattr(language, "export_gguf", export)
    rows = [row_of_llama_cpp(base, kind, "1.2") for kind in ("Q8_0", "Q4_0")]
    measure_in_llama_cpp(rows, checkpoint, base, WINDOWS, prompt_tokens=16, repeats=1)
    assert rows[0]["status"] == "measured" and (rows[1]["status"], rows[1]["error"]) == ("failed", "OSError: no room for it")


@needs_it
@pytest.mark.parametrize("tokens", [32, 16], ids=["windows", "prompt"])
def test_one_that_stops_while_it_is_measured_fails_alone(dense, monkeypatch, tokens):
    base, checkpoint = dense
    real, refused = LlamaCpp.__call__, []

    def call(self, input_ids, **more):
        if input_ids.shape[1] == tokens and self is made[1]:
            refused.append(self)
            raise CompactMindError("llama.cpp cannot read it")
        return real(self, input_ids, **more)

    made, start = [], LlamaCpp.__init__

    def begin(self, path, *more):
        start(self, path, *more)
        made.append(self)

    monkeypatch.setattr(LlamaCpp, "__init__", begin)
    monkeypatch.setattr(LlamaCpp, "__call__", call)
    monkeypatch.setattr(language, "measure_load_time", lambda load: 0.1)
    rows = [row_of_llama_cpp(base, kind, "1.2") for kind in ("Q8_0", "Q4_0")]
    measure_in_llama_cpp(rows, checkpoint, base, WINDOWS, prompt_tokens=16, repeats=1)
    assert refused and rows[0]["status"] == "measured" and rows[0]["generation"]
    assert (rows[1]["status"], rows[1]["error"]) == ("failed", "llama.cpp cannot read it")


@needs_it
def test_what_gguf_cannot_hold_is_left_out_and_said(dense, monkeypatch, capsys):
    base, checkpoint = dense

    def export(*_):
        raise CompactMindError("hidden_act 'gelu': llama.cpp's llama knows silu alone")

    monkeypatch.setattr(language, "export_gguf", export)
    rows = [row_of_llama_cpp(base, kind, "1.2") for kind in ("Q8_0", "Q4_0")]
    measure_in_llama_cpp(rows, checkpoint, base, WINDOWS, prompt_tokens=16, repeats=1)
    assert rows == [] and "llama.cpp Q8_0: left out, hidden_act 'gelu'" in capsys.readouterr().out
