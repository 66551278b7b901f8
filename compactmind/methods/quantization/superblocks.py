"""Scales that are small multiples of one number for 256 weights: the K types of llama.cpp.

A scale in fp16 for every 32 weights is half a bit a weight, with a minimum a whole one. In a super-block of 256 neighbouring inputs
of an output the scales are multiples, of `scale_bits` bits, of one number in fp16, and so are the minima (which are never positive):

Q2_K    2 bits, groups of 16, scale and minimum of 4 bits each      2.625 bits a weight
Q3_K    3 bits, groups of 16, scale of 6 bits with a sign           3.4375
Q4_K    4 bits, groups of 32, scale and minimum of 6 bits each      4.5
Q5_K    5 bits, groups of 32, scale and minimum of 6 bits each      5.5
Q6_K    6 bits, groups of 16, scale of 8 bits with a sign           6.5625

The number has so few significant bits here that every multiple of it is exact in fp16. So a weight can be computed with, and trained
around, as any other (grouped.py): scales in fp16 a group, which `multiples_of` takes apart again for a file.
"""

import torch

from compactmind.methods.quantization.grid import K_TYPES, SMALLEST, Grid, fit, from_integers, to_integers

SHARES = (1.1, 1.0, 0.95, 0.9, 0.85)
"""Shares of the largest scale that the largest multiple is tried to reach."""


def largest_multiple(grid: Grid) -> int:
    """Return the largest multiple that a scale of a grid may be; scales without a minimum have a sign."""
    return 2**grid.scale_bits - 1 if grid.zero == "float" else 2 ** (grid.scale_bits - 1) - 1


def sign_offset(grid: Grid) -> int:
    """Return what is added to multiples with a sign, so that none is negative."""
    return 0 if grid.zero == "float" else 2 ** (grid.scale_bits - 1)


def _rounded_up(x: torch.Tensor, most: int) -> torch.Tensor:
    """Return numbers no smaller than x >= 0 of which every multiple up to `most` is exact in fp16."""
    x = x.clamp(SMALLEST, 65504 / (most + 1) / 1.1)
    step = torch.exp2(torch.frexp(x)[1].float() - (11 - most.bit_length())).clamp_min(SMALLEST)
    return (x / step).ceil() * step


def fit_groups(
    weight: torch.Tensor, grid: Grid, importance: torch.Tensor | None = None, ranges: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and zero, (..., groups, 1) each, of the groups of a weight (..., groups, size), as `fit` does.

    The groups are those of one super-block if the grid has any. What they share is chosen by error, as a scale is: of several numbers the
    one with the smallest squared error of all groups, each of which takes the multiple below or above the scale that fits it best alone.
    Minima are fitted to what that gives, and chosen likewise.
    """
    if not grid.superblocks:
        return fit(weight, grid, importance, ranges)
    weight, most = weight.float(), largest_multiple(grid)
    counts = torch.ones_like(weight) if importance is None else importance.float().expand_as(weight)
    means = counts / counts.sum(-1, keepdim=True).clamp_min(1e-30)
    wanted, at_first = fit(weight, grid, importance, ranges)
    has_minimum = grid.zero == "float"

    def error(scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        q = to_integers(weight, scale, zero, grid)
        return ((from_integers(q, scale, zero, grid) - weight).square() * counts).sum(-1, keepdim=True)

    def minimum_for(scale: torch.Tensor) -> torch.Tensor:
        if not has_minimum:
            return at_first
        q = to_integers(weight, scale, at_first, grid)
        return (means * (weight - q * scale)).sum(-1, keepdim=True).clamp(max=0)

    best: Fit = ()
    for share in SHARES:
        single: Fit = ()
        for scale in _multiples_beside(wanted, share, most, least=1):
            zero = minimum_for(scale)
            single = _better(single, (error(scale, zero), scale, zero))
        if has_minimum:
            _, scale, zero = single
            single = ()
            for minimum in _multiples_beside(-zero, 1.0, most, least=0):
                single = _better(single, (error(scale, -minimum), scale, -minimum))
        errors, scale, zero = single
        best = _better(best, (errors.sum(-2, keepdim=True), scale, zero))
    return best[1], best[2]


Fit = tuple[torch.Tensor, ...]
"""An error and the scale and zero that leave it, or nothing yet."""


def _better(best: Fit, tried: Fit) -> Fit:
    """Return, place by place, what leaves less error."""
    return tuple(torch.where(tried[0] < best[0], *pair) for pair in zip(tried, best, strict=True)) if best else tried


def _multiples_beside(values: torch.Tensor, share: float, most: int, least: int) -> list[torch.Tensor]:
    """Return the multiples below and above values (..., groups, 1), from `least` to `most`, of a number for all groups.

    The largest multiple of the number reaches `share` of the largest value.
    """
    step = _rounded_up(share * values.abs().amax(-2, keepdim=True) / most, most)
    below = (values.abs() / step).floor()
    sign = torch.where(values < 0, -step, step)
    return [each.clamp(least, most) * sign for each in (below, below + 1)]


def multiples_of(values: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Take scales or minima in fp16, (rows, groups of a row), apart: the number of each super-block of `groups` groups, fp16 (rows,
    super-blocks), and which multiple of it each is, int16 like `values`. Their product is `values` again, to the bit.
    """
    whole = (values.double() / SMALLEST).to(torch.int64).unflatten(1, (-1, groups))  # all fp16 is a multiple of the smallest
    step = whole[..., 0].abs()
    for number in range(1, groups):
        step = torch.gcd(step, whole[..., number].abs())
    step = step.clamp_min(1)
    multiples = (whole // step[..., None]).flatten(1)
    return (step.double() * SMALLEST).half(), multiples.to(torch.int16)


def from_multiples(step: torch.Tensor, multiples: torch.Tensor) -> torch.Tensor:
    """Return what `multiples_of` was given, fp16 (rows, groups)."""
    groups = multiples.shape[1] // step.shape[1]
    return (step.float().repeat_interleave(groups, 1) * multiples.float()).half()


K_GRIDS = {bits: Grid(bits, *each) for bits, each in K_TYPES.items()}
"""Bits -> the grid of the K type that has them."""
FALLBACK = {2: Grid(4, 32), 3: Grid(4, 32), 4: Grid(5, 32), 5: Grid(5, 32, "float"), 6: Grid(8, 32), 8: Grid(8, 32)}
"""Bits -> the grid for rows that no super-blocks fill, as llama.cpp falls back."""


def k_grid_for(bits: int, width: int) -> Grid:
    """Return the grid of a weight with rows of `width` in a K type of `bits` bits, or the one instead of it."""
    grid = K_GRIDS.get(bits)
    return grid if grid and grid.fits(width) else FALLBACK[bits]
