"""CompactMind: make a transformer small and fast, and measure what that cost.

    from compactmind import compress, load_checkpoint

Importing the package imports nothing else; what these two need comes when they are asked for.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["CompactMindError", "compress", "load_checkpoint"]


def __getattr__(name: str) -> Any:
    """Import what is asked for. Raises CompactMindError naming an extra if `compress` lacks a package."""
    from compactmind.errors import CompactMindError, needs_extra

    if name == "CompactMindError":
        return CompactMindError
    if name == "load_checkpoint":
        from compactmind.checkpoint import load_checkpoint

        return load_checkpoint
    if name == "compress":
        with needs_extra("train"):
            from compactmind.search.one_call import compress

        return compress
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
