"""Turn the blocks of an encoder of BERT's layout into W8A8: int8 weights and activations on a real int8 kernel.

Nothing is smoothed: these blocks normalize behind the addition, so what a linear reads is the residual stream itself, and dividing
its channels would need a multiplication on the way around. A scale per token is enough for them. The forward pass quantizes
every input once, takes q, k and v as one product, and handles so few tokens at a time that what lies between two products stays in
the processor's cache: in a batch of 32 sentences passes over memory would otherwise take longer than the products. What
the file looks like: compactmind/formats/w8a8.py.
"""

import functools
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import eager_attention_forward

from compactmind.methods.pruning.encoder import EncoderLayer, encoder_blocks, encoder_layers, family_of
from compactmind.methods.quantization.packed_model import linears_to_quantize, require_quantizable, store_tables
from compactmind.methods.quantization.w8a8_block import joined
from compactmind.methods.quantization.w8a8_linear import Int8Parts, W8A8Linear

TOKENS = 512
"""Tokens handled at a time: with 700 channels in float32 1.4 MB, near what a core's cache holds. All 4,096 of a batch at once take 1.5
times as long."""


# ---------------------------------------------------------------------------------------------------- around attention
def project_heads(hidden: torch.Tensor, qkv: Int8Parts, bias: torch.Tensor) -> torch.Tensor:
    """Return q, k and v of hidden (tokens, channels) next to each other: (tokens, 3 * heads * head_dim)."""
    return torch.cat([qkv.linear(part, bias) for part in hidden.split(TOKENS)])


def after_attention(hidden: torch.Tensor, attended: torch.Tensor, block: "W8A8EncoderBlock") -> torch.Tensor:
    """Output projection, FFN, and the two additions with their norms: (tokens, channels)."""
    layer, result = block.layer, torch.empty_like(hidden)
    output, up, down = layer.attention_output, layer.up, layer.down
    for place, residual, x in zip(result.split(TOKENS), hidden.split(TOKENS), attended.split(TOKENS), strict=True):
        middle = layer.attention_norm(output.parts.linear(x, output.bias).add_(residual))
        inner = block.activation(up.parts.linear(middle, up.bias))
        place.copy_(layer.output_norm(down.parts.linear(inner, down.bias).add_(middle)))
    return result


class W8A8EncoderBlock:
    """Mixed into an encoder layer whose linears are W8A8Linear: the forward pass described at the top of this file."""

    def fuse(self, layer: EncoderLayer, attention: nn.Module, activation: nn.Module) -> None:
        """Remember the parts by name and join q, k and v; not registered, so that no name in the file changes."""
        self.__dict__.update(layer=layer, attention_module=attention, activation=activation)
        self.join()

    def join(self) -> None:
        """Put the weights of q, k and v next to each other in memory; after loading and after moving."""
        parts = [self.layer.query, self.layer.key, self.layer.value]
        self.__dict__["qkv"] = joined(parts)
        self.__dict__["qkv_bias"] = torch.cat([linear.bias for linear in parts])

    def _apply(self, function, recurse: bool = True):
        super()._apply(function, recurse)
        self.join()
        return self

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, *_: Any, **kwargs: Any
    ) -> torch.Tensor:
        """hidden_states: (batch, tokens, channels) -> the same shape and dtype."""
        attention, hidden = self.attention_module, hidden_states.float().flatten(0, 1)
        heads = project_heads(hidden, self.qkv.parts, self.qkv_bias)
        query, key, value = heads.view(*hidden_states.shape[:2], 3, -1, self.layer.head_dim).permute(2, 0, 3, 1, 4)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
        attended, _ = attend(attention, query, key, value, attention_mask, dropout=0.0, scaling=attention.scaling)
        return (
            after_attention(hidden, attended.flatten(2).flatten(0, 1), self).view(hidden_states.shape).to(hidden_states.dtype)
        )


@functools.cache
def _with_int8_forward(layer_class: type[nn.Module]) -> type[nn.Module]:
    return type(f"W8A8{layer_class.__name__}", (W8A8EncoderBlock, layer_class), {})


def fuse_encoder(model: PreTrainedModel) -> None:
    """Give, in place, every block of a W8A8 encoder the forward pass above."""
    layout = family_of(model).layout
    for block, layer in zip(encoder_blocks(model), encoder_layers(model), strict=True):
        if not (layer.num_heads and layer.intermediate_size):
            continue  # without attention or FFN: its linears are int8 each
        if isinstance(block, W8A8EncoderBlock):
            continue  # fused already
        block.__class__ = _with_int8_forward(type(block))
        block.fuse(layer, block.get_submodule(layout.attention), block.get_submodule(layout.activation))


# ---------------------------------------------------------------------------------------------------------- quantizing
@torch.no_grad()
def quantize_encoder(model: PreTrainedModel, embeddings: str = "fp16") -> dict[str, Any]:
    """Make, in place, every linear of the blocks W8A8, a scale per token and per output channel; heads stay in full precision.

    `embeddings`: what tables are stored in, one of packed_model.EMBEDDINGS. Returns the description a loader and a manifest need. Raises
    CompactMindError and ValueError, see `require_quantizable`, before anything is changed.
    """
    require_quantizable(model, embeddings)
    for name, linear in linears_to_quantize(model):
        model.set_submodule(name, W8A8Linear.from_linear(linear))
    tables = store_tables(model, embeddings)
    fuse_encoder(model)
    return {
        "method": "w8a8",
        "bits": 8,
        "granularity": {"weights": "per output channel", "activations": "per_token"},
        "embeddings": embeddings,
        "tables": tables,
    }
