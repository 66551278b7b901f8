"""Llama-like models whose blocks differ in their number of heads and FFN width.

transformers sizes every block from one number, so such a model cannot be described by its configuration classes. This adds a
width per block; nothing else changes, because the attention code there reads the number of heads off the projections. A copy
of this file lies beside the weights of every such checkpoint, so that
`AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)` works without this project.
"""

from torch import nn
from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
    HeliumConfig,
    HeliumForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)


class WidthsConfig:
    """Mixed into a configuration: the number of key-value heads and of FFN channels of every block."""

    layer_num_key_value_heads = None
    layer_intermediate_sizes = None

    def validate(self) -> None:
        """Refuse nothing: LlamaConfig wants, when it is saved, heads that divide the hidden size; with `head_dim` they need not."""


class WidthsForCausalLM:
    """Mixed into a model: its blocks have the widths its configuration says."""

    def __init__(self, config):
        super().__init__(config)
        groups = config.num_attention_heads // config.num_key_value_heads  # query heads per key-value head: stays
        widths = zip(self.model.layers, config.layer_num_key_value_heads, config.layer_intermediate_sizes, strict=True)
        for layer, key_value_heads, intermediate_size in widths:
            key_value, hidden = key_value_heads * layer.self_attn.head_dim, config.hidden_size
            for name, shape in {
                "self_attn.q_proj": (hidden, key_value * groups),
                "self_attn.k_proj": (hidden, key_value),
                "self_attn.v_proj": (hidden, key_value),
                "self_attn.o_proj": (key_value * groups, hidden),
                "mlp.gate_proj": (hidden, intermediate_size),
                "mlp.up_proj": (hidden, intermediate_size),
                "mlp.down_proj": (intermediate_size, hidden),
            }.items():
                layer.set_submodule(name, nn.Linear(*shape, bias=layer.get_submodule(name).bias is not None))


class PrunedLlamaConfig(WidthsConfig, LlamaConfig):
    """A LlamaConfig with widths per block."""

    model_type = "pruned_llama"


class PrunedLlamaForCausalLM(WidthsForCausalLM, LlamaForCausalLM):
    """A LlamaForCausalLM with widths per block."""

    config_class = PrunedLlamaConfig


class PrunedMistralConfig(WidthsConfig, MistralConfig):
    """A MistralConfig with widths per block."""

    model_type = "pruned_mistral"


class PrunedMistralForCausalLM(WidthsForCausalLM, MistralForCausalLM):
    """A MistralForCausalLM with widths per block."""

    config_class = PrunedMistralConfig


class PrunedQwen2Config(WidthsConfig, Qwen2Config):
    """A Qwen2Config with widths per block."""

    model_type = "pruned_qwen2"


class PrunedQwen2ForCausalLM(WidthsForCausalLM, Qwen2ForCausalLM):
    """A Qwen2ForCausalLM with widths per block."""

    config_class = PrunedQwen2Config


class PrunedQwen3Config(WidthsConfig, Qwen3Config):
    """A Qwen3Config with widths per block."""

    model_type = "pruned_qwen3"


class PrunedQwen3ForCausalLM(WidthsForCausalLM, Qwen3ForCausalLM):
    """A Qwen3ForCausalLM with widths per block."""

    config_class = PrunedQwen3Config


class PrunedGraniteConfig(WidthsConfig, GraniteConfig):
    """A GraniteConfig with widths per block."""

    model_type = "pruned_granite"


class PrunedGraniteForCausalLM(WidthsForCausalLM, GraniteForCausalLM):
    """A GraniteForCausalLM with widths per block."""

    config_class = PrunedGraniteConfig


class PrunedSmolLM3Config(WidthsConfig, SmolLM3Config):
    """A SmolLM3Config with widths per block."""

    model_type = "pruned_smollm3"


class PrunedSmolLM3ForCausalLM(WidthsForCausalLM, SmolLM3ForCausalLM):
    """A SmolLM3ForCausalLM with widths per block."""

    config_class = PrunedSmolLM3Config


class PrunedHeliumConfig(WidthsConfig, HeliumConfig):
    """A HeliumConfig with widths per block."""

    model_type = "pruned_helium"


class PrunedHeliumForCausalLM(WidthsForCausalLM, HeliumForCausalLM):
    """A HeliumForCausalLM with widths per block."""

    config_class = PrunedHeliumConfig


class PrunedStableLmConfig(WidthsConfig, StableLmConfig):
    """A StableLmConfig with widths per block."""

    model_type = "pruned_stablelm"


class PrunedStableLmForCausalLM(WidthsForCausalLM, StableLmForCausalLM):
    """A StableLmForCausalLM with widths per block."""

    config_class = PrunedStableLmConfig
