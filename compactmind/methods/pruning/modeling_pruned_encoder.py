"""FAMILIES: the encoders that can be distilled and compressed, a row each, and their classes with a width for every layer.

transformers sizes every layer from one number, so a model with pruned heads cannot be described by its configuration
classes. `Pruned<Name>Config` and `Pruned<Name>ForSequenceClassification` add a width per layer; nothing else changes, because the
attention code there reads the number of heads off the projection's width. A width may be 0: such a layer runs without attention or
without FFN; of it the output bias and the norm are left, which is what the masked layer computes, at no cost beside a norm. The classes
are made from the row when they are asked for: importing this file imports no model. A copy of it lies beside the weights of every pruned
checkpoint, so that `AutoModelForSequenceClassification.from_pretrained(directory, trust_remote_code=True)` works without this project.
"""

import functools
from dataclasses import dataclass

import torch
import transformers
from torch import nn


@dataclass(frozen=True)
class Layout:
    """Where the parts of a block are, as dotted names from it; `layers`, the list of blocks, from the model without its head."""

    layers: str
    attention: str
    """What projects and attends; its `attention_head_size` is the width of a head."""
    query: str
    key: str
    value: str
    attention_output: str
    attention_norm: str
    up: str
    activation: str
    down: str
    output_norm: str


@dataclass(frozen=True)
class Family:
    """A kind of encoder, as transformers has it."""

    classes: str
    """What its classes begin with."""
    layout: Layout
    head: tuple[str, str]
    """The two linears of its classifier, as dotted names from it."""
    student: str = ""
    """The family of students made of its alternate layers; empty: its own."""


BERT_BLOCK = Layout(
    layers="encoder.layer", attention="attention.self",
    query="attention.self.query", key="attention.self.key", value="attention.self.value",
    attention_output="attention.output.dense", attention_norm="attention.output.LayerNorm",
    up="intermediate.dense", activation="intermediate.intermediate_act_fn", down="output.dense", output_norm="output.LayerNorm",
)  # fmt: skip
DISTILBERT_BLOCK = Layout(
    layers="transformer.layer", attention="attention",
    query="attention.q_lin", key="attention.k_lin", value="attention.v_lin",
    attention_output="attention.out_lin", attention_norm="sa_layer_norm",
    up="ffn.lin1", activation="ffn.activation", down="ffn.lin2", output_norm="output_layer_norm",
)  # fmt: skip
DENSE_AND_OUT = ("classifier.dense", "classifier.out_proj")

FAMILIES: dict[str, Family] = {
    "bert": Family("Bert", BERT_BLOCK, ("bert.pooler.dense", "classifier"), student="distilbert"),  # MiniLM too
    "distilbert": Family("DistilBert", DISTILBERT_BLOCK, ("pre_classifier", "classifier")),
    "roberta": Family("Roberta", BERT_BLOCK, DENSE_AND_OUT),
    "xlm-roberta": Family("XLMRoberta", BERT_BLOCK, DENSE_AND_OUT),
    "camembert": Family("Camembert", BERT_BLOCK, DENSE_AND_OUT),
    "electra": Family("Electra", BERT_BLOCK, DENSE_AND_OUT),
}
"""`model_type` of a configuration -> family; a pruned model's begins with PRUNED."""

PRUNED = "pruned_"
CONFIG, CLASSIFIER = "Config", "ForSequenceClassification"


@functools.cache
def pruned_classes(family_name: str) -> tuple[type, type]:
    """Return configuration and classifier of a family whose layers differ in their number of heads and FFN width."""
    family = FAMILIES[family_name]
    layout = family.layout

    class PrunedConfig(getattr(transformers, family.classes + CONFIG)):
        """The family's configuration with the number of heads and of FFN neurons of every layer."""

        model_type = PRUNED + family_name
        layer_num_heads: list[int] | None = None
        layer_intermediate_sizes: list[int] | None = None

    class PrunedClassifier(getattr(transformers, family.classes + CLASSIFIER)):
        """The family's classifier whose layers have the widths its configuration says."""

        config_class = PrunedConfig

        def __init__(self, config: PrunedConfig):
            super().__init__(config)
            hidden = config.hidden_size
            blocks = self.base_model.get_submodule(layout.layers)
            for block, heads, width in zip(blocks, config.layer_num_heads, config.layer_intermediate_sizes, strict=True):
                attention = block.get_submodule(layout.attention)
                attended = heads * attention.attention_head_size
                if not heads:
                    block.set_submodule(layout.attention, NoHeads(layout, hidden, attention.attention_head_size))
                for name in (layout.query, layout.key, layout.value):
                    _resize(block, name, hidden, attended)
                _resize(block, layout.attention_output, attended, hidden)
                _resize(block, layout.up, hidden, width)
                _resize(block, layout.down, width, hidden)

    for each, end in ((PrunedConfig, CONFIG), (PrunedClassifier, CLASSIFIER)):
        each.__name__ = each.__qualname__ = f"Pruned{family.classes}{end}"
    return PrunedConfig, PrunedClassifier


def _resize(block: nn.Module, name: str, in_features: int, out_features: int) -> None:
    """Replace, in place, the linear `name` of a block by an uninitialised one of the given size, by what is left of it if that is 0."""
    if in_features and out_features:
        bias = block.get_submodule(name).bias is not None
        block.set_submodule(name, nn.Linear(in_features, out_features, bias=bias))
    else:
        block.set_submodule(name, BiasOnly(out_features) if out_features else NoRows(in_features))


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

    def __init__(self, layout: Layout, hidden_size: int, head_dim: int):
        super().__init__()
        inside = f"{layout.attention}."
        for name in (layout.query, layout.key, layout.value):
            setattr(self, name.removeprefix(inside), NoRows(hidden_size))
        self.attention_head_size, self.dropout = head_dim, nn.Dropout(0.0)
        self.output_name = layout.attention_output.removeprefix(inside) if layout.attention_output.startswith(inside) else None
        if self.output_name:
            setattr(self, self.output_name, BiasOnly(hidden_size))

    def forward(self, hidden_states: torch.Tensor, *_, **__) -> tuple[torch.Tensor, None]:
        """(batch, seq, hidden_size) -> what attention adds to every token: the bias, or nothing, (batch, seq, 0), before the output."""
        context = hidden_states[..., :0]
        return (getattr(self, self.output_name)(context) if self.output_name else context), None


def __getattr__(name: str) -> type:
    """Return a pruned class by its name, as whoever loads such a checkpoint asks for it."""
    for family_name, family in FAMILIES.items():
        for place, end in enumerate((CONFIG, CLASSIFIER)):
            if name == f"Pruned{family.classes}{end}":
                return pruned_classes(family_name)[place]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
