"""Weights as integers of 2 to 8 bits, a scale for every group of a row: how a group is rounded, and what it costs.

A group of a row is `group_size` neighbouring inputs of one output (the last one of a row may be shorter; -1: the whole row). With the
integers q from 0 to 2^bits - 1 and everything float in fp16, as it is stored, a group is one of ZEROS:

symmetric    scale * (q - 2^(bits - 1)): nothing beside the scale; the scale may be negative, so that the longer side is used
integer      scale * (q - zero_point): a zero point of `bits` bits
float        scale * q + minimum: a minimum in fp16; what llama.cpp calls Q4_1 and Q5_1

Scales are chosen by error instead of by extremes: of several ranges, each smaller than the last, the one that leaves the smallest weighted
squared error, fitted to its integers by least squares (as `make_qx_quants` of llama.cpp; weighted as in AWQ and GPTQ).
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch

from compactmind import kernels

BITS = (2, 3, 4, 5, 6, 8)
ZEROS = ("symmetric", "integer", "float")
SHRINK = {2: 16, 3: 12, 4: 10, 5: 6, 6: 4, 8: 2}
"""Bits -> how many ranges are tried, from the extremes down in steps of 1 / 20: fewer levels gain more from leaving outliers out."""
GGUF_BLOCK = 32
"""Weights that share a scale in the simple types of GGUF."""
GGUF_TYPES = {
    ("symmetric", 4): "Q4_0", ("symmetric", 5): "Q5_0", ("symmetric", 8): "Q8_0", ("float", 4): "Q4_1", ("float", 5): "Q5_1",
}  # fmt: skip
"""Zero and bits -> the type of GGUF that has these levels."""


class GGUFArchitecture(NamedTuple):
    """What llama.cpp calls a family, and whether its file has the rows of q and k in turns."""

    name: str
    in_turns: bool


GGUF_ARCHITECTURES = {
    "llama": GGUFArchitecture("llama", True), "mistral": GGUFArchitecture("llama", True), "granite": GGUFArchitecture("granite", True),
    "qwen2": GGUFArchitecture("qwen2", False), "qwen3": GGUFArchitecture("qwen3", False),
}  # fmt: skip
"""`model_type` of a family -> what llama.cpp computes it as."""
SUPERBLOCK = 256
"""Weights of a row that share one number for their scales, and one for their minima, in the K types of GGUF (superblocks.py)."""
K_TYPES = {2: (16, "float", 4), 3: (16, "symmetric", 6), 4: (32, "float", 6), 5: (32, "float", 6), 6: (16, "symmetric", 8)}
"""Bits -> group_size, zero and scale_bits of the K type of GGUF with so many."""
SMALLEST = 2.0**-24
"""The smallest number of fp16: no scale is 0."""


@dataclass(frozen=True)
class Grid:
    """The levels that a weight may have. Raises ValueError on a value outside its range."""

    bits: int
    group_size: int
    zero: str = "symmetric"
    scale_bits: int = 16
    """Of a scale, and of a minimum: 16, each in fp16, or as few as K_TYPES has, in multiples of one number for SUPERBLOCK weights."""

    def __post_init__(self):
        if self.bits not in BITS:
            raise ValueError(f"bits {self.bits!r}: choose one of {', '.join(map(str, BITS))}")
        if self.zero not in ZEROS:
            raise ValueError(f"zero {self.zero!r}: choose one of {', '.join(ZEROS)}")
        if self.group_size != -1 and not (isinstance(self.group_size, int) and self.group_size >= 8):
            raise ValueError(f"group_size {self.group_size!r}: choose 32, 64, 128, or -1 for a whole row")
        if self.scale_bits != 16 and K_TYPES.get(self.bits) != (self.group_size, self.zero, self.scale_bits):
            known = "; ".join(", ".join(map(str, (bits, *each))) for bits, each in K_TYPES.items())
            raise ValueError(f"scale_bits {self.scale_bits!r}: choose 16, or bits, group_size, zero and scale_bits of {known}")

    @property
    def superblocks(self) -> bool:
        """Whether scales are multiples of one number for SUPERBLOCK weights."""
        return self.scale_bits != 16

    @property
    def fitted_together(self) -> int:
        """How many groups have their scales chosen at one time."""
        return SUPERBLOCK // self.group_size if self.superblocks else 1

    @property
    def levels(self) -> int:
        """The number of levels."""
        return 2**self.bits

    def groups(self, in_features: int) -> list[slice]:
        """Return the columns of each group of a row. Raises ValueError if super-blocks do not fill it."""
        if not self.fits(in_features):
            raise ValueError(f"{self} is for rows of a multiple of {SUPERBLOCK} weights, not {in_features}")
        size = in_features if self.group_size == -1 else self.group_size
        return [slice(start, min(start + size, in_features)) for start in range(0, in_features, size)]

    def fits(self, in_features: int) -> bool:
        """Tell whether rows of so many weights can be on this grid."""
        return not self.superblocks or in_features % SUPERBLOCK == 0

    def divides(self, in_features: int) -> bool:
        """Tell whether every group of a row is whole."""
        return self.group_size == -1 or in_features % self.group_size == 0

    def stored_bits(self, in_features: int) -> int:
        """Return the bits that a row of a weight takes, scales and zeros included; integers fill words of 32 bits.

        Zero points fill theirs along the outputs, which a row cannot tell: below 32 bits more for each group.
        """
        groups = len(self.groups(in_features))
        if self.superblocks:
            parts = 2 if self.zero == "float" else 1
            return in_features * self.bits + parts * (-(-groups * self.scale_bits // 32) * 32 + in_features // SUPERBLOCK * 16)
        zeros = {"symmetric": 0, "integer": self.bits, "float": 16}[self.zero]
        return -(-in_features * self.bits // 32) * 32 + groups * (16 + zeros)

    @property
    def gguf_type(self) -> str | None:
        """The type of GGUF that holds the weights exactly, None if none does."""
        if self.superblocks:
            return f"Q{self.bits}_K"
        wide = [bits for zero, bits in GGUF_TYPES if zero == self.zero and bits >= self.bits]
        if not wide or (self.group_size != -1 and self.group_size % GGUF_BLOCK):
            return None
        return GGUF_TYPES[self.zero, min(wide)]

    @property
    def is_gguf(self) -> bool:
        """Whether GGUF holds the weights exactly in as many bytes as they take here."""
        return self.superblocks or (self.zero, self.bits) in GGUF_TYPES and self.group_size == GGUF_BLOCK

    def described(self) -> dict[str, int | str]:
        """Return it as JSON has it: Grid(**described()) is the same."""
        return {name: value for name, value in asdict(self).items() if name != "scale_bits" or value != 16}

    def __str__(self) -> str:
        group = "row" if self.group_size == -1 else f"g{self.group_size}"
        return f"{self.bits}b {group} {self.zero}" + (f" {self.scale_bits}b scales" if self.superblocks else "")


def _half(x: torch.Tensor) -> torch.Tensor:
    """Return what fp16 keeps of x."""
    return x.clamp(-65504, 65504).half().float()


def _nonzero(scale: torch.Tensor) -> torch.Tensor:
    scale = _half(scale)
    return torch.where(scale == 0, torch.full_like(scale, SMALLEST), scale)


def to_integers(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return the integers q nearest to a weight, in its dtype; scale and zero, as `fit` returns them, broadcast."""
    q = (weight - zero) / scale if grid.zero == "float" else weight / scale + zero
    return q.round_().clamp_(0, grid.levels - 1)


