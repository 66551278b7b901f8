"""Generating text a token at a time, without what costs more than the products of a small model do.

growing_cache   Keys and values stay where they are and a new token is written behind them; transformers' DynamicCache copies all of them
                for every token.
decode          Where compactmind/kernels can be had, all blocks of a Llama are one call for one token of one text, in whatever format its
                linears are: float32, W8A8, integers in groups. Otherwise the blocks run as they do for many tokens.
bf16            Float32 weights that are all bf16 numbers, as a checkpoint in bf16 has them, are multiplied from a copy in bf16 for a single
                token: the same products, half as much to read. The head's always, the blocks' where all copies fit into COPIES.

All come with the cache: `model.generate(..., past_key_values=growing_cache(model))`, or `model(..., past_key_values=...)`. Its plan holds
the weights as they are when it is made.
"""

import functools
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.mistral.modeling_mistral import MistralModel

from compactmind import kernels
from compactmind.methods.llama import LINEARS, LlamaBlock, is_llama, llama_blocks
from compactmind.methods.quantization.grouped import GroupedLinear
from compactmind.methods.quantization.w8a8_block import LAYERS, W8A8Block
from compactmind.methods.quantization.w8a8_linear import W8A8Linear
from compactmind.precision import WidenedLinear

ROOM = 64
"""Tokens there is room for at least beyond those that are there; half as many as are there, where that is more."""
COPIES = 2**30
"""Bytes that bf16 copies of a model's weights may take, the head's aside."""
MODELS = (LlamaModel, MistralModel)
"""Models whose one token `decode` computes; others run as they always do."""


