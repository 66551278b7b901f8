"""A short distillation after rounding: scales, float zeros and norms learn from the dense model's logits, the integers stay.

What every layer was rounded for is its own output; what counts is the whole model's. The second phase of EfficientQAT (Chen et al. 2024,
https://arxiv.org/abs/2407.11062) trains nothing but the step sizes for it: few numbers, no straight-through estimate, and the file keeps
its size and its integers. The loss is KL(dense || model). Backward goes block by block, so that one block is floating-point at a time.
Left out: weight decay, and training the integers.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from compactmind.devices import mixed_precision
from compactmind.errors import CompactMindError
from compactmind.forward import logits_divisor
from compactmind.methods.blockwise import block_inputs, run_block
from compactmind.methods.llama import llama_blocks, stream_norms
from compactmind.methods.quantization.grouped import GroupedLinear, GroupedWeight, forget_unpacked

TOKENS_AT_ONCE = 64
"""Tokens whose logits exist at one time."""
KEPT_BYTES = 500_000_000
"""What the dense model's head reads of every window is kept up to this size: a window that comes again is not read again."""
DECAY = (0.9, 0.95)
"""Adam's averages: so few steps want short ones."""


def tune_scales(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    windows: torch.Tensor,
    held_out: torch.Tensor,
    tokens: int,
    lr: float,
    show: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train, in place, a model's scales, float zeros and norms on `tokens` tokens of `windows` (windows, seq_len); returns what was done.

    A step is one window; a number moves by at most about `lr` times the mean size of those beside it, and less from step to step (cosine).
    Gradients are computed in bf16 where `mixed_precision` says that (fp16 has no range for them: float32), the KL on held-out text never.
    If the KL on `held_out` (windows, seq_len) is no smaller afterwards, nothing changes. What is trained has the dtype it had.
    Raises CompactMindError if the loss is no number.
    """
    steps, started, precision = max(1, math.ceil(tokens / windows.shape[1])), time.perf_counter(), mixed_precision()
    wanted_gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    places = [(norm, "weight") for norm in stream_norms(model)]
    for module in model.modules():
        if not isinstance(module, GroupedLinear) or module.grid.superblocks:  # of which not every scale can be written
            continue
        if module is not model.get_output_embeddings():  # whose scales a table may share
            places += [(module, "scale")] + [(module, "zero")] * (module.grid.zero == "float")
    before = [getattr(module, name).detach().clone() for module, name in places]
    _put(places, [each.float().clone() for each in before])  # which an optimizer changes
    values = [getattr(module, name).requires_grad_() for module, name in places]
    optimizer = torch.optim.Adam(
        [{"params": [value], "lr": lr * float(value.detach().abs().mean().clamp_min(1e-12))} for value in values], betas=DECAY
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    losses: list[float] = []
    read: dict[int, torch.Tensor] = {}

    def states_of_teacher(number: int) -> torch.Tensor:
        """Return what the dense model's head reads of a window: (seq_len, hidden) float32."""
        if number in read:
            return read[number]
        states = _states(teacher, windows[number])
        if (len(read) + 1) * states.nbytes <= KEPT_BYTES:
            read[number] = states
        return states

    def held_out_divergence() -> float:
        return sum(_divergence(model, teacher, window) for window in held_out) / len(held_out)

    at_first, kept = held_out_divergence(), False
    try:
        for step in range(steps):
            number = step % len(windows)
            states = states_of_teacher(number)
            with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16"):
                losses.append(_backward(model, teacher, windows[number], states))
            if not math.isfinite(losses[-1]):
                raise CompactMindError(
                    f"distilling after rounding has a loss of {losses[-1]} at step {step + 1}: a lower tuning_lr"
                )
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            show(f"gptq: learning {step + 1}/{steps} | KL {losses[-1]:.4f}")
        _put(places, [value.detach().to(old.dtype) for value, old in zip(values, before, strict=True)])
        at_last = held_out_divergence()
        kept = at_last < at_first
    finally:
        forget_unpacked(model)  # scales in float32 are torch's to multiply
        if not kept:
            _put(places, before)
        for value in values:
            value.grad = None
        for parameter, wanted in wanted_gradients:
            parameter.requires_grad_(wanted)
    return {
        "tokens": steps * windows.shape[1], "steps": steps, "lr": lr, "mixed_precision": precision, "losses": losses,
        "held_out": [at_first, at_last], "kept": kept, "seconds": time.perf_counter() - started,
    }  # fmt: skip


def _put(places: list[tuple[nn.Module, str]], values: list[torch.Tensor]) -> None:
    """Set, in place, what is trained: the data of a parameter, or a buffer."""
    for (module, name), value in zip(places, values, strict=True):
        if isinstance(getattr(module, name), nn.Parameter):
            getattr(module, name).data = value
        else:
            setattr(module, name, value)


@torch.no_grad()
def _divergence(model: PreTrainedModel, teacher: PreTrainedModel, window: torch.Tensor) -> float:
    """Return KL(teacher || model) in nats a token on a window (seq_len,)."""
    states = [_states(each, window) / logits_divisor(each) for each in (model, teacher)]
    heads, loss = [_head(each) for each in (model, teacher)], 0.0
    for start in range(0, len(window), TOKENS_AT_ONCE):
        parts = [each[start : start + TOKENS_AT_ONCE] for each in states]
        ours, theirs = ((part @ head.t()).log_softmax(dim=-1) for part, head in zip(parts, heads, strict=True))
        loss += float((theirs.exp() * (theirs - ours)).sum())
    return loss / len(window)


@torch.no_grad()
def _states(model: PreTrainedModel, window: torch.Tensor) -> torch.Tensor:
    """Return what a model's head reads of a window (seq_len,): (seq_len, hidden) float32."""
    return model.model(input_ids=window[None].to(model.device), use_cache=False).last_hidden_state[0].float()


def _backward(model: PreTrainedModel, teacher: PreTrainedModel, window: torch.Tensor, teacher_states: torch.Tensor) -> float:
    """Return KL(teacher || model) in nats a token on a window (seq_len,), and add its gradients to what is trained, in place.

    `teacher_states`: what the teacher's head reads of it, (seq_len, hidden).
    """
    (states,), arguments = block_inputs(model, window[None])
    blocks, reads = llama_blocks(model), []
    with torch.no_grad():
        for block, others in zip(blocks, arguments, strict=True):
            reads.append(states)
            states = run_block(block.module, states, others)
    last = states.detach().requires_grad_()
    normed = model.model.norm(last)
    loss, gradient = 0.0, torch.empty_like(normed[0])
    head, of_teacher, divisor = _head(model), _head(teacher), logits_divisor(model)
    with torch.no_grad():
        for start in range(0, len(window), TOKENS_AT_ONCE):
            part = slice(start, start + TOKENS_AT_ONCE)
            log_probabilities = (normed[0, part].float() / divisor @ head.t()).log_softmax(dim=-1)
            target = (teacher_states[part] / logits_divisor(teacher) @ of_teacher.t()).log_softmax(dim=-1)
            loss += float((target.exp() * (target - log_probabilities)).sum())
            gradient[part] = log_probabilities.exp_().sub_(target.exp_()) @ head / (divisor * len(window))
    normed.backward(gradient[None])
    gradient = last.grad
    for block, others in zip(reversed(blocks), reversed(arguments), strict=True):
        read = reads.pop().detach().requires_grad_()
        run_block(block.module, read, others).backward(gradient)
        gradient = read.grad
    return loss / len(window)


def _head(model: PreTrainedModel) -> torch.Tensor:
    head = model.get_output_embeddings()
    head = getattr(head, "table", head)  # a tied one's weights are there
    return head.dequantize() if isinstance(head, GroupedWeight) else head.weight.detach().float()
