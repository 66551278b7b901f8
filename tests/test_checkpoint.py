"""Every kind of model comes back from its directory as it was saved, and a damaged directory says so."""

import builtins
import json
import subprocess
import sys

import helpers
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from compactmind.checkpoint import (
    CARD,
    KINDS,
    MANIFEST,
    WEIGHTS,
    is_up_to_date,
    load_checkpoint,
    parameters_before_packing,
    read_manifest,
    save_checkpoint,
    weights_fingerprint,
)
from compactmind.errors import CompactMindError
from compactmind.files import sha256_of
from compactmind.methods.pruning.masks import compact
from compactmind.methods.quantization.packed_model import quantize_model

STAGE = {"script": "1_distill.py", "config": {"lr": 1e-4, "path": "models", "none": None}, "inputs": {"teacher": "abc"}}


def make_model(architecture: str, pruned: bool):
    model = helpers.MAKERS[architecture]()
    return compact(model, helpers.uneven_masks(model)) if pruned else model


def save(directory, model, tokenizer, kind="dense", **changes):
    save_checkpoint(directory, model, tokenizer, **{"kind": kind, "parent": "teacher_base", "stage": STAGE} | changes)
    return directory


def rewrite_weights(directory, change) -> None:
    """Change the tensors of a checkpoint and record the new size, so that only the tensors themselves are wrong."""
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    rewrite_manifest(directory, lambda manifest: manifest["files"][WEIGHTS].update(bytes=(directory / WEIGHTS).stat().st_size))


