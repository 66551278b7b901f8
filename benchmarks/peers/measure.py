"""Peers side by side: what each quantizer's weights do to a language model on the same windows, beside the bytes of its files.

Run:   python benchmarks/peers/measure.py --base models/llama --models nf4=peers/nf4 "gptq g32=peers/gptq_g32" --text wiki.test.raw
Reads: the dense model; folders written by the scripts beside this one (model.safetensors dequantized, peer.json)
Writes: --output (JSON, after every model; rows it has of the same folder and protocol stay), and prints the table

All models are float32 here and read the same windows in one process, one at a time. Against the dense model on every predicted token:
  KL           KL(dense || model) in nats, mean and 99.9th percentile
  same top     share of tokens whose most likely next token is the dense model's
  MB           1e6 bytes of what the peer writes, tables included; ratio: bytes of the dense model in 16 bits / these bytes
  int8 table   MB with embedding tables that the peer left in 16 bits stored as 8-bit integers, a float16 step for 64 of them (8.25 bits):
               to compare with files whose tables are small; `--int8_table True` measures the models with tables rounded so, too
A dense model whose head is its input table with a norm folded in (`--count_table_once True`) weighs as if the table were tied: the
bytes of the input table are left out on all rows. The dense row's own int8 table tells what that rounding costs by itself.
"""

import json
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from transformers import AutoModelForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from calibration import text_windows  # noqa: E402
from peer import EMBEDDING, HEAD, round_to_nearest, rounded_bytes  # noqa: E402

from compactmind.evaluation.divergence import measure_windows  # noqa: E402
from compactmind.evaluation.perplexity import paired_ratio  # noqa: E402
from compactmind.files import write_json_atomically  # noqa: E402
from compactmind.forward import loss_of, next_token_logits  # noqa: E402

TABLE_BITS, TABLE_GROUP = 8, 64
"""A table of 8-bit integers with a float16 step for 64 columns: 8.25 bits per weight."""


@dataclass(frozen=True)
class MeasureConfig:
    models: tuple[str, ...]
    """name=folder of each peer."""
    base: Path = Path("models/llama")
    """The dense model."""
    text: Path = Path("wikitext_data")
    """One text file as it stands (wiki.test.raw: the windows of llama.cpp's perplexity), or a folder with test.jsonl."""
    windows: int = 8
    """How many windows."""
    windows_from: Literal["first", "spread"] = "first"
    """The first of the text, or spread over all of it."""
    seq_len: int = 512
    """Tokens of each."""
    count_table_once: bool = False
    """Leave out the bytes of the input table where the head is a table of its own."""
    int8_table: bool = False
    """Measure each model with its 16-bit tables in int8, too, in twice the time."""
    output: Path = Path("results/peers.json")
    """JSON file to write."""


class Reference:
    """The dense model on the windows: what it scores, and its logits in a temporary file (100 MB a window of 512 tokens)."""

    def __init__(self, model: PreTrainedModel, windows: torch.Tensor, file: Path):
        rows, vocabulary = windows.shape[1] - 1, model.get_output_embeddings().weight.shape[0]
        self.windows = windows
        self.logits = torch.from_file(str(file), shared=True, size=len(windows) * rows * vocabulary, dtype=torch.float32)
        self.logits = self.logits.view(len(windows), rows, vocabulary)
        with torch.inference_mode():
            for kept, window in zip(self.logits, windows, strict=True):
                kept.copy_(next_token_logits(model, window))
        self.losses = [loss_of(kept, window).item() for kept, window in zip(self.logits, windows, strict=True)]

    def compare(self, model: PreTrainedModel) -> dict:
        """Return perplexity, its ratio to the dense one minus 1 with a paired interval, and the divergence of a model."""
        measured = measure_windows({"model": model}, self.windows, list(self.logits))["model"]
        against = paired_ratio(measured["losses"].tolist(), self.losses)
        return {
            "perplexity": math.exp(measured["losses"].mean()),
            "against_dense": against["ratio"] - 1,
            "against_dense_interval": [edge - 1 for edge in against["interval"]],
            "divergence": measured["divergence"],
        }


def bytes_counted(total: int, tables: dict[str, int], once: bool) -> int:
    """Return the bytes of a peer's files, without those of the input table if it is to be counted once and the head is another one."""
    return total - (tables[EMBEDDING] if once and HEAD in tables else 0)


def bytes_with_int8_tables(counted: int, tables: dict[str, int], shape: tuple[int, int], once: bool) -> int | None:
    """Return the same bytes with every 16-bit table (vocabulary, hidden) in int8; None if the peer left none in 16 bits."""
    kept = {name: size for name, size in tables.items() if not (once and name == EMBEDDING and HEAD in tables)}
    wide = [size for size in kept.values() if size >= 2 * shape[0] * shape[1]]
    if not wide:
        return None
    return counted - sum(wide) + len(wide) * rounded_bytes(shape, TABLE_BITS, TABLE_GROUP, symmetric=True)


