"""What of a language model is trained: all of its weights, or low-rank adapters beside them.

Adapters stand beside the seven linears of each block (Hu et al. 2021, https://arxiv.org/abs/2106.09685) and are added into the weights
before the model is returned; while they are trained, the weights beside them may be 4-bit ones (nf4_base.py).
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from compactmind.methods.llama import LINEARS
from compactmind.methods.retraining.nf4_base import NF4Base
from compactmind.methods.retraining.recipe import RetrainRecipe
from compactmind.methods.retraining.sharding import own_share
from compactmind.training import cpu_copy


def add_adapters(model: PreTrainedModel, rank: int, alpha: int) -> nn.Module:
    """Put, in place, an adapter beside each of the seven linears of every block and freeze everything else.

    Returns peft's wrapper, whose `merge_and_unload` and `unload` take them out again. The first output is that of the model
    without adapters: one of the two factors starts at 0.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, and it advises optional CPU kernels at import
    from peft import LoraConfig, get_peft_model  # here, because importing it takes seconds that only this mode should pay

    targets = [path.rpartition(".")[2] for path in LINEARS.values()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft still asks for names that transformers has renamed
        return get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=targets))


def trainable_copy(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of the trainable weights in main memory, of divided ones this process's share; tied ones once."""
    return cpu_copy({name: own_share(parameter) for name, parameter in model.named_parameters() if parameter.requires_grad})


@torch.no_grad()
def load_trainable(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Write, in place, what `trainable_copy` returned."""
    parameters = dict(model.named_parameters())
    for name, tensor in weights.items():
        own_share(parameters[name]).copy_(tensor)


def set_gradient_checkpointing(model: PreTrainedModel, enable: bool) -> None:
    """Switch, in place, the recomputation of each block's activations on or off."""
    prefix = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # transformers 5.20: the latter
    if enable:
        getattr(model, f"{prefix}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{prefix}_checkpointing_disable")()
        model.disable_input_require_grads()  # the hook on the embeddings that enabling put there


@contextmanager
def ready_to_train(model: PreTrainedModel, recipe: RetrainRecipe) -> Iterator[tuple[nn.Module | None, NF4Base | None]]:
    """Give, in place, a model the base, adapters and gradient checkpointing of a recipe; take them away at the end of the `with` block.

    So it is whatever was raised inside. Yields peft's wrapper, or None without adapters; those not merged until the end are lost; and the
    4-bit base, or None without.
    """
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    base = NF4Base(model) if recipe.base == "nf4" else None
    adapters = None
    try:
        if recipe.mode == "lora":
            adapters = add_adapters(model, recipe.lora_rank, recipe.lora_alpha)
        if recipe.gradient_checkpointing:
            set_gradient_checkpointing(model, True)
        yield adapters, base
    finally:
        if recipe.gradient_checkpointing:
            set_gradient_checkpointing(model, False)
        if base is not None:
            base.use_original_linears()
        if adapters is not None:
            adapters.unload()
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(trainable[name])
        model.zero_grad()
        model.eval()
