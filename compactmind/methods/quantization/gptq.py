"""Round a weight to a grid one input column at a time and let the columns that follow make up for the error (GPTQ).

Rounding every weight to its nearest level ignores that a layer's inputs are correlated. GPTQ (Frantar et al. 2023,
https://arxiv.org/abs/2210.17323) rounds column j, then shifts the columns not yet rounded so that the layer's output on
calibration inputs changes least: with H = mean of x x^T and its inverse, w_k -= error_j * Hinv[j, k] / Hinv[j, j].

With U the upper Cholesky factor of Hinv, an error in column j costs error^2 / U[j, j]^2, whatever the others are: what of x_j the columns
behind j cannot make up for. That is the importance by which the scales of a group are chosen (grid.py).
"""

import torch

from compactmind.methods.quantization.grid import Grid, fit, from_integers, to_integers

ORDERS = ("index", "activation")
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


def inverse_factor(moment: torch.Tensor, damping: float) -> torch.Tensor:
    """Return the upper Cholesky factor of the inverse of H + damping * mean diagonal, float32 (in, in); dead inputs have a 1 there."""
    moment = moment.double().clone()
    diagonal = moment.diagonal()
    diagonal[diagonal == 0] = 1.0 if not diagonal.any() else float(diagonal[diagonal > 0].mean())
    diagonal.add_(damping * diagonal.mean())
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moment)), upper=True).float()


@torch.no_grad()
def round_compensated(
    weight: torch.Tensor,
    moment: torch.Tensor,
    grid: Grid,
    damping: float = 0.01,
    *,
    ordered: bool = False,
    factor: torch.Tensor | None = None,
) -> Rounded:
    """Return weight (out, in) on its grid, rounded column by column; `moment` (in, in) is the mean of x x^T of its inputs.

    The scales of a group are chosen when its turn comes, from the weights as the errors before have shifted them; `ordered`: the inputs of
    the largest mean square go first and all scales are chosen before (act-order with static groups), so that groups stay in place.
    `factor`: what `inverse_factor` returns of `moment`, if it is known; not with `ordered`.
    """
    weight = weight.detach().float().clone()
    rows, width = weight.shape
    groups = grid.groups(width)
    group_of = torch.repeat_interleave(torch.tensor([columns.stop - columns.start for columns in groups])).tolist()
    order = moment.diagonal().argsort(descending=True, stable=True) if ordered else torch.arange(width, device=weight.device)
    if ordered or factor is None:
        factor = inverse_factor(moment[order][:, order] if ordered else moment, damping)
    importance = torch.empty(width, device=weight.device)
    importance[order] = factor.diagonal().reciprocal().square()
    scales, zeros = (torch.empty(len(groups), rows, device=weight.device) for _ in range(2))
    if ordered:
        for number, columns in enumerate(groups):
            scale, zero = fit(weight[:, columns], grid, importance[columns])
            scales[number], zeros[number] = scale[:, 0], zero[:, 0]
        weight = weight[:, order]
    q = torch.empty(rows, width, dtype=torch.uint8, device=weight.device)
    spans = (
        [slice(start, min(start + COLUMNS_AT_ONCE, width)) for start in range(0, width, COLUMNS_AT_ONCE)] if ordered else groups
    )
    for number, columns in enumerate(spans):
        if not ordered:
            scale, zero = fit(weight[:, columns], grid, importance[columns])
            scales[number], zeros[number] = scale[:, 0], zero[:, 0]
        for start in range(columns.start, columns.stop, COLUMNS_AT_ONCE):
            end = min(start + COLUMNS_AT_ONCE, columns.stop)
            block, own = (
                weight[:, start:end].t().contiguous(),
                factor[start:end, start:end],
            )  # (columns, out): a column is contiguous
            errors = torch.empty_like(block)
            for column in range(end - start):
                place = int(order[start + column])
                scale, zero = scales[group_of[place]], zeros[group_of[place]]
                found = to_integers(block[column], scale, zero, grid)
                errors[column] = (block[column] - from_integers(found, scale, zero, grid)) / own[column, column]
                block[column:].addr_(own[column, column:], errors[column], alpha=-1)
                q[:, place] = found.to(torch.uint8)
            weight[:, end:].addmm_(errors.t(), factor[start:end, end:], alpha=-1)
    return Rounded(q, scales.t().contiguous(), zeros.t().contiguous(), grid)


@torch.no_grad()
def round_nearest(weight: torch.Tensor, grid: Grid, importance: torch.Tensor | None = None) -> Rounded:
    """Return weight (out, in) on its grid, every weight rounded by itself; `importance` (in,) of each input's error."""
    parts = []
    for columns in grid.groups(weight.shape[1]):
        scale, zero = fit(weight[:, columns], grid, None if importance is None else importance[columns])
        parts.append((to_integers(weight[:, columns].float(), scale, zero, grid).to(torch.uint8), scale, zero))
    return Rounded(*(torch.cat(each, 1) for each in zip(*parts, strict=True)), grid)
