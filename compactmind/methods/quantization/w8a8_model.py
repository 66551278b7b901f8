"""Turn the blocks of a Llama into W8A8, one after the other, smoothed and rotated before it or not.

One block at a time is in float32; all others wait in the dtype they were released in, and every quantized block frees its float
weights. compactmind/formats/w8a8.py says what the file looks like.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from compactmind.methods.llama import LINEARS, LlamaBlock, llama_blocks
from compactmind.methods.quantization.calibration import SITES, InputStatistics, calibrate, readers_of
from compactmind.methods.quantization.grid import Grid
from compactmind.methods.quantization.packed_model import require_finite
from compactmind.methods.quantization.rotation import (
    FOLDED_SITE,
    fold_rotation,
    hadamard,
    rotate,
    rotation_sizes,
)
from compactmind.methods.quantization.smoothquant import NORM_SITES, check_alpha, fold, site_scale
from compactmind.methods.quantization.stream_rotation import random_orthogonal, rotate_stream
from compactmind.methods.quantization.tables import EMBEDDINGS, replace_tables, table_grid, tables_of
from compactmind.methods.quantization.w8a8_block import fuse_blocks
from compactmind.methods.quantization.w8a8_linear import (
    ACTIVATIONS,
    W8A8Linear,
    activation_scale,
    quantize_activation,
    quantize_weight,
    say_if_simulated,
)
from compactmind.precision import is_small, widen

PER_LAYER = "per_layer"
SITE_OF = {linear: site for site, readers in SITES.items() for linear in readers}


@dataclass(frozen=True)
class W8A8Recipe:
    """How a Llama becomes W8A8. Raises ValueError on a value outside its range."""

    alpha: float | str = PER_LAYER
    """In [0, 1], or per_layer: the best of `grid` by the output error of what reads the input."""
    sites: Sequence[str] = tuple(SITES)
    """Inputs that are smoothed."""
    rotations: Sequence[str] = (FOLDED_SITE,)
    """Inputs that are rotated: o in the weights alone, the others while the model runs. None with per_tensor_static, whose scale is
    calibrated on inputs as they are."""
    grid: Sequence[float] = (0.5,)
    activations: str = "per_token"
    embeddings: str = "as_released"
    """as_released; int8: a scale per row, and the head's product in int8; int6, int5, int4: integers in groups (tables.py), multiplied in
    floating point."""
    stream_rotation: bool = False
    """Rotate the residual stream in the weights, see `rotate_stream_for`: what is rotated before q/k/v and gate/up then needs no work."""

    def __post_init__(self):
        for value in self.grid if self.alpha == PER_LAYER else [self.alpha]:
            check_alpha(value)
        for name, values, choices in (
            ("site", self.sites, tuple(SITES)),
            ("rotation", self.rotations, tuple(SITES)),
            ("activations", [self.activations], ACTIVATIONS),
            ("embeddings", [self.embeddings], EMBEDDINGS),
        ):
            for value in values:
                if value not in choices:
                    raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(choices)}")

    @property
    def table(self) -> Grid | None:
        """The grid of table and head, None where they have none: as released, or int8 by row."""
        return None if self.embeddings == "int8" else table_grid(self.embeddings)

    @property
    def rotated(self) -> tuple[str, ...]:
        """The sites that are rotated one by one in fact: where the stream is rotated, what reads it is not."""
        if self.activations == "per_tensor_static":
            return ()
        return tuple(site for site in self.rotations if not (self.stream_rotation and site in NORM_SITES))


class Int8Embedding(nn.Module):
    """An embedding table in int8 with a scale per row; its output is float32."""

    def __init__(self, num_embeddings: int, embedding_dim: int):
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.register_buffer("weight", torch.zeros(num_embeddings, embedding_dim, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.ones(num_embeddings, 1))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(batch, tokens) ids -> (batch, tokens, embedding_dim) float32."""
        return self.weight[input_ids].float() * self.weight_scale[input_ids]


# -------------------------------------------------------------------------------------------------------------- quantizing
@contextmanager
def float32_block_by_block(model: PreTrainedModel) -> Iterator[None]:
    """Inside the `with` block every decoder block computes in float32, but only while it runs are its weights in float32.

    Whatever is raised inside, also in the middle of a block, the model is unchanged afterwards.
    """

    def enter(module, _):
        module.released = {name: parameter.data for name, parameter in module.named_parameters()}
        module.float()

    def leave(module, *_):
        for name, weight in module.__dict__.pop("released", {}).items():
            module.get_parameter(name).data = weight

    with ExitStack() as hooks:
        embedded = model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.float())
        hooks.callback(embedded.remove)
        for block in llama_blocks(model):
            hooks.callback(leave, block.module)  # one that was left by an exception
            hooks.callback(block.module.register_forward_pre_hook(enter).remove)
            hooks.callback(block.module.register_forward_hook(leave).remove)
        yield


