"""Hadamard rotations: spread the few large values of an input over many channels, so that one int8 scale serves them all.

A linear is the same if its input x becomes x R and its weight W becomes W R, with R orthogonal. Smoothing can only help
channels that are always large; a rotation also helps the tokens that are large here or there, as those before down_proj are.
R is block-diagonal with Hadamard blocks (entries +-1 / sqrt(size)), as in QuaRot (Ashkboos et al. 2024,
https://arxiv.org/abs/2404.00456) and SpinQuant (Liu et al. 2024, https://arxiv.org/abs/2405.16406), where the two are R2 and R4:

o                    folded into the rows of v_proj and the columns of o_proj, head by head: attention averages values, so it is free
qkv, gate_up, down   folded into the columns of the readers; the input is rotated while the model runs, 32 x 32 per 32 channels
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from compactmind.methods.llama import LlamaBlock
from compactmind.methods.quantization.calibration import readers_of

FOLDED_SITE = "o"
"""The input whose rotation needs no work while the model runs."""
LARGEST_BLOCK = 32
"""Channels rotated together: 64 and more were no better on SmolLM2, 16 worse, and the cost grows with the number."""


def rotation_sizes(blocks: Sequence[LlamaBlock], sites: Iterable[str]) -> dict[str, int]:
    """Return how many channels are rotated together at each of `sites`, the same in all blocks of a model.

    A power of two that divides the channels, at most LARGEST_BLOCK; where the input is rotated while the model runs also the same
    for all these sites, so that there is one matrix. A site where that leaves single channels is left out.
    """
    running = math.gcd(
        LARGEST_BLOCK, *(readers_of(block, site)[0].in_features for block in blocks for site in sites if site != FOLDED_SITE)
    )
    folded = math.gcd(LARGEST_BLOCK, *(block.head_dim for block in blocks))
    sizes = {site: folded if site == FOLDED_SITE else running for site in sites}
    return {site: size for site, size in sizes.items() if size > 1}


def signs(size: int) -> torch.Tensor:
    """Return the Hadamard matrix of Sylvester, (size, size) of +-1; `size` is a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def hadamard(size: int) -> torch.Tensor:
    """Return the orthogonal, symmetric Hadamard matrix (size, size); `size` is a power of two."""
    return signs(size) / math.sqrt(size)


def rotate(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Return x (..., channels) with every block of len(matrix) channels multiplied by `matrix`."""
    return (x.unflatten(-1, (-1, len(matrix))) @ matrix.to(x)).flatten(-2)


@torch.no_grad()
def fold_rotation(block: LlamaBlock, site: str, size: int) -> None:
    """Rotate, in place, the weights around the input `site`, `size` channels together.

    After `o` the block computes what it did; after the others it does once that input is rotated too.
    """
    for reader in readers_of(block, site):
        reader.weight.copy_(rotate(reader.weight.float(), hadamard(size).to(reader.weight.device)))
    if site == FOLDED_SITE:
        matrix = hadamard(size).to(block.v.weight.device)
        block.v.weight.copy_(rotate(block.v.weight.float().t(), matrix).t())
        if block.v.bias is not None:
            block.v.bias.copy_(rotate(block.v.bias.float(), matrix))


class InputRotation(nn.Module):
    """The rotation of a linear's input as a part of the model; stored as +-1, as compressed-tensors stores its transforms."""

    def __init__(self, size: int, device: torch.device | None = None):
        super().__init__()
        self.register_buffer("weight", signs(size).to(device=device, dtype=torch.bfloat16))
        self.prepare()

    def prepare(self) -> None:
        """Compute `matrix`, the orthogonal matrix in float32 (size, size), from the stored signs; after loading and after moving."""
        self.matrix = self.weight.float() / math.sqrt(len(self.weight))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., channels) -> the same shape, float32."""
        return rotate(x.float(), self.matrix)
