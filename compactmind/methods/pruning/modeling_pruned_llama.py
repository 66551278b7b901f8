"""A Llama whose blocks differ in their number of heads and FFN width.

transformers sizes every block from one number, so such a model cannot be described by its configuration classes. This adds a
width per block; nothing else changes, because the attention code there reads the number of heads off the projections. A copy
of this file lies beside the weights of every such checkpoint, so that
`AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)` works without this project.
"""

from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


class PrunedLlamaConfig(LlamaConfig):
    """A LlamaConfig with the number of key-value heads and of FFN channels of every block."""

    model_type = "pruned_llama"
    layer_num_key_value_heads: list[int] | None = None
    layer_intermediate_sizes: list[int] | None = None


class PrunedLlamaForCausalLM(LlamaForCausalLM):
    """A Llama whose blocks have the widths its configuration says."""

    config_class = PrunedLlamaConfig

    def __init__(self, config: PrunedLlamaConfig):
        super().__init__(config)
        groups = config.num_attention_heads // config.num_key_value_heads  # query heads per key-value head: stays
        widths = zip(self.model.layers, config.layer_num_key_value_heads, config.layer_intermediate_sizes, strict=True)
        for layer, key_value_heads, intermediate_size in widths:
            key_value, hidden = key_value_heads * config.head_dim, config.hidden_size
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
