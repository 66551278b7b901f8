"""What the scripts of this folder share; PyTorch, safetensors and the standard library alone, as peers live in environments of their own.

Each script quantizes one Llama with one peer and leaves a folder:
  as_written/          the files the peer writes, by its own code (for llama.cpp a GGUF file): their bytes are the bytes of the result
  model.safetensors    the same weights dequantized to float32, beside config.json and the tokenizer of the model: what measure.py loads
  peer.json            peer, version, settings, seconds, peak memory, and the bytes: of all files, and of the embedding tables in them
So one process measures all peers with one code on the same windows, whatever kernels they have, and none for the CPU is needed.
"""

import argparse
import json
import resource
import shutil
import sys
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WRITTEN = "as_written"
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def arguments(description: str, **options) -> argparse.Namespace:
    """Return the command line of a peer's script: `--model`, `--output`, `--calibration` and its own options with their defaults."""
    parser = argparse.ArgumentParser(
        description=description.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder of a dense Llama")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--calibration", type=Path, help="JSON list of windows of token ids, made by calibration.py")
    for name, default in options.items():
        kind = _true_or_false if isinstance(default, bool) else type(default)
        parser.add_argument(f"--{name}", type=kind, default=default, help=" ")
    args = parser.parse_args()
    if not (args.model / "config.json").is_file():
        raise SystemExit(f"error: {args.model} holds no model (no config.json): run `python download_model.py` first")
    if args.output.exists():
        raise SystemExit(f"error: {args.output} is there already: remove it, or choose another --output")
    return args


def _true_or_false(word: str) -> bool:
    if word not in ("True", "False"):
        raise argparse.ArgumentTypeError(f"{word!r}: expected True or False")
    return word == "True"


def settings(args: argparse.Namespace) -> dict:
    """Return the options of a command line that say how a peer quantizes."""
    return {name: value for name, value in vars(args).items() if name not in ("model", "output", "calibration")}


def calibration_windows(path: Path | None, count: int) -> torch.Tensor:
    """Return the first `count` windows of token ids, int64 (count, seq_len); SystemExit if the file has fewer."""
    if path is None:
        raise SystemExit("error: --calibration is missing: make it with `python benchmarks/peers/calibration.py`")
    windows = torch.tensor(json.loads(path.read_text(encoding="utf-8")), dtype=torch.int64)
    if len(windows) < count:
        raise SystemExit(
            f"error: {path} has {len(windows)} windows, {count} are wanted: make more with calibration.py --windows"
        )
    return windows[:count]


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of all safetensors files of a folder, as stored."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def table_bytes(folder: Path) -> dict[str, int]:
    """Return the bytes that input embeddings and head take in the safetensors files of a folder; a tied table stands there once."""
    sizes = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in {EMBEDDING, HEAD} & set(opened.keys()):
                tensor = opened.get_tensor(name)
                sizes[name] = tensor.numel() * tensor.element_size()
    return sizes


def peak_memory() -> int:
    """Return the largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Taken:
    """Seconds and peak memory from loading the model to the peer's finished file; `stop` before anything is dequantized.

    `cpu_seconds` are those of all threads together: what it takes on a machine that does nothing else, if one thread works.
    """

    def __init__(self):
        self.begun, self.cpu_begun = time.perf_counter(), time.process_time()

    def stop(self) -> dict:
        seconds, cpu_seconds = time.perf_counter() - self.begun, time.process_time() - self.cpu_begun
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_memory_bytes": peak_memory()}


def write_result(
    args: argparse.Namespace, weights: dict[str, torch.Tensor], peer: str, version: str, taken: dict,
    bytes_written: int, tables: dict[str, int],
) -> None:  # fmt: skip
    """Write the dequantized model and peer.json beside what the peer has written.

    `weights` replaces tensors of the base by name; those it lacks are the base's. `tables`: bytes of the tables in the peer's files.
    SystemExit on a tensor that the base does not have, one of another shape, and linears that did not change.
    """
    base = read_weights(args.model)
    state = {name: tensor.float() for name, tensor in base.items()}
    for name, tensor in weights.items():
        if name == HEAD and HEAD not in base:
            continue
        if name not in base or base[name].shape != tensor.shape:
            raise SystemExit(f"error: {peer} wrote {name} {tuple(tensor.shape)}, which the model does not have")
        state[name] = tensor.float().contiguous()
    untouched = [name for name in state if name.split(".")[-2] in LINEARS and torch.equal(state[name], base[name].float())]
    if untouched:
        raise SystemExit(f"error: {peer} left {len(untouched)} linears as they were, {untouched[0]} among them")
    args.output.mkdir(parents=True, exist_ok=True)
    for file in args.model.iterdir():
        if file.is_file() and file.suffix in (".json", ".jinja", ".model") and not file.name.startswith(("model", "manifest")):
            shutil.copy(file, args.output)
    config = json.loads((args.output / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    (args.output / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=1), encoding="utf-8")
    save_file(state, args.output / "model.safetensors", metadata={"format": "pt"})
    report = {
        "peer": peer,
        "version": version,
        "settings": settings(args),
        **taken,
        "bytes": bytes_written,
        "table_bytes": tables,
    }
    (args.output / "peer.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(f"{args.output}: {peer} {version}, {bytes_written / 1e6:.1f} MB, {taken['seconds']:.0f} s")


def written_bytes(folder: Path) -> int:
    """Return the bytes of all safetensors files of a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def round_to_nearest(weight: torch.Tensor, bits: int, group_size: int, symmetric: bool) -> torch.Tensor:
    """Return a matrix (rows, columns) rounded to integers of `bits`, per group of columns with a float16 step, and back in float32.

    Symmetric: -2^(bits-1) .. 2^(bits-1) - 1, step = largest absolute value / (2^(bits-1) - 1). Asymmetric: the range of the group with
    zero in it, zero point an integer. The last group of a row is shorter where `group_size` does not divide the columns (576 by 128).
    """
    rows, columns = weight.shape
    missing = -columns % group_size  # zeros there move neither a group's largest value nor its range with zero in it
    groups = torch.nn.functional.pad(weight.float(), (0, missing)).reshape(rows, -1, group_size)  # (rows, groups, group_size)
    if symmetric:
        step = groups.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
        zero, lowest, highest = torch.zeros_like(step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    else:
        low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
        step = (high - low) / (2**bits - 1)
        lowest, highest = 0, 2**bits - 1
    step = step.half().float().clamp(min=torch.finfo(torch.float16).smallest_normal)
    if not symmetric:
        zero = (-low / step).round().clamp(lowest, highest)
    integers = ((groups / step).round() + zero).clamp(lowest, highest)
    return ((integers - zero) * step).reshape(rows, -1)[:, :columns].contiguous()


def rounded_bytes(shape: tuple[int, int], bits: int, group_size: int, symmetric: bool) -> int:
    """Return the bytes of a matrix as `round_to_nearest` leaves it: integers packed, float16 steps, zero points of `bits`."""
    rows, columns = shape
    packed, of_group = rows * columns * bits, 16 + (0 if symmetric else bits)
    return -(-(packed + rows * -(-columns // group_size) * of_group) // 8)
