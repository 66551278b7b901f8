"""How config.json says what the tensors of a quantized model mean, so that transformers with compressed-tensors and vLLM read the file.

int-quantized   W8A8: int8 `weight` (out, in), `weight_scale` (out, 1), and `input_scale` (1,) where it is static
pack-quantized  integers of 2 to 8 bits, packed: the tensors of methods/quantization/grouped.py without a minimum

Without this entry a plain reader would take the integers for weights.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from compactmind.methods.quantization.grid import Grid

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
    said = {name: ([target], weights, ACTIVATIONS[activations]) for name, (target, activations) in groups.items()}
    return _entry("int-quantized", said, ignore)


def packed_config(groups: Mapping[Grid, Sequence[str]], ignore: Sequence[str]) -> dict[str, Any]:
    """Return the `quantization_config` of a model with packed weights: of each grid the `targets`, said as in `quantization_config`."""
    said = {}
    for number, (grid, targets) in enumerate(groups.items()):
        weights = {"num_bits": grid.bits, "type": "int", "symmetric": grid.zero == "symmetric", "dynamic": False}
        row = grid.group_size == -1
        weights |= {"strategy": "channel"} if row else {"strategy": "group", "group_size": grid.group_size}
        said[f"group_{number}"] = list(targets), weights, None
    return _entry("pack-quantized", said, ignore)


def _entry(layout: str, groups: dict[str, tuple[list[str], dict, dict | None]], ignore: Sequence[str]) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {
            # format: a group of weights alone would be taken for packed
            name: {"targets": targets, "weights": weights, "input_activations": activations, "format": layout}
            for name, (targets, weights, activations) in groups.items()
        },
        "ignore": list(ignore),
    }
