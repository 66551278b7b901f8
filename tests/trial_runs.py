"""What runs the trials of a search on a tiny Llama, with a cache if it is given a place."""

import helpers
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compactmind.methods.registry import Resources
from compactmind.search.cache import PrefixCache
from compactmind.search.trials import TrialRunner

PRUNE = {"method": "prune", "params": {"sparsity": 0.3, "round_to": 8}}
RETRAIN = {"method": "retrain", "params": {"tokens": 96}}
NF4, W8A8 = {"method": "nf4"}, {"method": "w8a8", "params": {"embeddings": "int8"}}


@pytest.fixture
def windows():
    return helpers.example_windows(count=6, length=24)


def make_runner(windows, tmp_path=None, dense=helpers.make_llama, **changes):
    resources = Resources(windows, windows, windows[:2], dense, torch.bfloat16)
    cache = PrefixCache(tmp_path / "cache", {"model": "x"}, 10**9) if tmp_path else None
    weights = sum(parameter.numel() for parameter in dense().parameters())
    settings = {"few": 2, "released_bytes": 2 * weights, "target": 1.0, "cache": cache, "skeleton": skeleton} | changes
    return TrialRunner(resources, windows, **settings)


def skeleton():
    """Return the model of make_llama without its weights."""
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**helpers.llama_settings()))