@torch.no_grad()
def output_error(
    block: LlamaBlock, site: str, statistics: InputStatistics, alpha: float | None, activations: str, rotation: int = 0
) -> float:
    """Return the relative squared error of what reads `site`, quantized after smoothing with `alpha` (None: unsmoothed).

    Sum over the readers of ||X W^T - q(X / s) q(W s)^T||^2 / ||X W^T||^2 on the kept calibration rows X, which count by their
    weights where each token has a scale of its own; X / s and W s are rotated before q, `rotation` channels together.
    """
    scale = torch.ones_like(statistics.absmax) if alpha is None else site_scale(block, site, statistics, alpha)
    matrix = hadamard(max(rotation, 1)).to(scale.device)
    token_weights = statistics.row_weights[:, None] if activations == "per_token" else 1.0
    rows = rotate(statistics.rows / scale, matrix)
    static = (statistics.absmax / scale).max().view(1, 1) / 127
    step = activation_scale(rows, activations, static)
    quantized_rows = quantize_activation(rows, step).float() * step
    error = size = 0.0
    for linear in readers_of(block, site):
        wanted = statistics.rows @ linear.weight.float().t()
        weight, weight_scale = quantize_weight(rotate(linear.weight.float() * scale, matrix))
        actual = quantized_rows @ (weight.float() * weight_scale).t()
        error += ((actual - wanted) * token_weights).square().sum().item()
        size += (wanted * token_weights).square().sum().item()
    return error / max(size, 1e-30)


def choose_alphas(
    block: LlamaBlock, statistics: dict[str, InputStatistics], recipe: W8A8Recipe, rotations: Mapping[str, int]
) -> dict[str, float]:
    """Return, per site, the alpha of the grid with the smallest output error on calibration rows."""

    def error(site: str, alpha: float) -> float:
        return output_error(block, site, statistics[site], alpha, recipe.activations, rotations.get(site, 0))

    return {site: min(recipe.grid, key=partial(error, site)) for site in recipe.sites}


def rotate_stream_for(model: PreTrainedModel, recipe: W8A8Recipe) -> None:
    """Rotate, in place, the residual stream of a model if a recipe asks for it, before `calibrate_llama` and `quantize_llama`.

    By a random matrix over all channels: the outliers of the stream are spread over all of them, not over 32 as by a rotation while the
    model runs. Costs nothing then, but a table where the head is tied to the embeddings. Raises CompactMindError, see `rotate_stream`.
    """
    if recipe.stream_rotation:
        rotate_stream(model, random_orthogonal(model.config.hidden_size))


def calibrate_llama(model: PreTrainedModel, windows: torch.Tensor) -> list[dict[str, InputStatistics]]:
    """Return what `quantize_llama` needs to know of the inputs of every block, observed on `windows` (windows, seq_len) of text.

    The blocks compute in float32, one at a time; the model is unchanged. Raises CompactMindError, see `calibrate`.
    """
    with float32_block_by_block(model):
        return calibrate(model, windows)


@torch.no_grad()
def smooth_llama(
    model: PreTrainedModel, statistics: Sequence[dict[str, InputStatistics]], recipe: W8A8Recipe
) -> list[dict[str, float]]:
    """Smooth, in place, every block, without any rotation. Returns the alphas used.

    The outputs stay the same. A small model becomes float32, because rounding the smoothed weights to half precision would be a loss of its
    own; what a large one is smoothed to is held in the dtype it has, as all that is done to it.
    """
    small, alphas = is_small(model), []
    if small:
        model.float()
    for block, observed in zip(llama_blocks(model), statistics, strict=True):
        held = [(parameter, parameter.dtype) for parameter in block.module.parameters()]
        block.module.float()
        alphas.append(_smooth_and_rotate(block, dict(observed), recipe, {}))
        for parameter, dtype in held:
            parameter.data = parameter.data.to(dtype)
    if not small:
        widen(model)
    return alphas