# -------------------------------------------------------------------------------------------------------------- the cache
class GrowingLayer(DynamicLayer):
    """Keys and values of one layer, (batch, heads, tokens, head_dim): views of tensors that have room for more."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add keys and values (batch, heads, new, head_dim), in place; returns all there are."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        count, new = self.get_seq_length(), key_states.shape[-2]
        self.grow(key_states, new)
        self.keys[..., count:, :], self.values[..., count:, :] = key_states, value_states
        return self.keys, self.values

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Begin with nothing."""
        super().lazy_initialization(key_states, value_states)
        self.room: dict[str, torch.Tensor] = {}

    def grow(self, like: torch.Tensor, new: int) -> None:
        """Make room, in place, for `new` tokens more, whose keys and values are still to be written; `like` has the other sizes."""
        for name in ("keys", "values"):
            held, room = getattr(self, name), self.room.get(name)
            count = held.shape[-2] if held.numel() else 0
            total = count + new
            # who reorders, repeats or crops a batch leaves a tensor of its own behind
            if room is None or held.data_ptr() != room.data_ptr() or room.shape[0] != like.shape[0] or total > room.shape[-2]:
                room = like.new_empty(*like.shape[:-2], total + max(ROOM, total // 2), like.shape[-1])
                if count:
                    room[..., :count, :] = held
                self.room[name] = room
            setattr(self, name, room[..., :total, :])


class GrowingCache(DynamicCache):
    """A cache of GrowingLayer, and what `decode` needs to know of the model it is for, None if it cannot."""

    plan: "Plan | None" = None


def growing_cache(model: PreTrainedModel) -> GrowingCache:
    """Return an empty cache for one text that a model generates; while it does, the model's weights have to stay what they are.

    Layers with a sliding window keep the kind of cache that transformers has for them. The model's class learns, in place, to use the plan,
    and its head's to use bf16.
    """
    cache = GrowingCache(config=model.config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    cache.plan = plan_of(model)
    if cache.plan is not None and not isinstance(model.model, DecodesByPlan):
        model.model.__class__ = _decoding(type(model.model))
    if cache.plan is not None and type(model.lm_head) in (nn.Linear, WidenedLinear) and bf16_of(model.lm_head) is not None:
        model.lm_head.__class__ = Bf16Head
    return cache


def cache_for(model: PreTrainedModel) -> GrowingCache | None:
    """Return an empty cache for a text that a model generates; None, whatever the model takes itself, if it is no Llama."""
    return growing_cache(model) if isinstance(model, PreTrainedModel) and is_llama(model) else None


# --------------------------------------------------------------------------------------------------------------- one token
class Plan:
    """The tensors of a Llama's blocks in the order in which torch.ops.compactmind.decode takes them (kernels/avx2.cpp says which)."""

    def __init__(self, blocks: list[LlamaBlock]):
        self.norms = [norm.weight for block in blocks for norm in (block.input_norm, block.post_norm)]
        self.linears: list[torch.Tensor] = []
        self.kinds: list[int] = []
        linears = (getattr(block, field) for block in blocks for field in LINEARS)
        floats = sum(linear.weight.numel() for linear in linears if _is_float(linear) and linear.weight.dtype == torch.float32)
        for block in blocks:
            for field in LINEARS:
                tensors, kind = _decode_arguments(getattr(block, field), narrow=2 * floats <= COPIES)
                self.linears += tensors
                self.kinds += kind
        self.eps, self.scaling = blocks[0].input_norm.variance_epsilon, blocks[0].module.self_attn.scaling

    def __call__(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layers: list[GrowingLayer]) -> torch.Tensor:
        """Return what the blocks make of `hidden` (1, 1, channels) float32, and write its keys and values into `layers`, in place."""
        for layer in layers:
            layer.grow(layer.keys, 1)
        keys, values = [layer.keys for layer in layers], [layer.values for layer in layers]
        parts = self.norms, self.linears, self.kinds, keys, values, self.eps, self.scaling
        return torch.ops.compactmind.decode(hidden, cos.contiguous(), sin.contiguous(), *parts).view_as(hidden)


def bf16_of(linear: nn.Linear) -> torch.Tensor | None:
    """Return a linear's weights in bf16 if that is exact, else None. A copy is made once for a weight, and kept with the linear."""
    weight = linear.weight
    if weight.dtype == torch.bfloat16 and weight.device.type == "cpu":
        return weight
    made_of = weight.data_ptr(), weight.shape, None if weight.is_inference() else weight._version
    if linear.__dict__.get("bf16", (None,))[0] != made_of:
        copy = None
        if weight.dtype == torch.float32 and weight.device.type == "cpu":
            copy = weight.detach().to(torch.bfloat16, memory_format=torch.contiguous_format)
            copy = copy if torch.equal(copy.float(), weight) else None
        linear.__dict__["bf16"] = made_of, copy
    return linear.__dict__["bf16"][1]


class Bf16Head(WidenedLinear):
    """A head that multiplies few rows from `bf16_of` its weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., channels) -> (..., words)."""
        few = 0 < x.numel() <= kernels.FEW_ROWS * self.in_features and x.dtype == torch.float32 and self.bias is None
        if not few or torch.is_grad_enabled() or not kernels.usable_on(x.device) or (weight := bf16_of(self)) is None:
            return super().forward(x)
        flat = x.reshape(-1, self.in_features).contiguous()
        return torch.ops.compactmind.bfloat16_linear(flat, weight).view(*x.shape[:-1], -1)


def _is_float(linear: nn.Module) -> bool:
    wide = type(linear) in (nn.Linear, WidenedLinear) and linear.weight.dtype == torch.float32
    return wide or type(linear) is WidenedLinear and linear.weight.dtype == torch.bfloat16


def _decode_arguments(linear: nn.Module, narrow: bool) -> tuple[list[torch.Tensor], list[int]]:
    """Return the three tensors and three numbers by which `decode` knows a linear; `narrow`: float32 in bf16 where that is exact."""
    if isinstance(linear, W8A8Linear):
        nothing = linear.weight_scale.new_empty(0)
        scale = nothing if linear.input_scale is None else linear.input_scale
        rotation = 0 if linear.hadamard_input is None else len(linear.hadamard_input.matrix)
        return [linear.weight, linear.weight_scale, scale], [1, rotation, 0]
    if isinstance(linear, GroupedLinear):
        size = linear.in_features if linear.grid.group_size == -1 else linear.grid.group_size
        return [linear.packed, linear.scale, linear.zero], [2, linear.grid.bits, size]
    if hasattr(linear, "levels"):  # NF4Linear, which takes seconds to import
        return list(linear.levels), [3, 0, 0]
    copy = bf16_of(linear) if narrow else None
    return [linear.weight if copy is None else copy] * 3, [0, 0, 0]


def plan_of(model: PreTrainedModel) -> Plan | None:
    """Return how `decode` computes a token of a model, None if it cannot: another device, dtype, architecture or kind of linear."""
    if not isinstance(getattr(model, "model", None), MODELS) or not kernels.usable_on(model.device):
        return None
    if getattr(model.config, "sliding_window", None) or model.config.hidden_act != "silu":
        return None
    blocks = llama_blocks(model)
    for block in blocks:
        norms = {block.input_norm.weight.dtype, block.post_norm.weight.dtype}
        if not isinstance(block.module, (*LAYERS, W8A8Block)) or norms != {torch.float32}:
            return None
        if not all(_is_decodable(getattr(block, field)) for field in LINEARS):
            return None
    return Plan(blocks)


def _is_decodable(linear: nn.Module) -> bool:
    if linear.bias is not None:
        return False
    if isinstance(linear, GroupedLinear):
        return linear.kernel == "avx2" and linear.scale.dtype == torch.float16
    if hasattr(linear, "levels"):
        return linear.levels is not None
    return isinstance(linear, W8A8Linear) or _is_float(linear)


class DecodesByPlan:
    """Mixed into a model of MODELS: one token more of a text in a GrowingCache with a plan is one call."""

    def forward(
        self, input_ids: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None, past_key_values: Any = None, inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None, **kwargs: Any,
    ) -> BaseModelOutputWithPast:  # fmt: skip
        """The arguments are those of the transformers model."""
        plan = getattr(past_key_values, "plan", None)
        one = plan is not None and input_ids is not None and input_ids.shape == (1, 1) and not torch.is_grad_enabled()
        others = any(kwargs.get(name) for name in ("output_attentions", "output_hidden_states"))
        if (
            not one
            or others
            or not past_key_values.get_seq_length()
            or attention_mask is not None
            and not bool(attention_mask.all())
        ):
            return super().forward(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
                inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs,
            )  # fmt: skip
        hidden = self.embed_tokens(input_ids).float()
        if position_ids is None:
            position_ids = torch.tensor([[past_key_values.get_seq_length()]])
        cos, sin = self.rotary_emb(hidden, position_ids=position_ids)
        hidden = plan(hidden, cos, sin, past_key_values.layers)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)


@functools.cache
def _decoding(model_class: type[nn.Module]) -> type[nn.Module]:
    return type(model_class.__name__, (DecodesByPlan, model_class), {"__module__": model_class.__module__})
