"""Which code made an output: what computes counts, what only explains or shows does not."""

import shutil

import helpers
import pytest

from compactmind import code_version as module
from compactmind.code_version import code_version

STAGES = (
    "download_model.py",
    "1_distill.py",
    "2_prune_finetune.py",
    "3_quantize.py",
    "4_smoothquant_llama.py",
    "5_bayesian_search.py",
)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of the program text; `version(script)` of it, and `edit(file, old, new)`."""
    for name in (*STAGES, "common.py"):
        shutil.copy(helpers.REPOSITORY / name, tmp_path / name)
    shutil.copytree(helpers.REPOSITORY / "compactmind", tmp_path / "compactmind", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(module, "__file__", str(tmp_path / "compactmind" / "code_version.py"))

    def versions() -> dict[str, str]:
        return {name: code_version(tmp_path / name) for name in STAGES}

    def changed_by(file: str, old: str, new: str) -> set[str]:
        before, path = versions(), tmp_path / file
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new, 1), encoding="utf-8")
        return {name for name, version in versions().items() if version != before[name]}

    return changed_by


def test_each_stage_has_a_version_of_its_own():
    assert len({code_version(helpers.REPOSITORY / name) for name in STAGES}) == len(STAGES)
    assert code_version(str(helpers.REPOSITORY / "1_distill.py")) == code_version(helpers.REPOSITORY / "1_distill.py")


def test_a_change_of_the_formula_counts_for_those_who_use_it(project):
    changed = project("compactmind/methods/distillation/soft_targets.py", "temperature**2 *", "temperature *")
    assert {"1_distill.py", "2_prune_finetune.py"} <= changed and not {"3_quantize.py", "download_model.py"} & changed
    assert project("1_distill.py", "loop.step()", "loop.step(x=2)") == {"1_distill.py"}
    assert project("compactmind/loop.py", "optimizer.step()", "optimizer.step(None)") == {"1_distill.py", "2_prune_finetune.py"}
    assert project("compactmind/checkpoint.py", "tensor.detach().cpu().contiguous()", "tensor.detach().cpu()") == set(STAGES)


def test_a_format_counts_for_those_who_make_what_it_stores(project):
    quantizing = {"3_quantize.py", "4_smoothquant_llama.py", "5_bayesian_search.py"}
    assert project("compactmind/formats/bitsandbytes.py", '"load_in_4bit": True', '"load_in_4bit": False') == quantizing
    assert project("compactmind/formats/w8a8.py", "if not is_llama(model)", "if is_llama(model)") == quantizing
    assert project("compactmind/formats/compressed_tensors.py", '"num_bits": 8', '"num_bits": 7') == quantizing
    assert project("compactmind/formats/table.py", "as_released=w8a8.as_released,", "") == quantizing
    assert project("compactmind/manifest.py", "MANIFEST_VERSION = 3", "MANIFEST_VERSION = 4") == set(STAGES)


def test_every_file_of_a_method_counts_wherever_the_method_can_be_run(project):
    methods, running = helpers.REPOSITORY / "compactmind" / "methods", {"4_smoothquant_llama.py", "5_bayesian_search.py"}
    files = {*methods.glob("retraining/*.py"), *methods.glob("pruning/llama_*.py")} - {methods / "retraining" / "__init__.py"}
    assert len(files) >= 11
    for file in files:
        assert project(file.relative_to(helpers.REPOSITORY), "\n\n\n", "\n\n\nANOTHER = 1\n\n\n") == running, file.name


def test_words_constants_to_edit_and_plots_do_not_count(project):
    assert project("compactmind/methods/distillation/soft_targets.py", "Hinton et al.", "Somebody") == set()
    assert project("compactmind/training.py", "import sys", "# a comment\n\nimport sys") == set()
    assert (
        project("1_distill.py", "CONFIG = DistillConfig.for_profile(PROFILE)", "CONFIG = DistillConfig(student_epochs=9)")
        == set()
    )
    assert project("common.py", "student_epochs: int = 2", "student_epochs: int = 3") == set()  # recorded as a setting
    assert project("compactmind/report/figures.py", "import", "import os\nimport") == set()
