"""Layers whose weights are integers of 2 to 8 bits with a scale for every group of a row, and how such integers are packed.

A linear and a table each know their own grid (grid.py), so that one model may have many. In memory as in a file an integer has its bits,
and nothing between them:

weight_packed      int32 (out, ceil(in * bits / 32)): of a row one integer behind the other, the first in the lowest bits
weight_scale       fp16 (out, groups)
weight_zero_point  int32 (ceil(out * bits / 32), groups), packed along the rows: with an integer zero
weight_minimum     fp16 (out, groups): with a float zero
weight_shape       int64 (2,): out, in

With super-blocks (superblocks.py) weight_scale and weight_minimum are int32 (out, ceil(groups * scale_bits / 32)), packed: multiples of
weight_scale_step and weight_minimum_step, fp16 (out, super-blocks); those of a scale with a sign have half their range added.

Without a minimum and super-blocks that is the layout `pack-quantized` of compressed-tensors 0.20.0 to the bit (formats/grouped.py says who
reads it); 0.15 packed widths that do not divide 32 otherwise. What multiplies them:

avx2         compactmind/kernels: few rows of inputs times the packed integers, which are made floating-point in registers; with AVX-512
             (`avx512` in the report) inputs are whole numbers of 24 bits, which multiply the integers as they are
dequantized  all integers are unpacked, a byte each, at the first product and made floating-point for every one
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from compactmind import kernels
from compactmind.methods.quantization.grid import Grid, from_integers
from compactmind.methods.quantization.superblocks import from_multiples, multiples_of, sign_offset

TENSORS = (
    "weight_packed", "weight_scale", "weight_scale_step", "weight_zero_point", "weight_minimum", "weight_minimum_step", "weight_shape",
)  # fmt: skip
"""What a file may hold of a weight."""


# ------------------------------------------------------------------------------------------------------------------ packing
AT_ONCE = 2**22
"""Integers that are packed at one time: five copies of them exist then."""


def pack(q: torch.Tensor, bits: int) -> torch.Tensor:
    """Return integers (rows, width), uint8 below 2^bits, without gaps: int32 (rows, ceil(width * bits / 32)), lowest bits first."""
    if q.numel() > AT_ONCE and len(q) > 1:
        result = torch.empty(len(q), -(-q.shape[1] * bits // 32), dtype=torch.int32, device=q.device)
        rows = max(1, AT_ONCE // q.shape[1])
        for part, place in zip(q.split(rows), result.split(rows), strict=True):
            place.copy_(pack(part, bits))
        return result
    places, words = _places(bits)
    parts = F.pad(q, (0, -q.shape[1] % len(places))).unflatten(1, (-1, len(places)))  # (rows, periods, integers of a period)
    packed = torch.zeros(*parts.shape[:2], words, dtype=torch.int32, device=q.device)
    for number, (word, shift) in enumerate(places):
        value = parts[..., number].int()
        packed[..., word] |= value << shift
        if shift + bits > 32:  # the rest is in the next word
            packed[..., word + 1] |= value >> (32 - shift)
    return packed.flatten(1)[:, : -(-q.shape[1] * bits // 32)].contiguous()


def unpack(packed: torch.Tensor, bits: int, width: int) -> torch.Tensor:
    """Return the integers (rows, width) that `pack` was given, uint8."""
    places, words = _places(bits)
    packed = F.pad(packed, (0, -packed.shape[1] % words)).unflatten(1, (-1, words))
    q = torch.empty(*packed.shape[:2], len(places), dtype=torch.uint8, device=packed.device)
    for number, (word, shift) in enumerate(places):
        value = packed[..., word] >> shift  # copies of the sign come in from above
        if shift + bits > 32:
            value = value & (1 << 32 - shift) - 1 | packed[..., word + 1] << (32 - shift)
        q[..., number] = value & (1 << bits) - 1
    return q.flatten(1)[:, :width].contiguous()


def _places(bits: int) -> tuple[list[tuple[int, int]], int]:
    """Return the word and the bit at which each integer begins until one begins with a word again, and how many words that takes."""
    count = 32 // math.gcd(32, bits)
    return [divmod(number * bits, 32) for number in range(count)], count * bits // 32


def _stepped(name: str, values: torch.Tensor, grid: Grid) -> dict[str, torch.Tensor]:
    """Return the tensors of the scales or minima of a grid with super-blocks, none for minima that it has not."""
    if name == "weight_minimum" and grid.zero != "float":
        return {}
    step, multiples = multiples_of(values.detach().half(), grid.fitted_together)
    return {name: pack((multiples + sign_offset(grid)).to(torch.uint8), grid.scale_bits), f"{name}_step": step}


def _from_steps(name: str, tensors: dict[str, torch.Tensor], grid: Grid, groups: int) -> torch.Tensor:
    multiples = unpack(tensors[name], grid.scale_bits, groups).to(torch.int16) - sign_offset(grid)
    return from_multiples(tensors[f"{name}_step"], multiples)


# ------------------------------------------------------------------------------------------------------------------- layers
class GroupedWeight(nn.Module):
    """A weight (rows, width) on a grid: `packed` as `pack` returns it, `scale` and `zero` (rows, groups) in fp16, float32 to be trained.

    `state_dict` holds the tensors at the top of this file. Follows a model to another device, never to another dtype.
    """

    def __init__(self, packed: torch.Tensor, width: int, scale: torch.Tensor, zero: torch.Tensor, grid: Grid):
        super().__init__()
        self.grid, self.shape = grid, (len(packed), width)
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scale", scale.half(), persistent=False)
        self.register_buffer("zero", zero.half() if grid.zero == "float" else zero.to(torch.uint8), persistent=False)
        self.prepare()

    @classmethod
    def of(cls, q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, grid: Grid, *others: Any) -> "GroupedWeight":
        """Return the weight with the integers `q` (rows, width), uint8; `others`: what else the class takes."""
        return cls(pack(q, grid.bits), q.shape[1], scale, zero, grid, *others)

    def prepare(self) -> None:
        """Choose what multiplies where the weight is now, see the top of this file; forget what was unpacked elsewhere."""
        whole = self.grid.group_size == -1 or self.grid.group_size % 8 == 0
        self.kernel = "avx2" if whole and kernels.usable_on(self.packed.device) else "dequantized"
        self.unpacked: torch.Tensor | None = None

    def _apply(self, function, recurse: bool = True):
        super()._apply(lambda tensor: tensor.to(function(tensor.new_empty(0)).device), recurse)
        self.prepare()
        return self

    @property
    def q(self) -> torch.Tensor:
        """The integers, uint8 (rows, width)."""
        return unpack(self.packed, self.grid.bits, self.shape[1])

    @property
    def _group(self) -> int:
        return self.shape[1] if self.grid.group_size == -1 else self.grid.group_size

    @property
    def _native(self) -> bool:
        return self.kernel == "avx2" and self.scale.dtype == torch.float16  # in float32 they are being trained

    def dequantize(self, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Return the weights that the integers stand for in float32, (rows, width), or those of some `rows` (any shape)."""
        if self._native:
            parts = (self.packed, self.scale, self.zero)
            if rows is not None:
                parts = (each[rows.flatten()] for each in parts)
            result = torch.ops.compactmind.grouped_dequantize(*parts, self.grid.bits, self._group, self.shape[1])
            return result if rows is None else result.view(*rows.shape, -1)
        if rows is None:
            q = self.unpacked = self.q if self.unpacked is None else self.unpacked
        elif self.unpacked is None:
            q = unpack(self.packed[rows].flatten(0, -2), self.grid.bits, self.shape[1]).view(*rows.shape, -1)
        else:
            q = self.unpacked[rows]
        scale, zero = (each if rows is None else each[rows] for each in (self.scale, self.zero))
        size, width = self.grid.group_size, self.shape[1]
        if size == -1 or width % size:  # one group, or a shorter last one
            spans = [(columns.stop - columns.start) for columns in self.grid.groups(width)]
            spans = torch.tensor(spans, device=q.device)
            scale, zero = (each.float().repeat_interleave(spans, dim=-1) for each in (scale, zero))
            return from_integers(q.float(), scale, zero, self.grid)
        parts = q.float().unflatten(-1, (-1, size)), scale.float().unsqueeze(-1), zero.float().unsqueeze(-1)
        return from_integers(*parts, self.grid).flatten(-2)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return x W^T + b of x (..., width): (..., rows), in x's dtype."""
        bias = None if bias is None else bias.to(x.dtype)
        few = 0 < x.numel() <= kernels.FEW_ROWS * self.shape[1]
        if few and self._native and not (x.requires_grad and torch.is_grad_enabled()):
            flat = x.reshape(-1, self.shape[1]).float().contiguous()
            parts = self.packed, self.scale, self.zero, self.grid.bits, self._group
            result = torch.ops.compactmind.grouped_linear(flat, *parts).to(x.dtype).view(*x.shape[:-1], -1)
            return result if bias is None else result + bias
        return F.linear(x, self.dequantize().to(x.dtype), bias)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what a file holds, see the top of this file."""
        stored = {"weight_packed": self.packed, "weight_shape": torch.tensor(self.shape)}
        if self.grid.superblocks:
            return stored | _stepped("weight_scale", self.scale, self.grid) | _stepped("weight_minimum", -self.zero, self.grid)
        stored["weight_scale"] = self.scale.detach().half()
        if self.grid.zero == "integer":
            stored["weight_zero_point"] = pack(self.zero.t().contiguous(), self.grid.bits).t().contiguous()
        if self.grid.zero == "float":
            stored["weight_minimum"] = self.zero.detach().half()
        return stored

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor], grid: Grid, *others: Any) -> "GroupedWeight":
        """Rebuild a weight from what `tensors` returned; `others`: what else the class takes.

        Raises KeyError if one is missing, ValueError if they do not fit the grid.
        """
        rows, width = tensors["weight_shape"].tolist()
        packed, groups = tensors["weight_packed"], len(grid.groups(width))
        words, blocks = -(-groups * grid.scale_bits // 32), groups // grid.fitted_together
        expected = {"weight_packed": (rows, -(-width * grid.bits // 32))}
        for name in ["weight_scale"] + ["weight_minimum"] * (grid.zero == "float"):
            expected[name] = (rows, words if grid.superblocks else groups)
            if grid.superblocks:
                expected[f"{name}_step"] = (rows, blocks)
        if grid.zero == "integer":
            expected["weight_zero_point"] = (-(-rows * grid.bits // 32), groups)
        if wrong := [name for name, shape in expected.items() if tensors[name].shape != shape]:
            shapes = ", ".join(f"{name} of {list(tensors[name].shape)}" for name in wrong)
            raise ValueError(f"a weight of {rows} x {width} in {grid} has other tensors: {shapes}")
        scale = _from_steps("weight_scale", tensors, grid, groups) if grid.superblocks else tensors["weight_scale"]
        zero = torch.full_like(scale, grid.levels // 2, dtype=torch.uint8)
        if grid.zero == "float":
            zero = -_from_steps("weight_minimum", tensors, grid, groups) if grid.superblocks else tensors["weight_minimum"]
        elif grid.zero == "integer":
            zero = unpack(tensors["weight_zero_point"].t().contiguous(), grid.bits, rows).t().contiguous()
        return cls(packed, width, scale, zero, grid, *others)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, tensor in self.tensors().items():
            destination[prefix + name] = tensor

    def extra_repr(self) -> str:
        """Return what print(model) shows of it."""
        return f"{self.shape[0]}, {self.shape[1]}, {self.grid}"


class GroupedLinear(GroupedWeight):
    """y = x W^T + b with W on a grid."""

    def __init__(
        self,
        packed: torch.Tensor,
        width: int,
        scale: torch.Tensor,
        zero: torch.Tensor,
        grid: Grid,
        bias: torch.Tensor | None = None,
    ):
        super().__init__(packed, width, scale, zero, grid)
        self.out_features, self.in_features = self.shape
        if bias is not None and not isinstance(bias, nn.Parameter):  # a parameter stays the one it is, and with it its dtype
            bias = nn.Parameter(bias, requires_grad=False)
        self.bias = bias

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in_features) -> (..., out_features), in x's dtype."""
        return self.product(x, self.bias)


class GroupedEmbedding(GroupedWeight):
    """A table on a grid; its output is float32."""

    def __init__(
        self,
        packed: torch.Tensor,
        width: int,
        scale: torch.Tensor,
        zero: torch.Tensor,
        grid: Grid,
        padding_idx: int | None = None,
    ):
        super().__init__(packed, width, scale, zero, grid)
        self.num_embeddings, self.embedding_dim = self.shape
        self.padding_idx = padding_idx

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(batch, tokens) ids -> (batch, tokens, embedding_dim) float32."""
        return self.dequantize(input)


class TiedHead(nn.Module):
    """A head that reads the weights of a table. It has no tensors of its own: they are stored, counted and moved once, with the table."""

    def __init__(self, table: GroupedEmbedding):
        super().__init__()
        self.__dict__["table"] = table  # not as a part, which would have the table's tensors in the file twice
        self.out_features, self.in_features = table.shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., channels) -> (..., words), in x's dtype."""
        return self.table.product(x)


def forget_unpacked(model: nn.Module) -> None:
    """Drop, in place, the copies with a byte for each integer that products without a kernel have left in a model."""
    for module in model.modules():
        if isinstance(module, GroupedWeight):
            module.unpacked = None
