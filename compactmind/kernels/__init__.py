"""Kernels of our own, in C++, for what torch has no fast product for: built once on the machine that runs them.

avx2.cpp   x86 CPUs with AVX2 and FMA, Linux, a C++ compiler (g++ or clang++, or what CXX names): int8 times int8, exact, where there are no
           int8 instructions; few rows times integers of 2 to 8 bits in groups, read as they lie in a file, and times bf16; attention
           of a whole text in float32; scales of groups, and rounding column by column
avx512.h   few rows times int8, integers in groups and NF4 again, and attention, on CPUs that have AVX-512 with VNNI and VBMI

Where they cannot be had everything runs without them, slower (w8a8_linear.py, grouped.py). They are built when first asked for, in some 20
seconds, into TORCH_EXTENSIONS_DIR or ~/.cache/torch_extensions, under a name that changes with the source, torch and the options.
"""

import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from compactmind.errors import CompactMindError

SOURCE = Path(__file__).with_name("avx2.cpp")
OPTIONS = ["-std=c++20", "-O3", "-mavx2", "-mfma", "-mf16c", "-ffp-contract=off", "-fopenmp", "-fPIC", "-Wall"]
FEW_ROWS = 4
"""So many rows `grouped_linear`, `levels_linear` and `bfloat16_linear` take (FEW of floats.h)."""
BUILD_SECONDS = 300
KERNEL_VARIABLE = "COMPACTMIND_KERNEL"
"""Environment variable that may say `simulated`: none of these, and no int8 instructions; empty or unset: whatever the machine has."""


def simulated_wanted() -> bool:
    """Tell whether KERNEL_VARIABLE asks for products without special kernels. Raises CompactMindError if it names anything else."""
    wanted = os.environ.get(KERNEL_VARIABLE, "")
    if wanted not in ("", "simulated"):
        raise CompactMindError(
            f"{KERNEL_VARIABLE} is {wanted!r}: set it to simulated, or unset it for the kernel of the machine"
        )
    return wanted == "simulated"


def usable_on(device: torch.device) -> bool:
    """Tell whether torch.ops.compactmind is to multiply on a device."""
    return device.type == "cpu" and not simulated_wanted() and available()


def int8_instructions() -> str:
    """Return what the int8 products of the kernels, which are there, are made of: "avx_vnni" where the CPU has it, else "avx2"."""
    return "avx_vnni" if torch.ops.compactmind.avx_vnni() else "avx2"


def few_rows_instructions() -> str:
    """Return what the products of few rows with integers in groups and NF4 are made of, where the kernels are there: "avx512" or "avx2"."""
    return "avx512" if torch.ops.compactmind.avx512() else "avx2"


def compiler() -> list[str] | None:
    """Return the command of a C++ compiler, None if there is none: CXX if that is set, else the first that is found."""
    given = shlex.split(os.environ.get("CXX", ""))
    candidates = [given] if given else [["g++"], ["clang++"], ["c++"]]
    return next((command for command in candidates if shutil.which(command[0])), None)


