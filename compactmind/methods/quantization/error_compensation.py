"""Round weights to 4 bits one input column at a time and let the columns that follow make up for the error (GPTQ).

Rounding every weight to its nearest level ignores that a layer's inputs are correlated. GPTQ (Frantar et al. 2023,
https://arxiv.org/abs/2210.17323) rounds column j, then shifts the columns not yet rounded so that the layer's output on
calibration inputs changes least: with H = mean of x x^T and its inverse, w_k -= error_j * Hinv[j, k] / Hinv[j, j].

Here the levels are NF4's and the scales those bitsandbytes gives the original weights, so the result is a matrix that
bitsandbytes packs without any further loss: every value is a level times its block's scale, and the element that defined the
scale keeps its value. The file, its size and its kernels stay the same. `smaller_scales` and an order of the columns, the largest inputs
first, leave a Llama half of the loss that is left without; scales stay in place, since they are chosen before.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn

from compactmind import kernels
from compactmind.data import model_inputs
from compactmind.methods.quantization.replayed import replayed


@torch.inference_mode()
def input_second_moments(
    model: nn.Module, names: Iterable[str], batches: Iterable[dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Return the mean of x x^T over all non-padding tokens for each named linear: name -> (in_features, in_features) float32.

    Batches hold `input_ids` and `attention_mask` (1 keep, 0 padding). The model is run in evaluation mode and unchanged.
    """
    sums: dict[str, torch.Tensor] = {}
    count, kept = 0, None

    def record(name: str):
        def hook(_module, inputs):
            tokens = inputs[0][kept].float()  # (tokens, in_features)
            product = tokens.T @ tokens
            sums[name] = sums[name] + product if name in sums else product

        return hook

    model.eval()
    device = next(model.parameters()).device
    handles = [model.get_submodule(name).register_forward_pre_hook(record(name)) for name in names]
    try:
        for batch in batches:
            kept = batch["attention_mask"].to(device).bool()
            count += int(kept.sum())
            model(**model_inputs(batch, model))
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / count for name, total in sums.items()}


@dataclass(frozen=True)
class Compensation:
    """How errors in the weights of one input are made up for by those of others; the same for all layers with these inputs."""

    factor: torch.Tensor
    """(in, in) float32, upper Cholesky factor of the inverse of H, in `order`: row j holds what column j passes on to those after it."""
    importance: torch.Tensor
    """(in,) float32, 1 / Hinv[j, j]: what of an error in column j no other column can make up for."""
    order: torch.Tensor | None = None
    """(in,): which columns are rounded first; None: as they stand."""


def factor_of_inverse(matrix: torch.Tensor) -> torch.Tensor:
    """Return the upper Cholesky factor U of the inverse of a positive definite matrix (n, n), U^T U = H^-1, without that inverse.

    Backwards, H has a lower factor as always; read forwards that is an upper R with R R^T = H, and U is its inverse. Wants twice the
    memory of the matrix, of which the first is freed when no caller holds it.
    """
    backwards = matrix.flip(0, 1)
    del matrix
    torch.linalg.cholesky(backwards, out=backwards)
    forwards = backwards.flip(0, 1)
    del backwards
    ones = torch.eye(len(forwards), dtype=forwards.dtype, device=forwards.device)
    return torch.linalg.solve_triangular(forwards, ones, upper=True, out=ones)


@torch.inference_mode()
def compensation_of(second_moment: torch.Tensor, damping: float = 0.01, largest_first: bool = False) -> Compensation:
    """Return how errors are made up for by inputs of this moment (in, in), of which a share `damping` of the mean is added to the diagonal.

    `largest_first`: the columns with the largest inputs are rounded before the others.
    """
    order = second_moment.diagonal().argsort(descending=True, stable=True) if largest_first else None
    moment = second_moment.double().clone() if order is None else second_moment.double()[order[:, None], order]
    moment.diagonal().add_(damping * moment.diagonal().mean() + 1e-12)
    factor = factor_of_inverse(moment)
    importance = factor.square().sum(0).reciprocal().float()
    if order is not None:
        importance = importance[order.argsort()]
    return Compensation(factor.float(), importance, order)


SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""What `smaller_scales` tries, as shares of the largest weight of a block."""


@torch.inference_mode()
def smaller_scales(
    weight: torch.Tensor, importance: torch.Tensor, levels: torch.Tensor, block_size: int
) -> torch.Tensor:
    """Return `weight` (out_features, in_features) with every block of `block_size` in a row cut off where its rounding errs least.

    An error of column j counts as its `importance` (in_features,). in_features is a multiple of `block_size`. An encoder finds the scales
    in what is returned; the weights beyond them are for `compensate_rounding` to cut.
    """
    importance = importance.unflatten(0, (-1, block_size))  # (blocks, block_size)
    if kernels.usable_on(weight.device) and block_size % 8 == 0:
        blocks = weight.float().contiguous().view(-1, block_size)
        return torch.ops.compactmind.cut_off(blocks, importance.float().contiguous(), levels, SHRINK).view(weight.shape)
    blocks = weight.float().unflatten(1, (-1, block_size))  # (out_features, blocks, block_size)
    largest, boundaries = blocks.abs().amax(-1, keepdim=True), (levels[1:] + levels[:-1]) / 2
    least = torch.full_like(largest, torch.inf)
    limit = largest
    for share in SHRINK:
        tried = share * largest
        rounded = tried * levels[torch.bucketize(blocks / tried.clamp_min(1e-12), boundaries)]
        error = ((rounded - blocks).square() * importance).sum(-1, keepdim=True)
        limit, least = torch.where(error < least, tried, limit), torch.minimum(error, least)
    return torch.maximum(torch.minimum(blocks, limit), -limit).flatten(1)


def _round_columns(
    block: torch.Tensor, pinned: torch.Tensor, sign: torch.Tensor, scale: torch.Tensor, decoded_scale: torch.Tensor,
    factor: torch.Tensor, levels: torch.Tensor, boundaries: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return what some columns (columns, out) are rounded to, one after the other, and their errors; `block` may be changed.

    By kernels/columns.h where that can be had, whose sums may round otherwise in their last bit.
    """
    if kernels.usable_on(block.device):
        return torch.ops.compactmind.round_columns_to_levels(block, factor, pinned, sign, scale, decoded_scale, levels)
    return _round_columns_in_torch(block, pinned, sign, scale, decoded_scale, factor, levels, boundaries)


@replayed
def _round_columns_in_torch(
    block: torch.Tensor, pinned: torch.Tensor, sign: torch.Tensor, scale: torch.Tensor, decoded_scale: torch.Tensor,
    factor: torch.Tensor, levels: torch.Tensor, boundaries: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    rounded, errors = torch.empty_like(block), torch.empty_like(block)
    for column, wanted in enumerate(block):
        nearest = torch.bucketize(wanted / decoded_scale[column].clamp_min(1e-12), boundaries)
        level = torch.where(pinned[column], sign[column], levels[nearest])
        rounded[column] = level * scale[column]
        errors[column] = (wanted - level * decoded_scale[column]) / factor[column, column]
        block[column:].addr_(factor[column, column:], errors[column], alpha=-1)
    return rounded, errors


@torch.inference_mode()
def compensate_rounding(
    weight: torch.Tensor,
    compensation: Compensation,
    levels: torch.Tensor,
    scale: torch.Tensor,
    decoded_scale: torch.Tensor,
    columns_at_once: int = 128,
) -> torch.Tensor:
    """Return `weight` with every element on a level times its `scale`, chosen so that outputs on the calibration change least.

    weight: (out_features, in_features); levels: sorted, from -1 to 1; scale and decoded_scale: (out_features, in_features), each
    element's block scale as the encoder uses it and as the decoder will reproduce it (they differ when scales are themselves quantized).
    Elements with |weight| >= scale become their scale, so that an encoder finds the same scales again.
    """
    order, factor = compensation.order, compensation.factor
    if order is not None:
        ordered, scale, decoded_scale = (each[:, order].contiguous() for each in (weight, scale, decoded_scale))
        rounded = torch.empty_like(ordered, dtype=torch.float32)
        in_order = replace(compensation, order=None)
        rounded[:, order] = compensate_rounding(ordered, in_order, levels, scale, decoded_scale, columns_at_once)
        return rounded
    weight = weight.detach().float().clone()
    in_features = weight.shape[1]
    pinned, sign = weight.abs() >= scale, weight.sign()
    boundaries = (levels[1:] + levels[:-1]) / 2
    rounded = torch.empty_like(weight)
    for start in range(0, in_features, columns_at_once):
        end = min(start + columns_at_once, in_features)
        parts = (each[:, start:end].t().contiguous() for each in (weight, pinned, sign, scale, decoded_scale))
        nearest, errors = _round_columns(*parts, factor[start:end, start:end], levels, boundaries)
        rounded[:, start:end] = nearest.t()
        weight[:, end:] -= errors.t().contiguous() @ factor[start:end, end:]
    return rounded
