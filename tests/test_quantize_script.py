"""3_quantize.py: a file that reloads with other logits is not kept and what stood there before is; weights no format can hold are named."""

import helpers
import pytest
import torch

from compactmind import checkpoint
from compactmind.checkpoint import save_checkpoint
from compactmind.data import EncodedSentences, write_dataset

METHODS = ("nf4", "int8", "w8a8")


@pytest.fixture
def folder(tmp_path):
    """A folder with sentences."""
    sentences = helpers.make_sentences(80)
    write_dataset(
        tmp_path / "sst2_data", {"train": sentences[:40], "validation": sentences[40:60], "test": sentences[60:]}, "made up"
    )
    return tmp_path


def save_student(folder, tokenizer, change=lambda model: None):
    model = helpers.make_distilbert(max_position_embeddings=128)
    with torch.no_grad():
        change(model)
    save_checkpoint(folder / "models" / "student", model, tokenizer, kind="dense", parent=None, stage={})


def contents(folder) -> dict:
    return {
        path: path.read_bytes() for path in sorted((folder / "models").rglob("*")) if path.is_file() and path.suffix != ".lock"
    }


@pytest.mark.parametrize("method", METHODS)
def test_what_reloads_with_other_logits_is_not_kept(folder, tokenizer, run_here, monkeypatch, method):
    load, broken = checkpoint.load_checkpoint, []

    def load_wrongly(directory, *arguments):
        loaded = load(directory, *arguments)
        if directory.name != "student" and broken:
            loaded.model.classifier.bias.data += broken[0]
        return loaded

    monkeypatch.setattr(checkpoint, "load_checkpoint", load_wrongly)
    save_student(folder, tokenizer)
    arguments = ("--parents", "student", "--method", method, "--w8a8_parents")
    for difference in (0.01, float("nan")):
        before, broken[:] = contents(folder), [difference]
        status, output = run_here("3_quantize.py", *arguments, cwd=folder)
        assert status == 1 and "this is a bug" in output and "not kept" in output, output
        assert contents(folder) == before
        assert [path.name for path in (folder / "models").glob("[!.]*")] == ["student"]
    broken.clear()
    status, output = run_here("3_quantize.py", *arguments, cwd=folder)
    assert status == 0 and "reloads with equal logits" in output, output
    before, broken[:] = contents(folder), [0.01]
    status, output = run_here("3_quantize.py", *arguments, "--force", "True", cwd=folder)
    assert status == 1 and contents(folder) == before


@pytest.mark.parametrize("method", METHODS)
def test_a_table_beyond_float16_is_named_with_the_way_out(folder, tokenizer, run_here, method):
    def enlarge(model):
        model.distilbert.embeddings.position_embeddings.weight[100, 3] = (
            7e4  # no sentence is as long: nothing else would notice
        )

    save_student(folder, tokenizer, enlarge)
    arguments = ("--parents", "student", "--method", method, "--w8a8_parents")
    status, output = run_here("3_quantize.py", *arguments, "--embeddings", "fp16", cwd=folder)
    assert status == 1 and "Traceback" not in output
    for part in ("distilbert.embeddings.position_embeddings", "70000", "65504", "--embeddings float32"):
        assert part in output, output
    assert not (folder / "models" / f"student_{method}").exists()
    status, output = run_here("3_quantize.py", *arguments, "--embeddings", "float32", cwd=folder)
    assert status == 0, output
    model = checkpoint.load_checkpoint(folder / "models" / f"student_{method}").model
    assert model.distilbert.embeddings.position_embeddings.weight[100, 3] == 7e4


def test_a_table_that_is_sorted_by_class_is_calibrated_on_all_classes(folder, tokenizer, run_here, monkeypatch):
    sentences = sorted(helpers.make_sentences(80), key=lambda sentence: sentence.label)
    parts = {"train": sentences, "validation": sentences[::4], "test": sentences[1::4]}
    write_dataset(folder / "sst2_data", parts, "made up")
    save_student(folder, tokenizer)
    read, encode = [], EncodedSentences.evaluation_batches

    def watched(self, *arguments):
        read.append(self.labels.tolist())
        return encode(self, *arguments)

    monkeypatch.setattr(EncodedSentences, "evaluation_batches", watched)
    arguments = ("--parents", "student", "--w8a8_parents", "--calibration_sentences", "8")
    status, output = run_here("3_quantize.py", *arguments, cwd=folder)
    assert status == 0, output
    (calibration,) = (labels for labels in read if len(labels) == 8)
    assert 2 <= sum(calibration) <= 6
