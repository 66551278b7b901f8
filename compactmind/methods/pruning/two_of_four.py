"""2:4 sparsity: of every four weights in a row two are zero, which tensor cores of NVIDIA GPUs from Ampere on skip (Mishra et al. 2021,
https://arxiv.org/abs/2104.08378).

A row is one output, its groups lie along the inputs. The weights stay a dense matrix with zeros in it: on a CPU it is neither smaller nor
faster. On a GPU `with_sparse_kernels` hands it to `torch.sparse`. Masks are held while the others are trained: zeroed again after every
step of the optimizer, so that no zero is ever undone.
"""

from collections.abc import Iterable

import torch
from torch import nn
from torch.sparse import to_sparse_semi_structured

from compactmind.errors import CompactMindError

KEPT, GROUP = 2, 4
PATTERN = f"{KEPT}:{GROUP}"
CAPABILITY = (8, 0)
"""Of the oldest GPUs whose tensor cores read the pattern."""
SHAPES = {torch.float16: (32, 64), torch.bfloat16: (32, 64)}
"""Dtype -> what rows and columns of a matrix must be multiples of for torch's kernels, those of CUTLASS and of cuSPARSELt."""


def keep_two_of_four(scores: torch.Tensor) -> torch.Tensor:
    """Return which weights stay, boolean (out, in): the two of the highest score in every four along the inputs.

    `scores`: (out, in), `in` a multiple of 4. Raises ValueError on any other width.
    """
    rows, columns = scores.shape
    if columns % GROUP:
        raise ValueError(f"{columns} inputs are no multiple of {GROUP}")
    best = scores.view(rows, columns // GROUP, GROUP).topk(KEPT, dim=-1).indices  # (out, in / 4, 2)
    kept = torch.zeros(rows, columns // GROUP, GROUP, dtype=torch.bool, device=scores.device)
    return kept.scatter_(-1, best, True).view(rows, columns)


def is_two_of_four(weight: torch.Tensor) -> bool:
    """Tell whether no four weights in a row (out, in) hold more than two that are not zero; False for what cannot have the pattern
    and for zeros alone."""
    if weight.ndim != 2 or weight.shape[1] % GROUP or not weight.any():
        return False
    return bool(((weight != 0).view(len(weight), -1, GROUP).sum(-1) <= KEPT).all())


def require_groups(linears: dict[str, nn.Linear]) -> None:
    """Raise CompactMindError naming the first linear whose inputs cannot be divided into fours."""
    for name, linear in linears.items():
        if linear.in_features % GROUP:
            raise CompactMindError(
                f"{name} has {linear.in_features} inputs, no multiple of {GROUP}: the pattern {PATTERN} cannot be laid over it; prune to "
                "widths that are (--round_to 64)"
            )


@torch.no_grad()
def zero_out(weight: torch.Tensor, kept: torch.Tensor) -> None:
    """Zero, in place, the weights that are not kept; both (out, in)."""
    weight.masked_fill_(~kept.to(weight.device), 0.0)


class HeldZeros:
    """The zeros of some weights, to be put back after every step of an optimizer."""

    def __init__(self, weights: Iterable[torch.Tensor]):
        self.masks = [(weight, weight.detach() == 0) for weight in weights]

    @torch.no_grad()
    def zero_again(self) -> None:
        """Zero, in place, what was zero."""
        for weight, zero in self.masks:
            weight.masked_fill_(zero, 0.0)


def apply_pattern(linears: dict[str, nn.Linear]) -> HeldZeros:
    """Zero, in place, the two smaller ones of every four weights; return what holds them. Raises CompactMindError, see `require_groups`."""
    require_groups(linears)
    for linear in linears.values():
        zero_out(linear.weight, keep_two_of_four(linear.weight.abs()))
    return HeldZeros(linear.weight for linear in linears.values())


def sparse_weight_names(model: nn.Module) -> list[str]:
    """Return the names of the weights of linears that have the pattern, as parameters of the model."""
    return [
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear) and is_two_of_four(module.weight)
    ]


def share_of_zeros(linears: Iterable[nn.Linear]) -> float:
    """Return the share of the weights of some linears that is zero."""
    weights = [linear.weight for linear in linears]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


# ---------------------------------------------------------------------------------------------------------------- on a GPU
def takes_sparse_kernel(weight: torch.Tensor) -> bool:
    """Tell whether torch's kernels take a weight (out, in): its pattern, its dtype, multiples of SHAPES; of the device nothing is asked."""
    rows, columns = SHAPES.get(weight.dtype, (0, 0))
    fits = rows and weight.ndim == 2 and not weight.shape[0] % rows and not weight.shape[1] % columns
    return bool(fits) and is_two_of_four(weight)


def with_sparse_kernels(model: nn.Module) -> list[str]:
    """Give, in place, the linears of a model on a GPU that have the pattern torch's semi-structured kernels; return their names.

    For inference: such weights are not trained or saved. Everything stays as it is on a CPU and on GPUs before Ampere, and so does a linear
    whose shape or dtype the kernels do not take (float32 among them).
    """
    converted = []
    for name, module in model.named_modules():
        weight = module.weight if isinstance(module, nn.Linear) else None
        if weight is None or not weight.is_cuda or torch.cuda.get_device_capability(weight.device) < CAPABILITY:
            continue
        if takes_sparse_kernel(weight):
            module.weight = nn.Parameter(to_sparse_semi_structured(weight.detach()), requires_grad=False)
            converted.append(name)
    return converted
