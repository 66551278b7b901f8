"""Turn the blocks of a Llama into W8A8, one after the other, with or without SmoothQuant before it; write and rebuild such a model.

The files follow the compressed-tensors layout `int-quantized` (int8 `weight`, `weight_scale` per output channel, `input_scale`
if static), which vLLM and transformers with compressed-tensors read. One block at a time is in float32; all others wait in the
dtype they were released in, and every quantized block frees its float weights.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from compactmind.methods.llama import LINEARS, LlamaBlock, block_linears, llama_blocks
from compactmind.methods.quantization.calibration import SITES, InputStatistics, calibrate
from compactmind.methods.quantization.smoothquant import check_alpha, fold, readers_of, refined_scale, site_scale
from compactmind.methods.quantization.w8a8_block import fuse_blocks
from compactmind.methods.quantization.w8a8_linear import W8A8Linear, activation_scale, quantize_activation, quantize_weight

PER_LAYER = "per_layer"
EMBEDDINGS = ("as_released", "int8")
SITE_OF = {linear: site for site, readers in SITES.items() for linear in readers}
COMPRESSED_ACTIVATIONS = {
    "per_token": {"strategy": "token", "dynamic": True},
    "per_tensor": {"strategy": "tensor", "dynamic": True},
    "per_tensor_static": {"strategy": "tensor", "dynamic": False},
}
"""Our names of the activations' granularity -> how compressed-tensors says it."""


class Int8Embedding(nn.Module):
    """An embedding table in int8 with a scale per row; its output is float32."""

    def __init__(self, num_embeddings: int, embedding_dim: int):
        super().__init__()
        self.register_buffer("weight", torch.zeros(num_embeddings, embedding_dim, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.ones(num_embeddings, 1))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.weight[input_ids].float() * self.weight_scale[input_ids]


# -------------------------------------------------------------------------------------------------------------- quantizing
@contextmanager
def float32_block_by_block(model: PreTrainedModel) -> Iterator[None]:
    """Inside the `with` block every decoder block computes in float32, but only while it runs are its weights in float32."""

    def enter(module, inputs):
        module.released = {name: parameter.data for name, parameter in module.named_parameters()}
        module.float()

    def leave(module, inputs, output):
        for name, parameter in module.named_parameters():
            parameter.data = module.released[name]
        del module.released

    with ExitStack() as hooks:
        handles = [model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.float())]
        for block in llama_blocks(model):
            handles += [block.module.register_forward_pre_hook(enter), block.module.register_forward_hook(leave)]
        for handle in handles:
            hooks.callback(handle.remove)
        yield


@torch.no_grad()
def output_error(block: LlamaBlock, site: str, statistics: InputStatistics, alpha: float | None, activations: str) -> float:
    """Return the relative squared error of what reads `site`, quantized after smoothing with `alpha` (None: unsmoothed).

    Sum over the readers of ||X W^T - q(X / s) q(W s)^T||^2 / ||X W^T||^2 on the kept calibration rows X, which count by their
    weights where each token has a scale of its own.
    """
    scale = torch.ones_like(statistics.absmax) if alpha is None else site_scale(block, site, statistics, alpha)
    token_weights = statistics.row_weights[:, None] if activations == "per_token" else 1.0
    rows = statistics.rows / scale
    static = (statistics.absmax / scale).max().view(1, 1) / 127
    step = activation_scale(rows, activations, static)
    quantized_rows = quantize_activation(rows, step).float() * step
    error = size = 0.0
    for linear in readers_of(block, site):
        wanted = statistics.rows @ linear.weight.float().t()
        weight, weight_scale = quantize_weight(linear.weight.float() * scale)
        found = quantized_rows @ (weight.float() * weight_scale).t()
        error += ((found - wanted) * token_weights).square().sum().item()
        size += (wanted * token_weights).square().sum().item()
    return error / max(size, 1e-30)


