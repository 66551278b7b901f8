"""llama.cpp's own quantizer on a dense GGUF file: what our files are compared with at equal bytes.

Run:   python export_gguf.py --model models/llama --output dense.gguf
       .peers/llama_quantize/bin/python benchmarks/peers/llama_quantize.py --model dense.gguf --types Q4_0 Q4_K_M --output peers
Environment: python -m venv .peers/llama_quantize, requirements-llama_quantize.txt beside this file installed in it
Writes: peers/<type>.gguf, with the tokenizer of the dense one

`llama_model_quantize` as of 2025, without an importance matrix. The wheel wants the libstdc++ of GCC 13; where that is older,

    echo 'extern "C" void __cxa_call_terminate(void*) noexcept { __builtin_trap(); }' > shim.cpp && g++ -shared -fPIC shim.cpp -o shim.so

and LD_PRELOAD=./shim.so in front of the command stand in for the one function it lacks.
"""

import argparse
from pathlib import Path

from llama._llama_cpp_cpu import ffi, lib

FILE_TYPES = {
    "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q3_K_M": 12, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18,
}  # fmt: skip
"""llama_ftype of the names."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="dense GGUF file")
    parser.add_argument("--types", nargs="+", choices=FILE_TYPES, required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder for the files")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    lib.llama_backend_init()
    for name in args.types:
        settings = ffi.new("struct llama_model_quantize_params *", lib.llama_model_quantize_default_params())
        settings.ftype = FILE_TYPES[name]
        target = args.output / f"{name.lower()}.gguf"
        if lib.llama_model_quantize(str(args.model).encode(), str(target).encode(), settings):
            raise SystemExit(f"error: {name} failed")
        print(f"{target} {target.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
