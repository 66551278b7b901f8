"""Attention on CPUs: of a whole text by a kernel of our own, everything else by torch.

torch's kernel for CPUs computes most of what a causal mask then takes away: 4.4 ms for 512 tokens of nine heads, 1.9 by a kernel of ours
(kernels/attention.h), which is a quarter of what a W8A8 Llama takes for a prompt.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from compactmind import kernels

NAME = "compactmind"
"""What transformers knows it by."""
OTHER = ("softcap", "position_bias", "s_aux", "cache", "output_attentions")
"""Arguments of attention that is another one."""


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, is_causal: bool | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """query (batch, heads, tokens, head_dim), key and value (batch, key heads, tokens, head_dim) -> (batch, tokens, heads, head_dim).

    What is in bf16 is computed in float32. The arguments are those of transformers' attention functions; a mask of None means that nothing
    is masked but, in a causal model, what comes later.
    """
    causal = attention_mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    whole = query.shape[2] > 1 and key.shape == value.shape and (query.shape[2] == key.shape[2] or not causal)
    plain = not dropout and not any(kwargs.get(name) for name in OTHER) and not torch.is_grad_enabled()
    held = query.dtype in (torch.float32, torch.bfloat16) and query.dtype == key.dtype == value.dtype
    if whole and plain and held and _is_of_tokens(attention_mask) and kernels.usable_on(query.device):
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        parts = (each.float() if each.stride(-1) == 1 else each.float().contiguous() for each in (query, key, value))
        return torch.ops.compactmind.attention(*parts, attention_mask, causal, scaling).to(query.dtype), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )


def _is_of_tokens(mask: Tensor | None) -> bool:
    """Tell whether a mask says which tokens are read, the same for all heads."""
    return mask is None or mask.dtype == torch.bool and mask.ndim == 4 and mask.shape[1] == 1 and mask.stride(-1) == 1


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


def with_attention_kernel(model: PreTrainedModel) -> PreTrainedModel:
    """Let, in place, a causal language model that would use torch's attention use this one; return it."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)
    return model
