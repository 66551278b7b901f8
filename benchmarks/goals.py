"""What this project set out to reach, beside what a report measured of it.

Run:   python benchmarks/goals.py              (after ./run.sh; --results_dir)
Reads: results/final_report.json; results/benchmark_training.json and benchmark_int8.json if these benchmarks have run
Writes: nothing; prints the table
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import StageConfig, parse_command_line, run_stage  # noqa: E402
from compactmind.errors import CompactMindError  # noqa: E402
from compactmind.files import read_json  # noqa: E402
from compactmind.report.as_shipped import as_shipped, compressed, is_dominated  # noqa: E402
from compactmind.report.sentences import largest_batch, measured, times_as_fast  # noqa: E402
from compactmind.report.tables import Table, number  # noqa: E402

VERDICTS = {True: "met", False: "MISSED", None: "not run"}
BENCHMARKS = ("training", "int8")


@dataclass(frozen=True)
class GoalsConfig(StageConfig):
    """Settings: the folder of the report."""


CONFIG = GoalsConfig()


def goals(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a dict per goal: goal, bound (at least, at most), value, measured (None: not measured), unit, met (None: not measured).

    `report` may have `benchmarks`: what benchmark_<name>.json says, by name.
    Of a goal of bytes or perplexity `beaten_by` names the row of the published file if the model is neither smaller nor better than it,
    else it is None.
    """
    wanted = [*_encoder_goals(report), *_language_goals(report)]
    file = as_shipped(report)
    beaten = {row["name"] for row in compressed(report, file) if is_dominated(row, file)} if file else set()
    return [
        {
            "goal": name, "bound": bound, "value": value, "measured": reached, "unit": unit, "met": _is_met(bound, value, reached),
            "beaten_by": file["name"] if beaten.intersection(of) else None,
        }
        for name, bound, value, unit, reached, *of in wanted
    ]  # fmt: skip


def _is_met(bound: str, value: float, reached: float | None) -> bool | None:
    if reached is None:
        return None
    return bool(reached >= value - 1e-9 if bound == "at least" else reached <= value + 1e-9)


def _or_none(read: Callable[[], float]) -> float | None:
    """Return read(), None where a row or a number that it needs was not measured."""
    try:
        return read()
    except (KeyError, TypeError, ZeroDivisionError):
        return None


def _encoder_goals(report: dict[str, Any]) -> list[tuple]:
    rows = measured(report, "encoder")
    batch = largest_batch(report)
    real_sst2 = not report["data"]["source"]["source"].startswith("PyPI")
    teacher, student = (0.90, 0.88) if real_sst2 else (0.835, 0.825)

    def accuracy(name: str) -> float | None:
        return _or_none(lambda: rows[name]["accuracy"])

    def points(name: str, other: str) -> float | None:
        return _or_none(lambda: rows[name]["accuracy"] - rows[other]["accuracy"])

    def against(name: str, compare: Callable[[dict[str, Any], dict[str, Any]], float], parent: str = "") -> float | None:
        """Return compare(row, the row it was made from), which has to be `parent` if one is named."""
        row = rows.get(name, {})
        if parent and row.get("made_from") != parent:
            return None
        return _or_none(lambda: compare(row, rows[row["made_from"]]))

    def gained(row: dict[str, Any], other: dict[str, Any]) -> float:
        return row["accuracy"] - other["accuracy"]

    def smaller(row: dict[str, Any], other: dict[str, Any]) -> float:
        return other["size_mb"] / row["size_mb"]

    def faster(row: dict[str, Any], _: dict[str, Any]) -> float | None:
        return row["latency"][batch]["speedup"] if report["references"]["encoder"] == "student_distilled" else None

    at_batch, int8 = batch.replace("_", " "), "student_pruned_w8a8"
    wanted = [
        ("teacher accuracy", "at least", teacher, "share", accuracy("teacher")),
        ("distilled student accuracy", "at least", student, "share", accuracy("student_distilled")),
        ("distilled minus control accuracy", "at least", 0.0, "points", points("student_distilled", "student_finetuned")),
        (
            "GFLOPs removed by pruning", "at least", 0.40, "share",
            against("student_pruned", lambda row, other: 1 - row["gflops"] / other["gflops"]),
        ),
        ("pruned minus distilled accuracy", "at least", -0.011, "points", against("student_pruned", gained, "student_distilled")),
        (f"pruned speed-up at {at_batch}", "at least", 1.4, "factor", against("student_pruned", faster, "student_distilled")),
    ]  # fmt: skip
    for name in ("student_distilled_nf4", "student_pruned_nf4"):
        wanted += [
            (f"{name} minus parent accuracy", "at least", -0.005, "points", against(name, gained)),
            (f"{name} times smaller", "at least", 2.0, "factor", against(name, smaller)),
        ]
    throughput = _or_none(lambda: report["benchmarks"]["training"]["rows"][-1]["speedup"])
    int8_faster = against(int8, lambda row, other: times_as_fast(row, other, batch))
    if "task" in report["data"]:  # what an accuracy is worth depends on the task
        wanted = wanted[2:]
    return [
        *wanted,
        (f"{int8} minus parent accuracy", "at least", -0.003, "points", against(int8, gained)),
        (f"{int8} against its parent, {at_batch}", "at least", 1.8, "factor", int8_faster),
        ("training throughput (see benchmarks/)", "at least", 3.0, "factor", throughput),
    ]


