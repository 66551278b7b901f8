"""One model in training divided between the processes of a run: each holds its share of every weight, gradient and moment.

Fully sharded data parallelism (Zhao et al. 2023, https://arxiv.org/abs/2304.11277) by torch.distributed.fsdp.fully_shard, a decoder block
at a time and what stands around the blocks as one more unit: a unit's weights are gathered just before they are used, and dropped again.
Gathered are the float32 weights, so that losses in full precision are those of the model that is saved; products in training are bf16 where
that was asked for. accelerate shards on GPUs only, and leaves a model that cannot be made whole again: of it only the launcher is used.
Left out: adapters, 8-bit moments, and shares that wait in main memory while others are used.
"""

import copy

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from compactmind.errors import CompactMindError
from compactmind.methods.llama import llama_blocks


def check_sharding(mode: str, optimizer: str, mixed_precision: str = "no") -> None:
    """Raise CompactMindError on a way of training that is not divided between processes."""
    for what, value, valid in (
        ("mode", mode, ("full",)), ("optimizer", optimizer, ("adamw",)), ("mixed precision", mixed_precision, ("no", "bf16")),
    ):  # fmt: skip
        if value not in valid:
            raise CompactMindError(
                f"{what} {value!r} is not divided between processes (FSDP), only {' or '.join(valid)}: choose that, or launch without "
                "FSDP: `accelerate launch --multi_gpu` without its config file"
            )


@torch.no_grad()
def shard(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Return a copy of a model with float32 weights, divided between all processes, each share on its `device`; all must call it.

    Every process has the same `model`, whose weights are given away: it is empty until `gather`, whatever happens in between. It may be
    held in fewer bits: a unit at a time becomes float32.
    """
    held = {parameter: parameter.dtype for parameter in model.parameters()}
    sharded = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    units = [(block.module, original.module) for block, original in zip(llama_blocks(sharded), llama_blocks(model), strict=True)]
    for unit, original in [*units, (sharded, model)]:
        original.float()  # the parameters are those of the copy
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
        for parameter in original.parameters():
            parameter.data = parameter.new_empty(0, dtype=held[parameter])
    return sharded


@torch.no_grad()
def gather(sharded: PreTrainedModel, model: PreTrainedModel, accelerator: Accelerator) -> None:
    """Give, in place, `model` of the main process the whole weights of `sharded`, in main memory and its own dtypes; all must call it."""
    empty = dict(model.named_parameters())
    for name, parameter in sharded.named_parameters():
        whole = parameter.full_tensor()
        if accelerator.is_main_process:
            empty[name].data = whole.to("cpu", empty[name].dtype)


def autocast(objective: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Make, in place, a module that returns a loss compute in the mixed precision that was asked for; return it."""
    enabled = accelerator.mixed_precision == "bf16"
    objective.forward = torch.autocast(accelerator.device.type, torch.bfloat16, enabled=enabled)(objective.forward)
    return objective


def own_share(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this process holds of a tensor: all of one that is not divided."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_moments(optimizer: torch.optim.Optimizer) -> dict:
    """Return an optimizer's state dict with this process's shares in the place of divided tensors."""
    state = optimizer.state_dict()
    shares = {number: {name: own_share(value) for name, value in its.items()} for number, its in state["state"].items()}
    return {**state, "state": shares}


@torch.no_grad()
def load_own_moments(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Restore, in place, what `own_moments` returned."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def divided(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        if not isinstance(parameter, DTensor) or value.ndim == 0:
            return value
        whole = torch.zeros_like(parameter)
        whole.to_local().copy_(value)
        return whole

    state = {
        number: {name: divided(value, parameters[number]) for name, value in its.items()} for number, its in saved["state"].items()
    }
    optimizer.load_state_dict({**saved, "state": state})
