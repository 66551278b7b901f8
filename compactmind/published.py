"""What a model was published as, where that is not what lies under models/: read off the file, and in words.

The weights of a GGUF file are mostly rounded. What is made of it here is dequantized, so it is no model of full precision, and the file
itself is a compressed model that costs nothing: whoever reads a number of the dequantized one has to be told.
"""

import re
from pathlib import Path
from typing import Any

from compactmind.errors import needs_extra
from compactmind.files import sha256_of

SIMPLE = re.compile(r"Q(\d)_([01])")
"""GGUF types of one scale per block: bits of a level, and 1 for those with a minimum of their own."""


def published_as(path: Path) -> dict[str, Any]:
    """Return what a GGUF file is: file, format, bytes, sha256, weights, bits_per_weight (of the whole file) and types.

    `types` has per type, that of most weights first: tensors, weights, bits_per_weight and block_size (weights per scale; 1: not rounded
    in blocks). Raises ValueError for a file that is no GGUF.
    """
    with needs_extra("gguf"):
        from gguf import GGML_QUANT_SIZES, GGUFReader

    types: dict[str, dict[str, Any]] = {}
    for tensor in GGUFReader(path).tensors:
        block, size = GGML_QUANT_SIZES[tensor.tensor_type]
        empty = {"tensors": 0, "weights": 0, "bits_per_weight": 8 * size / block, "block_size": block}
        of_type = types.setdefault(tensor.tensor_type.name, empty)
        of_type["tensors"] += 1
        of_type["weights"] += int(tensor.n_elements)
    weights, size = sum(of_type["weights"] for of_type in types.values()), path.stat().st_size
    return {
        "file": path.name, "format": "GGUF", "bytes": size, "sha256": sha256_of(path), "weights": weights,
        "bits_per_weight": 8 * size / weights, "types": dict(sorted(types.items(), key=lambda item: -item[1]["weights"])),
    }  # fmt: skip


def is_rounded(published: dict[str, Any]) -> bool:
    """Tell whether most weights of `published_as` were rounded in blocks."""
    return published["types"][main_type(published)]["block_size"] > 1


def main_type(published: dict[str, Any]) -> str:
    """Return the type of most weights."""
    return max(published["types"], key=lambda kind: published["types"][kind]["weights"])


def describe_published(name: str, published: dict[str, Any]) -> str:
    """Return what the model `name` was published as, and what that means for quantizers that are tried on it, in two sentences."""
    types = published["types"]
    grids = ", ".join(f"{each['tensors']} in {kind} at {each['bits_per_weight']:g}" for kind, each in types.items())
    grids = f"tensors and bits per weight: {grids}"
    origin = f"{name} was published as {published['file']} ({published['format']}, {published['bytes'] / 1e6:.1f} MB; {grids})"
    if not is_rounded(published):
        return f"{origin} and is that file in another format."
    kind = main_type(published)
    block = types[kind]["block_size"]
    grid, alike = f"{kind} weights were rounded in blocks of {block}", "a quantizer with such blocks"
    if simple := SIMPLE.fullmatch(kind):
        grid = f"{kind} weights lie on a grid of {2 ** int(simple[1])} levels per {block} weights"
        alike = f"a quantizer with blocks of {block} and {'a float minimum' if simple[2] == '1' else 'no minimum'}"
    return (
        f"{origin} and is dequantized here, not a model of full precision. Its {grid}: {alike} can find that grid again and is flattered, "
        "one with other levels rounds a second time and is harmed."
    )