def _language_goals(report: dict[str, Any]) -> list[tuple]:
    rows = measured(report, "llm")

    def value(name: str, read: Callable[[dict[str, Any]], float]) -> float | None:
        return _or_none(lambda: read(rows[name]))

    def speedup(phase: str) -> Callable[[dict[str, Any]], float]:
        return lambda row: row["generation"][phase]["speedup"]

    def retraining_minutes(row: dict[str, Any]) -> float:
        return (sum(step["seconds"] for step in row["pipeline"] if step["method"] == "retrain") or None) / 60

    above = value("llama_w8a8", lambda row: row["against_dense"]["ratio"] - 1)
    kernels = _or_none(lambda: {row["name"]: row for row in report["benchmarks"]["int8"]["rows"]}) or {}
    compiled = _or_none(lambda: kernels["CompactMind W8A8, compiled"]["prefill"]["against_float32"])
    wanted = [
        ("llama_w8a8 perplexity above dense", "at most", 0.005, "share", above, "llama_w8a8"),
        (
            f"llama_w8a8 prefill of {report['settings']['prompt_tokens']} tokens", "at least", 1.6, "factor",
            value("llama_w8a8", speedup("prefill")),
        ),
        ("llama_w8a8 decode", "at least", 1.5, "factor", value("llama_w8a8", speedup("decode"))),
        (
            "llama_w8a8 bytes of the released", "at most", 0.62, "share",
            value("llama_w8a8", lambda row: 1 / row["compression_ratio"]), "llama_w8a8",
        ),
        ("... compiled (see benchmarks/)", "at least", 2.3, "factor", compiled),
        (
            "llama_pruned perplexity, times dense", "at most", 1.2, "factor",
            value("llama_pruned", lambda row: row["against_dense"]["ratio"]), "llama_pruned",
        ),
        ("llama_pruned prefill", "at least", 1.15, "factor", value("llama_pruned", speedup("prefill"))),
        ("llama_pruned retraining", "at most", 10.0, "minutes", value("llama_pruned", retraining_minutes)),
    ]  # fmt: skip
    search = report["search"] or {}
    hybrid, single = (search.get(f"best_{kind}") for kind in ("hybrid", "single"))
    if hybrid and single:
        against = hybrid["measured"]["perplexity"] / single["measured"]["perplexity"]
        wanted.append(("best hybrid's perplexity against best single's", "at most", 1.0, "factor", against))
    return wanted


def goals_table(report: dict[str, Any]) -> Table:
    """Return what was set out to reach beside what was measured."""
    forms = {"share": (".1%", 1, ""), "points": ("+.1f", 100, ""), "factor": (".2f", 1, "x"), "minutes": (".1f", 1, " min")}
    rows = []
    for goal in goals(report):
        form, scale, unit = forms[goal["unit"]]
        shown = [number(None if value is None else scale * value, form, unit) for value in (goal["value"], goal["measured"])]
        beaten = f", but {goal['beaten_by']} is smaller and no worse" if goal["met"] and goal.get("beaten_by") else ""
        rows.append([goal["goal"], f"{goal['bound']} {shown[0]}", shown[1], VERDICTS[goal["met"]] + beaten])
    return Table("Goals", ["goal", "wanted", "measured", "verdict"], rows)


def main(config: GoalsConfig) -> None:
    path = config.results_dir / "final_report.json"
    report = read_json(path)
    if not report:
        raise CompactMindError(f"{path} not found: run `python 6_evaluate_report.py` first")
    report["benchmarks"] = {name: read_json(config.results_dir / f"benchmark_{name}.json") for name in BENCHMARKS}
    print(goals_table(report).as_text())


if __name__ == "__main__":
    run_stage(main, parse_command_line(CONFIG))