def rewrite_manifest(directory, change) -> None:
    manifest = helpers.read_json(directory / MANIFEST)
    change(manifest)
    (directory / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------- round trip
@pytest.mark.parametrize("method", [None, "nf4", "int8"])
@pytest.mark.parametrize("pruned", [False, True], ids=["whole", "pruned"])
@pytest.mark.parametrize("architecture", ["bert", "distilbert"])
def test_every_kind_comes_back_with_equal_logits(tmp_path, tokenizer, monkeypatch, architecture, pruned, method):
    def ask(*_):
        raise AssertionError("loading a checkpoint asked a question")

    monkeypatch.setattr(builtins, "input", ask)
    model = make_model(architecture, pruned)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    description = quantize_model(model, method) if method else None
    kind = method or ("pruned" if pruned else "dense")
    expected = helpers.logits_of(model)
    directory = save(tmp_path / "some_model", model, tokenizer, kind, quantization=description, metrics={"accuracy": 0.5})

    loaded = load_checkpoint(directory)
    assert not loaded.model.training
    assert type(loaded.model) is type(model)
    assert torch.equal(helpers.logits_of(loaded.model), expected)
    assert loaded.tokenizer("a good film")["input_ids"] == tokenizer("a good film")["input_ids"]
    assert loaded.manifest["kind"] == kind
    assert loaded.manifest["architecture"] == type(model).__name__
    assert loaded.manifest["parameters"] == parameters  # 4-bit storage halves numel(); the manifest counts weights
    assert parameters_before_packing(loaded.model) == parameters
    assert loaded.manifest["metrics"] == {"accuracy": 0.5}
    assert loaded.manifest["quantization"] == description
    widths = [(layer["num_heads"], layer["intermediate_size"]) for layer in loaded.manifest["layers"]]
    whole = [(4, 64)] * len(widths)
    assert widths == ([(4 - index, 64 - 4 - 6 * index) for index in range(len(widths))] if pruned else whole)

    again = save(tmp_path / "again", loaded.model, loaded.tokenizer, kind, quantization=description)
    assert torch.equal(helpers.logits_of(load_checkpoint(again).model), expected)


def test_a_checkpoint_holds_no_pickle_and_knows_its_files(tmp_path, tokenizer, distilbert):
    directory = save(
        tmp_path / "model", compact(distilbert, helpers.uneven_masks(distilbert)), tokenizer, "pruned", history=[{"epoch": 1}]
    )
    names = {path.name for path in directory.iterdir()}
    assert {WEIGHTS, MANIFEST, "config.json", "training_history.json", "modeling_pruned_encoder.py"} <= names
    assert {path.suffix for path in directory.iterdir()} <= {".json", ".safetensors", ".txt", ".py", ".jinja", ".md"}
    manifest = read_manifest(directory)
    assert set(manifest["files"]) == names - {MANIFEST, CARD}  # the card grows when the model is measured
    for name, recorded in manifest["files"].items():
        assert recorded == {"bytes": (directory / name).stat().st_size, "sha256": sha256_of(directory / name)}
    assert weights_fingerprint(directory) == sha256_of(directory / WEIGHTS)
    assert helpers.read_json(directory / "training_history.json") == [{"epoch": 1}]
    assert {"python", "torch", "transformers", "bitsandbytes", "compactmind"} <= set(manifest["versions"])


def test_saving_again_replaces_the_whole_directory(tmp_path, tokenizer):
    directory = save(tmp_path / "model", helpers.make_bert(seed=1), tokenizer, history=[], extra={"experiment_name": "first"})
    assert read_manifest(directory)["experiment_name"] == "first"
    second = helpers.make_bert(seed=2)
    save(directory, second, tokenizer)
    assert torch.equal(helpers.logits_of(load_checkpoint(directory).model), helpers.logits_of(second))
    assert not (directory / "training_history.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_unknown_kind_is_refused_before_anything_is_written(tmp_path, tokenizer, bert):
    with pytest.raises(ValueError, match="'gptq'.*dense, pruned, nf4, int8"):
        save(tmp_path / "model", bert, tokenizer, "gptq")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------- without this project's package
PLAIN_LOAD = """
import sys, torch
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
batch = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    torch.save(model(**batch).logits, sys.argv[3])
assert not [name for name in sys.modules if name.startswith("compactmind")], "the project was imported"
print(type(model).__name__)
"""


@pytest.mark.parametrize("architecture", ["bert", "distilbert"])
def test_a_pruned_checkpoint_loads_without_this_project(tmp_path, tokenizer, architecture):
    model = make_model(architecture, pruned=True)
    directory = save(tmp_path / "student_pruned", model, tokenizer, "pruned")
    torch.save(helpers.example_batch(), tmp_path / "batch.pt")
    result = subprocess.run(
        [sys.executable, "-c", PLAIN_LOAD, str(directory), str(tmp_path / "batch.pt"), str(tmp_path / "logits.pt")],
        cwd=tmp_path, env=helpers.environment(tmp_path), stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [type(model).__name__]
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), helpers.logits_of(model))


@pytest.mark.parametrize("half_precision", [False, True])
def test_an_nf4_checkpoint_of_a_dense_model_loads_with_plain_transformers(tmp_path, tokenizer, half_precision):
    model = helpers.make_distilbert(dim=128, hidden_dim=256, scale=0.05)
    description = quantize_model(model, "nf4", half_precision_embeddings=half_precision)
    directory = save(tmp_path / "student_distilled_nf4", model, tokenizer, "nf4", quantization=description)
    plain = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32)
    assert type(plain.distilbert.transformer.layer[0].ffn.lin1).__name__ == "Linear4bit"
    if half_precision:
        plain.distilbert.embeddings.float()  # transformers keeps the stored dtype of the tables
    # Not bit-equal: where the CPU has AVX512-BF16, a plain Linear4bit multiplies in bf16.
    torch.testing.assert_close(helpers.logits_of(plain), helpers.logits_of(model), atol=0.02, rtol=0)
    assert helpers.logits_of(model).abs().max() > 0.2


# -------------------------------------------------------------------------------------------------------- damaged, stale
def expect_clear_error(directory, *parts: str, command: str = "python 1_distill.py") -> None:
    with pytest.raises(CompactMindError) as caught:
        load_checkpoint(directory)
    for part in (str(directory), command, *parts):
        assert part in str(caught.value)


@pytest.fixture
def teacher(tmp_path, tokenizer, bert):
    return save(tmp_path / "teacher", bert, tokenizer)


def test_a_missing_directory_names_the_command_that_makes_it(tmp_path):
    expect_clear_error(tmp_path / "teacher", "not found")
    expect_clear_error(tmp_path / "student_pruned", "not found", command="python 2_prune_finetune.py")
    expect_clear_error(tmp_path / "my_experiment", "not found", command="run_pipeline.py")


def test_a_half_written_directory_is_no_checkpoint(teacher):
    (teacher / MANIFEST).unlink()
    expect_clear_error(teacher, "has no manifest.json")


def test_a_missing_tensor(teacher):
    rewrite_weights(teacher, lambda tensors: tensors.pop("bert.encoder.layer.1.output.dense.weight"))
    expect_clear_error(teacher, "bert.encoder.layer.1.output.dense.weight")


