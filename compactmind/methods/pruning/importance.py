"""How much each attention head and each FFN neuron of an encoder matters.

Three criteria, all per structure (a whole head, a whole neuron):

    taylor   (sum of weight x gradient over the structure's output columns)^2, summed over training batches. With
             y = W (m * x) the sum is exactly dL/dm, the first-order change of the loss when the structure's mask m goes
             from 1 to 0. Molchanov et al. 2019 (https://arxiv.org/abs/1906.10771). Squares, unlike the absolute values of
             Michel et al. 2019 (https://arxiv.org/abs/1905.10650), add up: 64 neurons and one head of as many parameters
             compare fairly, while absolute values let heads cancel inside and neurons not.
    l2       Euclidean norm of all weights of the structure.
    random   uniform noise: the control every criterion has to beat.

Scores of heads and neurons are compared in one global ranking, so each is divided by what removing the structure frees:
`taylor` (a squared loss change) by its parameter count, `l2` by the square root of it (a root mean square). Both say "importance
per parameter removed". Left out on purpose: second-order criteria and learned masks (CoFi), which need more than the
gradients training already has.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from compactmind.methods.pruning.encoder import EncoderLayer, encoder_layers

CRITERIA = ("taylor", "l2", "random")


@dataclass
class LayerScores:
    """Importance of one layer's structures: the larger, the more it matters."""

    heads: torch.Tensor  # (num_heads,)
    neurons: torch.Tensor  # (intermediate_size,)


def head_parameters(layer: EncoderLayer) -> int:
    """Count the parameters one head owns: its rows of q/k/v with their biases, its columns of the output projection."""
    hidden_size = layer.query.in_features
    biases = sum(linear.bias is not None for linear in (layer.query, layer.key, layer.value))
    return layer.head_dim * (4 * hidden_size + biases)


def neuron_parameters(layer: EncoderLayer) -> int:
    """Count the parameters one FFN neuron owns: a row of the up projection with its bias, a column of the down projection."""
    return layer.up.in_features + layer.down.out_features + (layer.up.bias is not None)


def prunable_parameters(model: PreTrainedModel) -> int:
    """Count what sparsity is a share of: the parameters owned by all heads and FFN neurons of the encoder blocks."""
    return sum(
        layer.num_heads * head_parameters(layer) + layer.intermediate_size * neuron_parameters(layer)
        for layer in encoder_layers(model)
    )


class ImportanceScorer:
    """Accumulates the criterion over training steps; `scores` gives the ranking per parameter removed.

    Call `observe` after every backward pass (before gradients are clipped or cleared); `reset` starts a new window.
    Raises ValueError on an unknown criterion.
    """

    def __init__(self, model: PreTrainedModel, criterion: str, seed: int = 0):
        if criterion not in CRITERIA:
            raise ValueError(f"unknown criterion {criterion!r}: choose one of {', '.join(CRITERIA)}")
        self.layers = encoder_layers(model)
        self.criterion = criterion
        generator = torch.Generator().manual_seed(seed)
        # Drawn once: a random ranking that changed at every pruning event would be another experiment.
        self.noise = [
            LayerScores(torch.rand(layer.num_heads, generator=generator), torch.rand(layer.intermediate_size, generator=generator))
            for layer in self.layers
        ]  # fmt: skip
        self.reset()

    def reset(self) -> None:
        """Forget what was observed."""
        self.observed = [
            LayerScores(torch.zeros(layer.num_heads), torch.zeros(layer.intermediate_size)) for layer in self.layers
        ]

    @torch.no_grad()
    def observe(self, loss_scale: float = 1.0) -> None:
        """Add the squared first-order loss change of every structure in this batch (needs gradients; `taylor` only).

        `loss_scale` is what the loss was multiplied with before the backward pass (fp16). A batch whose gradients overflowed says
        nothing, as for the optimizer, and is left out.
        """
        if self.criterion != "taylor":
            return
        changes = []
        for layer in self.layers:
            heads = _columns_times_gradient(layer.attention_output).view(layer.num_heads, layer.head_dim).sum(dim=1)
            changes.append([(change / loss_scale).square().cpu() for change in (heads, _columns_times_gradient(layer.down))])
        if all(torch.isfinite(change).all() for pair in changes for change in pair):
            for total, (heads, neurons) in zip(self.observed, changes, strict=True):
                total.heads += heads
                total.neurons += neurons

    @torch.no_grad()
    def scores(self) -> list[LayerScores]:
        """Return the importance per parameter removed, layer by layer."""
        if self.criterion == "random":
            return self.noise
        result = []
        for layer, total in zip(self.layers, self.observed, strict=True):
            if self.criterion == "taylor":
                result.append(LayerScores(total.heads / head_parameters(layer), total.neurons / neuron_parameters(layer)))
            else:
                result.append(
                    LayerScores(
                        (_head_square_sums(layer) / head_parameters(layer)).sqrt().cpu(),
                        (_neuron_square_sums(layer) / neuron_parameters(layer)).sqrt().cpu(),
                    )
                )
        return result


def _columns_times_gradient(linear: nn.Linear) -> torch.Tensor:
    """Return sum over rows of weight x gradient, one value per input column: (in_features,)."""
    if not linear.in_features:  # what is left of a layer without heads or neurons
        return torch.zeros(0)
    if linear.weight.grad is None:
        raise RuntimeError("the taylor criterion needs gradients: call observe() after backward()")
    return (linear.weight * linear.weight.grad).sum(dim=0)


def _row_square_sums(linear: nn.Linear) -> torch.Tensor:
    """Return the square sum of each output row with its bias: (out_features,)."""
    return linear.weight.square().sum(dim=1) + (linear.bias.square() if linear.bias is not None else 0)


def _head_square_sums(layer: EncoderLayer) -> torch.Tensor:
    rows = sum(_row_square_sums(linear) for linear in (layer.query, layer.key, layer.value))
    columns = layer.attention_output.weight.square().sum(dim=0)
    return (rows + columns).view(layer.num_heads, layer.head_dim).sum(dim=1)  # (num_heads,)


def _neuron_square_sums(layer: EncoderLayer) -> torch.Tensor:
    return _row_square_sums(layer.up) + layer.down.weight.square().sum(dim=0)  # (intermediate_size,)
