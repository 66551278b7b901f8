"""The parts of a Llama block by name, so that no technique needs to know where transformers keeps them."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from compactmind.errors import CompactMindError


@dataclass(frozen=True)
class LlamaBlock:
    """One decoder block: two norms, and the linears that read from and write to the residual stream."""

    name: str
    """Path in the model, e.g. model.layers.0."""
    module: nn.Module
    input_norm: nn.Module
    q: nn.Module
    k: nn.Module
    v: nn.Module
    o: nn.Module
    post_norm: nn.Module
    gate: nn.Module
    up: nn.Module
    down: nn.Module
    head_dim: int
    groups: int
    """Query heads per key-value head: 1 without grouped-query attention."""


ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "granite", "stablelm", "helium", "smollm3")
"""Model types whose norms multiply by their weight and stand directly before the linears that read them. Gemma's multiply by
1 + weight and stand elsewhere: the same attribute names, another computation."""

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""What the configuration of a mixture of experts has one of."""

LINEARS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
"""Field of LlamaBlock -> path inside a block."""

NORMS = {"input_norm": "input_layernorm", "post_norm": "post_attention_layernorm"}


def llama_blocks(model: PreTrainedModel) -> list[LlamaBlock]:
    """Return the decoder blocks of a Llama-like model (Llama, Mistral and others of the same layout).

    Raises CompactMindError naming what is missing if the model is of another layout.
    """
    experts = ", a mixture of experts" if any(getattr(model.config, name, None) for name in EXPERTS) else ""
    what = f"{type(model).__name__} (model_type {getattr(model.config, 'model_type', None)!r}{experts})"
    paths = ", ".join([*NORMS.values(), *LINEARS.values()])
    expected = f"expected a Llama-like causal LM, of type {', '.join(ARCHITECTURES)}: model.layers[i] with {paths}"
    layers = getattr(getattr(model, "model", None), "layers", None)
    if layers is None:
        raise CompactMindError(f"{what} has no model.layers: {expected}")
    blocks = []
    for index, layer in enumerate(layers):
        try:
            parts = {field: layer.get_submodule(path) for field, path in {**NORMS, **LINEARS}.items()}
        except AttributeError as error:
            raise CompactMindError(f"{what}, model.layers.{index}: {error}; {expected}") from None
        head_dim = layer.self_attn.head_dim
        heads, groups = parts["q"].out_features // head_dim, parts["q"].out_features // parts["k"].out_features
        if heads * head_dim != parts["q"].out_features or groups * parts["k"].out_features != parts["q"].out_features:
            raise CompactMindError(f"{what}, model.layers.{index}: query heads are no multiple of key-value heads; {expected}")
        blocks.append(LlamaBlock(f"model.layers.{index}", layer, **parts, head_dim=head_dim, groups=groups))
    if llama_type(model) not in ARCHITECTURES:
        raise CompactMindError(f"{what} has these parts and computes something else with them; {expected}")
    return blocks


def llama_type(model: PreTrainedModel) -> str:
    """Return the model type, of a model that was pruned to unequal widths the one it had before."""
    return model.config.model_type.removeprefix("pruned_")


def stream_norms(model: PreTrainedModel) -> list[nn.Module]:
    """Return what reads the residual stream: two norms per block and the last one."""
    return [norm for block in llama_blocks(model) for norm in (block.input_norm, block.post_norm)] + [model.model.norm]


def is_llama(model: nn.Module) -> bool:
    """Tell whether a model is a causal LM whose blocks `llama_blocks` can take apart."""
    return hasattr(getattr(model, "model", None), "layers") and hasattr(model, "lm_head")


def llama_shapes(model: PreTrainedModel) -> list[dict[str, int]]:
    """Return, per block, num_heads, num_key_value_heads, head_dim and intermediate_size."""
    return [
        {
            "num_heads": block.q.out_features // block.head_dim,
            "num_key_value_heads": block.k.out_features // block.head_dim,
            "head_dim": block.head_dim,
            "intermediate_size": block.up.out_features,
        }
        for block in llama_blocks(model)
    ]
