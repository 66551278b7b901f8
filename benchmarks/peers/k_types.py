"""K types of GGUF, rounded by llama.cpp and by gptq: every linear of a Llama whose rows super-blocks fill, the rest as released.

Run:   .venv/bin/pip install -r requirements-llama_cpp.txt
       .venv/bin/python benchmarks/peers/k_types.py --model models/llama --text wiki.test.raw --calibration_text wiki.valid.raw
Reads: models/llama (of SmolLM2 these are the 30 down_proj, with rows of 1536), two files of raw text
Prints: per type KL and perplexity against dense on the first windows of the text, of llama.cpp's rounding without and with an importance
    of every column (mean squared input on the calibration text, as its imatrix has it), and of gptq's on the same text

The bytes are the same: the types are. gptq reads what the blocks before, rounded already, write.
"""

import argparse
import sys
from pathlib import Path

import gguf
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from calibration import text_windows  # noqa: E402
from llama_cpp import quantize  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from compactmind.checkpoint import silence_libraries  # noqa: E402
from compactmind.evaluation.divergence import measure_windows  # noqa: E402
from compactmind.evaluation.perplexity import paired_ratio  # noqa: E402
from compactmind.forward import next_token_logits  # noqa: E402
from compactmind.methods.blockwise import walk_blocks  # noqa: E402
from compactmind.methods.llama import LINEARS, llama_blocks  # noqa: E402
from compactmind.methods.quantization.calibration import SITES  # noqa: E402
from compactmind.methods.quantization.gptq import columns_in_order, inverse_factor, round_compensated  # noqa: E402
from compactmind.methods.quantization.superblocks import K_GRIDS  # noqa: E402

DAMPING = 0.05


@torch.no_grad()
def importances(folder: Path, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the mean squared input (in,) of every linear of the dense model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return {
        f"{block.name}.{LINEARS[field]}": moments[site].diagonal().float().clone()
        for _, block, moments in walk_blocks(model, windows, None)
        for site, fields in SITES.items()
        for field in fields
    }


@torch.no_grad()
def by_llama_cpp(folder: Path, bits: int, importance: dict[str, torch.Tensor] | None):
    """Return the model with every linear that can be in the K type of `bits` bits, rounded by llama.cpp."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    kind = gguf.GGMLQuantizationType[K_GRIDS[bits].gguf_type]
    for name, weight in weights_of(model, bits).items():
        packed = quantize(weight, kind, importance[name] if importance else None)
        weight.copy_(torch.from_numpy(gguf.quants.dequantize(packed, kind).copy()))
    return model


@torch.no_grad()
def by_gptq(folder: Path, bits: int, windows: torch.Tensor):
    """Return the same, rounded by gptq."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    grid, chosen = K_GRIDS[bits], weights_of(model, bits)
    for _, block, moments in walk_blocks(model, windows, None):
        for site, fields in SITES.items():
            for field in fields:
                if (weight := chosen.get(f"{block.name}.{LINEARS[field]}")) is not None:
                    order = columns_in_order(moments[site], grid, "activation")
                    factor = inverse_factor(moments[site][order[:, None], order], DAMPING)
                    weight.copy_(round_compensated(weight, factor, order, grid).weight())
    return model


def weights_of(model, bits: int) -> dict[str, torch.Tensor]:
    """Return the weights of a float32 model whose rows super-blocks fill, by name; they are changed in place."""
    linears = {f"{block.name}.{path}": getattr(block, field) for block in llama_blocks(model) for field, path in LINEARS.items()}
    return {name: linear.weight.data for name, linear in linears.items() if K_GRIDS[bits].fits(linear.in_features)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/llama"))
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration_text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--calibration_windows", type=int, default=16)
    parser.add_argument("--bits", type=int, nargs="+", default=sorted(K_GRIDS))
    args = parser.parse_args()
    silence_libraries()
    held_out = text_windows(args.model, args.text, "test", 512, args.windows)
    windows = text_windows(args.model, args.calibration_text, "validation", 512, args.calibration_windows)
    dense = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = [next_token_logits(dense, window) for window in held_out]
    base = measure_windows({"dense": dense}, held_out, logits)["dense"]
    importance = importances(args.model, windows)
    ways = {
        "llama.cpp": lambda bits: by_llama_cpp(args.model, bits, None),
        "llama.cpp, importance": lambda bits: by_llama_cpp(args.model, bits, importance),
        "gptq": lambda bits: by_gptq(args.model, bits, windows),
    }
    for bits in args.bits:
        for way, make in ways.items():
            model = make(bits)
            measured = measure_windows({"model": model}, held_out, logits)["model"]
            ratio = paired_ratio(measured["losses"].tolist(), base["losses"].tolist())["ratio"]
            label = f"{K_GRIDS[bits].gguf_type}, {len(weights_of(model, bits))} linears, {way}"
            print(f"{label:<48} perplexity {ratio - 1:+.2%}, KL {measured['divergence']['mean']:.5f}", flush=True)


if __name__ == "__main__":
    main()
