"""Every method a pipeline can be made of, for the Llama track: METHODS, a table to read from top to bottom.

A method takes a model and gives back a model (the same object or another) and a record of what it did. It knows nothing of scripts,
directories or searches.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from compactmind.devices import number_of_processes
from compactmind.methods import memory
from compactmind.methods.llama import LINEARS, llama_blocks
from compactmind.methods.memory import Need, Sizes
from compactmind.methods.pruning.llama_compensation import DenseStates
from compactmind.methods.pruning.llama_importance import score
from compactmind.methods.pruning.llama_masks import PruneRecipe, check_prunable
from compactmind.methods.pruning.llama_pruning import losses_for, prune_llama
from compactmind.methods.pruning.sparse24 import Sparse24Recipe, check_sparse24, sparsify_llama
from compactmind.methods.quantization.calibration import SITES
from compactmind.methods.quantization.gptq_model import (
    SENSITIVITY_WINDOWS,
    GPTQRecipe,
    choices_from,
    choices_to_keep,
    least_bytes,
    quantize_gptq,
    tensor_choices,
)
from compactmind.methods.quantization.nf4_model import NF4Recipe, quantize_nf4
from compactmind.methods.quantization.sensitivity import Gradients, measure_gradients, measured_sensitivities
from compactmind.methods.quantization.tables import table_bits
from compactmind.methods.quantization.w8a8_model import (
    W8A8Recipe,
    calibrate_llama,
    quantize_llama,
    rotate_stream_for,
    smooth_llama,
)
from compactmind.methods.resources import Resources
from compactmind.methods.retraining.recipe import RetrainRecipe, windows_read
from compactmind.methods.retraining.sharding import check_sharding
from compactmind.methods.retraining.together import retrain_together
from compactmind.precision import is_small
from compactmind.progress import now_and_then
from compactmind.training import trains_sharded

if TYPE_CHECKING:
    from optuna import Trial


@dataclass(frozen=True)
class Method:
    """One entry of METHODS."""

    name: str
    kind: str
    """prune, sparsify, retrain, smooth or quantize: what decides which order is legal."""
    recipe: type
    """A frozen dataclass: the parameters of the method with their defaults; it refuses values outside their range."""
    apply: Callable[[PreTrainedModel, Resources, Any], tuple[PreTrainedModel, dict[str, Any]]]
    """(model, resources, recipe) -> the new model, for which the old one gives its weights away, and what was done."""
    space: dict[str, Sequence[Any]]
    """What a search may choose from, by parameter; the others keep their defaults."""
    result: str | None = None
    """Kind of checkpoint the result is, None for the kind it was."""
    bits: Callable[[Any], tuple[float, float | None]] | None = None
    """recipe -> bits of a weight of the blocks and of the others, scales included (None: as before); to tell bytes before running."""
    left: Callable[[Any, int], float | None] | None = None
    """Of one that prunes: (recipe, blocks) -> the share of the blocks' parameters that is left; None: known when it has run."""
    ratio: Callable[[Any], float | None] | None = None
    """recipe -> the compression ratio it makes by itself, whatever was done before; None: `bits` tells."""
    least: Callable[[PreTrainedModel, Any, int], tuple[float, float]] | None = None
    """Of one that has a `ratio`: (dense model, recipe, bytes of a number as released) -> the fewest bytes that it can make of the blocks'
    linears and of all else. The model need not have weights."""
    aim: str | None = None
    """The parameter of that ratio: a search for one size or for several sets it to its targets, and `aimed` takes the place of `space`."""
    aimed: dict[str, Sequence[Any]] = field(default_factory=dict)
    """What a search may choose from beside the target that `aim` is set to."""
    trains: str | None = None
    """The parameter that says on how many tokens it learns, if it does: what a search has chosen may learn longer before it is saved."""
    gradients: Callable[[Any], bool] | None = None
    """recipe -> whether it reads gradients in the precision of training, though it learns nothing."""
    needs: Callable[[Sizes, Any, int], Need] | None = None
    """(sizes, recipe, bytes of the model that is in memory) -> the memory it needs, see memory.py."""
    beforehand: Callable[[Resources, Any], None] | None = None
    """(resources, recipe) reads what it wants of the dense model before the model that it is done to is in memory."""
    check: Callable[[PreTrainedModel, Any, bool], None] | None = None
    """(dense model, recipe, whether it is done to this very model) raises CompactMindError if it cannot be done; it computes nothing."""

    fills_zeros: Callable[[Any], str | None] | None = None
    """recipe -> why zeros that a method before it has made would not be left, in words, None if they are; None: they are left."""
    idle: Callable[[Any], bool] | None = None
    """recipe -> whether it leaves a model that computes what the dense one does as it is; None: it never does."""

    def suggest(
        self, trial: "Trial", label: str | None = None, choices: dict[str, Sequence[Any]] | None = None
    ) -> dict[str, Any]:
        """Return parameters asked of an Optuna trial under the names <label>.<parameter>; from `choices` instead of `space` if given.

        Numbers in even steps are asked for as numbers, so that a sampler knows their order; everything else by name; what has one value
        is not asked for.
        """
        params = {}
        for name, values in (choices or self.space).items():
            asked, numbers = f"{label or self.name}.{name}", are_numbers(values)
            steps = {round(b - a, 9) for a, b in zip(values, values[1:], strict=False)} if numbers else set()
            if len(steps) == 1 and min(steps) > 0:
                ask = trial.suggest_int if all(type(value) is int for value in values) else trial.suggest_float
                wanted = ask(asked, values[0], values[-1], step=steps.pop())
                params[name] = min(values, key=lambda value: abs(value - wanted))  # 0.30000000000000004 is 0.3
            else:
                names = {as_choice(value): value for value in values}
                params[name] = values[0] if len(values) == 1 else names[trial.suggest_categorical(asked, list(names))]
        return params

    def parameters(self, given: dict[str, Any]) -> Any:
        """Return the recipe with the parameters `given`. Raises ValueError on an unknown name or a value outside its range."""
        known = {field.name for field in fields(self.recipe)}
        if unknown := sorted(set(given) - known):
            raise ValueError(f"{self.name} has no parameter {unknown[0]!r}: choose from {', '.join(sorted(known))}")
        return self.recipe(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def as_choice(value: Any) -> Any:
    """Return what stands for a value in a study, which holds words and numbers alone: `channels+groups` for ("channels", "groups")."""
    return "+".join(map(str, value)) or "none" if isinstance(value, (list, tuple)) else value


def are_numbers(values: Sequence[Any]) -> bool:
    """Tell whether all of these are numbers, to which truth values do not belong."""
    return all(type(value) in (int, float) for value in values)


@dataclass(frozen=True)
class SmoothRecipe:
    """SmoothQuant's smoothing alone: the model computes the same, its activations are easier to quantize."""

    alpha: float | str = 0.7
    """In [0, 1], or per_layer: the best of `grid`."""
    sites: Sequence[str] = tuple(SITES)
    """Inputs that are smoothed."""
    grid: Sequence[float] = (0.3, 0.5, 0.7, 0.9)

    def __post_init__(self):
        self.for_w8a8()

    def for_w8a8(self) -> W8A8Recipe:
        """Return the same as part of a W8A8 recipe without rotations; it refuses values outside their range."""
        return W8A8Recipe(alpha=self.alpha, sites=self.sites, grid=self.grid, rotations=())


def _prune(model, resources: Resources, recipe: PruneRecipe):
    scores = losses = None
    if not recipe.blocks and not recipe.hidden_sparsity:  # else what is scored is not the model as it is now
        scored = "scores", recipe.criterion, recipe.aggregate, recipe.seed
        scores = resources.remember(
            scored, lambda: score(model, recipe.criterion, resources.calibration, aggregate=recipe.aggregate, seed=recipe.seed)
        )
        if recipe.scope == "measured":
            losses = _losses_of_cuts(model, resources, recipe, scores)
    states = resources.remember("states", DenseStates) if is_small(model) else None
    return prune_llama(model, recipe, resources.calibration, scores, states, losses)


def _losses_of_cuts(model, resources: Resources, recipe: PruneRecipe, scores):
    """Return what cuts of every block cost, measured once for all sparsities; of the dense model for all runs."""
    fitted = f"re-fitted, damping {recipe.damping:g}" if recipe.compensate else "not re-fitted"
    parts = f"{' and '.join(recipe.structures)} by {recipe.criterion} {recipe.aggregate} {recipe.seed}, round_to {recipe.round_to}"
    name = f"cuts of {parts}, {fitted}, {_named(resources.calibration)}"

    def measured():
        return losses_for(model, recipe, resources.calibration, scores)

    return resources.remember(name, measured if resources.before else lambda: resources.keep(name, measured), numbers=True)


def _left_by_pruning(recipe: PruneRecipe, blocks: int) -> float | None:
    return None if recipe.hidden_sparsity else (1 - recipe.sparsity) * max(0.0, 1 - recipe.blocks / blocks)


def _windows_of_teacher(resources: Resources, recipe: RetrainRecipe) -> list[torch.Tensor]:
    return windows_read(resources.train, resources.held_out, recipe, number_of_processes())


def _read_teacher(resources: Resources, recipe: RetrainRecipe) -> None:
    """Let a large teacher read all of the text that is wanted of it, so that it is not in memory beside the model that is trained."""
    if recipe.distils and not recipe.hidden_loss_weight and not is_small(resources.teacher()):
        texts = _windows_of_teacher(resources, recipe)
        print(f"the dense model reads {sum(map(len, texts))} windows to train on ...", flush=True)
        for windows in texts:
            resources.teacher_states().read(resources.teacher(), windows)


def _sparsify(model, resources: Resources, recipe: Sparse24Recipe):
    return model, sparsify_llama(model, resources.calibration, recipe)


def _retrain(model, resources: Resources, recipe: RetrainRecipe):
    states, teacher = resources.teacher_states(), None
    known = all(map(states.holds, _windows_of_teacher(resources, recipe))) and not recipe.hidden_loss_weight
    if recipe.distils and not known:
        teacher = resources.teacher()
    held = {name: parameter.dtype for name, parameter in model.named_parameters()}
    device = model.device
    if trains_sharded():
        model.cpu()  # no GPU need have room for all of it in float32, nor main memory
    elif recipe.mode == "full":
        model.float()
    done = retrain_together(
        model, resources.train, resources.held_out, recipe, teacher=teacher, teacher_states=states, resume=resources.resume
    )
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(held[name])
    return model.to(device), done


def _check_retrain(dense, recipe: RetrainRecipe, is_dense: bool) -> None:
    if trains_sharded():
        check_sharding(recipe.mode, recipe.optimizer)


def _statistics(model, resources: Resources, turned: bool = False):
    return resources.remember(("statistics", turned), lambda: calibrate_llama(model, resources.calibration))


def _smooth(model, resources: Resources, recipe: SmoothRecipe):
    return model, {"alphas": smooth_llama(model, _statistics(model, resources), recipe.for_w8a8())}


def _w8a8(model, resources: Resources, recipe: W8A8Recipe):
    rotate_stream_for(model, recipe)
    return model, quantize_llama(model, _statistics(model, resources, recipe.stream_rotation), recipe)


def _nf4(model, resources: Resources, recipe: NF4Recipe):
    return model, quantize_nf4(model, resources.calibration, recipe)


def _gptq(model, resources: Resources, recipe: GPTQRecipe):
    description = quantize_gptq(
        model, resources.calibration, recipe, released_bytes=resources.released_bytes, released=resources.released,
        teacher=resources.teacher, learn_from=_learn_from(resources), choices=lambda: _choices(model, resources, recipe),
        gradients=lambda: _gradients(model, resources), show=now_and_then(),
    )  # fmt: skip
    return model, description


def _learn_from(resources: Resources):
    """Return the text of retraining, of which little is read twice; None where there is none."""
    return (resources.train, resources.held_out) if len(resources.train) and len(resources.held_out) else None


def _choices(model, resources: Resources, recipe: GPTQRecipe):
    """Measure what tensors cost once for all targets; of the dense model for all runs."""
    settings = ["stream turned"] * recipe.stream_rotation + [f"damping {recipe.damping:g}"] * (recipe.sensitivity == "gradients")
    settings += ["with K types"] * (recipe.layout == "gguf_k")
    name = ", ".join([f"costs {recipe.sensitivity}", _named(resources.calibration[:SENSITIVITY_WINDOWS]), *settings])

    def measured():
        known = _sensitivities(resources) if _go_by_dense(recipe) else {}
        if len(known) != len(LINEARS) * len(llama_blocks(model)) or "smooth" in resources.kinds_before:
            known = {}  # it has lost blocks, or its errors lie in other channels
        return tensor_choices(model, resources.calibration, recipe, known=known)

    def numbers():
        return choices_to_keep(measured())

    return choices_from(resources.remember(name, numbers if resources.before else lambda: resources.keep(name, numbers), numbers=True))


def _named(windows: torch.Tensor) -> str:
    """Return a name for what is measured on windows (windows, seq_len): with more or less text to calibrate on they are others."""
    return f"{len(windows)} windows {hashlib.sha256(windows.cpu().numpy().tobytes()).hexdigest()[:8]}"


def _go_by_dense(recipe: GPTQRecipe) -> bool:
    """Tell whether errors of linears cost what they do in the dense model; where channels are mixed they do not."""
    return bool(recipe.target_compression and recipe.sensitivity == "measured" and not recipe.stream_rotation)


def _sensitivities(resources: Resources) -> dict[str, float]:
    """Return what errors of the dense model's linears cost; measured once."""
    windows = resources.calibration[:SENSITIVITY_WINDOWS]
    name = f"sensitivities, {_named(windows)}"
    if ((), name) not in resources.remembered:
        measured = resources.keep(name, lambda: measured_sensitivities(resources.teacher(), windows))
        resources.remembered[(), name] = measured
    return resources.remembered[(), name]


def _gradients(model, resources: Resources) -> Gradients:
    """Return the gradients of the calibration text: the dense model's, measured once, which tell tokens apart whatever was done to it.

    A turned stream leaves them as they are. A model that has lost blocks, or that comes alone, has its own.
    """
    known = resources.remembered.get(((), "gradients"))
    return known if known and len(known.tokens) == len(llama_blocks(model)) else measure_gradients(model, resources.calibration)


def _measure_dense(resources: Resources, recipe: GPTQRecipe) -> None:
    """Measure of the dense model what a recipe goes by, before there is another one beside it."""
    if _go_by_dense(recipe):
        _sensitivities(resources)
    if recipe.weigh_tokens and recipe.compensation and ((), "gradients") not in resources.remembered:
        resources.remembered[(), "gradients"] = measure_gradients(resources.teacher(), resources.calibration)


def _filled_by_retraining(recipe: RetrainRecipe) -> str | None:
    return "adapters are added to all weights: set mode to full, which holds the zeros" if recipe.mode == "lora" else None


def _filled_by_w8a8(recipe: W8A8Recipe) -> str | None:
    return "rotations mix the weights of a row: set rotations to []" if recipe.rotations or recipe.stream_rotation else None


def _filled_by_nf4(recipe: NF4Recipe) -> str | None:
    return "compensated rounding adds what others lost to zeros: set compensation to false" if recipe.compensation else None


def _filled_by_gptq(recipe: GPTQRecipe) -> str:
    return "compensated rounding adds what others lost to zeros: take w8a8 without rotations, or nf4 without compensation"


SPARSITIES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6)
METHODS: dict[str, Method] = {
    "prune": Method(
        "prune", "prune", PruneRecipe, _prune,
        {
            "sparsity": SPARSITIES, "criterion": ("taylor", "activation", "variance", "l2"), "scope": ("uniform", "global", "measured"),
            "structures": (("channels",), ("channels", "groups")), "blocks": (0, 1, 2),
        }, "pruned", check=check_prunable, needs=memory.prune, left=_left_by_pruning,
        gradients=lambda recipe: recipe.criterion == "taylor",
    ),
    "sparse24": Method(
        "sparse24", "sparsify", Sparse24Recipe, _sparsify, {"criterion": ("wanda", "magnitude")}, check=check_sparse24,
        needs=memory.sparse24,
    ),
    "retrain": Method(
        "retrain", "retrain", RetrainRecipe, _retrain,
        # tokens are not searched for: more of them are better; what is chosen learns on more before it is saved
        {"tokens": (8192,), "lr": (5e-5, 1e-4, 2e-4, 4e-4), "alpha": (0.5, 1.0, 0.0), "evaluations": (1,)},
        trains="tokens", beforehand=_read_teacher, needs=memory.retrain, check=_check_retrain, fills_zeros=_filled_by_retraining,
        idle=lambda recipe: recipe.chosen_by_divergence and recipe.base == "as_released",
    ),
    "smooth": Method("smooth", "smooth", SmoothRecipe, _smooth, {"alpha": (0.5, 0.6, 0.7, 0.8, 0.9)}, needs=memory.smooth),
    "w8a8": Method(
        "w8a8", "quantize", W8A8Recipe, _w8a8,
        {
            "alpha": ("per_layer", 0.4, 0.5, 0.6, 0.7, 0.8), "activations": ("per_token", "per_tensor"),
            "embeddings": ("as_released", "int8"), "rotations": (("o",), ("o", "down"), ()),
        }, "w8a8", needs=memory.w8a8, bits=lambda recipe: (8.05, 8.06 if recipe.embeddings == "int8" else table_bits(recipe.embeddings)),
        fills_zeros=_filled_by_w8a8,
    ),
    "nf4": Method(
        "nf4", "quantize", NF4Recipe, _nf4,
        {"double_quantization": (True, False), "compensation": (True, False), "embeddings": ("as_released", "int8", "int4")}, "nf4",
        needs=memory.nf4, bits=lambda recipe: (4.13 if recipe.double_quantization else 4.5, table_bits(recipe.embeddings)),
        fills_zeros=_filled_by_nf4,
    ),
    "gptq": Method(
        "gptq", "quantize", GPTQRecipe, _gptq,
        {
            "bits": (3, 4, 5, 6), "group_size": (32, 64, 128), "zero": ("symmetric", "float"), "embeddings": ("int8", "int6", "int4"),
            "damping": (0.01, 0.05, 0.2),
        }, "grouped",
        beforehand=_measure_dense, needs=memory.gptq, bits=lambda recipe: recipe.bits_per_weight, fills_zeros=_filled_by_gptq,
        ratio=lambda recipe: recipe.target_compression or None, least=least_bytes, aim="target_compression", trains="tuning_tokens",
        aimed={"damping": (0.01, 0.05, 0.2), "weigh_tokens": (False, True), "stream_rotation": (False, True)},
    ),
}  # fmt: skip
"""Name -> method."""


def method_named(name: str) -> Method:
    """Return an entry of METHODS; raises ValueError listing all for any other name."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}: choose from {', '.join(METHODS)}")
    return METHODS[name]
