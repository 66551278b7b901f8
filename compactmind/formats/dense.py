"""Weights as they are, of one width in all blocks or of each its own (pruned): what transformers reads by itself."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from compactmind.files import WEIGHTS
from compactmind.precision import is_widened


def load(
    directory: Path,
    model_class: type[PreTrainedModel],
    quantization: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
) -> PreTrainedModel:
    """Return the model with weights of `dtype`, wherever it is to go. Raises ValueError if a tensor is missing or left over."""
    model, report = model_class.from_pretrained(directory, dtype=dtype or "auto", output_loading_info=True)
    problems = {key: sorted(map(str, names)) for key, names in report.items() if names}
    if problems:
        raise ValueError(f"the tensors of {WEIGHTS} do not fit {model_class.__name__}: {problems}")
    return model


def kernel(model: PreTrainedModel) -> str:
    """Return the dtype the model multiplies in."""
    return "float32" if is_widened(model) else str(next(model.parameters()).dtype).removeprefix("torch.")


def as_released(name: str, parameter: torch.Tensor) -> bool:
    """Tell whether a weight is stored in the dtype of the release: every number with a point is."""
    return parameter.is_floating_point()
