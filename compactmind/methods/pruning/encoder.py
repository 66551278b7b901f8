"""Where the prunable structures of a BERT or DistilBERT encoder are: which linear feeds which, layer by layer.

One attention head is `head_dim` rows of query/key/value and the matching columns of the output projection; one FFN neuron
is a row of the up projection and a column of the down projection. Everything that prunes, scores, resizes or copies
layers goes through `encoder_layers`, so the two architectures differ in this file only.
"""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class EncoderLayer:
    """The modules of one encoder block under common names (BERT's and DistilBERT's differ)."""

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


def encoder_layers(model: PreTrainedModel) -> list[EncoderLayer]:
    """Return the blocks of a BERT or DistilBERT model in order (live modules, not copies).

    Raises TypeError for any other architecture.
    """
    base = model.base_model
    if base.config.model_type in ("bert", "pruned_bert"):
        return [
            EncoderLayer(
                query=layer.attention.self.query,
                key=layer.attention.self.key,
                value=layer.attention.self.value,
                attention_output=layer.attention.output.dense,
                attention_norm=layer.attention.output.LayerNorm,
                up=layer.intermediate.dense,
                down=layer.output.dense,
                output_norm=layer.output.LayerNorm,
                head_dim=layer.attention.self.attention_head_size,
            )
            for layer in base.encoder.layer
        ]
    if base.config.model_type in ("distilbert", "pruned_distilbert"):
        return [
            EncoderLayer(
                query=layer.attention.q_lin,
                key=layer.attention.k_lin,
                value=layer.attention.v_lin,
                attention_output=layer.attention.out_lin,
                attention_norm=layer.sa_layer_norm,
                up=layer.ffn.lin1,
                down=layer.ffn.lin2,
                output_norm=layer.output_layer_norm,
                head_dim=layer.attention.attention_head_size,
            )
            for layer in base.transformer.layer
        ]
    raise TypeError(f"no encoder layers known for model type {base.config.model_type!r}: expected bert or distilbert")


def layer_shapes(model: PreTrainedModel) -> list[dict[str, int]]:
    """Return per layer `num_heads`, `head_dim` and `intermediate_size`: the physical widths, for a manifest."""
    return [
        {"num_heads": layer.num_heads, "head_dim": layer.head_dim, "intermediate_size": layer.intermediate_size}
        for layer in encoder_layers(model)
    ]
