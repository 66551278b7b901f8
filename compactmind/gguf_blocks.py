"""Integers in groups as the blocks of a GGUF file.

Integers in groups (methods/quantization/grouped.py) lie on the grids of GGUF's simple types, so nothing is rounded a second time:

| grid                           | type | bits a weight | a weight is            |
|--------------------------------|------|---------------|------------------------|
| symmetric, 2 to 4 bits         | Q4_0 | 4.5           | scale * (q - 8)        |
| symmetric, 5 bits              | Q5_0 | 5.5           | scale * (q - 16)       |
| symmetric, 6 and 8 bits        | Q8_0 | 8.5           | scale * q              |
| with a minimum, 2 to 4 bits    | Q4_1 | 5             | scale * q + minimum    |
| with a minimum, 5 bits         | Q5_1 | 6             | scale * q + minimum    |
| with super-blocks, 2 to 6 bits | Q2_K to Q6_K: methods/quantization/superblocks.py |

Blocks of the others have 32 weights; of a larger group every block gets the scale. What has the bits of its type and groups of 32 takes
as many bytes as it did (`"layout": "gguf"` and `"gguf_k"` of gptq choose among these alone).
"""

import numpy
import torch

from compactmind.methods.quantization.grid import GGUF_BLOCK as BLOCK
from compactmind.methods.quantization.grid import SUPERBLOCK
from compactmind.methods.quantization.grouped import GroupedWeight
from compactmind.methods.quantization.superblocks import multiples_of


def encoded(weight: GroupedWeight, rows: torch.Tensor | None = None) -> tuple[numpy.ndarray, str]:
    """Return the bytes of a weight, uint8 (rows, bytes of a row), with its rows in the order `rows`, and their type.

    Raises ValueError if GGUF has no type for it.
    """
    kind, grid, width = weight.grid.gguf_type, weight.grid, weight.shape[1]
    if kind is None or width % BLOCK:
        raise ValueError(f"no GGUF type holds rows of {width} weights in {grid}")
    order = slice(None) if rows is None else rows
    if grid.superblocks:
        return _superblocks(weight, order), kind
    q = weight.q[order].to(torch.int16).view(-1, width // BLOCK, BLOCK)
    times = (width if grid.group_size == -1 else grid.group_size) // BLOCK
    scale, zero = (each[order].repeat_interleave(times, 1)[:, : width // BLOCK, None] for each in (weight.scale, weight.zero))
    bits = int(kind[1])
    parts = [bytes_of(scale.half())]
    if kind.endswith("_1"):
        parts.append(bytes_of(zero.half()))
    else:
        q = q - 2 ** (grid.bits - 1) + (0 if bits == 8 else 2 ** (bits - 1))
    if bits == 8:
        parts.append(bytes_of(q.to(torch.int8)))
    else:
        if bits == 5:
            high = (q >> 4).to(torch.int64) << torch.arange(BLOCK, device=q.device)
            parts.append(bytes_of(high.sum(-1, keepdim=True))[..., :4])  # 32 bits, the lowest first
        low = q & 15
        parts.append(bytes_of((low[..., : BLOCK // 2] | low[..., BLOCK // 2 :] << 4).to(torch.uint8)))
    return numpy.concatenate(parts, -1).reshape(len(q), -1), kind


def _superblocks(weight: GroupedWeight, order: torch.Tensor | slice) -> numpy.ndarray:
    """Return the bytes of a weight with super-blocks, uint8 (rows, bytes of a row): blocks of a K type as ggml-common.h has them."""
    grid, q = weight.grid, weight.q[order].to(torch.int32).view(-1, SUPERBLOCK)  # (super-blocks, weights)
    count = grid.fitted_together
    (step, scales), (least_step, minima) = (multiples_of(each[order], count) for each in (weight.scale, -weight.zero.half()))
    step, least_step = (each.reshape(-1, 1) for each in (step, least_step))
    scales, minima = (each.reshape(-1, count).int() for each in (scales, minima))
    halves = q.view(-1, 2, SUPERBLOCK // 2)
    quarters = halves.unflatten(-1, (4, 32))  # of each half, which share bytes
    if grid.bits == 2:
        parts = [scales | minima << 4, _shifted(quarters, 2), step, least_step]
    elif grid.bits == 3:
        high = _shifted((q >> 2).view(-1, 1, 8, 32), 1)
        parts = [high, _shifted(quarters & 3, 2), _six_bits_of_sixteen(scales + 32), step]
    elif grid.bits == 6:
        low = halves & 15
        low = low[..., :64] | low[..., 64:] << 4
        parts = [low, _shifted(quarters >> 4, 2), scales, step]
    else:
        pairs = q.view(-1, 4, 2, 32)
        low = (pairs[:, :, 0] & 15) | (pairs[:, :, 1] & 15) << 4
        high = [_shifted((q >> 4).view(-1, 1, 8, 32), 1)] if grid.bits == 5 else []
        parts = [step, least_step, _six_bits_of_eight(scales, minima), *high, low]
    written = [bytes_of(each if each.dtype == torch.float16 else (each & 255).to(torch.uint8)) for each in parts]
    rows = len(weight.q[order])
    return numpy.concatenate([each.reshape(len(q), -1) for each in written], -1).reshape(rows, -1)


def _shifted(parts: torch.Tensor, bits: int) -> torch.Tensor:
    """Return bytes (blocks, n, 32) that have of (blocks, n, parts, 32) numbers of `bits` bits the first part in the lowest bits."""
    shifts = bits * torch.arange(parts.shape[2], device=parts.device)
    return (parts << shifts[:, None]).sum(2)


def _six_bits_of_eight(scales: torch.Tensor, minima: torch.Tensor) -> torch.Tensor:
    """Return the 12 bytes of 8 scales and 8 minima, (blocks, 8) each, of Q4_K and Q5_K."""
    first, second = (each[:, :4] | each[:, 4:] >> 4 << 6 for each in (scales, minima))
    return torch.cat([first, second, scales[:, 4:] & 15 | (minima[:, 4:] & 15) << 4], 1)


def _six_bits_of_sixteen(scales: torch.Tensor) -> torch.Tensor:
    """Return the 12 bytes of 16 scales (blocks, 16) from 0 to 63 of Q3_K."""
    low = scales[:, :8] & 15 | (scales[:, 8:] & 15) << 4
    return torch.cat([low, _shifted((scales >> 4).view(-1, 1, 4, 4), 2)[:, 0]], 1)


def bytes_of(tensor: torch.Tensor) -> numpy.ndarray:
    """Return the bytes of a tensor (..., n), uint8 (..., bytes of n)."""
    return tensor.contiguous().cpu().numpy().view(numpy.uint8)
