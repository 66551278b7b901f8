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
from compactmind.methods.quantization.blockwise import walk_blocks  # noqa: E402
from compactmind.methods.quantization.calibration import SITES  # noqa: E402
from compactmind.methods.quantization.gptq import columns_in_order, inverse_factor, round_compensated  # noqa: E402
from compactmind.methods.quantization.superblocks import K_GRIDS  # noqa: E402

DAMPING = 0.05
WAYS = ("llama.cpp", "llama.cpp, importance", "gptq")


@torch.no_grad()
def rounded(folder: Path, bits: int, way: str, windows: torch.Tensor):
    """Return the model with every linear that can be in the K type of `bits` bits, and how many these are."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    grid, count = K_GRIDS[bits], 0
    for _, block, moments in walk_blocks(model, windows, None):
        for site, fields in SITES.items():
            for field in fields:
                linear = getattr(block, field)
                if not grid.fits(linear.in_features):
                    continue
                count += 1
                if way == "gptq":
                    order = columns_in_order(moments[site], grid, "activation")
                    factor = inverse_factor(moments[site][order[:, None], order], DAMPING)
                    linear.weight.data = round_compensated(linear.weight, factor, order, grid).weight()
                else:
                    kind = gguf.GGMLQuantizationType[grid.gguf_type]
                    importance = moments[site].diagonal().float() if "importance" in way else None
                    packed = quantize(linear.weight.data.float(), kind, importance)
                    linear.weight.data = torch.from_numpy(gguf.quants.dequantize(packed, kind).copy()).view_as(linear.weight)
    return model, count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/llama"))
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration_text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--calibration_windows", type=int, default=16)
    parser.add_argument("--bits", type=int, nargs="+", default=sorted(K_GRIDS))
    asked = parser.parse_args()
    silence_libraries()
    held_out = text_windows(asked.model, asked.text, "test", 512, asked.windows)
    windows = text_windows(asked.model, asked.calibration_text, "validation", 512, asked.calibration_windows)
    dense = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = [next_token_logits(dense, window) for window in held_out]
    base = measure_windows({"dense": dense}, held_out, logits)["dense"]
    for bits in asked.bits:
        for way in WAYS:
            model, count = rounded(asked.model, bits, way, windows)
            found = measure_windows({"model": model}, held_out, logits)["model"]
            ratio = paired_ratio(found["losses"].tolist(), base["losses"].tolist())["ratio"]
            kind = K_GRIDS[bits].gguf_type
            print(f"{kind} {count} linears {way:<24} perplexity {ratio - 1:+.2%}, KL {found['divergence']['mean']:.5f}", flush=True)


if __name__ == "__main__":
    main()
