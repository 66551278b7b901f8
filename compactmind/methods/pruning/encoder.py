"""Where the prunable structures of an encoder are: which linear feeds which, layer by layer, whatever its family calls them.

One attention head is `head_dim` rows of query/key/value and the matching columns of the output projection; one FFN neuron
is a row of the up projection and a column of the down projection. Everything that prunes, scores, resizes, quantizes or copies
layers goes through `encoder_layers`; what families differ in is the table FAMILIES (modeling_pruned_encoder.py).
"""

from dataclasses import dataclass

import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from compactmind.errors import CompactMindError
from compactmind.methods.pruning.modeling_pruned_encoder import CLASSIFIER, FAMILIES, PRUNED, Family


@dataclass(frozen=True)
class EncoderLayer:
    """The modules of one encoder block under common names."""

    query: nn.Linear  # (num_heads * head_dim, hidden_size)
    key: nn.Linear
    value: nn.Linear
    attention_output: nn.Linear  # (hidden_size, num_heads * head_dim)
    attention_norm: nn.LayerNorm
    up: nn.Linear  # (intermediate_size, hidden_size)
    down: nn.Linear  # (hidden_size, intermediate_size)
    output_norm: nn.LayerNorm
    head_dim: int

    @property
    def num_heads(self) -> int:
        """Attention heads that are left."""
        return self.query.out_features // self.head_dim

    @property
    def intermediate_size(self) -> int:
        """FFN neurons that are left."""
        return self.up.out_features


PARTS = ("query", "key", "value", "attention_output", "attention_norm", "up", "down", "output_norm")
"""The fields of an EncoderLayer that are modules with weights."""


def family_name(config: PretrainedConfig) -> str:
    """Return the key of FAMILIES of a model, pruned or not. Raises CompactMindError listing the families for any other model."""
    name = config.model_type.removeprefix(PRUNED)
    if name not in FAMILIES:
        raise CompactMindError(
            f"no encoder layers are known for a {config.model_type!r} model: {', '.join(FAMILIES)} can be distilled and compressed. "
            "6_evaluate_report.py measures any sequence classifier: --models name=folder"
        )
    return name


def family_of(model: PreTrainedModel) -> Family:
    """Return the row of FAMILIES of a model. Raises CompactMindError, see `family_name`."""
    return FAMILIES[family_name(model.base_model.config)]


def classifier_class(name: str) -> type[PreTrainedModel]:
    """Return the class of transformers for the sequence classifiers of a family."""
    return getattr(transformers, FAMILIES[name].classes + CLASSIFIER)


def encoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """Return the blocks of an encoder in order, as they are. Raises CompactMindError, see `family_name`."""
    return model.base_model.get_submodule(family_of(model).layout.layers)


def encoder_layers(model: PreTrainedModel) -> list[EncoderLayer]:
    """Return the parts of the blocks of an encoder in order (live modules, not copies).

    Raises CompactMindError, see `family_name`.
    """
    layout = family_of(model).layout
    return [
        EncoderLayer(
            **{part: block.get_submodule(getattr(layout, part)) for part in PARTS},
            head_dim=block.get_submodule(layout.attention).attention_head_size,
        )
        for block in encoder_blocks(model)
    ]


def layer_shapes(model: PreTrainedModel) -> list[dict[str, int]]:
    """Return per layer `num_heads`, `head_dim` and `intermediate_size`: the physical widths, for a manifest."""
    return [
        {"num_heads": layer.num_heads, "head_dim": layer.head_dim, "intermediate_size": layer.intermediate_size}
        for layer in encoder_layers(model)
    ]


def block_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return the linears of all blocks by a name for people: `layer 0, query`; those of a part that was pruned away are not there."""
    parts = ("query", "key", "value", "attention_output", "up", "down")
    linears = {f"layer {index}, {part}": getattr(layer, part) for index, layer in enumerate(encoder_layers(model)) for part in parts}
    return {name: linear for name, linear in linears.items() if linear.weight.numel()}
