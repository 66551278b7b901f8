"""A directory in which run_pipeline.py has run every stage, which takes a minute or more, and copies of it to run something else in."""

import shutil

import helpers
import pytest
import scripts

ROWS = ["teacher", "student_finetuned", "student_distilled", "student_pruned", "student_distilled_nf4", "student_pruned_nf4",
        "student_pruned_w8a8"]  # fmt: skip
LANGUAGE_ROWS = ["llama", "llama_nf4", "llama_w8a8_naive", "llama_w8a8", "llama_gptq_3.5x", "llama_pruned", "llama_searched",
                 "llama_front_3x", "llama_front_4x"]  # fmt: skip


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A directory in which run_pipeline.py has run every stage, and what it printed."""

    def run(folder):
        helpers.make_workspace(folder, train_rows=300, dev_rows=50)
        # 3.5 times smaller and still more than the names of its tensors
        helpers.add_llama(folder, hidden_size=64, intermediate_size=128, scale=0.1)
        result = scripts.run_pipeline(cwd=folder)
        assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
        return result.stdout

    return scripts.made_once(tmp_path_factory, "reported", run)


@pytest.fixture
def copy(reported, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(reported[0], folder, ignore=shutil.ignore_patterns("hf_home", "llama_*"))  # each row takes seconds
    return folder