def _smooth_and_rotate(
    block: LlamaBlock, seen: dict[str, InputStatistics], recipe: W8A8Recipe, rotations: Mapping[str, int]
) -> dict[str, float]:
    """Smooth and rotate one block in float32, in place; return the alpha of each site. Smoothing changes `seen` with it."""
    alphas = dict.fromkeys(recipe.sites, recipe.alpha)
    if recipe.alpha == PER_LAYER:
        alphas = choose_alphas(block, seen, recipe, rotations)
    for site, alpha in alphas.items():
        scale = site_scale(block, site, seen[site], alpha)
        fold(block, site, scale)
        seen[site] = seen[site].divided_by(scale)
    for site, size in rotations.items():
        fold_rotation(block, site, size)
    return alphas


@torch.no_grad()
def quantize_llama(
    model: PreTrainedModel, statistics: Sequence[dict[str, InputStatistics]], recipe: W8A8Recipe
) -> dict[str, Any]:
    """Make, in place, every linear of the blocks W8A8 and return the description a loader and a manifest need.

    `statistics` come from `calibrate_llama` and stay as they are. Raises CompactMindError naming a weight that is NaN or infinite, and
    ValueError if the recipe wants the stream rotated and `rotate_stream_for` has not, before anything is changed; a model whose
    quantization is interrupted is of no more use.
    """
    chosen, blocks = [], llama_blocks(model)
    if recipe.stream_rotation and any(
        (norm.weight != 1).any() for block in blocks for norm in (block.input_norm, block.post_norm)
    ):
        raise ValueError("stream_rotation: call rotate_stream_for(model, recipe) first, then calibrate_llama, then quantize_llama")
    require_finite({f"{block.name}.{path}": getattr(block, field) for block in blocks for field, path in LINEARS.items()})
    if recipe.embeddings != "as_released":
        require_finite({"the embedding table": model.get_input_embeddings(), "the head": model.get_output_embeddings()})
    rotations = rotation_sizes(blocks, recipe.rotated)
    for observed in statistics:
        block = blocks.pop(0)  # the list holds the float linears: each block must be the last to know its own
        block.module.float()
        seen = dict(observed)  # smoothing puts new entries into it
        alphas = _smooth_and_rotate(block, seen, recipe, rotations)
        for field, path in LINEARS.items():
            absmax = seen[SITE_OF[field]].absmax.max().item()
            rotation = running_rotation(rotations, field)
            quantized = W8A8Linear.from_linear(getattr(block, field), recipe.activations, absmax, rotation)
            model.set_submodule(f"{block.name}.{path}", quantized)
        chosen.append(alphas)
    if recipe.embeddings == "int8":
        _quantize_embeddings(model, recipe.activations)
    tables = replace_tables(model, dict.fromkeys(tables_of(model), recipe.table) if recipe.table else {})
    description = {
        "method": "smoothquant" if recipe.sites else "w8a8",
        "bits": 8,
        "granularity": {"weights": "per output channel", "activations": recipe.activations},
        "sites": list(recipe.sites),
        "alpha": recipe.alpha,
        "alphas": chosen,
        "rotations": rotations,
        "stream_rotation": recipe.stream_rotation,
        "embeddings": recipe.embeddings,
        "tables": tables,
    }
    fuse_blocks(model)
    say_if_simulated(model)
    return description


def running_rotation(rotations: Mapping[str, int], field: str) -> int:
    """Return the size of the blocks by which the input of a linear is rotated while the model runs, 0 for none."""
    return 0 if SITE_OF[field] == FOLDED_SITE else rotations.get(SITE_OF[field], 0)


def dynamic(activations: str) -> str:
    """Return the granularity of the head's input, on which nothing is calibrated: that of the blocks, unless theirs is static."""
    return "per_token" if activations == "per_tensor_static" else activations


def _quantize_embeddings(model: PreTrainedModel, activations: str) -> None:
    """Make, in place, the embedding table and the head int8: one table for both where they are tied."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    small = Int8Embedding(table.num_embeddings, table.embedding_dim)
    small.weight, small.weight_scale = quantize_weight(table.weight)
    tied = head.weight.data_ptr() == table.weight.data_ptr()
    quantized = W8A8Linear.from_linear(head, dynamic(activations))
    if tied:
        # The scales apart, so that the file has them under both names: compressed-tensors unpacks the head by its own.
        quantized.weight, quantized.weight_scale = small.weight, small.weight_scale.clone()
        quantized.prepare()
    model.set_input_embeddings(small)
    model.set_output_embeddings(quantized)
