"""Every kind of model comes back from its directory as it was saved, and a damaged directory says so."""

import builtins
import json
import math
import shutil
import subprocess
import sys

import helpers
import pytest
import scripts
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from compactmind import checkpoint
from compactmind.checkpoint import load_any, load_checkpoint, save_checkpoint
from compactmind.errors import CompactMindError
from compactmind.files import WEIGHTS, lock_directory, sha256_of
from compactmind.formats.table import FORMATS, parameters_of
from compactmind.manifest import CARD, MANIFEST, add_to_manifest, is_up_to_date, read_manifest, weights_fingerprint
from compactmind.methods.pruning.masks import compact
from compactmind.methods.quantization.packed_model import quantize_model
from compactmind.methods.quantization.w8a8_model import W8A8Recipe, calibrate_llama, quantize_llama

STAGE = {"script": "1_distill.py", "config": {"lr": 1e-4, "path": "models", "none": None}, "inputs": {"teacher": "abc"}}


def make_model(architecture: str, pruned: bool):
    model = helpers.MAKERS[architecture]()
    return compact(model, helpers.uneven_masks(model)) if pruned else model


def save(directory, model, tokenizer, kind="dense", **changes):
    save_checkpoint(directory, model, tokenizer, **{"kind": kind, "parent": "teacher_base", "stage": STAGE} | changes)
    return directory


def rewrite_weights(directory, change) -> None:
    """Change the tensors of a checkpoint and record size and sum of the file, so that only the tensors themselves are wrong."""
    path = directory / WEIGHTS
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    record = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    rewrite_manifest(directory, lambda manifest: manifest["files"].update({WEIGHTS: record}))


def rewrite_manifest(directory, change) -> None:
    manifest = helpers.read_json(directory / MANIFEST)
    change(manifest)
    (directory / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def test_what_is_said_of_a_model_later_is_added_to_its_manifest(tmp_path, tokenizer):
    directory = save(tmp_path / "model", helpers.make_bert(), tokenizer, extra={"errors": None})
    before = read_manifest(directory)
    add_to_manifest(directory, {"errors": [1.0, 2.0], "interaction": 0.5})
    assert read_manifest(directory) == before | {"errors": [1.0, 2.0], "interaction": 0.5}
    assert is_up_to_date(directory, STAGE)
    with pytest.raises(CompactMindError, match="not found"):
        add_to_manifest(tmp_path / "other", {})


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
    assert parameters_of(loaded.model) == parameters
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
    assert weights_fingerprint(directory) == load_checkpoint(directory).fingerprint == sha256_of(directory / WEIGHTS)
    assert helpers.read_json(directory / "training_history.json") == [{"epoch": 1}]
    assert {"python", "torch", "transformers", "bitsandbytes", "compactmind"} <= set(manifest["versions"])


def test_saving_again_replaces_the_whole_directory(tmp_path, tokenizer):
    directory = save(tmp_path / "model", helpers.make_bert(seed=1), tokenizer, history=[], extra={"experiment_name": "first"})
    assert read_manifest(directory)["experiment_name"] == "first"
    second = helpers.make_bert(seed=2)
    save(directory, second, tokenizer)
    assert torch.equal(helpers.logits_of(load_checkpoint(directory).model), helpers.logits_of(second))
    assert not (directory / "training_history.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".locks", "model"]


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
        cwd=tmp_path, env=scripts.environment(tmp_path), stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [type(model).__name__]
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), helpers.logits_of(model))


@pytest.mark.parametrize("half_precision", [False, True])
def test_an_nf4_checkpoint_of_a_dense_model_loads_with_plain_transformers(tmp_path, tokenizer, half_precision):
    model = helpers.make_distilbert(dim=128, hidden_dim=256, scale=0.05)
    description = quantize_model(model, "nf4", embeddings="fp16" if half_precision else "float32")
    directory = save(tmp_path / "student_distilled_nf4", model, tokenizer, "nf4", quantization=description)
    plain = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32, device_map="cpu")
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
    expect_clear_error(tmp_path / "my_experiment", "not found", command=f"there is no checkpoint in {tmp_path}")


def test_a_missing_directory_of_ones_own_names_those_that_are_there(teacher):
    expect_clear_error(teacher.with_name("my_experiment"), "not found", command="choose from teacher")


def test_somebody_elses_folder_is_not_told_to_run_a_stage(tmp_path, bert):
    bert.save_pretrained(tmp_path / "my-bert")
    with pytest.raises(CompactMindError, match="my-bert has no manifest.json: it is a Hugging Face folder.*--models") as caught:
        load_checkpoint(tmp_path / "my-bert")
    assert "run `" not in str(caught.value)


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
    expect_clear_error(teacher, "'gptq'", *FORMATS)


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
    displaced = teacher.with_name(".teacher.old")
    teacher.rename(displaced)
    expect_clear_error(teacher, "not found")  # a reader changes nothing
    assert displaced.is_dir() and not teacher.exists()
    with lock_directory(teacher):  # a writer does
        assert torch.equal(helpers.logits_of(load_checkpoint(teacher).model), helpers.logits_of(bert))


