"""BERT and DistilBERT classifiers whose layers differ in their number of heads and FFN width.

transformers sizes every layer from one number, so a model with pruned heads cannot be described by its configuration
classes. These two add a width per layer; nothing else changes, because the attention code there reads the number of heads
off the projection's width. A width may be 0: such a layer runs without attention or without FFN; of it the output bias and the norm are
left, which is what the masked layer computes, at no cost beside a norm. A copy of this file lies beside the weights of every pruned
checkpoint, so that `AutoModelForSequenceClassification.from_pretrained(directory, trust_remote_code=True)` works without this project.
"""

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)


def _resize(parent: nn.Module, name: str, in_features: int, out_features: int) -> None:
    """Replace, in place, the linear `parent.name` by an uninitialised one of the given size, by what is left of it if that is 0."""
    if in_features and out_features:
        setattr(parent, name, nn.Linear(in_features, out_features, bias=getattr(parent, name).bias is not None))
    else:
        setattr(parent, name, BiasOnly(out_features) if out_features else NoRows(in_features))


class NoRows(nn.Module):
    """What is left of a linear without outputs: (..., in_features) -> (..., 0)."""

    def __init__(self, in_features: int):
        super().__init__()
        self.in_features, self.out_features, self.bias = in_features, 0, None

    @property
    def weight(self) -> torch.Tensor:
        """(0, in_features): nothing to score, mask or store."""
        return torch.empty(0, self.in_features)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., 0)."""
        return hidden_states[..., :0]


class BiasOnly(nn.Module):
    """What is left of a linear without inputs: its bias, (out_features,), to be added to every token."""

    def __init__(self, out_features: int):
        super().__init__()
        self.in_features, self.out_features = 0, out_features
        self.bias = nn.Parameter(torch.zeros(out_features))

    @property
    def weight(self) -> torch.Tensor:
        """(out_features, 0): nothing to score, mask or store."""
        return torch.empty(self.out_features, 0)

    def forward(self, nothing: torch.Tensor) -> torch.Tensor:
        """(..., 0) -> (out_features,)."""
        return self.bias


class NoHeads(nn.Module):
    """What is left of attention without heads, in the place of it: linears without rows and, where they are in it, the output's bias."""

    def __init__(self, inputs: tuple[str, ...], hidden_size: int, head_dim: int, output: str | None = None):
        super().__init__()
        for name in inputs:
            setattr(self, name, NoRows(hidden_size))
        self.attention_head_size, self.dropout = head_dim, nn.Dropout(0.0)
        self.output_name = output
        if output:
            setattr(self, output, BiasOnly(hidden_size))

    def forward(self, hidden_states: torch.Tensor, *_, **__) -> tuple[torch.Tensor, None]:
        """(batch, seq, hidden_size) -> what attention adds to every token: the bias, or nothing, (batch, seq, 0), before the output."""
        context = hidden_states[..., :0]
        return (getattr(self, self.output_name)(context) if self.output_name else context), None


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
            if not heads:
                layer.attention.self = NoHeads(("query", "key", "value"), config.hidden_size, head_dim)
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
            if not heads:
                layer.attention = NoHeads(("q_lin", "k_lin", "v_lin"), config.dim, head_dim, "out_lin")
            for name in ("q_lin", "k_lin", "v_lin"):
                _resize(layer.attention, name, config.dim, heads * head_dim)
            _resize(layer.attention, "out_lin", heads * head_dim, config.dim)
            _resize(layer.ffn, "lin1", config.dim, width)
            _resize(layer.ffn, "lin2", width, config.dim)
