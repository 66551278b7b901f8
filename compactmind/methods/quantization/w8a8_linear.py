"""A linear layer with int8 weights and int8 activations whose product really runs on an int8 kernel.

y = (q(x) @ q(W)^T) * s_x * s_W + b with symmetric int8 (-127..127): s_W per output channel; s_x per token (dynamic), per tensor
(dynamic) or per tensor (static, from calibration): the O1, O2 and O3 of SmoothQuant (Xiao et al. 2023,
https://arxiv.org/abs/2211.10438). With a rotation, x is first multiplied by it (and W has been, see rotation.py). Kernels:

int_mm     torch._int_mm: CPUs with int8 instructions (VNNI), CUDA of compute capability 7.5 and later (widths multiples of 8);
           on CPUs without them it saturates: wrong numbers
avx2       compactmind/kernels: x86 CPUs without them, where a C++ compiler is at hand; with AVX-VNNI (`avx_vnni` in the report) four
           products and their sum are one instruction
simulated  the same integers multiplied in floating point: the same int32 to the last bit, no speed-up, and the report says so

Where there is a compiler compactmind/kernels also do what is around int_mm on a CPU: norm, gate, rotation, rounding and scales.

COMPACTMIND_KERNEL=simulated in the environment asks for the last everywhere, as on a machine that has none of the others
(`COMPACTMIND_KERNEL=simulated ./test.sh`). No file depends on the kernel: the sums are the same, and what is written down are weights and
scales.

Not onednn.qlinear_pointwise with prepacked weights: no faster on 512 tokens, three times slower on one, twice the memory, and with
signed activations torch 2.13 ships only its reference loop, a thousand times slower.
"""

import sys
from typing import NamedTuple

import torch
from torch import nn

from compactmind import kernels
from compactmind.methods.quantization.rotation import InputRotation, rotate

ACTIVATIONS = ("per_token", "per_tensor", "per_tensor_static")
LEVELS = 127
"""Largest int8 magnitude used; -128 is left out so that the range is symmetric."""
EXACT_IN_FLOAT32 = 2**24 // LEVELS**2
"""So many products of two int8 add up without rounding in float32, in whatever order: 1,040."""
SMALLEST_SCALE = 1e-9
CUDA_ROWS = 32
"""torch._int_mm on CUDA wants more than 16 rows: fewer are padded to this many."""


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 weights (out, in) and their scales per output channel, float32 (out, 1)."""
    weight = weight.float()
    scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=SMALLEST_SCALE) / LEVELS
    return (weight / scale).round().clamp(-LEVELS, LEVELS).to(torch.int8), scale


def activation_scale(x: torch.Tensor, activations: str, static_scale: torch.Tensor | None = None) -> torch.Tensor:
    """Return the scale of x (..., in): float32 (..., 1) per token, else one number of as many dimensions, or `static_scale`."""
    if activations == "per_tensor_static":
        return static_scale
    dim = -1 if activations == "per_token" else tuple(range(x.ndim))
    absmax = torch.maximum(x.amax(dim, keepdim=True), -x.amin(dim, keepdim=True))  # 20 times as fast as the infinity norm
    return absmax.float().clamp(min=SMALLEST_SCALE) / LEVELS


def quantize_activation(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return x (..., in) / scale, rounded to the nearest even and clipped to -127..127, int8."""
    return (x.float() * scale.reciprocal()).round_().clamp_(-LEVELS, LEVELS).to(torch.int8)


def kernel_for(device: torch.device, in_features: int, out_features: int) -> str:
    """Return which of the kernels above multiplies int8 matrices of these widths on a device.

    Raises CompactMindError if COMPACTMIND_KERNEL names anything but `simulated`.
    """
    if kernels.simulated_wanted():
        return "simulated"
    if device.type == "cuda":
        capable = torch.cuda.get_device_capability(device) >= (7, 5) and in_features % 8 == 0 and out_features % 8 == 0
        return "int_mm" if capable else "simulated"
    if device.type == "cpu" and torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported():
        return "int_mm"
    return "avx2" if kernels.usable_on(device) else "simulated"


