"""Round a weight to a grid one input column at a time and let the columns that follow make up for the error (GPTQ).

Rounding every weight to its nearest level ignores that a layer's inputs are correlated. GPTQ (Frantar et al. 2023,
https://arxiv.org/abs/2210.17323) rounds column j, then shifts the columns not yet rounded so that the layer's output on
calibration inputs changes least: with H = mean of x x^T and its inverse, w_k -= error_j * Hinv[j, k] / Hinv[j, j].

With U the upper Cholesky factor of Hinv, an error in column j costs error^2 / U[j, j]^2, whatever the others are: what of x_j the columns
behind j cannot make up for. That is the importance by which the scales of a group are chosen (grid.py).
"""

import torch

from compactmind import kernels
from compactmind.methods.quantization.error_compensation import factor_of_inverse
from compactmind.methods.quantization.grid import ZEROS, Grid, from_integers, to_integers
from compactmind.methods.quantization.replayed import replayed
from compactmind.methods.quantization.superblocks import fit_groups

ORDERS = ("activation", "index")
AT_ONCE = 2**21
"""Weights that are rounded to nearest at one time: a score of copies of them exist then."""
COLUMNS_AT_ONCE = 128
"""Columns whose errors are gathered before those behind them are shifted."""


class Rounded:
    """A weight on its grid: `q` uint8 (out, in), `scale` and `zero` float32 (out, groups), `grid`."""

    def __init__(self, q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, grid: Grid):
        self.q, self.scale, self.zero, self.grid = q, scale, zero, grid

    def weight(self) -> torch.Tensor:
        """Return the weights the integers stand for, float32 (out, in)."""
        result = torch.empty(self.q.shape, device=self.q.device)
        for number, columns in enumerate(self.grid.groups(self.q.shape[1])):
            part = (self.q[:, columns].float(), self.scale[:, number, None], self.zero[:, number, None])
            result[:, columns] = from_integers(*part, self.grid)
        return result


def _empty(weight: torch.Tensor, grid: Grid) -> Rounded:
    """Return a Rounded for a weight (out, in) whose numbers are still to be written."""
    groups = len(weight), len(grid.groups(weight.shape[1]))
    q = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    return Rounded(q, *(torch.empty(groups, device=weight.device) for _ in range(2)), grid)


def columns_in_order(moment: torch.Tensor, grid: Grid, order: str) -> torch.Tensor:
    """Return the columns (in,) in the order in which they are rounded, the columns of a group together, and of a super-block.

    index: as they stand. activation: the group with the largest input first, and in a group the largest first: an error that is made early
    has many columns to make up for it, and what makes up for the error of a large input is changed little where it is small.
    """
    width, squares = len(moment), moment.diagonal()
    if order == "index":
        return torch.arange(width, device=moment.device)
    groups = [columns.start + squares[columns].argsort(descending=True, stable=True) for columns in grid.groups(width)]

    def largest_first(parts: list[torch.Tensor]) -> list[torch.Tensor]:
        return sorted(parts, key=lambda columns: -float(squares[columns[0]]))

    count = grid.fitted_together
    return torch.cat(largest_first([torch.cat(largest_first(groups[at : at + count])) for at in range(0, len(groups), count)]))


def inverse_factor(moment: torch.Tensor, damping: float) -> torch.Tensor:
    """Return the upper Cholesky factor of the inverse of H + damping * mean diagonal, float32 (in, in); dead inputs have a 1 there."""
    return factor_of_inverse(_damped(moment, damping)).float()  # nobody holds the damped one: it is most of the memory of a block


def _damped(moment: torch.Tensor, damping: float) -> torch.Tensor:
    moment = moment.to(torch.float64, copy=True)
    diagonal = moment.diagonal()
    diagonal[diagonal == 0] = 1.0 if not diagonal.any() else float(diagonal[diagonal > 0].mean())
    diagonal.add_(damping * diagonal.mean())
    return moment