def measured_before(output: Path, protocol: dict) -> dict[tuple[str, float], dict]:
    """Return the rows of an earlier output of the same protocol by name and the peer's seconds, which never come twice."""
    if not output.is_file():
        return {}
    earlier = json.loads(output.read_text(encoding="utf-8"))
    return {(row["name"], row["seconds"]): row for row in earlier["rows"] if earlier["protocol"] == protocol and "seconds" in row}


def round_tables(model: PreTrainedModel) -> None:
    """Round, in place, input embeddings and head to int8."""
    tables = {id(part.weight): part.weight for part in (model.get_input_embeddings(), model.get_output_embeddings())}
    for table in tables.values():
        table.data = round_to_nearest(table.data, TABLE_BITS, TABLE_GROUP, symmetric=True)


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def table_of(rows: list[dict]) -> str:
    """Return the rows as aligned text."""
    lines = [
        f"{'':<30}{'MB':>8}{'ratio':>7}{'perplexity':>12}{'to dense':>10}{'KL mean':>10}{'p99.9':>8}{'same top':>10}"
        f"{'int8 table MB':>15}{'to dense':>10}{'KL mean':>10}{'made in s':>11}{'CPU s':>7}{'peak MB':>9}"
    ]
    for row in rows:
        line = f"{row['name']:<30}{row['bytes'] / 1e6:>8.1f}{row['ratio']:>7.2f}{_quality(row)}"
        small = row.get("int8_table", {})
        line += f"{small['bytes'] / 1e6:>15.1f}" if small else f"{'-':>15}"
        if "perplexity" in small:
            line += f"{small['against_dense']:>10.2%}{small['divergence']['mean']:>10.4f}"
        else:
            line += f"{'-':>10}{'-':>10}"
        if "seconds" in row:
            line += f"{row['seconds']:>11.0f}{row['cpu_seconds']:>7.0f}{row['peak_memory_bytes'] / 1e6:>9.0f}"
        lines.append(line)
    return "\n".join(lines)


def _quality(row: dict) -> str:
    return (
        f"{row['perplexity']:>12.3f}{row['against_dense']:>10.2%}{row['divergence']['mean']:>10.4f}"
        f"{row['divergence']['p999']:>8.3f}{row['divergence']['same_top']:>10.2%}"
    )


def main(config: MeasureConfig) -> None:
    # ------------------------------------------------------------------------------------------------------------ what is compared
    folders = {}
    for entry in config.models:
        name, separator, folder = entry.rpartition("=")
        if not separator or not (Path(folder) / "peer.json").is_file():
            raise SystemExit(
                f"error: --models {entry!r}: expected name=folder with a peer.json, which the scripts beside this one write"
            )
        folders[name] = Path(folder)
    windows = text_windows(config.base, config.text, "test", config.seq_len, config.windows, config.windows_from)
    # ------------------------------------------------------------------------------------------------------------ the dense model
    with tempfile.TemporaryDirectory() as scratch:
        model = load(config.base)
        shape = tuple(model.get_input_embeddings().weight.shape)
        state = {id(weight): (name, 2 * weight.numel()) for name, weight in model.named_parameters()}
        tables = {name: size for name, size in state.values() if name in (EMBEDDING, HEAD)}
        released = bytes_counted(sum(size for _, size in state.values()), tables, config.count_table_once)
        dense = Reference(model, windows, Path(scratch) / "dense")
        protocol = {
            "text": str(config.text), "windows": len(windows), "windows_from": config.windows_from, "seq_len": config.seq_len,
            "predicted_tokens": len(windows) * (config.seq_len - 1), "base": str(config.base), "base_bytes": released,
            "count_table_once": config.count_table_once,
        }  # fmt: skip
        rows, before = [], measured_before(config.output, protocol)
        for name, folder in {"dense, 16 bits": None, **folders}.items():
            made = {"bytes": sum(size for _, size in state.values()), "table_bytes": tables}
            if folder:
                made = json.loads((folder / "peer.json").read_text(encoding="utf-8"))
                if (name, made["seconds"]) in before and not config.int8_table:
                    rows.append(before[name, made["seconds"]])
                    write_json_atomically(config.output, {"protocol": protocol, "rows": rows})
                    continue
                model = load(folder)
            counted = bytes_counted(made["bytes"], made["table_bytes"], config.count_table_once)
            row = {"name": name, "ratio": released / counted, **made, "bytes": counted, **dense.compare(model)}
            small = bytes_with_int8_tables(counted, made["table_bytes"], shape, config.count_table_once)
            if small:
                row["int8_table"] = {"bytes": small}
            if small and config.int8_table:
                round_tables(model)
                row["int8_table"] |= dense.compare(model)
            rows.append(row)
            write_json_atomically(config.output, {"protocol": protocol, "rows": rows})
            print(f"{len(rows):>3}/{len(folders) + 1} {name:<30}{_quality(row)}", flush=True)
    # ------------------------------------------------------------------------------------------------------------ table
    print("\n" + table_of(rows))
    print(
        f"\n{len(windows)} windows of {config.seq_len} tokens of {config.text} ({config.windows_from}); written to {config.output}"
    )


if __name__ == "__main__":
    main(tyro.cli(MeasureConfig, config=(tyro.conf.FlagConversionOff,), use_underscores=True))
