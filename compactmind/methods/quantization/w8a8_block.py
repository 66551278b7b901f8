"""The forward pass of a W8A8 Llama block in which every input is quantized once and nothing between two int8 products is done twice.

An int8 product is several times as fast as a float one, so a block spends its time around it: normalizing, scaling, rotating,
gating, quantizing, each a pass over memory. Here

- q/k/v are one product, gate/up are one product: their common input is quantized once;
- what lies between two products is one function (the six below). They take tensors only, so `torch.compile` translates each of
  them once for all blocks of all models, and turns it into a single pass;
- attention and the cache stay those of transformers, whichever implementation the model is configured for.

The modules, their names and the file stay as they are: a block with another forward pass, same numbers up to rounding.
"""

import functools
from collections.abc import Sequence
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, eager_attention_forward
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer

from compactmind.methods.quantization.rotation import rotate
from compactmind.methods.quantization.w8a8_linear import W8A8Linear, activation_scale, quantize_activation

LAYERS = (LlamaDecoderLayer, MistralDecoderLayer)
"""Blocks whose computation the forward pass below is; any other keeps its own, linear by linear."""


# ------------------------------------------------------------------------------------------- between two int8 products
def quantize(
    x: torch.Tensor, rotation: torch.Tensor | None, activations: str, static_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x (..., channels), rotated unless `rotation` is None, in int8, and its scale, which multiplies (..., channels)."""
    if rotation is not None:
        x = rotate(x, rotation)
    scale = activation_scale(x, activations, static_scale)
    return quantize_activation(x, scale), scale


def normalize_and_quantize(hidden, weight, eps, rotation, activations, static_scale):
    """RMSNorm, then `quantize`."""
    return quantize(F.rms_norm(hidden.float(), weight.shape, weight.float(), eps), rotation, activations, static_scale)


def scale_and_rotate(product, scale, channel_scale, cos, sin, rotated, head_dim):
    """Rescale the product of q, k and v (batch, tokens, channels), split it into heads and rotate the first `rotated` (RoPE).

    Returns the rotated heads and the others, both (batch, tokens, heads, head_dim); cos and sin: (batch or 1, tokens, head_dim).
    """
    heads = (product * channel_scale).view(*product.shape[:-1], product.shape[-1] // head_dim, head_dim)
    scale, half = scale.view(*scale.shape, 1), head_dim // 2
    cos = cos.float().unsqueeze(2) * scale
    sin = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1).float().unsqueeze(2) * scale
    turning = heads[:, :, :rotated]
    return (turning * cos).addcmul_(turning.roll(half, -1), sin), heads[:, :, rotated:] * scale


def add(residual, product, scale, channel_scale):
    """Return residual + the rescaled product, in the residual's dtype."""
    return torch.addcmul(residual.float(), product * channel_scale, scale).to(residual.dtype)


def add_normalize_and_quantize(residual, product, scale, channel_scale, weight, eps, rotation, activations, static_scale):
    """`add`, then `normalize_and_quantize`; returns the sum too."""
    hidden = add(residual, product, scale, channel_scale)
    return hidden, *normalize_and_quantize(hidden, weight, eps, rotation, activations, static_scale)


def gate_and_quantize(product, scale, channel_scale, rotation, activations, static_scale):
    """Rescale the product of gate and up, SiLU(gate) * up, then `quantize`."""
    gate, up = (product * channel_scale).mul_(scale).chunk(2, dim=-1)
    return quantize(F.silu(gate).mul_(up), rotation, activations, static_scale)


FUNCTIONS = (quantize, normalize_and_quantize, scale_and_rotate, add, add_normalize_and_quantize, gate_and_quantize)
EAGER = SimpleNamespace(**{function.__name__: function for function in FUNCTIONS})


@functools.cache
def compiled_functions() -> SimpleNamespace:
    """Return the functions above compiled, for any number of tokens; the translation itself happens at the first calls."""
    return SimpleNamespace(**{function.__name__: torch.compile(function, dynamic=True) for function in FUNCTIONS})


# ------------------------------------------------------------------------------------------------------------ the block
class W8A8Block:
    """Mixed into a decoder layer of LAYERS whose linears are W8A8Linear without bias, see the top of this file."""

    compiled = False

    def join(self) -> "W8A8Block":
        """Put the weights of linears with one input next to each other in memory; after loading and after moving."""
        attention, mlp = self.self_attn, self.mlp
        self.__dict__["qkv"] = _joined([attention.q_proj, attention.k_proj, attention.v_proj])  # not registered: no new tensors
        self.__dict__["gate_up"] = _joined([mlp.gate_proj, mlp.up_proj])
        return self

    def _apply(self, function, recurse: bool = True):
        super()._apply(function, recurse)
        return self.join()

    def forward(
        self, hidden_states, attention_mask=None, position_ids=None, past_key_values=None, use_cache=False,
        position_embeddings=None, **kwargs,
    ) -> torch.Tensor:  # fmt: skip
        """hidden_states: (batch, tokens, channels) -> the same shape; the arguments are those of the transformers layer."""
        between = compiled_functions() if self.compiled else EAGER
        attention, mlp = self.self_attn, self.mlp
        before, after = self.input_layernorm, self.post_attention_layernorm
        o, down, mode = attention.o_proj, mlp.down_proj, self.qkv.activations

        q, scale = between.normalize_and_quantize(
            hidden_states, before.weight, before.variance_epsilon, self.qkv.rotation, mode, self.qkv.input_scale
        )
        product = self.qkv.product(q)
        key_heads = attention.k_proj.out_features // attention.head_dim
        rotated = attention.q_proj.out_features // attention.head_dim + key_heads
        heads, value = between.scale_and_rotate(
            product, scale, self.qkv.weight_scale.t(), *position_embeddings, rotated, attention.head_dim
        )
        heads, value = heads.to(hidden_states.dtype).transpose(1, 2), value.to(hidden_states.dtype).transpose(1, 2)
        query, key = heads[:, :-key_heads], heads[:, -key_heads:]
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, attention.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
        attended, _ = attend(
            attention, query, key, value, attention_mask, dropout=0.0, scaling=attention.scaling, position_ids=position_ids,
            sliding_window=getattr(attention.config, "sliding_window", None), **kwargs,
        )  # fmt: skip

        q, scale = between.quantize(attended.flatten(2), o.rotation, mode, o.input_scale)
        hidden_states, q, scale = between.add_normalize_and_quantize(
            hidden_states, o.product(q), scale, o.weight_scale.t(), after.weight, after.variance_epsilon,
            self.gate_up.rotation, mode, self.gate_up.input_scale,
        )  # fmt: skip
        q, scale = between.gate_and_quantize(
            self.gate_up.product(q), scale, self.gate_up.weight_scale.t(),
            down.rotation, mode, down.input_scale,
        )  # fmt: skip
        return between.add(hidden_states, down.product(q), scale, down.weight_scale.t())


def _joined(linears: Sequence[W8A8Linear]) -> W8A8Linear:
    """Return one linear with the output channels of all; the weights of `linears` become views of its own."""
    first, rows = linears[0], [linear.out_features for linear in linears]
    joined = W8A8Linear(first.in_features, sum(rows), bias=False, activations=first.activations, device="meta")
    joined.weight = torch.cat([linear.weight for linear in linears])
    joined.weight_scale = torch.cat([linear.weight_scale for linear in linears])
    joined.input_scale, joined.hadamard_input = first.input_scale, first.hadamard_input
    for linear, weight in zip(linears, joined.weight.split(rows), strict=True):
        linear.weight = weight
    return joined.prepare()


@functools.cache
def _with_int8_forward(layer_class: type[nn.Module]) -> type[nn.Module]:
    return type(f"W8A8{layer_class.__name__}", (W8A8Block, layer_class), {})


def fuse_blocks(model: PreTrainedModel) -> int:
    """Give, in place, every block of a W8A8 model that fits it the forward pass above; returns how many fit.

    A block fits if it is one of LAYERS, all its linears are W8A8Linear without bias, and its gate is SiLU.
    """
    fused = 0
    for layer in model.model.layers:
        linears = [module for module in layer.modules() if isinstance(module, (nn.Linear, W8A8Linear))]
        fits = type(layer) in LAYERS and all(isinstance(linear, W8A8Linear) and linear.bias is None for linear in linears)
        if fits and layer.mlp.config.hidden_act == "silu":
            layer.__class__ = _with_int8_forward(type(layer))
            layer.join()
            fused += 1
    return fused


def compile_blocks(model: PreTrainedModel, compiled: bool = True) -> PreTrainedModel:
    """Let, in place, the fused blocks of a W8A8 model use compiled functions (or eager ones again); needs a C++ compiler on CPUs.

    The first calls take the time to compile six functions, whatever the number of blocks.
    """
    for module in model.modules():
        if isinstance(module, W8A8Block):
            module.compiled = compiled
    return model
