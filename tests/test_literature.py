"""Published numbers beside this run's: which can be compared, and why others cannot."""

import made_up_report

from compactmind.report.literature import beside_the_literature, check_llama_2

report = made_up_report.report


def test_published_rows_say_why_they_cannot_be_compared(report):
    rows = {row["model"]: row for row in beside_the_literature(report)}
    assert not any(row["comparable"] for row in rows.values()) and all(row["why"] and row["source"] for row in rows.values())
    assert "this run's sentences are not SST-2" in rows["BERT-base, 109 M"]["why"]
    assert "a hidden test set" in rows["TinyBERT-4, 14.5 M"]["why"]
    nf4 = rows["NF4, Llama-2-7B"]["why"]
    assert (
        "this run's model is llama" in nf4
        and "not WikiText-2" in nf4
        and "windows of 512, not 2048" in nf4
        and "16 windows, not all" in nf4
    )


def test_the_same_data_and_protocol_can_be_compared(report):
    report["data"]["source"]["source"] = "sst2_data/glue/sst2"
    make_llama_2(report)
    comparable = {row["model"] for row in beside_the_literature(report) if row["comparable"]}
    assert "BERT-base, 109 M" in comparable and "NF4, Llama-2-7B" in comparable
    assert not any("LLaMA-1" in model or "Llama-3" in model or "TinyBERT" in model for model in comparable)
    report["data"]["splits"]["test"]["rows"] = 50
    assert not any(row["comparable"] for row in beside_the_literature(report) if row["task"] == "SST-2")


def make_llama_2(report, perplexity: float = 5.472, **protocol) -> None:
    dense = report["models"][3]
    dense |= {"model_name": "hub meta-llama/Llama-2-7b-hf", "perplexity": perplexity}
    dense["protocol"] = {
        "text": "hub Salesforce/wikitext, test",
        "join": "\n\n",
        "seq_len": 2048,
        "windows": 166,
        "windows_from": "spread",
        **protocol,
    }
    report["settings"]["eval_windows"] = 0


def test_llama_2_is_checked_against_the_published_perplexity(report):
    assert check_llama_2(report) is None  # another model
    make_llama_2(report)
    assert check_llama_2(report).endswith("perplexity 5.472, +0.002 against the published 5.47: reproduced.")
    make_llama_2(report, 5.12, seq_len=4096)
    assert "windows of 4096 tokens instead of 2048" in check_llama_2(report)
    make_llama_2(report, 5.7, join="\n")
    assert "joined by '\\n' instead of a blank line" in check_llama_2(report)
    make_llama_2(report, 5.7)
    assert "the arithmetic (float32) or other weights" in check_llama_2(report)
    report["settings"]["eval_windows"] = 16
    assert "only 166 windows instead of all" in check_llama_2(report)
