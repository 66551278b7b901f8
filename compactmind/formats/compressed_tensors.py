"""How the config.json of a W8A8 model says what its tensors mean, so that transformers with compressed-tensors and vLLM read the file.

The layout is `int-quantized`: int8 `weight` (out, in), `weight_scale` (out, 1), and `input_scale` (1,) where it is static. Without this
entry a plain reader would take the integers for weights.
"""

from collections.abc import Sequence
from typing import Any

FORMAT = "int-quantized"
INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
ACTIVATIONS = {
    "per_token": {**INT8, "strategy": "token", "dynamic": True},
    "per_tensor": {**INT8, "strategy": "tensor", "dynamic": True},
    "per_tensor_static": {**INT8, "strategy": "tensor", "dynamic": False},
    None: None,
}
"""Our names of the activations' granularity -> how compressed-tensors says it; None: the input is not rounded."""


def quantization_config(groups: dict[str, tuple[str, str | None]], ignore: Sequence[str]) -> dict[str, Any]:
    """Return the `quantization_config` of a model with int8 weights, a scale per output channel.

    groups: name of the group -> what is in it (the class of a module, or `re:` and a pattern of its name, which counts for more) and the
    granularity of its input; ignore: names of modules that are not quantized.
    """
    weights = {**INT8, "strategy": "channel", "dynamic": False}
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {
            # format: a group of weights alone would be taken for packed
            name: {"targets": [target], "weights": weights, "input_activations": ACTIVATIONS[activations], "format": FORMAT}
            for name, (target, activations) in groups.items()
        },
        "ignore": list(ignore),
    }