def reason_against() -> str | None:
    """Return why this machine cannot have the kernels, None if nothing speaks against them."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return f"they are for Linux on x86-64, and this is {sys.platform} on {platform.machine()}"
    if not torch.cpu._is_avx2_supported():
        return "this CPU has no AVX2"
    if not library().exists() and compiler() is None:
        return "there is no C++ compiler: install g++ (`apt-get install g++`), or name one in CXX"
    return None


def library() -> Path:
    """Return where the built kernels are, or will be."""
    sources = "".join(path.read_text() for path in [SOURCE, *sorted(SOURCE.parent.glob("*.h"))])
    identity = f"{sources} {torch.__version__} {OPTIONS}"
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    return Path(root) / "compactmind" / f"avx2-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"


def identity() -> str:
    """Return which of them run here, "none" where none can be had or are wanted: what a time that is measured depends on."""
    return "none" if simulated_wanted() or reason_against() else library().stem


@functools.cache
def available() -> bool:
    """Tell whether torch.ops.compactmind can be called; the first time they are loaded and, if need be, built.

    Says in one line on standard error why not: whoever makes or loads a quantized model learns that it will be slow here.
    """
    if reason := reason_against():
        print(f"compactmind: no kernels for quantized models, they run slower: {reason}", file=sys.stderr)
        return False
    path = library()
    try:
        if not path.exists():
            build(path)
        torch.ops.load_library(path)
    except (OSError, subprocess.SubprocessError) as error:
        message = (getattr(error, "stderr", None) or str(error)).strip().splitlines() or [type(error).__name__]
        print(
            f"compactmind: no kernels for quantized models, they run slower: building {path} failed: {message[-1]}",
            file=sys.stderr,
        )
        return False
    _tell_shapes()
    return True


def build(path: Path) -> None:
    """Compile and link the kernels into `path`; two processes that do so at once do not disturb each other.

    Raises OSError if the folder cannot be written, subprocess.SubprocessError if the compiler fails.
    """
    from torch.utils.cpp_extension import include_paths, library_paths

    print("compactmind: building kernels for this CPU (once, some 20 seconds) ...", file=sys.stderr)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        compiled, linked = Path(folder, "kernels.o"), Path(folder, "kernels.so")
        run = functools.partial(subprocess.run, check=True, capture_output=True, text=True, timeout=BUILD_SECONDS)
        run([*compiler(), *OPTIONS, *(f"-I{each}" for each in include_paths()), "-c", str(SOURCE), "-o", str(compiled)])
        # Without -fopenmp: the threads are to be those of the OpenMP that torch brings, not of a second one.
        run(
            [
                *compiler(),
                "-shared",
                str(compiled),
                *(f"-L{each}" for each in library_paths()),
                "-ltorch_cpu",
                "-lc10",
                "-o",
                str(linked),
            ]
        )
        os.replace(linked, path)


@functools.cache  # what is told is known as long as the library lives
def _tell_shapes() -> torch.library.Library:
    """Tell torch.compile and the meta device what comes out.

    (Not by `torch.library.register_fake`, which reads the source of who calls it: a tenth of a second.)
    """
    told = torch.library.Library("compactmind", "FRAGMENT")

    def shape_of(name: str) -> Callable[[Callable], None]:
        return lambda function: told.impl(name, function, "Meta")

    @shape_of("quantize_rows")
    def _(x, norm, eps, gate, rotation):
        width = x.shape[1] // 2 if gate else x.shape[1]
        return x.new_empty(x.shape[0], width, dtype=torch.int8), x.new_empty(x.shape[0], 1)

    @shape_of("int8_linear")
    def _(q, row_scale, weight, channel_scale, bias, vnni=True):
        return q.new_empty(q.shape[0], weight.shape[0], dtype=torch.float32)

    @shape_of("scale_product")
    def _(product, row_scale, channel_scale, bias):
        return product.new_empty(product.shape, dtype=torch.float32)

    @shape_of("gelu_quantize")
    def _(product, row_scale, channel_scale, bias):
        rows = product.new_empty(product.shape[0], 1, dtype=torch.float32)
        return product.new_empty(product.shape, dtype=torch.int8), rows

    @shape_of("add_norm_quantize")
    def _(product, row_scale, channel_scale, bias, residual, norm, norm_bias, eps):
        rows = residual.new_empty(residual.shape[0], 1)
        return residual.new_empty(residual.shape), residual.new_empty(residual.shape, dtype=torch.int8), rows

    @shape_of("grouped_dequantize")
    def _(packed, scale, zero, bits, size, width):
        return scale.new_empty(packed.shape[0], width, dtype=torch.float32)

    @shape_of("bfloat16_linear")
    def _(x, weight):
        return x.new_empty(x.shape[0], weight.shape[0])

    @shape_of("levels_linear")
    def _(x, packed, scale, levels):
        return x.new_empty(x.shape[0], scale.shape[0])

    @shape_of("grouped_linear")
    def _(x, packed, scale, zero, bits, size):
        return x.new_empty(x.shape[0], packed.shape[0])

    return told
