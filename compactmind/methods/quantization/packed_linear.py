"""A linear layer with 4-bit NormalFloat weights for any width, packed by bitsandbytes, optionally with error compensation.

NF4 (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314) maps blocks of 64 weights to 16 quantiles of a normal
distribution; with double quantization the scale of each block is itself stored in 8 bits.

bitsandbytes 0.50 unpacks blocks that run across the end of a row wrongly on a CPU (an input width that is no multiple of 64,
as pruning makes them, gives 2.7 times the rounding error, silently). So rows are padded with zeros to the next multiple: a few
bytes, no change of the function.
"""

import logging

import torch
from torch import nn
from torch.nn import functional

from compactmind import kernels
from compactmind.errors import needs_extra
from compactmind.methods.quantization.error_compensation import Compensation, compensate_rounding, smaller_scales

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it advises optional CPU kernels at import
with needs_extra("nf4"):
    import bitsandbytes as bnb

BLOCK_SIZE = 64
"""Weights that share a scale."""


def compute_dtype_for(device: torch.device | str) -> torch.dtype:
    """Return the dtype 4-bit weights are multiplied in: bf16 on a GPU that has it, fp16 on others; fp32 on a CPU, where bf16 is slower."""
    if torch.device(device).type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


class NF4Linear(bnb.nn.Linear4bit):
    """A Linear4bit whose packed rows are a multiple of the block size long; inputs keep their own width."""

    def __init__(self, in_features: int, out_features: int, bias: bool, device: torch.device | str, double_quantization: bool):
        self.padding = -in_features % BLOCK_SIZE
        super().__init__(
            in_features + self.padding,
            out_features,
            bias=bias,
            compute_dtype=compute_dtype_for(device),
            quant_type="nf4",
            compress_statistics=double_quantization,
            device="meta",  # what is drawn at random there would be thrown away: minutes for a Llama of 7 billion weights
        )
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.in_features = in_features
        self.double_quantization = double_quantization
        self._levels: tuple[torch.Tensor, ...] | None = None
        # On CPUs with AVX512-BF16, bitsandbytes would repack the weights at the first call and multiply in bf16: slower for
        # batches, and not the logits that were saved.
        self.support_avx512bf16_for_cpu = False

    def pack(self, weight: torch.Tensor, compensation: Compensation | None = None, *, refined: bool = False) -> None:
        """Set, in place, the 4-bit weight from `weight` (out_features, in_features).

        With the `compensation` of its inputs rounding errors are made up for; `refined`: with smaller scales where they err less.
        """
        weight = functional.pad(weight.detach().float(), (0, self.padding))
        if compensation is not None:
            columns, cut = slice(0, self.in_features), weight
            if refined:
                importance = functional.pad(compensation.importance, (0, self.padding))  # zeros err nowhere
                cut = smaller_scales(weight, importance, bnb.functional.get_4bit_type("nf4", device=weight.device), BLOCK_SIZE)
            scale, decoded_scale, levels = self._scales(cut)
            weight[:, columns] = compensate_rounding(
                weight[:, columns], compensation, levels, scale[:, columns], decoded_scale[:, columns]
            )
        self.weight = bnb.nn.Params4bit(
            weight, requires_grad=False, compress_statistics=self.double_quantization, quant_type="nf4", module=self
        ).to(weight.device)

    def _scales(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return each element's scale before and after double quantization, both like `weight`, and the 16 levels."""
        _, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=self.double_quantization)
        largest = weight.view(-1, BLOCK_SIZE).abs().amax(dim=1)
        decoded = (
            bnb.functional.dequantize_blockwise(state.absmax, state.state2).float() + state.offset if state.nested else largest
        )
        spread = [values.repeat_interleave(BLOCK_SIZE).view_as(weight) for values in (largest, decoded)]
        return *spread, state.code.float()

    def load_packed(self, packed: torch.Tensor, statistics: dict[str, torch.Tensor], device: torch.device | str) -> None:
        """Set, in place, the 4-bit weight from a file's tensors; `statistics` are those whose names begin with `weight.`."""
        self.weight = bnb.nn.Params4bit.from_prequantized(packed, statistics, device=device, module=self)

    @property
    def levels(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """What kernels/ multiplies by: packed weights, the scale of every block float32 (out, blocks), the 16 levels; None on a GPU."""
        state = self.weight.quant_state
        if state is None or not kernels.usable_on(self.weight.device):
            return None
        if self._levels is None or self._levels[0].data_ptr() != self.weight.data_ptr():
            scale = state.absmax
            if state.nested:
                scale = bnb.functional.dequantize_blockwise(scale, state.state2).float() + state.offset
            scale = scale.float().reshape(self.out_features, -1).contiguous()
            self._levels = self.weight.data.flatten(), scale, state.code.float().contiguous()
        return self._levels

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features)."""
        few = 0 < hidden_states.numel() <= kernels.FEW_ROWS * self.in_features
        if few and not (hidden_states.requires_grad and torch.is_grad_enabled()) and (levels := self.levels):
            rows = hidden_states.reshape(-1, self.in_features).float().contiguous()
            result = torch.ops.compactmind.levels_linear(rows, *levels).to(hidden_states.dtype)
            result = result if self.bias is None else result + self.bias.to(result.dtype)
            return result.view(*hidden_states.shape[:-1], self.out_features)
        if self.padding:
            hidden_states = functional.pad(hidden_states, (0, self.padding))
        return super().forward(hidden_states)


class Int8Linear(bnb.nn.Linear8bitLt):
    """A Linear8bitLt (LLM.int8(), one scale per output row) with the same two ways to set its weight."""

    def __init__(self, in_features: int, out_features: int, bias: bool):
        super().__init__(in_features, out_features, bias=bias, has_fp16_weights=False, device="meta")
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def pack(self, weight: torch.Tensor) -> None:
        """Set, in place, the int8 weight from `weight` (out_features, in_features)."""
        self.weight = bnb.nn.Int8Params(weight.detach(), requires_grad=False, has_fp16_weights=False).to(weight.device)

    def load_packed(self, packed: torch.Tensor, row_scales: torch.Tensor) -> None:
        """Set, in place, the int8 weight and the scale of each output row from a file's tensors."""
        self.weight = bnb.nn.Int8Params(packed, requires_grad=False, has_fp16_weights=False, CB=packed, SCB=row_scales)


PackedLinear = NF4Linear | Int8Linear


def packed_linear_like(linear: nn.Linear, method: str, device: torch.device | str, double_quantization: bool) -> PackedLinear:
    """Return an empty packed layer of the size of `linear`, in the same mode."""
    size = (linear.in_features, linear.out_features, linear.bias is not None)
    packed = NF4Linear(*size, device, double_quantization) if method == "nf4" else Int8Linear(*size)
    return packed.train(linear.training)
