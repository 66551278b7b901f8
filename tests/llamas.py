"""Models of every type that is pruned as a Llama is, with weights everywhere, and what is taken from them at random."""

import copy

import helpers
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from compactmind.checkpoint import save_checkpoint
from compactmind.methods.llama import llama_blocks
from compactmind.methods.pruning.llama_structure import BlockMask, full_mask, rebuilt, shrink_block

STAGE = {"script": "test", "config": {}, "inputs": {}}


@pytest.fixture(scope="module")
def windows():
    return helpers.example_windows(count=6, length=24)


def make(**changes):
    """Return a Llama with 3 blocks, 4 query and 2 key-value heads of 8, MLP 48, unless `changes` say otherwise."""
    return helpers.make_llama(**{"num_hidden_layers": 3, **changes})


SLIDING = {"use_sliding_window": True, "sliding_window": 6}
"""Shorter than the windows of text."""
BIASES = {"attention_bias": True, "mlp_bias": True}
OTHERS = {
    "mistral": {"sliding_window": 6},
    "qwen2": {**SLIDING, "max_window_layers": 2},
    "qwen3": {**SLIDING, "max_window_layers": 2, "head_dim": 8, "attention_bias": True},
    "granite": {
        **BIASES,
        "residual_multiplier": 0.5,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "attention_multiplier": 0.2,
    },
    "smollm3": {**SLIDING, **BIASES, "no_rope_layer_interval": 2},
    "helium": {"head_dim": 4},
    "stablelm": {"use_qkv_bias": True},
}
"""Model type -> settings in which it differs from a Llama."""
WHOLE_HEADS = [kind for kind in OTHERS if kind not in ("helium", "stablelm")]


def make_other(kind: str, **changes):
    """Return a model of any type with 4 blocks, 8 query and 4 key-value heads of 4, MLP 48, unless `changes` say otherwise."""
    settings = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, **OTHERS.get(kind, {}), **changes}
    config = AutoConfig.for_model(kind, **helpers.llama_settings(**settings))
    return helpers.randomize(AutoModelForCausalLM.from_config(config))


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model(helpers.example_windows()).logits


def random_masks(model, channels: int | list[int], groups: int | list[int], seed: int = 0) -> list[BlockMask]:
    """Return masks that keep so many channels and groups (of every block, or one number per block), at random places."""
    generator, masks = torch.Generator().manual_seed(seed), []
    for index, block in enumerate(llama_blocks(model)):
        mask = full_mask(block)
        for kept, values in ((channels, mask.channels), (groups, mask.groups)):
            kept = kept if isinstance(kept, int) else kept[index]
            values[torch.randperm(len(values), generator=generator)[kept:]] = False
        masks.append(mask)
    return masks


def shrunk(model, masks):
    """Return a smaller copy of a model."""
    model = copy.deepcopy(model)
    for block, mask in zip(llama_blocks(model), masks, strict=True):
        shrink_block(block, mask)
    return rebuilt(model)


def save(model, directory):
    save_checkpoint(directory, model, helpers.make_byte_tokenizer(), kind="pruned", parent="x", stage=STAGE)
