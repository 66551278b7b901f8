"""llm-compressor's GPTQ (Frantar et al. 2022) in the compressed-tensors layout of vLLM: group-wise integers, columns by activation.

Run:   .peers/llmcompressor/bin/python benchmarks/peers/llm_compressor.py --model models/llama --output peers/gptq_g32 \\
           --calibration calibration.json --group_size 32 --symmetric False
Environment: python -m venv .peers/llmcompressor && .peers/llmcompressor/bin/pip install -r benchmarks/peers/requirements-llmcompressor.txt

Its groups must divide a linear's inputs: 128 does not divide SmolLM2's 576 (64 and 32 do). Read back from its file by transformers.
"""

import importlib.metadata

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.awq import AWQModifier
from llmcompressor.modifiers.gptq import GPTQModifier
from peer import LINEARS, WRITTEN, Taken, arguments, calibration_windows, read_weights, table_bytes, write_result, written_bytes
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

METHODS = {"gptq": GPTQModifier, "awq": AWQModifier}


def main() -> None:
    args = arguments(__doc__, method="gptq", bits=4, group_size=64, symmetric=True, samples=24)
    windows = calibration_windows(args.calibration, args.samples)
    rows = Dataset.from_dict({"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()})
    integers = QuantizationArgs(num_bits=args.bits, strategy="group", group_size=args.group_size, symmetric=args.symmetric)
    scheme = QuantizationScheme(targets=["Linear"], weights=integers)
    taken = Taken()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    oneshot(
        model=model, tokenizer=AutoTokenizer.from_pretrained(args.model), dataset=rows, max_seq_length=windows.shape[1],
        num_calibration_samples=len(windows), shuffle_calibration_samples=False,
        recipe=METHODS[args.method](config_groups={"all": scheme}, ignore=["lm_head"]),
    )  # fmt: skip
    written = args.output / WRITTEN
    model.save_pretrained(written, save_compressed=True)
    cost = taken.stop()
    model = AutoModelForCausalLM.from_pretrained(
        written, dtype=torch.bfloat16, quantization_config=CompressedTensorsConfig(run_compressed=False)
    )
    weights = {f"{name}.weight": module.weight.detach() for name, module in model.named_modules()
               if name.rpartition(".")[2] in LINEARS}  # fmt: skip
    if args.method == "awq":  # it moves scales into the norms, too
        weights |= {name: tensor for name, tensor in read_weights(written).items() if name.endswith("norm.weight")}
    version = importlib.metadata.version("llmcompressor")
    peer = f"llm-compressor {args.method.upper()}"
    write_result(args, weights, peer, version, cost, written_bytes(written), table_bytes(written))


if __name__ == "__main__":
    main()
