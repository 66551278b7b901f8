"""What can be removed from a Llama whole: FFN channels, key-value groups, blocks; and how the smaller model is built.

The couplings, which `tests/test_llama_structure.py` checks against the same model with those parts silenced:

channel j of a block's FFN     row j of gate_proj and of up_proj, column j of down_proj
group g of its attention       key-value head g (its rows of k_proj and v_proj) and all query heads that read it (their rows of
                               q_proj, their columns of o_proj)
block l                        everything in it: the residual stream passes by
hidden channel h               column h of the embeddings, of the head and of every linear that reads the residual stream, row h of every
                               linear that writes to it, weight h of every norm

A model of equal widths is of its class again; a Llama whose hidden size is no multiple of the heads that are left is a Mistral without
sliding window, which computes the same (LlamaConfig refuses such a number of heads). Unequal widths, and biases beside such a number of
heads, need modeling_pruned_llama.py. FAMILIES says what each model type takes.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    GraniteForCausalLM,
    HeliumForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    SmolLM3ForCausalLM,
    StableLmForCausalLM,
)

from compactmind.methods.llama import LINEARS, LlamaBlock, llama_blocks, llama_type, stream_norms
from compactmind.methods.pruning import modeling_pruned_llama as modeling

STRUCTURES = ("channels", "groups")


@dataclass(frozen=True)
class Family:
    """What a model of one type is when it is smaller."""

    equal: type[PreTrainedModel]
    """Class of a model whose blocks all have the same widths: that of transformers."""
    unequal: type[PreTrainedModel]
    """Class of one whose blocks differ in their widths."""
    heads_fill_hidden: bool = False
    """The class wants num_attention_heads times head_dim to be the hidden size, so neither key-value groups nor hidden channels can go."""


FAMILIES = {
    "llama": Family(LlamaForCausalLM, modeling.PrunedLlamaForCausalLM),
    "mistral": Family(MistralForCausalLM, modeling.PrunedMistralForCausalLM),
    "qwen2": Family(Qwen2ForCausalLM, modeling.PrunedQwen2ForCausalLM),
    "qwen3": Family(Qwen3ForCausalLM, modeling.PrunedQwen3ForCausalLM),
    "granite": Family(GraniteForCausalLM, modeling.PrunedGraniteForCausalLM),
    "smollm3": Family(SmolLM3ForCausalLM, modeling.PrunedSmolLM3ForCausalLM),
    "helium": Family(HeliumForCausalLM, modeling.PrunedHeliumForCausalLM, heads_fill_hidden=True),
    "stablelm": Family(StableLmForCausalLM, modeling.PrunedStableLmForCausalLM, heads_fill_hidden=True),
}
"""Model type -> what becomes of it. Channels of the FFN and blocks can go from each."""

PER_BLOCK = ("layer_types", "no_rope_layers", "layer_num_key_value_heads", "layer_intermediate_sizes")
"""Fields of a configuration that hold a value per block."""


@dataclass
class BlockMask:
    """What stays of one block, boolean: True keep, False prune. No group left and no channel left is not a block."""

    channels: torch.Tensor  # (intermediate_size,)
    groups: torch.Tensor  # (num_key_value_heads,)


def full_mask(block: LlamaBlock) -> BlockMask:
    """Return the mask that keeps everything of a block."""
    return BlockMask(
        torch.ones(block.up.out_features, dtype=torch.bool),
        torch.ones(block.k.out_features // block.head_dim, dtype=torch.bool),
    )


def channel_parameters(block: LlamaBlock) -> int:
    """Count the parameters one FFN channel owns."""
    return 2 * block.up.in_features + block.down.out_features + sum(x.bias is not None for x in (block.gate, block.up))


def group_parameters(block: LlamaBlock) -> int:
    """Count the parameters one key-value head owns, with the query heads that read it."""
    hidden = block.q.in_features
    biases = block.groups * (block.q.bias is not None) + (block.k.bias is not None) + (block.v.bias is not None)
    return block.head_dim * (2 * (block.groups + 1) * hidden + biases)


def prunable_parameters(model: PreTrainedModel) -> int:
    """Count what sparsity is a share of: the parameters owned by all FFN channels and key-value groups."""
    return sum(kept_parameters(block, full_mask(block)) for block in llama_blocks(model))


def kept_parameters(block: LlamaBlock, mask: BlockMask) -> int:
    """Count the prunable parameters that a mask leaves in a block."""
    return int(mask.channels.sum()) * channel_parameters(block) + int(mask.groups.sum()) * group_parameters(block)


def columns_of_o(block: LlamaBlock, groups: torch.Tensor) -> torch.Tensor:
    """Return, for a value per key-value group, the same per input channel of o_proj (and per row of q_proj)."""
    return groups.repeat_interleave(block.groups * block.head_dim)


@torch.no_grad()
def silence(model: PreTrainedModel, masks: list[BlockMask]) -> None:
    """Set, in place, what the masks prune to zero where it is read: the widths stay, the function is that of the smaller model."""
    for block, mask in zip(llama_blocks(model), masks, strict=True):
        block.down.weight[:, ~mask.channels.to(block.down.weight.device)] = 0
        block.o.weight[:, ~columns_of_o(block, mask.groups).to(block.o.weight.device)] = 0


@torch.no_grad()
def shrink_block(block: LlamaBlock, mask: BlockMask) -> None:
    """Remove, in place, the rows and columns of a block that the mask prunes; the model's configuration does not follow."""
    keep = {"gate": mask.channels, "up": mask.channels, "q": columns_of_o(block, mask.groups)}
    keep["k"] = keep["v"] = mask.groups.repeat_interleave(block.head_dim)
    for field, rows in keep.items():
        block.module.set_submodule(LINEARS[field], _part(getattr(block, field), rows, 0))
    block.module.set_submodule(LINEARS["o"], _part(block.o, keep["q"], 1))
    block.module.set_submodule(LINEARS["down"], _part(block.down, mask.channels, 1))


