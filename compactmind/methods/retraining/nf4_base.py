"""Adapters beside a base of 4 bits: the linears of the blocks are NF4 while they are trained beside, and as released afterwards.

QLoRA (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314): NF4 with double quantization, rounded to nearest, gradients go through the
decoded weights to the adapters. There the model stays NF4; here the adapters are added to the weights that came in, so that the result is
of the kind it was, and what rounding cost is not learned away for good: whether that pays is measured on the result.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from compactmind.forward import room_for
from compactmind.methods.llama import LINEARS, llama_blocks


class NF4Base:
    """The linears of a model's blocks, whose places NF4 takes in the model, in place, from `__init__` until `use_original_linears`.

    Their weights wait in main memory, in the dtype they came in; beyond forward.MEMORY_TO_KEEP in a temporary file, which the system maps.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel):
        from compactmind.methods.quantization.packed_linear import packed_linear_like  # bitsandbytes takes seconds to import

        self.model, self.packed = model, True
        self.linears = {f"{block.name}.{LINEARS[field]}": getattr(block, field) for block in llama_blocks(model) for field in LINEARS}
        self.devices = {name: linear.weight.device for name, linear in self.linears.items()}
        self.weights = _room_like({name: linear.weight for name, linear in self.linears.items()})
        for name, linear in self.linears.items():
            packed = packed_linear_like(linear, "nf4", linear.weight.device, double_quantization=True)
            if linear.bias is not None:
                packed.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)  # it changes dtype with its first product
            packed.pack(linear.weight.data)
            self.weights[name].copy_(linear.weight.data)
            linear.weight.data = self.weights[name]
            model.set_submodule(name, packed)

    def use_original_linears(self) -> None:
        """Put, in place, the linears with the weights that came in where NF4 is, inside of adapters too; a second call does nothing."""
        if not self.packed:
            return
        for name, linear in self.linears.items():
            linear.weight.data = self.weights[name].to(self.devices[name], copy=True)  # what is added to it must not reach the original
            place = self.model.get_submodule(name)
            if hasattr(place, "base_layer"):  # peft's
                place.base_layer = linear
            else:
                self.model.set_submodule(name, linear)
        self.packed = False

    @torch.no_grad()
    def restore(self) -> None:
        """Give, in place, the linears that were put back the weights that came in again, whatever has been added to them."""
        for name, linear in self.linears.items():
            linear.weight.copy_(self.weights[name])


def _room_like(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return room for tensors in main memory or in a file: empty tensors of their shapes and dtypes."""
    views = {}
    for dtype in {tensor.dtype for tensor in tensors.values()}:
        of_dtype = {name: tensor for name, tensor in tensors.items() if tensor.dtype == dtype}
        sizes = [tensor.numel() for tensor in of_dtype.values()]
        parts = room_for(sum(sizes), dtype=dtype).split(sizes)
        views |= {name: part.view_as(tensor) for (name, tensor), part in zip(of_dtype.items(), parts, strict=True)}
    return views