def from_integers(q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return the weights that integers q stand for; scale and zero broadcast."""
    return torch.addcmul(zero, q, scale) if grid.zero == "float" else (q - zero) * scale


def fit(
    weight: torch.Tensor, grid: Grid, importance: torch.Tensor | None = None, ranges: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and zero of each group of a weight (..., size), both (..., 1) in float32 with values that are stored exactly.

    Zero is the integer zero point, or the minimum in fp16 with a float zero. Of the ranges tried the one with the smallest squared error,
    each weight's counted by its `importance` (broadcasts; None: all alike). `ranges`: how many are tried at most (None: see SHRINK).
    """
    weight, ranges = weight.float(), min(SHRINK[grid.bits], ranges or SHRINK[grid.bits])
    if weight.numel() and kernels.usable_on(weight.device):
        return _fit_by_kernel(weight, grid, importance, ranges)
    importance = torch.ones_like(weight) if importance is None else importance.float().expand_as(weight)
    best: tuple[torch.Tensor, ...] = ()
    for scale, zero in _ranges(weight, grid, ranges):
        for _ in range(2):  # as tried, then fitted to the integers that gives
            q = to_integers(weight, scale, zero, grid)
            error = ((from_integers(q, scale, zero, grid) - weight).square() * importance).sum(-1, keepdim=True)
            tried = (error, scale, zero)
            better = error < best[0] if best else None
            best = tuple(torch.where(better, *pair) for pair in zip(tried, best, strict=True)) if best else tried
            scale, zero = _least_squares(weight, importance, q, zero, grid)
    return best[1], best[2]


def _fit_by_kernel(
    weight: torch.Tensor, grid: Grid, importance: torch.Tensor | None, ranges: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `fit` does, by kernels/fit.h, whose sums are in another order: of ranges as good as each other it may take another."""
    size = weight.shape[-1]
    counts = torch.ones(1, size) if importance is None else importance.float()
    if counts.shape != weight.shape[weight.dim() - counts.dim() :]:
        counts = counts.expand_as(weight)
    fitted = torch.ops.compactmind.fit(
        weight.detach().reshape(-1, size).contiguous(), counts.reshape(-1, size).contiguous(), grid.bits, ZEROS.index(grid.zero),
        ranges, grid.superblocks and grid.zero == "float",
    )  # fmt: skip
    return tuple(each.view(*weight.shape[:-1], 1) for each in fitted)


def _ranges(weight: torch.Tensor, grid: Grid, steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield scale and zero, (..., 1) each, of ranges to try for groups (..., size), the extremes first."""
    top, half = grid.levels - 1, grid.levels // 2
    low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    if grid.superblocks and grid.zero == "float":
        low, high = low.clamp(max=0), high.clamp(min=0)  # no minimum is positive there, no scale negative
    longer = torch.where(high > -low, high, low)
    for step in range(steps):
        share = 1 - step / 20
        if grid.zero == "symmetric":
            for reach in (-half, half - 1):  # -half has an integer of its own, half has none
                yield _nonzero(share * longer / reach), torch.full_like(longer, half)
        elif grid.zero == "integer":
            least, most = share * low.clamp(max=0), share * high.clamp(min=0)
            scale = _nonzero((most - least) / top)
            yield scale, (-least / scale).round().clamp(0, top)
        else:
            middle, width = (low + high) / 2, share * (high - low)
            yield _nonzero(width / top), _half(middle - width / 2)


def _least_squares(
    weight: torch.Tensor, importance: torch.Tensor, q: torch.Tensor, zero: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scale, and with a float zero the minimum too, that fit the integers best."""
    if grid.zero == "float":
        total = importance.sum(-1, keepdim=True).clamp_min(1e-30)
        mean_q, mean_w = ((importance * each).sum(-1, keepdim=True) / total for each in (q, weight))
        spread = (importance * (q - mean_q).square()).sum(-1, keepdim=True).clamp_min(1e-30)
        scale = _nonzero((importance * (q - mean_q) * (weight - mean_w)).sum(-1, keepdim=True) / spread)
        if grid.superblocks:
            scale = scale.clamp_min(SMALLEST)
        zero = _half(mean_w - scale * mean_q)
        return scale, zero.clamp(max=0) if grid.superblocks else zero
    step = q - zero
    spread = (importance * step.square()).sum(-1, keepdim=True).clamp_min(1e-30)
    return _nonzero((importance * step * weight).sum(-1, keepdim=True) / spread), zero
