"""Turn the blocks of an encoder of BERT's layout into W8A8: int8 weights and activations on a real int8 kernel.

Nothing is smoothed: these blocks normalize behind the addition, so what a linear reads is the residual stream itself, and dividing
its channels would need a multiplication on the way around. A scale per token is enough for them. The forward pass quantizes
every input once, takes q, k and v as one product, and handles so few sentences at a time that what lies between two products stays in
the processor's cache: in a batch of 32 passes over memory would otherwise take longer than the products. Of the last block a classifier
computes the first token alone, which is all its head reads (compactmind/methods/first_token.py). What the file looks like:
compactmind/formats/w8a8.py.
"""

import functools
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import GELUActivation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import eager_attention_forward

from compactmind.attention import attention_forward
from compactmind.methods.first_token import read_first_token_in_classifier
from compactmind.methods.pruning.encoder import EncoderLayer, encoder_blocks, encoder_layers, family_of
from compactmind.methods.quantization.packed_model import linears_to_quantize, require_quantizable, store_tables
from compactmind.methods.quantization.w8a8_block import joined, rows_of
from compactmind.methods.quantization.w8a8_linear import W8A8Linear, say_if_simulated

TOKENS = 512
"""Tokens handled at a time, at least a sentence: with 700 channels in float32 1.4 MB, near what a core's cache holds. All 2,048 of 32
sentences at once take 1.2 to 1.3 times as long, 128 tokens at a time as well (a scratch script, VNNI)."""


# --------------------------------------------------------------------------------------------------------- behind attention
def after_attention(hidden: torch.Tensor, attended: torch.Tensor, block: "W8A8EncoderBlock") -> torch.Tensor:
    """Output projection, FFN, and the two additions with their norms: (tokens, channels)."""
    return (_by_kernels if block.has_kernels else _by_torch)(hidden, attended, block)


def _by_torch(residual: torch.Tensor, attended: torch.Tensor, block: "W8A8EncoderBlock") -> torch.Tensor:
    layer = block.layer
    middle = layer.attention_norm(layer.attention_output.parts.linear(attended, layer.attention_output.bias).add_(residual))
    inner = block.activation(layer.up.parts.linear(middle, layer.up.bias))
    return layer.output_norm(layer.down.parts.linear(inner, layer.down.bias).add_(middle))


def _by_kernels(residual: torch.Tensor, attended: torch.Tensor, block: "W8A8EncoderBlock") -> torch.Tensor:
    """Return the same; what lies between two products is one function, and what it gives is rounded where it is in the cache."""
    layer, ops = block.layer, torch.ops.compactmind

    def product(linear: W8A8Linear, q: torch.Tensor, scale: torch.Tensor):
        return linear.parts.unscaled(q, scale, linear.bias)

    first, second = layer.attention_norm, layer.output_norm
    q, scale = ops.quantize_rows(attended.contiguous(), None, 0.0, False, 0)
    middle, q, scale = ops.add_norm_quantize(*product(layer.attention_output, q, scale), residual, first.weight, first.bias, first.eps)
    q, scale = ops.gelu_quantize(*product(layer.up, q, scale))
    return ops.add_norm_quantize(*product(layer.down, q, scale), middle, second.weight, second.bias, second.eps)[0]


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
        self.__dict__["kv"] = rows_of(self.qkv, parts[0].out_features)
        norms = (self.layer.attention_norm, self.layer.output_norm)
        floats = all(tensor.dtype == torch.float32 for norm in norms for tensor in (norm.weight, norm.bias))
        exact = isinstance(self.activation, (nn.GELU, GELUActivation)) and getattr(self.activation, "approximate", "none") == "none"
        self.__dict__["fits_kernels"] = exact and floats

    @property
    def has_kernels(self) -> bool:
        """Whether kernels do what lies between its products."""
        linears = (self.layer.attention_output, self.layer.up, self.layer.down)
        return self.fits_kernels and all(linear.around and linear.kernel != "simulated" for linear in linears)

    def _apply(self, function, recurse: bool = True):
        super()._apply(function, recurse)
        self.join()
        return self

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, *_: Any, **kwargs: Any
    ) -> torch.Tensor:
        """hidden_states: (batch, tokens, channels) -> the same shape and dtype."""
        return self._in_parts(self._some_sentences, hidden_states, attention_mask)

    def first_token(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """hidden_states: (batch, tokens, channels) and a mask as SDPA has it -> (batch, 1, channels): `forward` at the first token."""
        attended = self._in_parts(self._attended_by_first, hidden_states, attention_mask)
        first = hidden_states[:, 0].float().contiguous()
        return after_attention(first, attended, self)[:, None].to(hidden_states.dtype)

    def _in_parts(self, function, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        sentences = max(1, TOKENS // max(hidden_states.shape[1], 1))
        if not hidden_states.is_cpu or not isinstance(attention_mask, torch.Tensor | None):
            sentences = len(hidden_states)  # a GPU wants all at once, and the mask of flex_attention is of the whole batch
        parts = hidden_states.float().split(sentences)
        masks = [attention_mask] * len(parts)
        if isinstance(attention_mask, torch.Tensor) and len(attention_mask) == len(hidden_states):
            masks = attention_mask.split(sentences)
        results = [function(*each) for each in zip(parts, masks, strict=True)]
        return (results[0] if len(results) == 1 else torch.cat(results)).to(hidden_states.dtype)

    def _some_sentences(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        hidden = hidden_states.flatten(0, 1)
        heads = self._split_heads(self.qkv.parts.linear(hidden, self.qkv_bias), hidden_states, 3)
        return after_attention(hidden, self._attend(*heads, attention_mask), self).view(hidden_states.shape)

    def _attended_by_first(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        first, query = hidden_states[:, :1], self.layer.query
        (query,) = self._split_heads(query.parts.linear(first.flatten(0, 1), query.bias), first, 1)
        keys = self.kv.parts.linear(hidden_states.flatten(0, 1), self.qkv_bias[-self.kv.out_features :])
        mask = None if attention_mask is None else attention_mask[:, :, :1]
        return self._attend(query, *self._split_heads(keys, hidden_states, 2), mask)

    def _split_heads(self, product: torch.Tensor, like: torch.Tensor, parts: int) -> torch.Tensor:
        """(batch * tokens, parts * heads * head_dim) -> (parts, batch, heads, tokens, head_dim)."""
        return product.view(*like.shape[:2], parts, -1, self.layer.head_dim).permute(2, 0, 3, 1, 4)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Each (batch, heads, tokens, head_dim) -> (batch * queries, heads * head_dim)."""
        attention = self.attention_module
        implementation = attention.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        attend = attention_forward if implementation == "sdpa" else attend
        return attend(attention, query, key, value, mask, dropout=0.0, scaling=attention.scaling)[0].flatten(2).flatten(0, 1)


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
    read_first_token_in_classifier(model)


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
    say_if_simulated(model)
    return {
        "method": "w8a8",
        "bits": 8,
        "granularity": {"weights": "per output channel", "activations": "per_token"},
        "embeddings": embeddings,
        "tables": tables,
    }
