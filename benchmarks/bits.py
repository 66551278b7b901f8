"""Size against quality of the method gptq: what each target costs in perplexity and KL, how long it takes, on both bases.

Run:   python benchmarks/bits.py --base shipped --text wiki.test.raw --calibration_text wiki.valid.raw
       python benchmarks/bits.py --base turned ...       (the control: the same function with generic weights, benchmarks/turned.py)
       python benchmarks/bits.py --sensitivity gradients ...      (the estimate in place of the measurement)
Reads: models/llama (--model), two files of raw text: windows of --seq_len tokens from their beginning, as llama.cpp reads them.
Prints a line per target, with and without the distillation after rounding; --json keeps them.

The turned control has a second table (its head is no longer the embeddings'), which is the control's and not the method's: bytes count
the table once.
"""

import argparse
import gc
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from compactmind.checkpoint import bytes_to_save, silence_libraries  # noqa: E402
from compactmind.evaluation.divergence import measure_windows  # noqa: E402
from compactmind.evaluation.perplexity import paired_ratio, perplexity_of  # noqa: E402
from compactmind.forward import loss_of, next_token_logits  # noqa: E402
from compactmind.methods.quantization.gptq_model import GPTQRecipe, quantize_gptq, tensor_choices  # noqa: E402


def raw_windows(tokenizer, path: Path, seq_len: int, count: int) -> torch.Tensor:
    """Return the first windows (count, seq_len) of a file's text as it is."""
    ids = tokenizer(path.read_text(encoding="utf-8")[: count * seq_len * 16], return_tensors="pt", verbose=False)["input_ids"][
        0
    ]
    return ids[: count * seq_len].view(count, seq_len)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--model", type=Path, default=Path("models/llama"), help="the model as released: its bytes are what a ratio is of"
    )
    parser.add_argument("--base", choices=("shipped", "turned"), default="shipped")
    parser.add_argument(
        "--turned", type=Path, default=Path("models/llama_turned"), help="the control, made by benchmarks/turned.py"
    )
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration_text", type=Path, required=True)
    parser.add_argument("--targets", type=float, nargs="+", default=[2.5, 3.0, 3.5])
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--calibration_windows", type=int, default=16)
    parser.add_argument("--seq_len", type=int, default=512)
    parser.add_argument("--tuning_tokens", type=int, nargs="+", default=[0, 8192])
    parser.add_argument("--sensitivity", choices=("measured", "gradients"), default="measured")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    silence_libraries()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    held_out = raw_windows(tokenizer, given.text, given.seq_len, given.windows)
    calibration = raw_windows(tokenizer, given.calibration_text, given.seq_len, given.calibration_windows)
    source = given.model if given.base == "shipped" else given.turned
    released = AutoModelForCausalLM.from_pretrained(given.model, dtype="auto")
    released_bytes, uncounted = bytes_to_save(released), ("lm_head",) if given.base == "turned" else ()

    def dense():
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()

    teacher, known, rows = dense(), {}, []
    logits = [next_token_logits(teacher, window) for window in held_out]
    losses = torch.stack([loss_of(each, window) for each, window in zip(logits, held_out, strict=True)])
    of_dense = perplexity_of(losses, given.seq_len, "raw")
    print(
        f"base {given.base}, {len(held_out)} windows of {given.seq_len}, {len(calibration)} to calibrate, {torch.get_num_threads()} threads"
    )
    names = {
        "target": 7,
        "tuned on": 9,
        "ratio": 8,
        "MB": 8,
        "perplexity": 12,
        "against dense": 15,
        "KL": 9,
        "p999": 7,
        "same top": 10,
    }
    print("".join(name.rjust(width) for name, width in names.items()) + "     s")
    for target in given.targets:
        for tokens in given.tuning_tokens:
            model, started = dense(), time.perf_counter()
            if "choices" not in known:
                known["choices"] = tensor_choices(model, calibration, GPTQRecipe(sensitivity=given.sensitivity), uncounted)
                known["seconds"] = time.perf_counter() - started
                started = time.perf_counter()
            recipe = GPTQRecipe(target_compression=target, tuning_tokens=tokens, sensitivity=given.sensitivity)
            description = quantize_gptq(
                model, calibration, recipe, released_bytes=released_bytes, released=released.dtype, uncounted=uncounted,
                teacher=lambda: teacher, choices=lambda: known["choices"],
            )  # fmt: skip
            seconds = time.perf_counter() - started + known["seconds"]
            size = stored(model, released.dtype, uncounted)
            measured = measure_windows({"model": model}, held_out, dense=logits)["model"]
            of_model, kl = perplexity_of(measured["losses"], given.seq_len, "raw"), measured["divergence"]
            ratio = paired_ratio(of_model["losses"], of_dense["losses"])
            rows.append(
                {"base": given.base, "target": target, "tuning_tokens": tokens, "bytes": size, "ratio": released_bytes / size,
                 "perplexity": of_model["perplexity"], "dense": of_dense["perplexity"], "against_dense": ratio, "divergence": kl,
                 "seconds": seconds, "description": description}
            )  # fmt: skip
            print(
                f"{target:>7.2f}{tokens:>9}{released_bytes / size:>8.3f}{size / 1e6:>8.1f}{of_model['perplexity']:>12.3f}"
                f"{ratio['ratio'] - 1:>+15.2%}{kl['mean']:>9.4f}{kl['p999']:>7.2f}{kl['same_top']:>10.1%}{seconds:>6.0f}", flush=True,
            )  # fmt: skip
            if given.json:
                given.json.write_text(json.dumps(rows, default=str), encoding="utf-8")
            del model
            gc.collect()


def stored(model, released: torch.dtype, uncounted) -> int:
    """Return the bytes of the tensors of a file, floating-point weights in the dtype of the release."""
    size = 0
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[0] not in uncounted:
            packed = name.rpartition(".")[2].startswith("weight_")
            size += tensor.numel() * (tensor.element_size() if packed else released.itemsize)
    return size


if __name__ == "__main__":
    main()
