"""Check a run of the paper profile against what others have published of Llama-2-7B: expected beside measured, row by row.

Run:   python benchmarks/paper_check.py        (after the commands of docs/paper_profile.md, with their --models_dir and --results_dir)
Reads: results/final_report.json; results/smoothquant.json and models/llama/manifest.json for rows the report does not have
Writes: nothing; prints the table, where its numbers are from, and the command of every row that is not measured
Exit code: 1 if a measured row is out of its range, was measured by another protocol or is of another model, or nothing was measured

A perplexity is compared only if text, length and number of windows, join and dense model are those of the published one. Quantized rows may
be better than what is published, as more is done here than to nearest (per-layer alpha, compensated rounding, scales by error), but neither
better than the dense model nor of another size than their bits make.
"""

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import StageConfig, parse_command_line, run_stage  # noqa: E402
from compactmind.errors import CompactMindError  # noqa: E402
from compactmind.files import WEIGHTS  # noqa: E402
from compactmind.report.literature import (  # noqa: E402
    LLAMA_2_7B,
    LLAMA_2_7B_PERPLEXITY,
    LLAMA_2_7B_SEQ_LEN,
    LLAMA_2_7B_WINDOWS,
    PUBLISHED,
    TOLERANCE,
    Published,
    protocol_differences,
)

# ------------------------------------------------------------------------------------------------------------- expected
DENSE = "llama"
SHAPE = {
    "hidden_size": 4096, "layers": 32, "num_heads": 32, "num_key_value_heads": 32, "intermediate_size": 11008, "vocabulary": 32000,
}  # fmt: skip
"""Of Llama-2-7B; 6,738,415,616 weights, 6,476,005,376 of them in the linears of the blocks, 262,144,000 in table and head."""
SIZE_TOLERANCE = 0.02
"""Share by which a file may be larger or smaller: scales, norms and the file's head."""

REPORT = "python 6_evaluate_report.py --profile paper"
STAGE_4 = "python 4_smoothquant_llama.py --profile paper"


def fixed(name: str, method: str, params: dict[str, Any], *settings: str) -> str:
    """Return the command that makes models/<name> by one method."""
    command = ["python", "5_bayesian_search.py", "--profile", "paper", "--strategy", "fixed", *settings]
    return shlex.join([*command, "--output", f"models/{name}", "--pipeline", json.dumps([{"method": method, "params": params}])])


@dataclass(frozen=True)
class Expected:
    """A checkpoint and what its row of the report should say."""

    name: str
    """Of the directory under models/."""
    what: str
    published: tuple[str, ...]
    """`model` of its entries of PUBLISHED: what to stand beside."""
    size_gb: float
    """1e9 bytes of its weight file, from SHAPE and the bits of a weight."""
    command: str
    """What makes it, before REPORT measures it."""

    def sources(self) -> list[Published]:
        """Return the published numbers. Raises KeyError if one of them is not in PUBLISHED."""
        known = {row.model: row for row in PUBLISHED}
        return [known[model] for model in self.published]

    def perplexities(self) -> tuple[float, float]:
        """Return the lowest and the highest perplexity that is accepted."""
        return LLAMA_2_7B_PERPLEXITY - TOLERANCE, max(row.result for row in self.sources()) + TOLERANCE