def _part(linear: nn.Linear, keep: torch.Tensor, dim: int) -> nn.Linear:
    index = keep.nonzero()[:, 0].to(linear.weight.device)
    weight = linear.weight.index_select(dim, index)
    part = type(linear)(weight.shape[1], weight.shape[0], bias=linear.bias is not None, device="meta")
    part.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
    if linear.bias is not None:
        part.bias = nn.Parameter(linear.bias.index_select(0, index) if dim == 0 else linear.bias.clone())
    return part


def remove_blocks(model: PreTrainedModel, indices: set[int]) -> None:
    """Remove whole blocks, in place; raises ValueError if none would be left."""
    layers = model.model.layers
    if len(indices) >= len(layers):
        raise ValueError(f"removing {len(indices)} blocks would leave none of {len(layers)}")
    model.model.layers = nn.ModuleList(layer for index, layer in enumerate(layers) if index not in indices)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    config = model.config
    config.num_hidden_layers = len(model.model.layers)
    for name in PER_BLOCK:
        if getattr(config, name, None):
            setattr(config, name, [value for index, value in enumerate(getattr(config, name)) if index not in indices])
    if hasattr(config, "max_window_layers"):  # Qwen's number of blocks at the beginning without a sliding window
        config.max_window_layers -= sum(index < config.max_window_layers for index in indices)


