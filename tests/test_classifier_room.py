"""What the stages of the encoder track take is told from shapes, and refused where it is not there."""

import json
from dataclasses import replace
from types import SimpleNamespace

import helpers
import psutil
import pytest

from common import DistillConfig, PruneConfig, QuantizeConfig, ReportConfig
from compactmind import classifier_room as room
from compactmind.checkpoint import save_checkpoint
from compactmind.errors import CompactMindError
from compactmind.methods import classifier_memory as memory
from compactmind.methods.classifier_memory import ClassifierSizes
from compactmind.methods.pruning.encoder import encoder_layers

BASE = ClassifierSizes(hidden=768, inner=3072, layers=12, heads=12, parameters=109_500_000, table=23_440_896)


@pytest.fixture
def models(tmp_path):
    """A folder with a teacher, its base and a student."""
    for name, model in {
        "teacher_base": helpers.make_bert(), "teacher": helpers.make_bert(), "student_distilled": helpers.make_distilbert(),
    }.items():  # fmt: skip
        model.save_pretrained(tmp_path / name)
    room.require_room_for.cache_clear()
    return tmp_path


def settings(models) -> dict:
    return {
        "1_distill.py": DistillConfig(models_dir=models), "2_prune_finetune.py": PruneConfig(models_dir=models),
        "3_quantize.py": QuantizeConfig(models_dir=models, parents=("student_distilled",), w8a8_parents=()),
        "6_evaluate_report.py": ReportConfig(models_dir=models, results_dir=models),
    }  # fmt: skip


@pytest.mark.parametrize("make", [helpers.make_bert, helpers.make_distilbert])
def test_sizes_are_those_of_the_model(tmp_path, make):
    model = make()
    model.save_pretrained(tmp_path)
    sizes = room.sizes_of(tmp_path)
    exact = sum(parameter.numel() for parameter in model.parameters())
    assert exact <= sizes.parameters < exact + 4000  # the header of the file
    assert (sizes.hidden, sizes.inner, sizes.heads) == (32, 64, 4) and sizes.layers == len(encoder_layers(model))
    assert sizes.table == model.get_input_embeddings().weight.numel()
    assert room.sizes_of(tmp_path, "ForCausalLM") is None and room.sizes_of(tmp_path / "nowhere") is None


def test_what_training_takes_grows_with_what_is_trained_and_read():
    whole, frozen = (memory.train(BASE, 32, 128, frozen) for frozen in (False, True))
    assert whole - frozen == 4 * 4 * BASE.table  # gradient, two moments, average
    assert memory.train(BASE, 64, 128, True) - frozen == 12 * BASE.layer(32, 128)
    assert BASE.layer(32, 256) > 2 * BASE.layer(32, 128)  # attention is square
    student = BASE.cut(6)
    assert student.layers == 6 and BASE.weights - student.weights == 6 * 4 * (4 * 768**2 + 2 * 768 * 3072)
    assert memory.quantize(BASE, 256, 64, 64) > memory.quantize(BASE, 0, 64, 64) > 2 * BASE.weights


def test_every_stage_says_what_it_takes_once(models, capsys):
    for script, config in settings(models).items():
        for _ in range(2):
            room.require_room_for(script, config)
    output = capsys.readouterr().out
    assert output.count("memory: ") == output.count("GB at the peak") == output.count("Disk: ") == 4


@pytest.mark.parametrize("script", list(room.ROOMS))
def test_what_does_not_fit_is_refused_with_a_way_out(models, monkeypatch, script):
    config = settings(models)[script]
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10_000_000))
    with pytest.raises(CompactMindError, match=r"needs 0\.\d GB of memory, and 10\.0 MB are free: .*--\w+"):
        room.require_room_for(script, config)
    line, problem = room.describe_room(script, config)
    assert "GB at the peak" in line and "10.0 MB are free" in problem


@pytest.mark.parametrize("script", list(room.ROOMS))
def test_where_nothing_is_yet_nothing_is_told(tmp_path, script):
    config = replace(settings(tmp_path)[script], models_dir=tmp_path / "none")
    assert room.describe_room(script, config) == ("memory and disk: known once what it reads is there", None)


def test_families_and_hidden_states_keep_the_parent_beside(models):
    plain = PruneConfig(models_dir=models, alpha=0.0)
    weights = room.sizes_of(models / "student_distilled").weights
    for more in ({"target_speedups": (2.0,)}, {"hidden_loss_weight": 1.0}):
        beside = room.pruning(replace(plain, **more))
        assert max(beside.needs.values()) == max(room.pruning(plain).needs.values()) + weights


def test_a_language_model_is_no_classifier_of_the_report(models):
    before = room.measuring(settings(models)["6_evaluate_report.py"])
    helpers.make_llama().save_pretrained(models / "llama")
    assert room.measuring(settings(models)["6_evaluate_report.py"]) == before
    path = models / "teacher" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["BertModel"]}))
    assert room.measuring(settings(models)["6_evaluate_report.py"]) != before


def test_the_plan_says_what_would_stop_a_stage(models, run_here, monkeypatch):
    options = ("--models_dir", models, "--only", "1_distill.py", "--dry_run", "True")
    status, output = run_here("run_pipeline.py", *options, cwd=models)
    assert status == 0 and "GB at the peak" in output
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10_000_000))
    status, output = run_here("run_pipeline.py", *options, cwd=models)
    assert status == 1 and "would stop: " in output and "--batch_size" in output


def test_stages_refuse_before_they_begin(tmp_path, run_here, monkeypatch):
    helpers.make_workspace(tmp_path, train_rows=60, dev_rows=20)
    assert run_here("download_model.py", cwd=tmp_path)[0] == 0
    tokenizer, models = helpers.make_tokenizer(tmp_path / "vocabulary"), tmp_path / "models"
    for name, model in {"teacher": helpers.make_bert(), "student_distilled": helpers.make_distilbert()}.items():
        made = {"script": "1_distill.py", "config": {}, "inputs": {}}
        save_checkpoint(models / name, model, tokenizer, kind="dense", parent=None, stage=made)
    before = {path: path.read_bytes() for path in models.glob("[a-z]*/*") if path.is_file()}
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10_000_000))
    quantize = ("3_quantize.py", "--parents", "student_distilled", "--w8a8_parents", "student_distilled")
    for command in (("1_distill.py",), ("2_prune_finetune.py",), quantize):
        room.require_room_for.cache_clear()
        status, output = run_here(*command, cwd=tmp_path)
        assert status == 1 and "GB of memory, and 10.0 MB are free" in output and "take" in output
    assert {path: path.read_bytes() for path in models.glob("[a-z]*/*") if path.is_file()} == before
