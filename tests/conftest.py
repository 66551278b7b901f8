"""Fixtures made from nothing: no network, no hub cache, no file outside the test's own directory."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: it reads this once
os.environ["ACCELERATE_USE_CPU"] = "true"  # the same numbers on every machine; tests marked gpu take both away
os.environ["ACCELERATE_MIXED_PRECISION"] = "no"

import helpers
import pytest
import scripts
import torch
from accelerate.state import AcceleratorState

from compactmind.data import EncodedSentences

torch.set_num_threads(1)


LONG_FILES = ("test_onnx_export.py", "test_workers.py", "test_report.py", "test_large_models.py", "test_paper_profile.py",
              "test_killed_workers.py", "test_search_script.py", "test_engine.py", "test_documents.py", "test_search_processes.py",
              "test_as_shipped.py", "test_script_training.py", "test_loop.py", "test_families.py", "test_llama_structure.py",
              "test_compressor.py", "test_trials.py", "test_encoder_families.py", "test_killed_scripts.py", "test_report_rows.py",
              "test_sharding.py", "test_scripts.py", "test_fixed_pipeline.py", "test_pipeline_run.py")  # fmt: skip
"""Files that take half a minute and more, the longest first; those that begin with the same `made_once` apart from each other."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Long files come first: a whole file goes to one process, and one that begins last is waited for by the other process."""
    order = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_collection_finish():
    """Nothing that importing made is garbage: looking for it took 0.3 s each time, half of the time of some files."""
    gc.freeze()


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A WordPiece tokenizer that knows the words of the synthetic sentences."""
    return helpers.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def sentences():
    """Sixty different labelled sentences of different lengths."""
    return helpers.make_sentences(60)


@pytest.fixture(scope="session")
def encoded(tokenizer, sentences):
    """The same sentences, tokenized."""
    return EncodedSentences(tokenizer, sentences, max_length=64)


@pytest.fixture
def bert():
    return helpers.make_bert()


@pytest.fixture
def distilbert():
    return helpers.make_distilbert()


@pytest.fixture
def fresh_accelerator():
    """Precision and device are settled once per process: here they are open again, and afterwards too."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def on_gpu(monkeypatch, fresh_accelerator):
    """What is chosen by itself is the GPU."""
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)


@pytest.fixture
def run_here(monkeypatch, capfd):
    """Run a script inside this process: `run_here(name, *arguments, cwd=...)` -> (exit status, output)."""

    def run(name, *arguments, cwd):
        return scripts.run_script_here(name, *arguments, cwd=cwd, monkeypatch=monkeypatch, capfd=capfd)

    return run