class Int8Parts(NamedTuple):
    """What an int8 product needs of a W8A8Linear: tensors and names, no module, so that compiled code serves every layer."""

    weight: torch.Tensor
    channel_scale: torch.Tensor
    """(1, out): what a product is multiplied by, beside the scale of its input."""
    rotation: torch.Tensor | None
    input_scale: torch.Tensor | None
    activations: str
    kernel: str
    around: bool
    """Whether compactmind/kernels do what is around the product: norm, gate, rotation, rounding, scales."""

    @property
    def turned(self) -> int:
        """Size of the rotation, 0 if there is none."""
        return 0 if self.rotation is None else len(self.rotation)

    def linear(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        norm: torch.Tensor | None = None,
        eps: float = 0.0,
        gate: bool = False,
    ) -> torch.Tensor:
        """Return x W^T + b of x (..., in): float32 (..., out). x is rotated if there is a rotation, and rounded to int8.

        `norm` (in,): RMSNorm with this weight and `eps` comes first. `gate`: x is (..., 2 in), and SiLU of the first half times the second
        is taken.
        """
        native = self.around and self.activations == "per_token"
        if native:
            rows = x.reshape(-1, x.shape[-1]).float().contiguous()
            q, scale = torch.ops.compactmind.quantize_rows(rows, None if norm is None else norm.float(), eps, gate, self.turned)
        else:
            if norm is not None:
                x = nn.functional.rms_norm(x.float(), norm.shape, norm.float(), eps)
            if gate:
                first, second = x.chunk(2, dim=-1)
                x = nn.functional.silu(first).mul_(second)
            if self.rotation is not None:
                x = rotate(x.float(), self.rotation)
            scale = activation_scale(x, self.activations, self.input_scale)
            q = quantize_activation(x, scale)
        if self.kernel == "int_mm" and native:
            product = torch._int_mm(q, self.weight.t())
            return torch.ops.compactmind.scale_product(product, scale, self.channel_scale, bias).view(*x.shape[:-1], -1)
        if self.kernel != "avx2":
            product = self.product(q) * self.channel_scale
            return product.mul_(scale) if bias is None else torch.addcmul(bias, product, scale)
        q = q.reshape(-1, q.shape[-1])
        scale = scale.flatten().expand(len(q)).contiguous()
        return torch.ops.compactmind.int8_linear(q, scale, self.weight, self.channel_scale, bias).view(*x.shape[:-1], -1)

    def unscaled(self, q: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Return the product of int8 q (rows, in) with scales (rows, 1) as the kernels around it take it: int32 (rows, out) with the scales
        and the bias that are missing, or float32 and three times None."""
        if self.kernel == "int_mm":
            return torch._int_mm(q, self.weight.t()), scale, self.channel_scale, bias
        return torch.ops.compactmind.int8_linear(q, scale, self.weight, self.channel_scale, bias), None, None, None

    def product(self, q: torch.Tensor) -> torch.Tensor:
        """Return q @ W_int8^T for int8 q (..., in): int32 (..., out), not yet scaled, by the other kernels."""
        rows = q.reshape(-1, self.weight.shape[1])
        if self.kernel == "simulated":
            parts = zip(rows.split(EXACT_IN_FLOAT32, 1), self.weight.split(EXACT_IN_FLOAT32, 1), strict=True)
            result = sum((left.float() @ right.float().t()).to(torch.int32) for left, right in parts)
        elif rows.is_cuda and len(rows) < CUDA_ROWS:
            result = torch._int_mm(nn.functional.pad(rows, (0, 0, 0, CUDA_ROWS - len(rows))), self.weight.t())[: len(rows)]
        else:
            result = torch._int_mm(rows, self.weight.t())
        return result.view(*q.shape[:-1], self.weight.shape[0])


class W8A8Linear(nn.Module):
    """y = x W^T + b in int8, see the top of this file. Takes and returns float32, bfloat16 or float16; no gradients.

    Buffers, as the compressed-tensors format names them: `weight` int8 (out, in), `weight_scale` float32 (out, 1), and with
    per_tensor_static `input_scale` float32 (1,). `rotation` is the size of the Hadamard blocks that the input is multiplied by, 0
    for none. Raises ValueError on an unknown granularity of the activations.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool, activations: str = "per_token", rotation: int = 0, device=None
    ):
        super().__init__()
        if activations not in ACTIVATIONS:
            raise ValueError(f"unknown activations {activations!r}: choose one of {', '.join(ACTIVATIONS)}")
        self.in_features, self.out_features, self.activations = in_features, out_features, activations
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.ones(out_features, 1, device=device))
        self.register_buffer(
            "input_scale", torch.ones(1, device=device) if activations == "per_tensor_static" else None
        )  # fmt: skip
        self.hadamard_input = InputRotation(rotation, device) if rotation else None
        self.bias = nn.Parameter(torch.zeros(out_features, device=device), requires_grad=False) if bias else None
        self.kernel, self.around = "simulated", False

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, activations: str = "per_token", input_absmax: float | None = None, rotation: int = 0
    ) -> "W8A8Linear":
        """Return the int8 version of a linear layer, whose weight is rotated already if there is to be a rotation.

        `input_absmax` (from calibration) is needed for per_tensor_static. Raises ValueError without it.
        """
        if activations == "per_tensor_static" and input_absmax is None:
            raise ValueError("per_tensor_static needs input_absmax, the largest magnitude of the input on calibration text")
        quantized = cls(
            linear.in_features, linear.out_features, linear.bias is not None, activations, rotation, linear.weight.device
        )
        quantized.weight, quantized.weight_scale = quantize_weight(linear.weight.detach())
        if activations == "per_tensor_static":
            quantized.input_scale.fill_(max(input_absmax / LEVELS, SMALLEST_SCALE))
        if linear.bias is not None:
            quantized.bias.data = linear.bias.detach().float().clone()
        return quantized.prepare()

    def prepare(self) -> "W8A8Linear":
        """Choose the kernel for where the weights are now; after loading and after moving."""
        self.kernel = kernel_for(self.weight.device, self.in_features, self.out_features)
        self.around = self.kernel != "simulated" and kernels.usable_on(self.weight.device)
        if self.hadamard_input is not None:
            self.hadamard_input.prepare()
        return self

    def _apply(self, function, recurse: bool = True):
        """Follow a model to another device but never to another dtype."""
        super()._apply(lambda tensor: tensor.to(function(tensor.new_empty(0)).device), recurse)
        return self.prepare()

    @property
    def parts(self) -> Int8Parts:
        """What a product needs, see there."""
        rotation = None if self.hadamard_input is None else self.hadamard_input.matrix
        around = self.around and self.kernel != "simulated"
        return Int8Parts(self.weight, self.weight_scale.t(), rotation, self.input_scale, self.activations, self.kernel, around)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in_features) -> (..., out_features), in x's dtype."""
        result = self.parts.linear(x.reshape(-1, self.in_features), self.bias)
        return result.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Return what print(model) shows of it."""
        return f"{self.in_features}, {self.out_features}, activations={self.activations}, kernel={self.kernel}"


def say_if_simulated(model: nn.Module) -> None:
    """Say in one line on standard error, when a model was made, that products of it have no int8 kernel here; nothing if all have one."""
    linears = [module for module in model.modules() if isinstance(module, W8A8Linear)]
    slow = [linear for linear in linears if linear.kernel == "simulated"]
    if not slow:
        return
    device = slow[0].weight.device
    if kernels.simulated_wanted():
        reason = f"{kernels.KERNEL_VARIABLE} says simulated"
    elif device.type == "cuda":
        reason = "a GPU needs compute capability 7.5 and widths that are multiples of 8"
    else:
        reason = kernels.reason_against() or "the kernels could not be built"
    print(
        f"compactmind: {len(slow)} of {len(linears)} int8 linears run simulated on {device.type}, slower than before they were quantized "
        f"({reason}); the file is as it would be with a kernel",
        file=sys.stderr,
    )
