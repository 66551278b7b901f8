"""Compute the last encoder block only where its output is read: at the first token, which is all a classifier looks at.

The queries, the output projection and the whole FFN of the last block are needed for one token of each sentence instead of all
of them; keys and values still come from every token. Logits and gradients are those of the ordinary forward pass (to rounding),
at up to 5/6 of one block less work: a fifth of a three-layer student's training step, measured. Float models have it in training and while
many sentences are scored; they themselves, their files and everything measured about them stay as they are. W8A8 classifiers and ONNX files
have it for good.
"""

import types
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from compactmind.methods.pruning.encoder import encoder_blocks, family_of
from compactmind.methods.pruning.modeling_pruned_encoder import BERT_BLOCK, DISTILBERT_BLOCK


def read_first_token_only(model: PreTrainedModel) -> None:
    """Make, in place, the last block of a classifier of one of FAMILIES return its first token alone, (batch, 1, hidden_size).

    `read_all_tokens` undoes it. The last entry of `hidden_states` has one token then. Raises CompactMindError for other models.
    """
    layer, forward = encoder_blocks(model)[-1], FORWARD[family_of(model).layout]
    layer.forward = types.MethodType(forward, layer)  # a bound method: a deep copy of the model binds it to the copy


IN_CLASSIFIER = ContextVar("what runs is a classifier of which nothing but logits is wanted", default=False)


def read_first_token_in_classifier(model: PreTrainedModel) -> None:
    """Let, in place, the last block of a classifier compute its first token alone wherever nobody can see more than that of it.

    That is while the classifier as a whole runs and neither hidden states nor attentions are asked for; its encoder called on its own
    computes all tokens. Where an attention implementation has masks of its own all tokens are computed too.
    """
    layer, layout = encoder_blocks(model)[-1], family_of(model).layout
    if "forward" in layer.__dict__:
        return
    layer.__dict__["first_token_of_layout"] = FORWARD[layout]
    layer.forward = types.MethodType(_as_much_as_is_seen, layer)
    model.register_forward_pre_hook(_begin, with_kwargs=True)
    model.register_forward_hook(_end, always_call=True)


def _begin(model: nn.Module, _: tuple, given: dict[str, Any]) -> None:
    asked = (given.get(name) for name in ("output_hidden_states", "output_attentions"))
    configured = (getattr(model.config, name, False) for name in ("output_hidden_states", "output_attentions"))
    IN_CLASSIFIER.set(not any(here or (here is None and always) for here, always in zip(asked, configured, strict=True)))


def _end(*_: Any) -> None:
    IN_CLASSIFIER.set(False)


def _as_much_as_is_seen(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, *others: Any, **named: Any):
    known = attention_mask is None or (isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4)
    if not (IN_CLASSIFIER.get() and known):
        return type(self).forward(self, hidden_states, attention_mask, *others, **named)
    if hasattr(self, "first_token"):
        return self.first_token(hidden_states, attention_mask)
    return self.first_token_of_layout(self, hidden_states, attention_mask)


def read_all_tokens(model: PreTrainedModel) -> None:
    """Give, in place, the last block its ordinary forward pass back."""
    encoder_blocks(model)[-1].__dict__.pop("forward", None)


def _bert_layer(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, *_, **__) -> torch.Tensor:
    own = self.attention.self
    context = _attention(own.query, own.key, own.value, own.attention_head_size, own.dropout, hidden_states, attention_mask)
    return self.feed_forward_chunk(self.attention.output(context, hidden_states[:, :1]))


def _distilbert_layer(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, *_, **__) -> torch.Tensor:
    own = self.attention
    context = _attention(own.q_lin, own.k_lin, own.v_lin, own.attention_head_size, own.dropout, hidden_states, attention_mask)
    attended = self.sa_layer_norm(own.out_lin(context) + hidden_states[:, :1])
    return self.output_layer_norm(self.ffn(attended) + attended)


FORWARD = {BERT_BLOCK: _bert_layer, DISTILBERT_BLOCK: _distilbert_layer}
"""Layout of a block -> its forward pass for one token."""


def _attention(
    query: nn.Linear,
    key: nn.Linear,
    value: nn.Linear,
    head_dim: int,
    dropout: nn.Dropout,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None,
) -> torch.Tensor:
    """Return what the first token attends to, (batch, 1, heads * head_dim).

    `attention_mask`: (batch, 1, queries, tokens) as transformers makes it (boolean or additive), or None.
    """
    if not query.out_features:  # a layer that lost all its heads
        return hidden_states[:, :1, :0]
    heads = [
        linear(states).unflatten(-1, (-1, head_dim)).transpose(1, 2)
        for linear, states in ((query, hidden_states[:, :1]), (key, hidden_states), (value, hidden_states))
    ]
    mask = None if attention_mask is None else attention_mask[:, :, :1]
    context = F.scaled_dot_product_attention(*heads, attn_mask=mask, dropout_p=dropout.p if dropout.training else 0.0)
    return context.transpose(1, 2).flatten(2)