EXPECTED = (
    Expected(DENSE, "as released, fp16", ("fp16, Llama-2-7B",), 13.477, "python download_model.py --profile paper"),
    Expected("llama_w8a8", "int8 weights and activations", ("SmoothQuant W8A8, alpha 0.85, Llama-2-7B",), 7.006, STAGE_4),
    Expected("llama_nf4", "NF4, compensated, tables int8", ("NF4, Llama-2-7B",), 3.611, STAGE_4),
    Expected(
        "llama_nf4_nearest", "NF4, to nearest", ("NF4, Llama-2-7B",), 3.865,
        fixed("llama_nf4_nearest", "nf4", {"compensation": False, "embeddings": "as_released"}),
    ),
    Expected(
        "llama_w4g128", "gptq, 4 bits in groups of 128", ("GPTQ w4g128, Llama-2-7B", "AWQ w4g128, Llama-2-7B"), 3.889,
        fixed(
            "llama_w4g128", "gptq", {"bits": 4, "group_size": 128, "zero": "integer", "embeddings": "as_released"},
            "--calibration_windows", "128",
        ),
    ),
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- measured
def read_json(path: Path, command: str) -> dict[str, Any] | None:
    """Return what a stage wrote, None if it is not there. Raises CompactMindError naming the command if it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CompactMindError(f"{path} cannot be read ({error}): run `{command}`") from None
    if not isinstance(content, dict):
        raise CompactMindError(f"{path} is damaged (a {type(content).__name__}, no object): run `{command}`")
    return content


def shape_of(layers: list[dict[str, int]], parameters: int) -> dict[str, float]:
    """Return the values of SHAPE of a Llama with a head of its own, read off the widths of its blocks and the number of its weights."""
    first = layers[0]
    hidden = first["num_heads"] * first["head_dim"]
    blocks = sum(
        2 * hidden + 2 * hidden * hidden + 2 * hidden * layer["num_key_value_heads"] * layer["head_dim"]
        + 3 * hidden * layer["intermediate_size"] for layer in layers
    )  # fmt: skip
    names = ("num_heads", "num_key_value_heads", "intermediate_size")
    return {
        "hidden_size": hidden, "layers": len(layers), **{name: first[name] for name in names},
        "vocabulary": (parameters - blocks - hidden) / (2 * hidden),
    }  # fmt: skip


def base_of(report: dict[str, Any], models_dir: Path) -> dict[str, Any] | None:
    """Return identity, model_name, layers and parameters of the dense model: of its row, or of its manifest; None without either."""
    names = ("identity", "model_name", "layers", "parameters")
    row = rows_of(report).get(DENSE)
    if row:
        return {name: row[name] for name in names}
    manifest = read_json(models_dir / DENSE / "manifest.json", EXPECTED[0].command)
    if not manifest:
        return None
    source = manifest["stage"]["config"].get("source", "an unknown source")
    values = manifest["files"][WEIGHTS]["sha256"], source, manifest["layers"], manifest["parameters"]
    return dict(zip(names, values, strict=True))


def differences_of_base(base: dict[str, Any] | None) -> list[str]:
    """Return what tells the dense model from Llama-2-7B."""
    if base is None:
        return ["nothing says which model it was made from"]
    shape = shape_of(base["layers"], base["parameters"])
    differences = [f"{name} {shape[name]:g} instead of {value}" for name, value in SHAPE.items() if shape[name] != value]
    name = base["model_name"].lower()
    if LLAMA_2_7B.lower() not in name or "chat" in name:
        differences.append(f"it is {base['model_name']}")
    return [f"not of {LLAMA_2_7B}: {', '.join(differences)}"] if differences else []


def rows_of(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the measured rows of a report by name."""
    return {row["name"]: row for row in report.get("models", []) if row.get("status") == "measured"}


@dataclass(frozen=True)
class Measurement:
    """What was measured of a row, and why it cannot be compared."""

    perplexity: float
    size_gb: float
    differences: list[str]


def measurement_of(name: str, report: dict[str, Any], smoothquant: dict[str, Any], models_dir: Path) -> Measurement | None:
    """Return what was measured of a checkpoint, by the report or else by stage 4; None if neither has measured it."""
    row, base = rows_of(report).get(name), base_of(report, models_dir)
    differences = differences_of_base(base)
    if row:
        protocol, size = row["protocol"], row["size_mb"] / 1e3
        if name != DENSE and row["made_from"] != DENSE:
            differences.append(f"made from {row['made_from'] or 'a model that is no row'}, not from {DENSE}")
    else:
        row = next((row for row in smoothquant.get("models", []) if row["name"] == name), None)
        if row is None:
            return None
        protocol, size = smoothquant["protocol"], row["bytes"] / 1e9
        if base and smoothquant["measured"]["weights"]["model"] != base["identity"]:
            differences.append(f"made from another model than {DENSE}")
    differences += protocol_differences(protocol)
    if protocol["seq_len"] == LLAMA_2_7B_SEQ_LEN and protocol["windows"] != LLAMA_2_7B_WINDOWS:
        differences.append(f"{protocol['windows']} windows instead of all {LLAMA_2_7B_WINDOWS}")
    return Measurement(row["perplexity"], size, differences)


# -------------------------------------------------------------------------------------------------------------- verdict
def verdict_of(expected: Expected, measured: Measurement | None) -> tuple[bool, str]:
    """Return whether a row passes, and what to say of it; a row that is not measured passes."""
    if measured is None:
        return True, "not measured"
    if measured.differences:
        return False, "not comparable: " + "; ".join(measured.differences)
    low, high = expected.perplexities()
    wrong = []
    if not low <= measured.perplexity <= high:  # NaN is not
        bound = high if measured.perplexity > high else low
        wrong.append(f"perplexity off by {measured.perplexity - bound:+.3f}")
    share = measured.size_gb / expected.size_gb - 1
    if not abs(share) <= SIZE_TOLERANCE:
        wrong.append(f"size off by {share:+.1%}")
    return not wrong, ", ".join(wrong) or "ok"


def span(low: float, high: float) -> str:
    """Return a range in words."""
    low, high = f"{round(low, 3):g}", f"{round(high, 3):g}"
    return low if low == high else f"{low} to {high}"


def main(config: StageConfig) -> None:
    paths = config.results_dir / "final_report.json", config.results_dir / "smoothquant.json"
    report, smoothquant = read_json(paths[0], REPORT), read_json(paths[1], STAGE_4)
    if report is None and smoothquant is None:
        raise CompactMindError(f"neither {paths[0]} nor {paths[1]} is there: run the commands of docs/paper_profile.md, at last `{REPORT}`")
    try:
        measured = {each.name: measurement_of(each.name, report or {}, smoothquant or {}, config.models_dir) for each in EXPECTED}
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise CompactMindError(
            f"{paths[0]} or {paths[1]} is not of this version or damaged ({error!r}): run `{STAGE_4}`, then `{REPORT} --fresh True`"
        ) from None
    verdicts = {each.name: verdict_of(each, measured[each.name]) for each in EXPECTED}
    print(
        f"\n{LLAMA_2_7B}, WikiText-2 raw, test, all {LLAMA_2_7B_WINDOWS} windows of {LLAMA_2_7B_SEQ_LEN} tokens\n\n"
        f"{'model':<19}{'what':<31}{'published':>13}{'accepted':>15}{'measured':>10}{'GB':>8}{'measured':>10}  verdict"
    )
    for each in EXPECTED:
        results, there = [row.result for row in each.sources()], measured[each.name]
        numbers = f"{'-':>10}{each.size_gb:>8.2f}{'-':>10}"
        if there:
            numbers = f"{there.perplexity:>10.3f}{each.size_gb:>8.2f}{there.size_gb:>10.2f}"
        print(
            f"{each.name:<19}{each.what:<31}{span(min(results), max(results)):>13}{span(*each.perplexities()):>15}{numbers}  "
            f"{verdicts[each.name][1]}"
        )
    print("\nPublished by others, on other machines:")
    for row in dict.fromkeys(row for each in EXPECTED for row in each.sources()):
        print(f"- {row.model}: {row.result:g}; {row.protocol}; {row.source}")
    missing = list(dict.fromkeys(each.command for each in EXPECTED if measured[each.name] is None))
    if missing:
        print("\nNot measured; these make it:")
        print("\n".join([*missing, REPORT]))
    if not any(measured.values()):
        raise SystemExit("error: nothing was measured, so nothing is checked")
    if not all(passed for passed, _ in verdicts.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    run_stage(main, parse_command_line(StageConfig.for_profile()))
