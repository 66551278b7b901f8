"""4_smoothquant_llama.py as a user runs it: files that load again, a table of alphas, and clear words about bad input."""

import json

import helpers
import pytest
import scripts
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GemmaConfig, GemmaForCausalLM

from compactmind.checkpoint import load_checkpoint
from compactmind.errors import CompactMindError
from compactmind.files import sha256_of
from compactmind.formats import table
from compactmind.forward import window_losses
from compactmind.manifest import read_manifest
from compactmind.methods.quantization.w8a8_block import W8A8Block
from compactmind.methods.quantization.w8a8_linear import W8A8Linear
from compactmind.methods.quantization.w8a8_model import Int8Embedding
from compactmind.report import figures
from compactmind.text import load_documents, token_windows

OUTPUTS = ("llama_w8a8", "llama_w8a8_naive", "llama_nf4")


def make_source(folder, model=None):
    """Save a Llama as others would, tokenizer included; returns its directory."""
    source = folder / "their_llama"
    helpers.released_llama(model).save_pretrained(source)
    helpers.make_byte_tokenizer().save_pretrained(source)
    return source


@pytest.fixture(scope="module")
def finished(tmp_path_factory, request):
    """Return a directory in which the stage has run once, and what it printed."""
    folder = tmp_path_factory.mktemp("smoothquant")
    helpers.add_text(folder)
    make_source(folder)
    done = scripts.run_script("4_smoothquant_llama.py", "--model_path", "their_llama", "--save_smoothed", True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.fixture
def run_here(monkeypatch, capfd, tmp_path):
    def run(*arguments, cwd=tmp_path):
        return scripts.run_script_here(
            "4_smoothquant_llama.py", "--model_path", "their_llama", *arguments, cwd=cwd, monkeypatch=monkeypatch, capfd=capfd
        )

    return run


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model(helpers.example_windows()).logits.float()


# -------------------------------------------------------------------------------------------------------------- a whole run
def test_every_output_loads_again_and_says_what_it_is(finished):
    folder, _ = finished
    dense = AutoModelForCausalLM.from_pretrained(folder / "their_llama", dtype=torch.float32)
    for name in OUTPUTS:
        checkpoint = load_checkpoint(folder / "models" / name)
        assert checkpoint.manifest["parent"] == "their_llama"
        difference = (logits_of(checkpoint.model) - logits_of(dense)).norm() / logits_of(dense).norm()
        assert 0 < difference < (1.0 if name == "llama_nf4" else 0.2), name  # random weights forgive little
        assert checkpoint.tokenizer("abc")["input_ids"][0] == 256
    description = read_manifest(folder / "models" / "llama_w8a8")["quantization"]
    assert description["method"] == "smoothquant" and len(description["alphas"]) == 2
    assert all(alpha in (0.5, 0.8) for layer in description["alphas"] for alpha in layer.values())
    assert description["rotations"] == {"o": 8}  # in the weights alone: any reader of the layout gets it right
    assert "transform_config" not in helpers.read_json(folder / "models" / "llama_w8a8" / "config.json")["quantization_config"]
    naive = read_manifest(folder / "models" / "llama_w8a8_naive")["quantization"]
    assert naive["method"] == "w8a8" and naive["sites"] == [] and naive["rotations"] == {}


def test_the_blocks_run_in_int8_and_nothing_else_does(finished):
    folder, _ = finished
    model = load_checkpoint(folder / "models" / "llama_w8a8").model
    quantized = [name for name, module in model.named_modules() if isinstance(module, W8A8Linear)]
    assert len(quantized) == 14 and not any("lm_head" in name for name in quantized)
    assert all(isinstance(layer, W8A8Block) for layer in model.model.layers)
    state = load_file(folder / "models" / "llama_w8a8" / "model.safetensors")
    assert {str(tensor.dtype) for name, tensor in state.items() if name.endswith("proj.weight")} == {"torch.int8"}
    assert state["model.embed_tokens.weight"].dtype == torch.bfloat16 and "lm_head.weight" not in state


def test_the_smoothed_model_is_the_dense_one_with_other_weights(finished):
    folder, _ = finished
    dense = AutoModelForCausalLM.from_pretrained(folder / "their_llama", dtype=torch.float32)
    smoothed = AutoModelForCausalLM.from_pretrained(folder / "models" / "llama_smoothed", dtype=torch.float32)
    assert (logits_of(smoothed) - logits_of(dense)).abs().max() < 1e-5 * logits_of(dense).abs().max()
    assert not torch.equal(smoothed.model.layers[0].self_attn.q_proj.weight, dense.model.layers[0].self_attn.q_proj.weight)


def test_the_table_holds_every_model_on_the_same_windows_and_every_alpha(finished):
    folder, output = finished
    report = helpers.read_json(folder / "results" / "smoothquant.json")
    assert [row["name"] for row in report["models"]] == ["their_llama", *OUTPUTS, "llama_smoothed"]
    assert (
        report["protocol"]["windows"] == 4 and report["protocol"]["seq_len"] == 32 and "made up" in report["protocol"]["text"]
    )
    dense = report["models"][0]
    for row in report["models"]:
        assert row["interval"][0] <= row["perplexity"] <= row["interval"][1]
        assert row["against_dense"]["ratio"] == pytest.approx(row["perplexity"] / dense["perplexity"])
        assert row["name"] in output
        low, high = row["divergence"]["interval"]
        assert low <= row["divergence"]["mean"] <= high and f"{row['divergence']['mean']:.4f} [{low:.4f}, {high:.4f}]" in output
    by_name = {row["name"]: row for row in report["models"]}
    assert dense["divergence"]["mean"] == 0 < by_name["llama_w8a8"]["divergence"]["mean"]
    assert by_name["llama_smoothed"]["divergence"]["mean"] < 1e-6
    assert report["protocol"]["windows_from"] == "spread"
    windows = token_windows(helpers.make_byte_tokenizer(), load_documents(folder / "wikitext_data", "test"), 32, 4, "spread")
    result = window_losses(load_checkpoint(folder / "models" / "llama_w8a8").model, windows)
    assert result.tolist() == pytest.approx(by_name["llama_w8a8"]["losses"], rel=1e-4)
    assert by_name["llama_w8a8"]["bytes"] < by_name["their_llama"]["bytes"]
    assert by_name["llama_smoothed"]["perplexity"] == pytest.approx(dense["perplexity"], rel=1e-5)
    named = ["naive", "per_layer", "per_layer, not rotated", "per_layer, all rotated"]
    assert [row["alpha"] for row in report["alpha_table"]] == [*named, 0.5, 0.8]
    assert read_manifest(folder / "models" / "llama_w8a8")["alpha_table"] == report["alpha_table"]
    assert (folder / "results" / "smoothquant.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_run_has_nothing_to_do(finished, run_here):
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    status, output = run_here("--save_smoothed", True, cwd=folder)
    assert status == 0 and output.count("up to date") == 4
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


def test_a_plot_that_fails_loses_no_model_and_no_number(tmp_path, run_here, monkeypatch):
    helpers.add_text(tmp_path)
    make_source(tmp_path)

    def fail(figure, path):
        raise OSError("no fonts")

    with monkeypatch.context() as broken:
        broken.setattr(figures, "save_figure", fail)
        with pytest.raises(OSError, match="no fonts"):
            run_here("--alpha_grid", "0.5")
    report = helpers.read_json(tmp_path / "results" / "smoothquant.json")
    assert [row["name"] for row in report["models"]] == ["their_llama", *OUTPUTS]
    before = {name: read_manifest(tmp_path / "models" / name) for name in OUTPUTS}
    status, output = run_here("--alpha_grid", "0.5")
    assert status == 0 and output.count("up to date") == 3, output
    assert {name: read_manifest(tmp_path / "models" / name) for name in OUTPUTS} == before
    assert (tmp_path / "results" / "smoothquant.png").is_file()
    assert helpers.read_json(tmp_path / "results" / "smoothquant.json") == report


def test_a_measurement_that_fails_loses_no_model_and_leaves_no_numbers_of_others(tmp_path, run_here, monkeypatch):
    helpers.add_text(tmp_path)
    make_source(tmp_path)
    assert run_here("--alpha_grid", "0.5")[0] == 0
    old = helpers.read_json(tmp_path / "results" / "smoothquant.json")

    def fail(*_):
        raise CompactMindError("not today")

    with monkeypatch.context() as broken:
        broken.setattr(table, "kernel_of", fail)
        status, output = run_here("--alpha", "0.9", "--alpha_grid", "0.5")
        assert status == 1 and "not today" in output
    made = read_manifest(tmp_path / "models" / "llama_w8a8")
    assert made["quantization"]["alpha"] == 0.9
    status, output = run_here("--alpha", "0.9", "--alpha_grid", "0.5")
    assert status == 0 and output.count("up to date") == 3
    measured = read_manifest(tmp_path / "models" / "llama_w8a8")
    assert "quality" not in made and measured["quality"]["losses"] and made == {key: measured[key] for key in measured if key != "quality"}
    new = helpers.read_json(tmp_path / "results" / "smoothquant.json")
    before, after = ({row["name"]: row["perplexity"] for row in report["models"]} for report in (old, new))
    assert {name for name in before if before[name] != after[name]} == {"llama_w8a8"}
    status, output = run_here("--alpha", "0.9", "--alpha_grid", "0.5", "--eval_windows", "2")
    assert status == 0 and helpers.read_json(tmp_path / "results" / "smoothquant.json")["protocol"]["windows"] == 2


def test_one_alpha_for_all_is_the_best_of_the_table(tmp_path, run_here):
    helpers.add_text(tmp_path)
    make_source(tmp_path)
    status, output = run_here("--alpha", "global", "--embeddings", "int8", "--activations", "per_tensor_static")
    assert status == 0, output
    manifest = read_manifest(tmp_path / "models" / "llama_w8a8")
    numbers = [row for row in manifest["alpha_table"] if isinstance(row["alpha"], float)]
    assert manifest["quantization"]["alpha"] == min(numbers, key=lambda row: row["divergence"])["alpha"]
    assert len({row["divergence"] for row in numbers}) == len(numbers) == 2 and all(row["perplexity"] > 1 for row in numbers)
    model = load_checkpoint(tmp_path / "models" / "llama_w8a8").model
    assert isinstance(model.get_input_embeddings(), Int8Embedding) and isinstance(model.lm_head, W8A8Linear)
    assert model.model.layers[0].mlp.down_proj.activations == "per_tensor_static"
    text = model.generate(helpers.example_windows()[:1], max_new_tokens=3, do_sample=False)
    assert text.shape == (1, 19)


def test_a_turned_stream_needs_no_rotation_while_the_model_runs(tmp_path, run_here):
    helpers.add_text(tmp_path)
    make_source(tmp_path)
    turned = ("--stream_rotation", True, "--rotations", "o", "--alpha_grid", "0.5")
    status, output = run_here(*turned, "--save_smoothed", True)
    assert status == 0 and output.count("calibrating on") == 2, output  # once more for the rows whose stream is as it was
    report = helpers.read_json(tmp_path / "results" / "smoothquant.json")
    result = {row["name"]: row["divergence"]["mean"] for row in report["models"]}
    assert result["llama_smoothed"] < 1e-6 and result["llama_w8a8"] < result["llama_nf4"]
    assert [row["alpha"] for row in report["alpha_table"]] == ["naive", "per_layer", "per_layer, not rotated", 0.5]
    made, naive = (read_manifest(tmp_path / "models" / name)["quantization"] for name in ("llama_w8a8", "llama_w8a8_naive"))
    assert made["stream_rotation"] and made["rotations"] == {"o": 8} and not naive["stream_rotation"]
    assert not load_checkpoint(tmp_path / "models" / "llama_w8a8").model.config.tie_word_embeddings
    assert load_checkpoint(tmp_path / "models" / "llama_w8a8_naive").model.config.tie_word_embeddings


# --------------------------------------------------------------------------------------------------------------- bad input
def gemma():
    return helpers.randomize(GemmaForCausalLM(GemmaConfig(**helpers.llama_settings(head_dim=8))))


def poisoned():
    model = helpers.make_llama()
    model.model.layers[1].mlp.up_proj.weight.data[3] = float("nan")
    return model


@pytest.mark.parametrize(
    ("arguments", "make", "expected"),
    [
        (("--alpha", 1.5), None, ("alpha 1.5", "[0, 1]")),
        (("--seq_len", 4096), None, ("tokens, less than one window of 4096", "--seq_len")),
        (("--model_path", "nowhere"), None, ("nowhere", "config.json", "python download_model.py")),
        ((), gemma, ("GemmaForCausalLM", "llama, mistral")),
        ((), poisoned, ("model.layers.1", "NaN or infinite", "down")),
        (("--text_dir", "no_text"), None, ("no_text", "python download_model.py")),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_bad_input_is_named_and_leaves_nothing_behind(tmp_path, run_here, arguments, make, expected):
    helpers.add_text(tmp_path)
    make_source(tmp_path, make() if make else None)
    status, output = run_here(*arguments)
    assert status == 1 and all(part in output for part in expected), output
    assert "Traceback" not in output
    assert not list((tmp_path / "models").glob("[!.]*"))
    assert not (tmp_path / "results").exists() or not list((tmp_path / "results").iterdir())


def test_a_truncated_weight_file_and_a_missing_tokenizer_are_named(tmp_path, run_here):
    helpers.add_text(tmp_path)
    source = make_source(tmp_path)
    weights = source / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    status, output = run_here()
    assert status == 1 and "their_llama" in output and "damaged" in output and "Traceback" not in output
    weights.write_bytes(whole)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    status, output = run_here()
    assert status == 1 and "their_llama" in output and "tokenizer" in output and "Traceback" not in output
    assert not list((tmp_path / "models").glob("[!.]*"))


def test_a_checkpoint_with_a_tensor_missing_is_refused(finished, tmp_path):
    folder, _ = finished
    state = load_file(folder / "models" / "llama_w8a8" / "model.safetensors")
    copy = tmp_path / "llama_w8a8"
    copy.mkdir()
    for path in (folder / "models" / "llama_w8a8").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    state.pop("model.layers.0.mlp.down_proj.weight_scale")
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    manifest = json.loads((copy / "manifest.json").read_text())
    path = copy / "model.safetensors"
    manifest["files"]["model.safetensors"] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Exception, match="weight_scale.*4_smoothquant_llama.py"):
        load_checkpoint(copy)
