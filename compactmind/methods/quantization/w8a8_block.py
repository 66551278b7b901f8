"""The forward pass of a W8A8 Llama block in which every input is quantized once and nothing between two int8 products is done twice.

An int8 product is several times as fast as a float one, so a block spends its time around it: normalizing, scaling, rotating,
gating, quantizing, each a pass over memory. Here

- q/k/v are one product, gate/up are one product: their common input is quantized once;
- what lies before attention is one function, what lies after it another. They take tensors only, so `torch.compile` translates
  each of them once for all blocks of all models, and fuses what is between the products;
- attention and the cache stay those of transformers, whichever implementation the model is configured for.

The modules, their names and the file stay as they are: a block with another forward pass, same numbers up to rounding.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, eager_attention_forward
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer

from compactmind.methods.quantization.w8a8_linear import Int8Parts, W8A8Linear

LAYERS = (LlamaDecoderLayer, MistralDecoderLayer)
"""Blocks whose computation the forward pass below is; any other keeps its own, linear by linear."""


# ---------------------------------------------------------------------------------------------------- around attention
def before_attention(
    hidden: Tensor, norm_weight: Tensor, eps: float, qkv: Int8Parts, cos: Tensor, sin: Tensor, rotated: int, head_dim: int
) -> tuple[Tensor, Tensor]:
    """RMSNorm, the product of q, k and v, split into heads of which the first `rotated` are turned (RoPE).

    hidden (batch, tokens, channels), cos and sin (batch or 1, tokens, head_dim). Returns the turned heads and the others, both
    (batch, heads, tokens, head_dim) in the dtype of `hidden`.
    """
    if _by_kernels(hidden, qkv):
        q, scale = torch.ops.compactmind.quantize_rows(hidden.flatten(0, 1), norm_weight, eps, False, qkv.turned)
        product = qkv.unscaled(q, scale, None)[:3]
        heads = torch.ops.compactmind.turn_heads(*product, cos.float().contiguous(), sin.float().contiguous(), rotated).transpose(1, 2)
        return heads[:, :rotated], heads[:, rotated:]
    heads = qkv.linear(hidden, norm=norm_weight, eps=eps).unflatten(-1, (-1, head_dim))
    first, second = heads[:, :, :rotated].chunk(2, dim=-1)  # not torch.roll: compiled, its indices make this 50 times slower
    cos, sin = (angle.float().unsqueeze(2).chunk(2, dim=-1) for angle in (cos, sin))
    turned = torch.cat((first * cos[0] - second * sin[0], second * cos[1] + first * sin[1]), dim=-1)
    return turned.to(hidden.dtype).transpose(1, 2), heads[:, :, rotated:].to(hidden.dtype).transpose(1, 2)


def after_attention(
    residual: Tensor, attended: Tensor, o: Int8Parts, norm_weight: Tensor, eps: float, gate_up: Int8Parts, down: Int8Parts
) -> Tensor:
    """o_proj, RMSNorm, SiLU(gate) * up and down_proj with their two additions to the residual stream (batch, tokens, channels)."""
    if _by_kernels(residual, o, gate_up, down):
        ops, rows = torch.ops.compactmind, residual.flatten(0, 1)
        q, scale = ops.quantize_rows(attended.flatten(0, 1).contiguous(), None, 0.0, False, o.turned)
        hidden, q, scale = ops.add_rms_quantize(*o.unscaled(q, scale, None)[:3], rows, norm_weight.float(), eps, gate_up.turned)
        q, scale = ops.gate_quantize(*gate_up.unscaled(q, scale, None)[:3], down.turned)
        return ops.add_rms_quantize(*down.unscaled(q, scale, None)[:3], hidden, None, 0.0, 0)[0].view(residual.shape)
    hidden = (residual.float() + o.linear(attended)).to(residual.dtype)
    gate_and_up = gate_up.linear(hidden, norm=norm_weight, eps=eps)
    return (hidden.float() + down.linear(gate_and_up, gate=True)).to(residual.dtype)


def _by_kernels(hidden: Tensor, *linears: Int8Parts) -> bool:
    """Tell whether kernels do what lies between the products: one function each, that leaves nothing to be read again."""
    fit = all(linear.around and linear.activations == "per_token" and linear.kernel != "simulated" for linear in linears)
    return fit and hidden.dtype == torch.float32 and hidden.is_contiguous() and not torch.compiler.is_compiling()


COMPILED_TOKENS = 16
"""Fewer tokens than this are computed eagerly in a compiled model too: calling a compiled function costs more than it saves."""


@functools.cache
def compiled_functions() -> tuple[Callable, Callable]:
    """Return the two functions compiled, for any number of tokens; the translation itself happens at the first calls."""
    return torch.compile(before_attention, dynamic=True), torch.compile(after_attention, dynamic=True)


# ------------------------------------------------------------------------------------------------------------ the block
class W8A8Block:
    """Mixed into a decoder layer of LAYERS whose linears are W8A8Linear without bias, see the top of this file."""

    compiled = False

    def join(self) -> "W8A8Block":
        """Put the weights of linears with one input next to each other in memory; after loading and after moving."""
        attention, mlp = self.self_attn, self.mlp
        self.__dict__["qkv"] = joined([attention.q_proj, attention.k_proj, attention.v_proj])  # not registered: no new tensors
        self.__dict__["gate_up"] = joined([mlp.gate_proj, mlp.up_proj])
        return self

    def _apply(self, function, recurse: bool = True):
        super()._apply(function, recurse)
        return self.join()

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values: Cache | None = None, use_cache: bool = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """hidden_states: (batch, tokens, channels) -> the same shape; the arguments are those of the transformers layer."""
        attention = self.self_attn
        before, after = before_attention, after_attention
        if self.compiled and hidden_states.shape[1] >= COMPILED_TOKENS:
            before, after = compiled_functions()
        norm = self.input_layernorm
        key_heads = attention.k_proj.out_features // attention.head_dim
        rotated = attention.q_proj.out_features // attention.head_dim + key_heads
        heads, value = before(
            hidden_states, norm.weight, norm.variance_epsilon, self.qkv.parts, *position_embeddings, rotated, attention.head_dim
        )
        query, key = heads[:, :-key_heads], heads[:, -key_heads:]
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, attention.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
        attended, _ = attend(
            attention, query, key, value, attention_mask, dropout=0.0, scaling=attention.scaling, position_ids=position_ids,
            sliding_window=getattr(attention.config, "sliding_window", None), **kwargs,
        )  # fmt: skip
        norm = self.post_attention_layernorm
        return after(
            hidden_states, attended.flatten(2), attention.o_proj.parts, norm.weight, norm.variance_epsilon,
            self.gate_up.parts, self.mlp.down_proj.parts,
        )  # fmt: skip


def joined(linears: Sequence[W8A8Linear]) -> W8A8Linear:
    """Return one linear with the output channels of all; the weights of `linears` become views of its own."""
    first, rows = linears[0], [linear.out_features for linear in linears]
    joined = W8A8Linear(first.in_features, sum(rows), bias=False, activations=first.activations, device="meta")
    joined.weight = torch.cat([linear.weight for linear in linears])
    joined.weight_scale = torch.cat([linear.weight_scale for linear in linears])
    joined.input_scale, joined.hadamard_input = first.input_scale, first.hadamard_input
    for linear, weight in zip(linears, joined.weight.split(rows), strict=True):
        linear.weight = weight
    return joined.prepare()


def rows_of(linear: W8A8Linear, start: int) -> W8A8Linear:
    """Return a linear with the output channels of another from number `start` on; its weight is a view."""
    part = W8A8Linear(linear.in_features, linear.out_features - start, bias=False, activations=linear.activations, device="meta")
    part.weight, part.weight_scale = linear.weight[start:], linear.weight_scale[start:]
    part.input_scale, part.hadamard_input = linear.input_scale, linear.hadamard_input
    return part.prepare()


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

    The first calls take the time to compile two functions, whatever the number of blocks.
    """
    for module in model.modules():
        if isinstance(module, W8A8Block):
            module.compiled = compiled
    return model
