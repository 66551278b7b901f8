"""What this project set out to reach, beside what a report measured of it. Everything is read off the report's dict."""

from collections.abc import Callable
from typing import Any

from compactmind.report.as_shipped import as_shipped, compressed, is_dominated
from compactmind.report.sentences import largest_batch, measured, times_as_fast


def goals(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a dict per goal: goal, bound (at least, at most), value, measured (None: not measured), unit, met (None: not measured).

    Of a goal of bytes or perplexity `beaten_by` names the row of the published file if the model is neither smaller nor better than it,
    else it is None.
    """
    wanted = [*_encoder_goals(report), *_language_goals(report)]
    file = as_shipped(report)
    beaten = {row["name"] for row in compressed(report, file) if is_dominated(row, file)} if file else set()
    return [
        {
            "goal": name, "bound": bound, "value": value, "measured": found, "unit": unit, "met": _is_met(bound, value, found),
            "beaten_by": file["name"] if beaten.intersection(of) else None,
        }
        for name, bound, value, unit, found, *of in wanted
    ]  # fmt: skip


def _is_met(bound: str, value: float, found: float | None) -> bool | None:
    if found is None:
        return None
    return bool(found >= value - 1e-9 if bound == "at least" else found <= value + 1e-9)


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
