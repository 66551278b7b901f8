"""bitsandbytes NF4 as transformers applies it (QLoRA, Dettmers et al. 2023): blocks of 64 weights on a 4-bit normal grid, no calibration.

Run:   python benchmarks/peers/bitsandbytes_nf4.py --model models/llama --output peers/nf4
Environment: the project's own
"""

import importlib.metadata

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peer import WRITTEN, Taken, arguments, table_bytes, write_result, written_bytes
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def main() -> None:
    args = arguments(__doc__, double_quantization=True, quant_type="nf4")
    taken = Taken()
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=args.quant_type, bnb_4bit_use_double_quant=args.double_quantization,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        args.model, quantization_config=how, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    written = args.output / WRITTEN
    model.save_pretrained(written)
    cost = taken.stop()
    weights = {
        f"{name}.weight": dequantize_4bit(module.weight.data, module.weight.quant_state)
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit)
    }
    version = importlib.metadata.version("bitsandbytes")
    write_result(args, weights, "bitsandbytes", version, cost, written_bytes(written), table_bytes(written))


if __name__ == "__main__":
    main()
