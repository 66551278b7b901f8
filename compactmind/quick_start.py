"""Importing transformers without what a process that only runs a model never uses: a second less until its first answer.

Of three seconds of imports one is for compiling and for several processes: transformers marks functions for torch.compile as it is
imported, which imports all of torch._dynamo, and that sympy and torch.distributed.tensor.
"""

import gc
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

COMPILER = "torch._dynamo"
ALONE = "torch._dynamo._trace_wrapped_higher_order_op"
"""What transformers takes from COMPILER; it does without the rest."""
MARKS = ("allow_in_graph", "assume_constant_result", "disable")
"""Decorators of COMPILER that change nothing unless the function is compiled."""


class ImportedWhenAskedFor(types.ModuleType):
    """COMPILER with nothing but its MARKS, which do nothing; asked for anything else, a submodule too, it becomes the real one."""

    def __getattr__(self, name: str) -> Any:
        """Return a mark, or what the package has under that name. Raises AttributeError if it has nothing."""
        if name in MARKS:
            return _unmarked
        if name.startswith("__") and name != "__path__":  # who looks through all modules
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        self.__class__, self.__path__ = types.ModuleType, self.__spec__.submodule_search_locations
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


def _unmarked(function: Callable | None = None, *args: Any, **kwargs: Any) -> Callable:
    return function if function is not None else _unmarked


def _put_off_compiler() -> None:
    """Let COMPILER be imported when it is asked for, where it has not been."""
    if COMPILER in sys.modules:
        return
    package = importlib.util.module_from_spec(importlib.util.find_spec(COMPILER))
    sys.modules[COMPILER] = package
    try:
        importlib.import_module(ALONE)
    except ImportError:  # another version of torch, where it does not come alone
        del sys.modules[COMPILER]
        return
    del package.__path__
    package.__class__ = ImportedWhenAskedFor


@contextmanager
def quick_start() -> Iterator[None]:
    """Import torch, transformers and what needs them inside, in a process that runs a model by itself and compiles nothing of transformers.

    What is imported is not searched for garbage, then or later. transformers learns that there is no torch.distributed, as on builds of
    torch without it, and keeps to that. torch.compile still works, only that what transformers does not want compiled is not known.
    """
    gc.disable()
    import torch

    distributed, torch.distributed.is_available = torch.distributed.is_available, lambda: False
    _put_off_compiler()
    try:
        yield
    finally:
        torch.distributed.is_available = distributed
        gc.freeze()
        gc.enable()