@torch.no_grad()
def remove_hidden_channels(model: PreTrainedModel, keep: torch.Tensor) -> None:
    """Remove, in place, channels of the residual stream everywhere; keep: (hidden_size,) boolean.

    A norm divides by the root of the mean square of its input, and a mean over fewer channels is another one: with H of them before
    and K after, weights times sqrt(H / K) and eps times H / K give what the same norm gives if the channels that go are 0. Norms of queries
    and keys have the same eps: what they read is multiplied by sqrt(H / K), which they take out again.
    """
    ratio = len(keep) / int(keep.sum())
    for block in llama_blocks(model):
        for field in ("q", "k", "v", "gate", "up"):
            block.module.set_submodule(LINEARS[field], _part(getattr(block, field), keep, 1))
        for field in ("o", "down"):
            block.module.set_submodule(LINEARS[field], _part(getattr(block, field), keep, 0))
        if hasattr(block.module.self_attn, "q_norm"):
            for linear in (block.module.self_attn.q_proj, block.module.self_attn.k_proj):
                for parameter in linear.parameters():
                    parameter.mul_(ratio**0.5)
            for norm in (block.module.self_attn.q_norm, block.module.self_attn.k_norm):
                norm.variance_epsilon *= ratio
    for norm in stream_norms(model):
        norm.weight = nn.Parameter(norm.weight[keep.to(norm.weight.device)] * ratio**0.5, norm.weight.requires_grad)
        norm.variance_epsilon *= ratio
    embeddings = model.get_input_embeddings()
    tied = model.get_output_embeddings().weight is embeddings.weight
    table = embeddings.weight[:, keep.to(embeddings.weight.device)]
    embeddings.weight, embeddings.embedding_dim = nn.Parameter(table, embeddings.weight.requires_grad), table.shape[1]
    head = _part(model.get_output_embeddings(), keep, 1)
    if tied:
        head.weight = embeddings.weight
    model.set_output_embeddings(head)
    model.config.hidden_size = table.shape[1]
    model.config.rms_norm_eps *= ratio


@torch.no_grad()
def silence_hidden_channels(model: PreTrainedModel, keep: torch.Tensor) -> None:
    """Set, in place, to zero what writes the channels that go into the residual stream: the function of the smaller model."""
    gone = ~keep.to(model.device)
    model.get_input_embeddings().weight[:, gone] = 0  # the head reads these too, but 0 times 0 is what it would read anyway
    for block in llama_blocks(model):
        for linear in (block.o, block.down):
            linear.weight[gone] = 0
            if linear.bias is not None:
                linear.bias[gone] = 0


def rebuilt(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model whose class and configuration say what the blocks of `model`, whose weights it takes, have become."""
    config, blocks, family = model.config, llama_blocks(model), FAMILIES[llama_type(model)]
    key_value_heads = [block.k.out_features // block.head_dim for block in blocks]
    widths = [block.up.out_features for block in blocks]
    groups, head_dim = blocks[0].groups, blocks[0].head_dim
    heads, model_class = groups * key_value_heads[0], family.equal
    if len(set(key_value_heads)) > 1 or len(set(widths)) > 1:
        model_class = family.unequal
    elif model_class is LlamaForCausalLM and config.hidden_size % heads:
        biased = any(linear.bias is not None for block in blocks for linear in (block.q, block.gate))  # a Mistral has none
        model_class = family.unequal if biased else MistralForCausalLM
    settings = config.to_dict()
    for name in (
        "model_type",
        "architectures",
        "auto_map",
        "layer_num_key_value_heads",
        "layer_intermediate_sizes",
        "transformers_version",
    ):
        settings.pop(name, None)
    settings |= {"num_hidden_layers": len(blocks), "intermediate_size": widths[0]}
    if model_class is family.unequal:
        settings |= {"layer_num_key_value_heads": key_value_heads, "layer_intermediate_sizes": widths}
        heads = config.num_attention_heads
    settings |= {"num_attention_heads": heads, "num_key_value_heads": heads // groups}
    if "head_dim" in settings or heads * head_dim != config.hidden_size:
        settings["head_dim"] = head_dim
    if model_class is MistralForCausalLM:
        settings.setdefault("sliding_window", None)  # a Llama has none
    with torch.device("meta"):
        result = model_class(model_class.config_class(**settings))
    result.load_state_dict(model.state_dict(), assign=True)
    result.tie_weights()
    result.model.rotary_emb = model.model.rotary_emb  # computed, not stored: the one on meta is empty
    result.generation_config = model.generation_config
    result.set_attn_implementation(model.config._attn_implementation)
    return result.train(model.training)
