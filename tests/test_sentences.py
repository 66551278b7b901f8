"""The report in sentences and warnings, from numbers that are made up."""

import made_up_report
import pytest
from made_up_report import language_model, times

from compactmind.report.sentences import sentences, warnings

report = made_up_report.report


# ------------------------------------------------------------------------------------------------------------- sentences
def test_a_pruned_classifier_in_one_sentence(report):
    result = next(line for line in sentences(report) if line.startswith("pruned:"))
    assert result == (
        "pruned: 40% fewer GFLOPs, 60.0 MB instead of 80.0, 1.62x faster at batch 32, for -0.7 points of accuracy against student "
        "(89.3% and 90.0%; McNemar p = 0.21: not distinguishable on 872 sentences)."
    )
    report["models"][1]["mcnemar_against_reference"]["p_value"] = 0.003
    assert "; McNemar p = 0.003: different on 872 sentences)" in sentences(report)[0]
    report["models"][1]["latency"]["batch_32"]["speedup"] = 0.5
    assert "2.00x slower at batch 32" in sentences(report)[0]
    report["models"][1] |= {"size_mb": 80.0, "gflops": 2.0}  # what is the same is not told
    assert sentences(report)[0].startswith("pruned: 2.00x slower at batch 32, for")


def test_a_language_model_in_one_sentence(report):
    result = next(line for line in sentences(report) if line.startswith("llama_w8a8:"))
    assert "1.60x smaller than llama as released, perplexity +2.00% [+1.00%, +3.00%] (40.80 and 40.00 on 16 windows)" in result
    assert "; KL 0.02 nats a token, 1.8 at the worst of 1000, same top token at 95.1%; next to" in result
    assert result.endswith("; next to the dense model in float32 it reads a prompt 1.90x faster and generates 1.20x faster.")
    report["models"][4]["against_dense"] = {"ratio": 1.001, "interval": [0.999, 1.003]}
    assert "[-0.10%, +0.30%], not distinguishable from 0" in sentences(report)[1]


def test_the_bits_of_a_model_in_one_sentence(report):
    result = [line for line in sentences(report) if line.startswith("llama_gptq_2.5x:")]
    assert result[0].startswith("llama_gptq_2.5x: 2.50x smaller than llama as released, perplexity +5.00%")
    assert result[1:] == [
        "llama_gptq_2.5x: 4.00 bits a weight, all of the file counted (tensors: 4 of 3 bits, 4 of 4 bits, 4 of 5 bits, 1 of 6 bits, "
        "2 of 8 bits); 2.5x smaller was asked for, 2.504x reached; KL 0.012 nats a token expected from calibration text, 0.05 measured."
    ]
    report["models"][5]["quantization"] |= {"target_compression": None, "expected_kl": None}
    assert any(line.endswith("2 of 8 bits).") for line in sentences(report))
    report["models"][5]["quantization"] = {"bits": 8}  # another format
    assert sum(line.startswith("llama_gptq_2.5x:") for line in sentences(report)) == 1


def test_what_the_search_found_in_sentences(report):
    lines = sentences(report)
    assert (
        "Of 2 pipelines tried, the best that is at least 2.5x smaller is prune > nf4 (trial 7): perplexity 60.00" in lines[-2]
    )
    assert lines[-1] == "No single method that was tried is 2.5x smaller; only combinations are."
    single = {"measured": {"perplexity": 122.0}, "methods": ["prune"]}
    report["search"]["best_single"] = single
    assert "is 50% better than the best single one (prune, 122.00)" in sentences(report)[-1]
    report["search"] = None
    assert not any("pipelines" in line for line in sentences(report))


# -------------------------------------------------------------------------------------------------------------- warnings
def test_a_report_with_nothing_to_warn_of_only_says_what_cannot_be_ranked(report):
    assert warnings(report) == [
        "872 sentences give an accuracy to within 2.0 points: pruned cannot be ranked against student by it."
    ]
    report["models"][1]["mcnemar_against_reference"]["p_value"] = 0.01
    assert warnings(report) == []


def test_rows_of_different_days_are_compared_by_their_speed_ups(report):
    report["models"][1]["latency"] = {
        "batch_1": times(20, 1.6),
        "batch_32": times(600, 1.62),
    }  # a slow day, its reference's too
    assert not any("GFLOPs" in warning for warning in warnings(report))
    for row in report["models"][:2]:  # no reference ran along
        row["latency"] = {batch: {**measured, "speedup": None} for batch, measured in row["latency"].items()}
    assert any("is not faster at batch 32 (0.50 times as fast)" in warning for warning in warnings(report))


@pytest.mark.parametrize(
    ("index", "changes", "expected"),
    [
        (1, {"kind": "nf4", "gflops": 2.0, "latency": {"batch_1": times(9, 1.1), "batch_32": times(390, 0.77)}},
         "pruned is slower than its parent student (1.30x at batch 32): nf4 weights"),
        (1, {"kind": "nf4", "gflops": 2.0, "latency": {"batch_1": times(12, 1 / 1.2), "batch_32": times(390, 0.77)}},
         "(1.20x at batch 1, 1.30x at batch 32)"),
        (1, {"latency": {"batch_1": times(10, 1.0), "batch_32": times(180, 1.6)}},
         "40% fewer GFLOPs than student, but is not faster at batch 1 "),
        (4, {"kernel": "simulated"}, "no int8 kernel: its times say nothing"),
        (4, {"generation": {"prefill": times(1900, 0.5), "decode": times(9, 2.0)}}, "reads a prompt 2.00x slower"),
        (4, {"machine": "another CPU, 8 threads"}, "measured on another machine (another CPU, 8 threads)"),
        (4, {"protocol": {"text": "IMDB, test", "seq_len": 2048, "windows": 4}},
         "measured under another protocol (text 'IMDB, test', seq_len 2048, windows 4)"),
        (4, {"protocol": {**language_model("any")["protocol"], "windows_from": "first"}}, "windows 16, windows_from 'first')"),
    ],
)  # fmt: skip
def test_a_warning_where_it_helps(report, index, changes, expected):
    before = warnings(report)
    if "protocol" in changes:  # of three rows one is different
        report["models"].append(language_model("llama_nf4", 1.3))
    report["models"][index] |= changes
    new = [line for line in warnings(report) if line not in before]
    assert len(new) == 1 and expected in new[0] and report["models"][index]["name"] in new[0]
