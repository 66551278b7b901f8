"""What a report says of models whose weights are 2:4: on this processor, and on another one."""

from typing import Any

METHOD, PATTERN = "sparse24", "2:4"


def is_two_of_four(row: dict[str, Any]) -> bool:
    """Tell whether a row's model was given the pattern: a classifier by its stage, a language model by a step of its pipeline."""
    config = (row.get("stage") or {}).get("config") or {}
    return config.get("pattern") == PATTERN or any(step["method"] == METHOD for step in row.get("pipeline") or ())


def zeros_sentences(report: dict[str, Any]) -> list[str]:
    """Return a sentence for every measured model with the pattern: what it saves here, which is nothing, and what would take it."""
    names = [row["name"] for row in report["models"] if row["status"] == "measured" and is_two_of_four(row)]
    if not names:
        return []
    one = len(names) == 1
    where = "was measured without its kernels" if report["environment"].get("gpu") else "a CPU has no kernel for it"
    return [
        f"{', '.join(names)}: two of every four weights of the blocks are zero ({PATTERN}). That saves no time and no bytes here: "
        f"{'it is' if one else 'they are'} stored and multiplied as {'a dense model' if one else 'dense models'}, {where}. "
        "load_checkpoint(..., sparse_kernels=True) hands such weights to the kernels of GPUs from Ampere on."
    ]
