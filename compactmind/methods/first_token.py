"""Compute the last encoder block only where its output is read: at the first token, which is all a classifier looks at.

The queries, the output projection and the whole FFN of the last block are needed for one token of each sentence instead of all
of them; keys and values still come from every token. Logits and gradients are those of the ordinary forward pass (to rounding),
at up to 5/6 of one block less work: a fifth of a three-layer student's training step, measured. It is for training and for scoring
many sentences; the models themselves, their files and everything measured about them stay as they are.
"""

import types

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
