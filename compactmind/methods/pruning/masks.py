"""Which heads and neurons are kept: chosen by a global ranking, enforced by zeros, made real by compaction.

A mask says 1 keep, 0 prune. Masks only ever shrink. While training, the weights of pruned structures are set to zero after
every optimizer step; a zeroed neuron or head has no influence and no gradient, so removing its rows and columns for good
(`compact`) gives the same function, smaller and faster.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from compactmind.data import EncodedSentences
from compactmind.errors import CompactMindError
from compactmind.forward import predict_logits
from compactmind.methods.pruning.encoder import EncoderLayer, encoder_layers, family_name
from compactmind.methods.pruning.importance import LayerScores, head_parameters, neuron_parameters, prunable_parameters
from compactmind.methods.pruning.modeling_pruned_encoder import pruned_classes

COMPACTION_TOLERANCE = 1e-5
"""Largest allowed difference of any logit between the masked and the compacted model, as a share of the largest logit or of 1."""


@dataclass
class LayerMask:
    """Structures of one layer: True keep, False prune."""

    heads: torch.Tensor  # (num_heads,) bool
    neurons: torch.Tensor  # (intermediate_size,) bool


def full_masks(model: PreTrainedModel) -> list[LayerMask]:
    """Return masks that keep everything."""
    return [
        LayerMask(torch.ones(layer.num_heads, dtype=torch.bool), torch.ones(layer.intermediate_size, dtype=torch.bool))
        for layer in encoder_layers(model)
    ]


def choose_masks(
    model: PreTrainedModel,
    scores: list[LayerScores],
    masks: list[LayerMask],
    target_sparsity: float,
    round_to: int = 1,
) -> list[LayerMask]:
    """Return smaller masks: the least important structures of all layers go until `target_sparsity` is reached.

    Heads are ranked one by one, neurons in groups of `round_to` within a layer (the least important together), so that FFN
    widths stay multiples of it. Every layer keeps at least one head and one group. `scores` are importance per parameter.
    The sparsity reached is at least the target and exceeds it by less than one structure. Raises ValueError if the target
    is not in [0, 1) or cannot be reached.
    """
    if not 0 <= target_sparsity < 1:
        raise ValueError(f"target_sparsity must be in [0, 1), not {target_sparsity}")
    if round_to < 1:
        raise ValueError(f"round_to must be at least 1, not {round_to}")
    layers = encoder_layers(model)
    masks = [LayerMask(mask.heads.clone(), mask.neurons.clone()) for mask in masks]
    budget = target_sparsity * prunable_parameters(model)
    removed = sum(_removed_parameters(layer, mask) for layer, mask in zip(layers, masks, strict=True))

    candidates = []  # (score, parameters freed, mask tensor, indices)
    for layer, score, mask in zip(layers, scores, masks, strict=True):
        alive = mask.heads.nonzero().flatten()
        ranked = alive[score.heads[alive].argsort(stable=True)]
        for index in ranked[:-1]:  # the best head of a layer is never a candidate
            candidates.append((score.heads[index].item(), head_parameters(layer), mask.heads, index))
        alive = mask.neurons.nonzero().flatten()
        ranked = alive[score.neurons[alive].argsort(stable=True)]
        odd = len(ranked) % round_to  # a width that is no multiple yet: its remainder goes first
        groups = ([ranked[:odd]] if odd else []) + list(ranked[odd:].split(round_to))
        for group in groups[:-1]:
            freed = neuron_parameters(layer) * len(group)
            candidates.append((score.neurons[group].mean().item(), freed, mask.neurons, group))

    for _, freed, mask, index in sorted(candidates, key=lambda candidate: candidate[0]):
        if removed >= budget:
            break
        mask[index] = False
        removed += freed
    if removed < budget:
        raise ValueError(
            f"target_sparsity {target_sparsity} cannot be reached: every layer keeps one head and {round_to} neurons, "
            f"which leaves at most {removed / prunable_parameters(model):.3f}"
        )
    return masks


def sparsity_of(model: PreTrainedModel, masks: list[LayerMask]) -> float:
    """Return the share of the prunable parameters (heads + FFN of the blocks) that the masks remove."""
    removed = sum(_removed_parameters(layer, mask) for layer, mask in zip(encoder_layers(model), masks, strict=True))
    return removed / prunable_parameters(model)


def _removed_parameters(layer: EncoderLayer, mask: LayerMask) -> int:
    return int((~mask.heads).sum()) * head_parameters(layer) + int((~mask.neurons).sum()) * neuron_parameters(layer)


@torch.no_grad()
def apply_masks(model: PreTrainedModel, masks: list[LayerMask]) -> None:
    """Set, in place, all weights and biases of pruned structures to zero."""
    for layer, mask in zip(encoder_layers(model), masks, strict=True):
        rows = mask.heads.repeat_interleave(layer.head_dim).to(layer.query.weight)  # (num_heads * head_dim,)
        for linear in (layer.query, layer.key, layer.value):
            _zero_rows(linear, rows)
        layer.attention_output.weight.mul_(rows)
        neurons = mask.neurons.to(layer.up.weight)  # (intermediate_size,)
        _zero_rows(layer.up, neurons)
        layer.down.weight.mul_(neurons)


def _zero_rows(linear: nn.Linear, keep: torch.Tensor) -> None:
    linear.weight.mul_(keep[:, None])
    if linear.bias is not None:
        linear.bias.mul_(keep)


def of_widths(model: PreTrainedModel, heads: list[int], neurons: list[int]) -> PreTrainedModel:
    """Return an untrained pruned classifier like `model`, on its device, with so many heads and neurons per layer, and as many layers.

    Raises CompactMindError for other architectures than those of FAMILIES.
    """
    config_class, model_class = pruned_classes(family_name(model.config))
    settings = model.config.to_dict()
    for key in ("model_type", "architectures", "auto_map", "transformers_version"):
        settings.pop(key, None)
    settings["layer_num_heads"], settings["layer_intermediate_sizes"] = heads, neurons
    config = config_class(**settings)
    config.num_hidden_layers = len(heads)
    return model_class(config).to(model.device)


@torch.no_grad()
def compact(model: PreTrainedModel, masks: list[LayerMask]) -> PreTrainedModel:
    """Return a physically smaller copy of a classifier of one of FAMILIES without the pruned rows and columns.

    Its logits equal those of the masked model; `model` is unchanged. Compacting a pruned model again is fine.
    Raises CompactMindError for other architectures.
    """
    smaller = of_widths(model, [int(mask.heads.sum()) for mask in masks], [int(mask.neurons.sum()) for mask in masks])

    kept = {}
    for source, target, mask in zip(encoder_layers(model), encoder_layers(smaller), masks, strict=True):
        rows = mask.heads.repeat_interleave(source.head_dim).nonzero().flatten().to(model.device)
        neurons = mask.neurons.nonzero().flatten().to(model.device)
        for name in ("query", "key", "value"):
            kept[getattr(target, name)] = _selected(getattr(source, name), rows=rows)
        kept[target.attention_output] = _selected(source.attention_output, columns=rows)
        kept[target.up] = _selected(source.up, rows=neurons)
        kept[target.down] = _selected(source.down, columns=neurons)
    # Everything outside the pruned linears is copied as it is.
    resized = {name for name, module in smaller.named_modules() if module in kept}
    rest = {name: value for name, value in model.state_dict().items() if name.rsplit(".", 1)[0] not in resized}
    smaller.load_state_dict(rest, strict=False)
    for module, state in kept.items():
        module.load_state_dict({name: state[name] for name in module.state_dict()})  # what is left of a layer without heads has no weight
    sources = dict(model.named_parameters())
    for name, parameter in smaller.named_parameters():
        parameter.requires_grad_(sources[name].requires_grad)
    return smaller.train(model.training)


def _selected(
    linear: nn.Linear, rows: torch.Tensor | None = None, columns: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Return the state of a linear reduced to some output rows or input columns."""
    state = {name: value.detach() for name, value in linear.state_dict().items()}
    if rows is not None:
        return {name: value[rows] for name, value in state.items()}
    return {**state, **({"weight": state["weight"][:, columns]} if "weight" in state else {})}


def compact_and_compare(
    model: PreTrainedModel, masks: list[LayerMask], validation: EncodedSentences, batch_size: int
) -> tuple[PreTrainedModel, float]:
    """Return the smaller model and the largest difference of its logits to the masked one's. Raises if it is too large.

    Both compute in float32. Rounding grows with the logits, so a difference is judged beside the largest of them.
    """
    smaller = compact(model, masks)
    masked_logits = predict_logits(model, validation, batch_size)
    if not torch.isfinite(masked_logits).all():
        raise CompactMindError(
            "the model's logits on validation sentences are not finite: training diverged, use a smaller --lr (and look at --parent)"
        )
    difference = (predict_logits(smaller, validation, batch_size) - masked_logits).abs().max().item()
    if not difference <= COMPACTION_TOLERANCE * max(1.0, masked_logits.abs().max().item()):
        raise CompactMindError(
            f"compacted and masked model differ by {difference:.2e} on a logit: this is a bug, please report it"
        )
    return smaller, difference
