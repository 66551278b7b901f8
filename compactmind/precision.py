"""In what precision a language model is held, and in which it computes.

Held: in the dtype it was released in, on every device; on a CPU its weights then stay in the mapped file until somebody changes them.
Computed: in float32 by everything that measures, weighs or re-fits; training, and text that is only observed, has its products in bf16
where `mixed_precision` says that. A small model is float32 as a whole, which is fastest; of a large one each matrix is float32 only while
it multiplies. The numbers are the same: bf16 and fp16 are float32 without the last bits. A checkpoint that is used on a GPU, not worked
on, computes in the dtype of its file, as people serve it.
"""

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

SMALL_BYTES = 1_000_000_000
"""Bytes of all weights in float32 up to which a model is float32 as a whole: to widen each matrix anew takes an eighth of the time."""
ROWS_BYTES = 2**26
"""Bytes in float32 that a matrix is widened by at a time: the head of a large vocabulary is the largest matrix of most models."""


class WidenedLinear(nn.Linear):
    """A linear that computes in the dtype of what it reads, or that of autocast, whatever its weights wait in; these get no gradients."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        mixed = torch.is_autocast_enabled(input.device.type)
        dtype = torch.get_autocast_dtype(input.device.type) if mixed else input.dtype
        trained = mixed and self.weight.requires_grad and self.weight.dtype == torch.float32  # autocast rounds it, with gradients
        if self.weight.dtype == dtype or trained:
            return super().forward(input)
        return _Widened.apply(input.to(dtype), self.weight, self.bias)


class WidenedEmbedding(nn.Embedding):
    """A table whose output is float32, whatever it is held in."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(...) ids -> (..., channels) float32."""
        return super().forward(input).float()


class _Widened(torch.autograd.Function):
    """x W^T + b with W widened some rows at a time, and once more in the backward pass: autograd would keep the wide one for it."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        spans = _spans(weight)
        output = x.new_empty(*x.shape[:-1], len(weight)) if len(spans) > 1 else None
        for rows in spans:
            part = F.linear(x, weight[rows].to(x.dtype), None if bias is None else bias[rows].to(x.dtype))
            if output is None:
                return part
            output[..., rows] = part
        return output

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        (weight,) = ctx.saved_tensors
        if ctx.needs_input_grad[1]:
            raise RuntimeError(f"a weight of {weight.dtype} is not trained: make the model float32 first, or freeze it")
        return sum(gradient[..., rows] @ weight[rows].to(gradient.dtype) for rows in _spans(weight)), None, None


def _spans(weight: torch.Tensor) -> list[slice]:
    size = max(1, ROWS_BYTES // (4 * weight.shape[1]))
    return [slice(start, start + size) for start in range(0, len(weight), size)]


def dtype_to_hold(architecture: str, parameters: int, device: str | torch.device = "cpu") -> torch.dtype | None:
    """Return the dtype that the weights of a checkpoint are to be held in, None for what its file has."""
    generates, cuda = "CausalLM" in architecture, torch.device(device).type == "cuda"
    return None if generates and (cuda or 4 * parameters > SMALL_BYTES) else torch.float32


def prepare_for_inference(model: PreTrainedModel, quantized: bool) -> PreTrainedModel:
    """Make, in place, a language model whose weights are held as in its file compute as it is used; return it.

    In float32, but what is not quantized on a GPU in the dtype of its file, as people serve it.
    """
    return model if model.device.type == "cuda" and not quantized else widen(model)


def is_small(model: PreTrainedModel) -> bool:
    """Tell whether all weights of a model in float32 take no more than SMALL_BYTES."""
    return 4 * sum(parameter.numel() for parameter in model.parameters()) <= SMALL_BYTES


def work_in_float32(model: PreTrainedModel) -> PreTrainedModel:
    """Make, in place, a model of any floating-point dtype compute in float32; return it.

    Logits are those of `model.float()`. The weights of a small one become float32, those of any other stay as they are and get no
    gradients while they do.
    """
    return model.float() if is_small(model) else widen(model)


@functools.cache
def release_freed_memory() -> None:
    """Make glibc give each tensor's memory back when it is freed, not keep it for the next one of that size: a third of the peak is that.

    It takes no measurable time; other systems are left alone.
    """
    threshold, bytes_from = -3, 2**20  # M_MMAP_THRESHOLD
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(threshold, bytes_from)


def widen(model: PreTrainedModel) -> PreTrainedModel:
    """Make, in place, norms float32, and plain linears and tables compute in it whatever they are held in; return the model."""
    if model.device.type == "cpu":
        release_freed_memory()
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = WidenedLinear
        elif type(module) is nn.Embedding:
            module.__class__ = WidenedEmbedding
        elif type(module).__name__.endswith("Norm"):  # vectors: what they take does not count
            module.float()
    return model


@contextmanager
def widened(model: PreTrainedModel) -> Iterator[None]:
    """Inside the `with` block a model of any dtype computes in float32; afterwards it is unchanged."""
    before = [(module, module.__class__, [(each, each.data) for each in module.parameters(recurse=False)]) for module in model.modules()]
    if not computes_in_float32(model):
        widen(model)
    try:
        yield
    finally:
        for module, each, parameters in before:
            module.__class__ = each
            for parameter, data in parameters:
                parameter.data = data


def is_widened(model: PreTrainedModel) -> bool:
    """Tell whether `widen` was done to a model."""
    return any(isinstance(module, WidenedEmbedding | WidenedLinear) for module in model.modules())


def computes_in_float32(model: PreTrainedModel) -> bool:
    """Tell whether all weights of a dense model are float32 or widened where they are used."""
    return is_widened(model) or all(parameter.dtype == torch.float32 for parameter in model.parameters())
