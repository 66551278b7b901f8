"""AutoRound (Cheng et al. 2023): rounding and clipping learned by signed gradient descent, block after block; group-wise integers.

Run:   .peers/auto_round/bin/python benchmarks/peers/autoround.py --model models/llama --output peers/autoround_g32 \\
           --calibration calibration.json --group_size 32 --symmetric False --iters 50
Environment: python -m venv .peers/auto_round && .peers/auto_round/bin/pip install -r benchmarks/peers/requirements-auto_round.txt

200 iterations, 128 samples of 2048 tokens are the tool's defaults; it takes them per block, so
time grows with their product.
"""

import importlib.metadata

import torch
from auto_round import AutoRound
from peer import LINEARS, WRITTEN, Taken, arguments, calibration_windows, table_bytes, write_result, written_bytes
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    args = arguments(__doc__, bits=4, group_size=128, symmetric=True, iters=50, samples=24, batch_size=8)
    windows = calibration_windows(args.calibration, args.samples)
    batches = [{"input_ids": batch, "attention_mask": torch.ones_like(batch)} for batch in windows.split(args.batch_size)]
    taken = Taken()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    rounding = AutoRound(
        model, AutoTokenizer.from_pretrained(args.model), scheme="W4A16", bits=args.bits, group_size=args.group_size,
        sym=args.symmetric, iters=args.iters, nsamples=args.samples, seqlen=windows.shape[1], batch_size=args.batch_size,
        dataset=batches, device_map="cpu", enable_torch_compile=False, low_cpu_mem_usage=False,
    )  # fmt: skip
    model = rounding.quantize()[0]
    weights = {f"{name}.weight": module.weight.detach().float().clone() for name, module in model.named_modules()
               if name.rpartition(".")[2] in LINEARS}  # fmt: skip
    written = args.output / WRITTEN
    # with a zero point 0.16.1 would write AWQ's layout, and fails at it; GPTQ's has the same bytes
    rounding.save_quantized(str(written), format="auto_round" if args.symmetric else "auto_gptq")
    cost = taken.stop()
    version = importlib.metadata.version("auto-round")
    write_result(args, weights, "AutoRound", version, cost, written_bytes(written), table_bytes(written))


if __name__ == "__main__":
    main()
