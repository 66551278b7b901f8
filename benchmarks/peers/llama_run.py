"""GGUF files run by llama.cpp itself, and models of ours run by PyTorch, side by side: perplexity, KL to the first, and speed.

Run:   .venv/bin/pip install -r requirements-llama_cpp.txt
       .venv/bin/python benchmarks/peers/llama_run.py --models dense=models/llama ours=models/llama_gptq_3.5x ours_gguf=ours.gguf \
           q4_0=q4_0.gguf --tokens test_windows.json --output results/benchmark_gguf.json
Reads: folders and GGUF files; windows as calibration.py writes them, for example of wiki.test.raw
Prints: a row for each, and writes them

llama.cpp rounds what a linear reads to 8 bits, so its numbers are not those of PyTorch on the same weights. Speed: all in turn, medians of
`--repeats` rounds after two to warm up; a prompt of 512 tokens, then 8 tokens one by one.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from gguf import GGUFReader  # noqa: E402

from compactmind.checkpoint import load_any, silence_libraries  # noqa: E402
from compactmind.evaluation.cost import NEW_TOKENS, measure_generation  # noqa: E402
from compactmind.evaluation.divergence import measure_windows  # noqa: E402
from compactmind.evaluation.llama_cpp import LlamaCpp, installed  # noqa: E402
from compactmind.evaluation.perplexity import paired_ratio, perplexity_of  # noqa: E402


def described(path: Path) -> dict:
    """Return the bytes of a file or folder's weights and, of a GGUF file, how many tensors it has of each type."""
    if path.suffix != ".gguf":
        return {"bytes": sum(file.stat().st_size for file in path.glob("*.safetensors"))}
    tensors = GGUFReader(path).tensors
    types = [tensor.tensor_type.name for tensor in tensors]
    counts = {kind: types.count(kind) for kind in sorted(set(types))}
    return {"bytes": path.stat().st_size, "bytes_of_tensors": sum(int(tensor.n_bytes) for tensor in tensors), "types": counts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, help="name=folder or file.gguf; others are compared with the first")
    parser.add_argument("--tokens", type=Path, help="windows of token ids (JSON); without them only speed is measured")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--prompt_tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5, help="rounds of the measurement of speed; 0: none")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    silence_libraries()
    places = {name: Path(place) for name, place in (each.split("=", 1) for each in args.models)}
    windows = torch.tensor(json.loads(args.tokens.read_text())[: args.windows]) if args.tokens else None
    room = max(args.prompt_tokens + NEW_TOKENS, windows.shape[1] if windows is not None else 0)

    def loaded(place: Path):
        if place.suffix != ".gguf":
            return load_any(place).model
        vocabulary = len(GGUFReader(place).fields["tokenizer.ggml.tokens"].data)
        return LlamaCpp(place, room, vocabulary, torch.get_num_threads())

    models = {name: loaded(place) for name, place in places.items()}
    first = next(iter(models))
    rows = {name: described(place) for name, place in places.items()}
    if windows is not None:
        for name, each in measure_windows(models, windows, first).items():
            rows[name] |= perplexity_of(each["losses"], windows.shape[1], args.tokens.name) | {"divergence": each["divergence"]}
            rows[name]["against_first"] = paired_ratio(rows[name]["losses"], rows[first]["losses"])
    if args.repeats:
        for name, phases in measure_generation(models, args.prompt_tokens, args.repeats, first).items():
            rows[name]["generation"] = phases
    for name, row in rows.items():
        line = f"{name:<24} {row['bytes'] / 1e6:7.1f} MB"
        if "perplexity" in row:
            line += f" | perplexity {row['perplexity']:.3f} ({row['against_first']['ratio'] - 1:+.2%}), KL {row['divergence']['mean']:.4f}"
        for phase, times in row.get("generation", {}).items():
            line += f" | {phase} {times['median_ms']:.1f} ms, {times['speedup']:.2f}x"
        print(line)
    record = {"llama.cpp": installed(), "threads": torch.get_num_threads(), "models": rows}
    args.output.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
