"""Every method a pipeline can be made of, for the Llama track: METHODS, a table to read from top to bottom.

A method takes a model and gives back a model (the same object or another) and a record of what it did. It knows nothing of scripts,
directories or searches.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import PreTrainedModel

from compactmind.methods.pruning.llama_pruning import PruneRecipe, prune_llama
from compactmind.methods.quantization.packed_model import quantize_model
from compactmind.methods.quantization.w8a8_model import W8A8Recipe, calibrate_llama, quantize_llama
from compactmind.methods.retraining.causal_lm import RetrainRecipe, retrain_causal_lm
from compactmind.training import TrainingState


@dataclass
class Resources:
    """What methods may need beside the model; all windows are (windows, seq_len) token ids."""

    calibration: torch.Tensor
    """Text on which activations and gradients are observed."""
    train: torch.Tensor
    """Text to retrain on."""
    held_out: torch.Tensor
    """Text that decides which weights of retraining are kept; never the text of a reported number."""
    dense: Callable[[], PreTrainedModel]
    """Makes a fresh copy of the dense model in float32: the teacher."""
    released: torch.dtype = torch.float32
    """What the dense model's file is in, and the result's will be."""
    resume: TrainingState | None = None
    """Where retraining keeps its state, so that a killed run goes on."""


@dataclass(frozen=True)
class Method:
    """One entry of METHODS."""

    name: str
    kind: str
    """prune, retrain or quantize: what decides which order is legal."""
    tracks: tuple[str, ...]
    needs: tuple[str, ...]
    """calibration, text."""
    recipe: type
    """A frozen dataclass: the parameters of the method with their defaults; it refuses values outside their range."""
    apply: Callable[[PreTrainedModel, Resources, Any], tuple[PreTrainedModel, dict[str, Any]]]
    """(model, resources, recipe) -> the new model, for which the old one gives its weights away, and what was done."""
    result: str | None = None
    """Kind of checkpoint the result is, None for the kind it was."""

    def parameters(self, given: dict[str, Any]):
        """Return the recipe with the parameters `given`. Raises ValueError on an unknown name or a value outside its range."""
        known = {field.name for field in fields(self.recipe)}
        if unknown := sorted(set(given) - known):
            raise ValueError(f"{self.name} has no parameter {unknown[0]!r}: choose from {', '.join(sorted(known))}")
        return self.recipe(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


@dataclass(frozen=True)
class NF4Recipe:
    """NF4 by bitsandbytes."""

    double_quantization: bool = True
    """Quantize the block scales too."""


def _prune(model, resources: Resources, recipe: PruneRecipe):
    return prune_llama(model, recipe, resources.calibration)


def _retrain(model, resources: Resources, recipe: RetrainRecipe):
    teacher = resources.dense() if recipe.distillation or recipe.hidden_loss_weight else None
    return model, retrain_causal_lm(
        model, resources.train, resources.held_out, recipe, teacher=teacher, resume=resources.resume
    )


def _w8a8(model, resources: Resources, recipe: W8A8Recipe):
    return model, quantize_llama(model, calibrate_llama(model, resources.calibration), recipe)


def _nf4(model, resources: Resources, recipe: NF4Recipe):
    return model, quantize_model(model, "nf4", double_quantization=recipe.double_quantization, half_precision_embeddings=False)


METHODS: dict[str, Method] = {
    "prune": Method("prune", "prune", ("llm",), ("calibration",), PruneRecipe, _prune, "pruned"),
    "retrain": Method("retrain", "retrain", ("llm",), ("text",), RetrainRecipe, _retrain),
    "w8a8": Method("w8a8", "quantize", ("llm",), ("calibration",), W8A8Recipe, _w8a8, "w8a8"),
    "nf4": Method("nf4", "quantize", ("llm",), (), NF4Recipe, _nf4, "nf4"),
}
"""Name -> method."""


def method_named(name: str) -> Method:
    """Return an entry of METHODS; raises ValueError listing all for any other name."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}: choose from {', '.join(METHODS)}")
    return METHODS[name]
