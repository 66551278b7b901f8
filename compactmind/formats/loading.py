"""What the loaders of several formats share: a model that waits for its tensors, and the rule that each of them must fit."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights


def uninitialized_model(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """Return a model to load weights into: what its tensors hold is undefined, so no time and no memory is spent on random numbers."""
    with no_init_weights():
        model = model_class(config)
    model.tie_weights()  # a part of the initialization that was left out
    return model


class EmptyOnMeta(TorchFunctionMode):
    """Puts what torch.empty makes, as weights are made, on the meta device, and nothing else (`torch.device("meta")` imports sympy)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """The arguments are those that torch calls it with."""
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def meta_model(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """Return a model to assign weights to: they are on the meta device, what it computes for itself is not, and nothing is tied."""
    with EmptyOnMeta(), no_init_weights():
        return model_class(config)


def tie_table(model: PreTrainedModel) -> None:
    """Make head and table, in place, one parameter where the configuration ties them and both are as released."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if model.config.tie_word_embeddings and type(table) is nn.Embedding and type(head) is nn.Linear:
        head.weight = table.weight


def require_every_tensor(model_class: type[PreTrainedModel], missing: Sequence[str], unexpected: Sequence[str]) -> None:
    """Raise ValueError if a tensor of the model was not in the file, or one of the file not in the model."""
    if missing or unexpected:
        raise ValueError(f"tensors do not fit {model_class.__name__}: missing {missing}, unexpected {unexpected}")