@replayed
def _fit(weight: torch.Tensor, importance: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    return fit_groups(weight, grid, importance)


def _round_columns(
    block: torch.Tensor, factor: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the integers of some columns (columns, out), one after the other, and their errors; `block` may be changed.

    By kernels/columns.h where that can be had, whose sums may round otherwise in their last bit.
    """
    if kernels.usable_on(block.device):
        return torch.ops.compactmind.round_columns(
            block, factor, scale.contiguous(), zero.contiguous(), grid.bits, ZEROS.index(grid.zero)
        )
    return _round_columns_in_torch(block, factor, scale, zero, grid)


@replayed
def _round_columns_in_torch(
    block: torch.Tensor, factor: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    q, errors = torch.empty_like(block, dtype=torch.uint8), torch.empty_like(block)
    for column, wanted in enumerate(block):
        integers = to_integers(wanted, scale, zero, grid)
        errors[column] = (wanted - from_integers(integers, scale, zero, grid)) / factor[column, column]
        block[column:].addr_(factor[column, column:], errors[column], alpha=-1)
        q[column] = integers
    return q, errors


@torch.no_grad()
def round_compensated(weight: torch.Tensor, factor: torch.Tensor, order: torch.Tensor, grid: Grid) -> Rounded:
    """Return weight (out, in) on its grid, rounded column by column.

    `order` (in,) comes from `columns_in_order`, and `factor` from `inverse_factor` of the moment whose rows and columns are in that order.
    The scales of a group, or of all of a super-block, are chosen when its turn comes, from the weights as the errors before have shifted
    them.
    """
    weight = weight.detach().float()[:, order]
    rows, width = weight.shape
    groups = grid.groups(width)
    importance = factor.diagonal().reciprocal().square()
    scales, zeros = (torch.empty(rows, len(groups), device=weight.device) for _ in range(2))
    rounded = torch.empty(width, rows, dtype=torch.uint8, device=weight.device)  # in order
    places, size, start = order.tolist(), groups[0].stop, 0
    while start < width:
        numbers = [column // size for column in places[start : start + grid.fitted_together * size : size]]
        parts = sum(len(range(width)[groups[number]]) for number in numbers)
        chosen = weight[:, start : start + parts].unflatten(1, (len(numbers), -1))  # a shorter last group comes alone
        scale, zero = _fit(chosen, importance[start : start + parts].view(chosen.shape[1:]), grid)
        scales[:, numbers], zeros[:, numbers] = scale[..., 0], zero[..., 0]
        for place, number in enumerate(numbers):
            stop = start + len(range(width)[groups[number]])
            for first in range(start, stop, COLUMNS_AT_ONCE):
                last = min(first + COLUMNS_AT_ONCE, stop)
                block = weight[:, first:last].t().contiguous()  # (columns, out)
                its = factor[first:last, first:last], scale[:, place, 0], zero[:, place, 0]
                rounded[first:last], errors = _round_columns(block, *its, grid)
                weight[:, last:].addmm_(errors.t(), factor[first:last, last:], alpha=-1)
            start = stop
    q = torch.empty(rows, width, dtype=torch.uint8, device=weight.device)
    q[:, order] = rounded.t()
    return Rounded(q, scales, zeros, grid)


@torch.no_grad()
def round_nearest(
    weight: torch.Tensor, grid: Grid, importance: torch.Tensor | None = None, ranges: int | None = None
) -> Rounded:
    """Return weight (out, in) on its grid, each rounded by itself; `importance` (in,): of every input's error; `ranges`: see `fit`."""
    if weight.numel() > AT_ONCE and len(weight) > 1:  # a table: some rows at a time
        rows, whole = max(1, AT_ONCE // weight.shape[1]), _empty(weight, grid)
        for start in range(0, len(weight), rows):
            part = round_nearest(weight[start : start + rows], grid, importance, ranges)
            for name in ("q", "scale", "zero"):
                getattr(whole, name)[start : start + rows] = getattr(part, name)
        return whole
    groups = grid.groups(weight.shape[1])
    size = groups[0].stop
    whole = (
        sum(columns.stop - columns.start == size for columns in groups) * size
    )  # all groups of one size at once, then the rest
    parts = []
    for columns in [slice(0, whole)] + [slice(whole, None)] * (whole < weight.shape[1]):
        part = weight[:, columns].float()
        part = part.unflatten(1, (-1, grid.fitted_together, size if columns.start == 0 else part.shape[1]))
        counts = None if importance is None else importance[columns].view(part.shape[1:])
        scale, zero = fit_groups(part, grid, counts, ranges)
        parts.append((to_integers(part, scale, zero, grid).to(torch.uint8), scale, zero))
    return Rounded(*(torch.cat([each.flatten(1) for each in those], 1) for those in zip(*parts, strict=True)), grid)
