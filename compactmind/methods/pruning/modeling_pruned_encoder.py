"""BERT and DistilBERT classifiers whose layers differ in their number of heads and FFN width.

transformers sizes every layer from one number, so a model with pruned heads cannot be described by its configuration
classes. These two add a width per layer; nothing else changes, because the attention code there reads the number of heads
off the projection's width. A copy of this file lies beside the weights of every pruned checkpoint, so that
`AutoModelForSequenceClassification.from_pretrained(directory, trust_remote_code=True)` works without this project.
"""

from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)


def _resize(parent: nn.Module, name: str, in_features: int, out_features: int) -> None:
    """Replace, in place, the linear `parent.name` by an uninitialised one of the given size."""
    setattr(parent, name, nn.Linear(in_features, out_features, bias=getattr(parent, name).bias is not None))


class PrunedBertConfig(BertConfig):
    """A BertConfig with the number of heads and of FFN neurons of every layer."""

    model_type = "pruned_bert"
    layer_num_heads: list[int] | None = None
    layer_intermediate_sizes: list[int] | None = None


class PrunedBertForSequenceClassification(BertForSequenceClassification):
    """A BERT classifier whose layers have the widths its configuration says."""

    config_class = PrunedBertConfig

    def __init__(self, config: PrunedBertConfig):
        super().__init__(config)
        head_dim = config.hidden_size // config.num_attention_heads
        for layer, heads, width in zip(
            self.bert.encoder.layer, config.layer_num_heads, config.layer_intermediate_sizes, strict=True
        ):
            for name in ("query", "key", "value"):
                _resize(layer.attention.self, name, config.hidden_size, heads * head_dim)
            _resize(layer.attention.output, "dense", heads * head_dim, config.hidden_size)
            _resize(layer.intermediate, "dense", config.hidden_size, width)
            _resize(layer.output, "dense", width, config.hidden_size)


class PrunedDistilBertConfig(DistilBertConfig):
    """A DistilBertConfig with the number of heads and of FFN neurons of every layer."""

    model_type = "pruned_distilbert"
    layer_num_heads: list[int] | None = None
    layer_intermediate_sizes: list[int] | None = None


class PrunedDistilBertForSequenceClassification(DistilBertForSequenceClassification):
    """A DistilBERT classifier whose layers have the widths its configuration says."""

    config_class = PrunedDistilBertConfig

    def __init__(self, config: PrunedDistilBertConfig):
        super().__init__(config)
        head_dim = config.dim // config.n_heads
        for layer, heads, width in zip(
            self.distilbert.transformer.layer, config.layer_num_heads, config.layer_intermediate_sizes, strict=True
        ):
            for name in ("q_lin", "k_lin", "v_lin"):
                _resize(layer.attention, name, config.dim, heads * head_dim)
            _resize(layer.attention, "out_lin", heads * head_dim, config.dim)
            _resize(layer.ffn, "lin1", config.dim, width)
            _resize(layer.ffn, "lin2", width, config.dim)