def choose_alphas(
    block: LlamaBlock, statistics: dict[str, InputStatistics], sites: Sequence[str], grid: Sequence[float], activations: str
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Return, per site, the alpha of `grid` with the smallest output error on calibration rows, and all errors of the grid."""
    errors = {site: [output_error(block, site, statistics[site], alpha, activations) for alpha in grid] for site in sites}
    return {site: grid[min(range(len(grid)), key=row.__getitem__)] for site, row in errors.items()}, errors


def calibrate_llama(model: PreTrainedModel, windows: torch.Tensor) -> list[dict[str, InputStatistics]]:
    """Return what `quantize_llama` needs to know of the inputs of every block, observed on `windows` (windows, seq_len) of text.

    The blocks compute in float32, one at a time; the model stays as it was. Raises CompactMindError, see `calibrate`.
    """
    with float32_block_by_block(model):
        return calibrate(model, windows)


@torch.no_grad()
def smooth_llama(
    model: PreTrainedModel,
    statistics: Sequence[dict[str, InputStatistics]],
    *,
    alpha: float | str = PER_LAYER,
    sites: Sequence[str] = tuple(SITES),
    grid: Sequence[float] = (0.5,),
    refine: bool = False,
    activations: str = "per_token",
) -> list[dict[str, float]]:
    """Make, in place, the model float32 and smooth every block; settings as in `quantize_llama`. Returns the alphas used.

    The outputs stay the same; float32, because rounding the smoothed weights to half precision would be a loss of its own.
    """
    model.float()
    blocks = zip(llama_blocks(model), statistics, strict=True)
    return [_smooth(block, dict(observed), alpha, sites, grid, refine, activations) for block, observed in blocks]


def _smooth(block, seen, alpha, sites, grid, refine, activations) -> dict[str, float]:
    """Smooth one block in float32, in place, `seen` with it; return the alpha of each site."""
    alphas = dict.fromkeys(sites, alpha)
    if alpha == PER_LAYER:
        alphas, _ = choose_alphas(block, seen, sites, grid, activations)
    for site in sites:
        scale = site_scale(block, site, seen[site], alphas[site])
        if refine:
            scale = refined_scale(block, site, seen[site], scale, activations)
        fold(block, site, scale)
        seen[site] = seen[site].divided_by(scale)
    return alphas


@torch.no_grad()
def quantize_llama(
    model: PreTrainedModel,
    statistics: Sequence[dict[str, InputStatistics]],
    *,
    alpha: float | str = PER_LAYER,
    sites: Sequence[str] = tuple(SITES),
    grid: Sequence[float] = (0.5,),
    refine: bool = False,
    activations: str = "per_token",
    embeddings: str = "as_released",
) -> dict[str, Any]:
    """Make, in place, every linear of the blocks W8A8 and return the description a loader and a manifest need.

    `statistics` come from `calibrate_llama` and stay as they are. `sites` are smoothed (none: naive W8A8) with `alpha`: a number in
    [0, 1], or `per_layer` for the best of `grid` by output error; with `refine` that is where `refined_scale` starts. Raises ValueError on settings outside these.
    """
    if embeddings not in EMBEDDINGS:
        raise ValueError(f"unknown embeddings {embeddings!r}: choose one of {', '.join(EMBEDDINGS)}")
    for value in grid if alpha == PER_LAYER else [alpha]:
        check_alpha(value)
    chosen = []
    for block, observed in zip(llama_blocks(model), statistics, strict=True):
        block.module.float()
        seen = dict(observed)  # smoothing puts new entries into it
        alphas = _smooth(block, seen, alpha, sites, grid, refine, activations)
        for field, path in LINEARS.items():
            absmax = seen[SITE_OF[field]].absmax.max().item()
            model.set_submodule(f"{block.name}.{path}", W8A8Linear.from_linear(getattr(block, field), activations, absmax))
        chosen.append(alphas)
    if embeddings == "int8":
        _quantize_embeddings(model, activations)
    description = {
        "method": "smoothquant" if sites else "w8a8",
        "bits": 8,
        "granularity": {"weights": "per output channel", "activations": activations},
        "sites": list(sites),
        "alpha": alpha,
        "alphas": chosen,
        "refined": refine and bool(sites),
        "embeddings": embeddings,
    }
    model.config.quantization_config = compressed_tensors_config(description)
    fuse_blocks(model)
    return description


def _quantize_embeddings(model: PreTrainedModel, activations: str) -> None:
    """Make, in place, the embedding table and the head int8: one table for both where they are tied."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    small = Int8Embedding(table.num_embeddings, table.embedding_dim)
    small.weight, small.weight_scale = quantize_weight(table.weight)
    tied = head.weight.data_ptr() == table.weight.data_ptr()
    dynamic = "per_token" if activations == "per_tensor_static" else activations
    quantized = W8A8Linear.from_linear(head, dynamic)
    if tied:
        quantized.weight, quantized.weight_scale = small.weight, small.weight_scale
        quantized.prepare()
    model.set_input_embeddings(small)
    model.set_output_embeddings(quantized)


def compressed_tensors_config(description: dict[str, Any]) -> dict[str, Any]:
    """Return the `quantization_config` with which compressed-tensors reads the file."""
    int8 = {"num_bits": 8, "type": "int", "symmetric": True}
    activations = COMPRESSED_ACTIVATIONS[description["granularity"]["activations"]]
    group = {
        "targets": ["Linear"],
        "weights": {**int8, "strategy": "channel", "dynamic": False},
        "input_activations": {**int8, **activations},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [] if description["embeddings"] == "int8" else ["lm_head"],
    }


# --------------------------------------------------------------------------------------------------------------- rebuilding
def load_w8a8(
    weights_file: Path, model_class: type[PreTrainedModel], description: dict[str, Any], dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Rebuild a W8A8 model from its weight file and the description `quantize_llama` returned; the rest is of `dtype`.

    Raises ValueError if a tensor is missing or left over.
    """
    config = model_class.config_class.from_pretrained(weights_file.parent)
    activations = description["granularity"]["activations"]
    with torch.device("meta"):
        model = model_class(config)
    for block in llama_blocks(model):
        for path, linear in block_linears(block).items():
            empty = W8A8Linear(linear.in_features, linear.out_features, linear.bias is not None, activations, device="meta")
            model.set_submodule(path, empty)
    tied = config.tie_word_embeddings
    if description["embeddings"] == "int8":
        table = model.get_input_embeddings()
        model.set_input_embeddings(Int8Embedding(table.num_embeddings, table.embedding_dim))
        dynamic = "per_token" if activations == "per_tensor_static" else activations
        model.set_output_embeddings(W8A8Linear(table.embedding_dim, table.num_embeddings, False, dynamic, device="meta"))
    state = load_file(weights_file)
    packed = {name for name, module in model.named_modules() if isinstance(module, (W8A8Linear, Int8Embedding))}
    for name, tensor in state.items():
        if tensor.is_floating_point() and name.rpartition(".")[0] not in packed:
            state[name] = tensor.to(dtype)
    if tied:
        for name in [name for name in model.state_dict() if name.startswith("lm_head.") and name not in state]:
            state[name] = state[name.replace("lm_head.", "model.embed_tokens.")]
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    if missing or unexpected:
        raise ValueError(f"tensors do not fit {model_class.__name__}: missing {missing}, unexpected {unexpected}")
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)  # computed, not stored: the one on meta is empty
    for module in model.modules():
        if isinstance(module, W8A8Linear):
            module.prepare()
    fuse_blocks(model)
    return model
