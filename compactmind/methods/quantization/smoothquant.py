"""SmoothQuant: move the outliers of activations into the weights, where a scale per output channel can hold them.

Xiao et al. 2023 (https://arxiv.org/abs/2211.10438). A linear's input channel j is divided by
s_j = absmax(X_j)^alpha / absmax(W_j)^(1 - alpha) and the weight's column j multiplied by it. The division costs nothing at
run time because whatever produces the channel absorbs it: the norm before q/k/v and gate/up, the rows of up_proj before
down_proj (SiLU(gate) * up is linear in up), the rows of v_proj before o_proj (attention averages values; with grouped-query
attention all query heads of a group share one value head, hence one s). In exact arithmetic the model's outputs stay the same.
"""

from collections.abc import Mapping

import torch

from compactmind.methods.llama import LlamaBlock
from compactmind.methods.quantization.calibration import SITES, InputStatistics, readers_of

NORM_SITES = ("qkv", "gate_up")
"""Sites of the paper: their scales go into the norm before them."""
SMALLEST = 1e-5
"""Floor of maxima and scales: a dead channel keeps a harmless scale."""


def check_alpha(alpha: float) -> None:
    """Raise ValueError unless alpha, the share of the difficulty that moves into the weights, is in [0, 1]."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha {alpha} is not in [0, 1]: 0.5 shares the difficulty, 0.7 to 0.9 move more into the weights")


def smoothing_scale(activation_absmax: torch.Tensor, weight_absmax: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return s = activation_absmax^alpha / weight_absmax^(1 - alpha), all of shape (channels,)."""
    check_alpha(alpha)
    activation, weight = activation_absmax.clamp(min=SMALLEST), weight_absmax.clamp(min=SMALLEST)
    return (activation**alpha / weight ** (1 - alpha)).clamp(min=SMALLEST)


def site_scale(block: LlamaBlock, site: str, statistics: InputStatistics, alpha: float) -> torch.Tensor:
    """Return the smoothing scale of one input of a block, (channels,); for `o` equal within each group of query heads."""
    activation = statistics.absmax
    weight = torch.stack([linear.weight.float().abs().amax(dim=0) for linear in readers_of(block, site)]).amax(dim=0)
    if site == "o":
        activation, weight = (_over_groups(block, values) for values in (activation, weight))
    return smoothing_scale(activation, weight, alpha)


def _over_groups(block: LlamaBlock, values: torch.Tensor) -> torch.Tensor:
    """Replace each channel of o_proj's input by the maximum over the query heads that share its value head."""
    grouped = values.view(-1, block.groups, block.head_dim)
    return grouped.amax(dim=1, keepdim=True).expand_as(grouped).reshape(-1)


@torch.no_grad()
def fold(block: LlamaBlock, site: str, scale: torch.Tensor) -> None:
    """Divide, in place, the input channels of `site` by `scale` (channels,) in what produces them and multiply in what reads them."""
    for linear in readers_of(block, site):
        linear.weight.mul_(scale.to(linear.weight))
    if site in NORM_SITES:
        producer = block.input_norm if site == "qkv" else block.post_norm
        producer.weight.div_(scale.to(producer.weight))
        if getattr(producer, "bias", None) is not None:
            producer.bias.div_(scale.to(producer.bias))
        return
    if site == "down":
        producer = block.up
    else:  # o: one entry per value channel, the first query head of each group
        producer = block.v
        scale = scale.view(-1, block.groups, block.head_dim)[:, 0].reshape(-1)
    producer.weight.div_(scale.to(producer.weight)[:, None])
    if producer.bias is not None:
        producer.bias.div_(scale.to(producer.bias))


@torch.no_grad()
def smooth_block(block: LlamaBlock, statistics: dict[str, InputStatistics], alphas: Mapping[str, float]) -> None:
    """Smooth, in place, the sites of a block named in `alphas`, each with its own alpha; `statistics` follow, in place.

    Producers are folded after their own inputs, so the order is fixed: qkv, o, gate_up, down. Scales come from the weights as
    they stand when their turn comes.
    """
    for site in SITES:
        if site in alphas:
            scale = site_scale(block, site, statistics[site], alphas[site])
            fold(block, site, scale)
            statistics[site] = statistics[site].divided_by(scale)