def test_other_bytes_of_the_same_size_are_noticed(teacher, capfd):
    content = bytearray((teacher / WEIGHTS).read_bytes())
    content[-4000:-2000] = b"\xff" * 2000
    (teacher / WEIGHTS).write_bytes(content)
    expect_clear_error(teacher, f"{WEIGHTS} is not what was saved")
    assert is_up_to_date(teacher, STAGE)  # the file is not read for that ...
    assert not is_up_to_date(teacher, STAGE, verify=True)  # ... unless it is asked for
    assert "teacher is made again" in capfd.readouterr().out and read_manifest(teacher)["kind"] == "dense"


def test_why_something_is_made_again_is_said(teacher, capfd):
    assert not is_up_to_date(teacher, STAGE | {"config": STAGE["config"] | {"lr": 2e-4, "more": 1}, "code": "abc"})
    assert capfd.readouterr().out == f"{teacher} is made again: it was made with another code, config.lr, config.more\n"
    assert is_up_to_date(teacher, STAGE) and not is_up_to_date(teacher.with_name("student"), STAGE)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", [None, "int8"])
def test_weights_that_are_no_numbers_are_neither_saved_nor_taken(tmp_path, tokenizer, teacher, bert, value, method):
    quantization = quantize_model(bert, method) if method else None
    with torch.no_grad():
        bert.classifier.weight[1, 3] = value
    with pytest.raises(CompactMindError, match="was not written: classifier.weight holds NaN or infinite"):
        save(teacher, bert, tokenizer, method or "dense", quantization=quantization)
    assert load_checkpoint(teacher).manifest["kind"] == "dense"  # what stood there is unchanged
    rewrite_weights(teacher, lambda tensors: tensors["classifier.weight"].fill_(value))
    expect_clear_error(teacher, "classifier.weight holds NaN or infinite")
    with pytest.raises(CompactMindError, match="could not be loaded.*classifier.weight holds NaN"):
        foreign = tmp_path / "foreign"
        bert.save_pretrained(foreign) if method is None else shutil.copytree(teacher, foreign)
        (foreign / MANIFEST).unlink(missing_ok=True)
        tokenizer.save_pretrained(foreign)
        load_any(foreign)


def test_a_reader_meets_a_writer(tmp_path, tokenizer, monkeypatch):
    """Replaced between the look at the manifest and the load of the weights, a checkpoint is read again."""
    first, second = helpers.make_bert(seed=1), helpers.make_bert(seed=2)
    directory = save(tmp_path / "teacher", first, tokenizer, extra={"experiment_name": "first"})
    real, calls = checkpoint.read_manifest, []

    def then_replace(*arguments):
        manifest = real(*arguments)
        if not calls:
            calls.append(1)
            save(directory, second, tokenizer, extra={"experiment_name": "second"})
        return manifest

    monkeypatch.setattr(checkpoint, "read_manifest", then_replace)
    loaded = load_checkpoint(directory)
    assert loaded.manifest["experiment_name"] == "second"
    assert torch.equal(helpers.logits_of(loaded.model), helpers.logits_of(second))


# --------------------------------------------------------------------------------------------------------- what travels
def test_what_a_model_comes_with_stays_with_it(tmp_path, tokenizer):
    source, model = tmp_path / "source", helpers.make_llama()
    source.mkdir()
    beside = {"LICENSE.txt": "the licence", "NOTICE": "who made it", "USE_POLICY.md": "what for", "other.jinja": "{{ x }}"}
    for name, text in beside.items():
        (source / name).write_text(text)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9], "temperature": 0.6}))
    directory = save(tmp_path / "llama_w8a8", model, helpers.make_byte_tokenizer(), beside=source)
    assert {name: (directory / name).read_text() for name in beside} == beside
    assert set(beside) | {"generation_config.json"} <= set(read_manifest(directory)["files"])
    assert load_checkpoint(directory).model.generation_config.eos_token_id == [7, 9]


@pytest.mark.parametrize("kind", ["dense", "nf4", "w8a8"])
def test_every_kind_of_language_model_stops_where_it_is_told_to(tmp_path, kind):
    model = helpers.make_llama()
    model.generation_config.eos_token_id = [7, 9]
    quantization = None
    if kind == "nf4":
        quantization = quantize_model(model, "nf4", embeddings="float32")
    elif kind == "w8a8":
        quantization = quantize_llama(model, calibrate_llama(model, helpers.example_windows()), W8A8Recipe(alpha=0.5))
    directory = save(tmp_path / "llama", model, helpers.make_byte_tokenizer(), kind, quantization=quantization)
    assert load_checkpoint(directory).model.generation_config.eos_token_id == [7, 9]