def test_a_tensor_too_many(teacher):
    rewrite_weights(teacher, lambda tensors: tensors.update({"bert.stray.weight": torch.ones(2)}))
    expect_clear_error(teacher, "bert.stray.weight")


def test_a_tensor_of_another_shape(teacher):
    rewrite_weights(teacher, lambda tensors: tensors.update({"classifier.weight": torch.ones(3, 32)}))
    expect_clear_error(teacher)


@pytest.mark.parametrize("method", ["nf4", "int8"])
@pytest.mark.parametrize("suffix", ["weight", "bias"])
def test_a_missing_tensor_of_a_packed_model(tmp_path, tokenizer, distilbert, method, suffix):
    description = quantize_model(distilbert, method)
    directory = save(tmp_path / "student_distilled_nf4", distilbert, tokenizer, method, quantization=description)
    name = f"distilbert.transformer.layer.1.ffn.lin1.{suffix}"
    rewrite_weights(directory, lambda tensors: tensors.pop(name))
    expect_clear_error(directory, name, command="python 3_quantize.py")


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_a_tensor_too_many_in_a_packed_model(tmp_path, tokenizer, distilbert, method):
    description = quantize_model(distilbert, method)
    directory = save(tmp_path / "student_distilled_nf4", distilbert, tokenizer, method, quantization=description)
    rewrite_weights(directory, lambda tensors: tensors.update({"distilbert.stray.weight": torch.ones(2)}))
    expect_clear_error(directory, "distilbert.stray.weight", command="python 3_quantize.py")


def test_a_truncated_weight_file(teacher):
    content = (teacher / WEIGHTS).read_bytes()
    (teacher / WEIGHTS).write_bytes(content[: len(content) // 2])
    expect_clear_error(teacher, f"{len(content) // 2} bytes instead of {len(content)}")


@pytest.mark.parametrize("method", [None, "nf4"])
def test_a_weight_file_of_the_right_size_with_a_damaged_header(tmp_path, tokenizer, distilbert, method):
    description = quantize_model(distilbert, method) if method else None
    directory = save(tmp_path / "student_distilled", distilbert, tokenizer, method or "dense", quantization=description)
    content = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(b"\xff" * 64 + content[64:])
    expect_clear_error(directory)


def test_a_missing_file(teacher):
    (teacher / "config.json").unlink()
    expect_clear_error(teacher, "config.json is missing")


@pytest.mark.parametrize(
    "content",
    [b"", b'{"kind": "dense", "files": {"mod', b"\xff\xfe\x00", b"[1, 2]", b"null", b"{}",
     b'{"kind": "dense"}', b'{"kind": "dense", "files": {}}'],
)  # fmt: skip
def test_a_damaged_manifest(teacher, content):
    (teacher / MANIFEST).write_bytes(content)
    expect_clear_error(teacher, MANIFEST)
    assert not is_up_to_date(teacher, STAGE)


def test_a_manifest_of_an_unknown_kind_or_architecture(teacher):
    rewrite_manifest(teacher, lambda manifest: manifest.update(architecture="LlamaForTea"))
    expect_clear_error(teacher, "LlamaForTea")
    rewrite_manifest(teacher, lambda manifest: manifest.update(kind="gptq"))
    expect_clear_error(teacher, "'gptq'", *KINDS)


def test_up_to_date_means_whole_and_made_by_this_very_stage(teacher):
    assert is_up_to_date(teacher, STAGE)
    assert is_up_to_date(str(teacher), json.loads(json.dumps(STAGE)))
    assert not is_up_to_date(teacher, STAGE | {"config": {"lr": 2e-4}})
    assert not is_up_to_date(teacher, STAGE | {"inputs": {"teacher": "other"}})
    assert not is_up_to_date(teacher.parent / "student", STAGE)
    (teacher / "tokenizer.json").unlink()
    assert not is_up_to_date(teacher, STAGE)


def test_up_to_date_compares_what_json_can_hold(tmp_path, tokenizer, bert):
    stage = STAGE | {"config": {"batches": (1, 32)}}  # a tuple comes back as a list
    assert is_up_to_date(save(tmp_path / "teacher", bert, tokenizer, stage=stage), stage)


def test_a_kill_between_the_renames_does_not_lose_the_checkpoint(teacher, bert):
    teacher.rename(teacher.with_name(".teacher.old"))
    assert torch.equal(helpers.logits_of(load_checkpoint(teacher).model), helpers.logits_of(bert))
