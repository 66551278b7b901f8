"""Published results to stand beside a run, each with its source and protocol, and why a row may or may not be compared with them."""

from dataclasses import dataclass
from typing import Any

SST2_DEV_ROWS = 872
LLAMA_2_7B = "Llama-2-7b"
LLAMA_2_7B_PERPLEXITY = 5.47
LLAMA_2_7B_SEQ_LEN, LLAMA_2_7B_WINDOWS = 2048, 166
"""What it is of: all whole windows of WikiText-2's raw test text in the tokens of Llama-2."""
TOLERANCE = 0.02
"""A perplexity this far from the published one (in perplexity) is explained by kernels and dtype."""


@dataclass(frozen=True)
class Published:
    """One published number."""

    task: str
    """SST-2 (accuracy in %) or WikiText-2 (perplexity)."""
    model: str
    dense: float | None
    """What the uncompressed model reaches in the same source."""
    result: float
    protocol: str
    source: str
    test_server: bool = False
    """Measured on the hidden test set: never comparable with a run of ours."""
    seq_len: int | None = None
    of: str | None = None
    """The dense model's name, of a perplexity."""


PUBLISHED = (
    Published("SST-2", "BERT-base, 109 M", None, 92.7, "dev, 872 sentences", "model card, another card says 93.2"),
    Published("SST-2", "DistilBERT-6, 67 M", 92.7, 91.3, "dev", "Sanh et al. 2019, arXiv:1910.01108, model card"),
    Published("SST-2", "MiniLM-L12-H384, 33 M", None, 93.0, "dev", "Wang et al. 2020, arXiv:2002.10957, model card"),
    Published("SST-2", "MiniLM-L6-H384, 22 M", None, 90.14, "dev", "neural-compressor 2.6"),
    Published("SST-2", "MiniLM-L6-H384, int8", 90.14, 89.91, "dev; 89.45 to 89.91 by scheme", "neural-compressor 2.6"),
    Published("SST-2", "BERT-base, int8", 92.32, 91.97, "dev; 2.26x faster on a Xeon", "neural-compressor 2.6"),
    Published("SST-2", "CoFi, 60% of the encoder removed", None, 93.0, "dev; 2.1x faster, V100, batch 128", "Xia et al. 2022, arXiv:2204.00408"),
    Published("SST-2", "CoFi, 95% of the encoder removed", None, 90.4, "dev; 12.2x faster, V100, batch 128", "Xia et al. 2022, arXiv:2204.00408"),
    Published("SST-2", "TinyBERT-4, 14.5 M", None, 92.6, "test server, with augmentation; 9.4x faster", "Jiao et al. 2020, arXiv:1909.10351", test_server=True),
    Published("WikiText-2", "fp16, Llama-2-7B", None, LLAMA_2_7B_PERPLEXITY, "windows of 2048, joined by a blank line", "Lin et al. 2024, arXiv:2306.00978; 5.474 in SmoothQuant's repository", seq_len=2048, of=LLAMA_2_7B),
    Published("WikiText-2", "SmoothQuant W8A8, alpha 0.85, Llama-2-7B", 5.474, 5.515, "windows of 2048, joined by a blank line; q, k and v are int8 for attention too", "Xiao et al. 2023, arXiv:2211.10438, repository", seq_len=2048, of=LLAMA_2_7B),
    Published("WikiText-2", "SmoothQuant W8A8, alpha 0.85, Llama-3-8B", 6.138, 6.258, "windows of 2048", "Xiao et al. 2023, arXiv:2211.10438, repository", seq_len=2048, of="Meta-Llama-3-8B"),
    Published("WikiText-2", "NF4, Llama-2-7B", 5.47, 5.66, "windows of 2048; rounded to nearest in blocks of 128, head as released", "Elhoushi and Johnson 2025, arXiv:2507.04610, repository facebookresearch/any4", seq_len=2048, of=LLAMA_2_7B),
    Published("WikiText-2", "GPTQ w4g128, Llama-2-7B", 5.47, 5.58, "windows of 2048, calibrated on WikiText-2, columns by activation", "GPTQ's own code, run in AutoGPTQ's pull request 236", seq_len=2048, of=LLAMA_2_7B),
    Published("WikiText-2", "AWQ w4g128, Llama-2-7B", 5.47, 5.60, "windows of 2048", "Lin et al. 2024, arXiv:2306.00978", seq_len=2048, of=LLAMA_2_7B),
    Published("WikiText-2", "SliceGPT 20%, Llama-2-7B", 5.47, 6.64, "windows of 2048, calibrated on WikiText-2", "Ashkboos et al. 2024, arXiv:2401.15024", seq_len=2048, of=LLAMA_2_7B),
    Published("WikiText-2", "LLM-Pruner 20% Taylor, LLaMA-1-7B", 12.62, 19.1, "windows of 128; 17.6 after LoRA", "Ma et al. 2023, arXiv:2305.11627", seq_len=128, of="llama-7b"),
    Published("WikiText-2", "LLM-Pruner 20% L2, LLaMA-1-7B", 12.62, 582.0, "windows of 128", "Ma et al. 2023, arXiv:2305.11627", seq_len=128, of="llama-7b"),
    Published("WikiText-2", "random 20%, LLaMA-1-7B", 12.62, 27.5, "windows of 128", "Ma et al. 2023, arXiv:2305.11627", seq_len=128, of="llama-7b"),
    Published("WikiText-2", "FLAP 20%, LLaMA-1-7B", 12.62, 14.6, "windows of 128", "An et al. 2024, arXiv:2312.11983", seq_len=128, of="llama-7b"),
)  # fmt: skip


def beside_the_literature(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the published rows with `comparable` (bool) and `why`: what speaks for or against comparing this run with each."""
    rows = []
    for published in PUBLISHED:
        reasons = _against_sst2(report, published) if published.task == "SST-2" else _against_perplexity(report, published)
        rows.append(
            {
                "task": published.task, "model": published.model, "dense": published.dense, "result": published.result,
                "protocol": published.protocol, "source": published.source, "comparable": not reasons,
                "why": "; ".join(reasons) or "same data and protocol",
            }
        )  # fmt: skip
    return rows


def _against_sst2(report: dict[str, Any], published: Published) -> list[str]:
    reasons = ["a hidden test set"] if published.test_server else []
    source, rows = report["data"]["source"]["source"], report["data"]["splits"]["test"]["rows"]
    if source.startswith("PyPI") or "task" in report["data"]:
        reasons.append("this run's sentences are not SST-2")
    elif rows != SST2_DEV_ROWS:
        reasons.append(f"this run measured {rows} sentences, not the {SST2_DEV_ROWS} of dev")
    return reasons


def _against_perplexity(report: dict[str, Any], published: Published) -> list[str]:
    dense = _dense(report)
    if dense is None:
        return ["no language model was measured"]
    protocol, reasons = dense["protocol"], []
    if published.of.lower() not in dense["model_name"].lower():
        reasons.append(f"this run's model is {dense['model_name']}")
    if "wikitext" not in protocol["text"].lower():
        reasons.append("this run's text is not WikiText-2")
    if protocol["seq_len"] != published.seq_len:
        reasons.append(f"windows of {protocol['seq_len']}, not {published.seq_len}")
    if report["settings"]["eval_windows"]:
        reasons.append(f"{protocol['windows']} windows, not all")
    return reasons


def _dense(report: dict[str, Any]) -> dict[str, Any] | None:
    name = report["references"]["llm"]
    return next((row for row in report["models"] if row["name"] == name and row["status"] == "measured"), None)


def protocol_differences(protocol: dict[str, Any]) -> list[str]:
    """Return what of a perplexity's protocol differs from that of the published ones of Llama-2-7B; how many windows is not looked at."""
    reasons, seq_len = [], LLAMA_2_7B_SEQ_LEN
    if "wikitext" not in protocol["text"].lower():
        reasons.append(f"another text ({protocol['text']})")
    if protocol["seq_len"] != seq_len:
        reasons.append(
            f"windows of {protocol['seq_len']} tokens instead of {seq_len} (longer ones give lower numbers: 5.12 with 4096)"
        )
    if protocol["join"] != "\n\n":
        reasons.append(f"documents joined by {protocol['join']!r} instead of a blank line")
    if protocol.get("special_tokens", True) is False:
        reasons.append("no <s> at the start of the text")
    return reasons


def check_llama_2(report: dict[str, Any]) -> str | None:
    """Return how a dense Llama-2-7B stands to the published 5.47 and what explains a difference; None for any other model."""
    dense = _dense(report)
    if dense is None or LLAMA_2_7B.lower() not in dense["model_name"].lower():
        return None
    measured, protocol = dense["perplexity"], dense["protocol"]
    difference = measured - LLAMA_2_7B_PERPLEXITY
    compared = f"{dense['model_name']} has perplexity {measured:.3f}, {difference:+.3f} against the published {LLAMA_2_7B_PERPLEXITY}"
    reasons = protocol_differences(protocol)
    if report["settings"]["eval_windows"]:
        reasons.append(f"only {protocol['windows']} windows instead of all {LLAMA_2_7B_WINDOWS}")
    if abs(difference) <= TOLERANCE and not reasons:
        return f"{compared}: reproduced."
    if not reasons:
        reasons.append(f"the protocol is the same, so what is left is the arithmetic ({dense['kernel']}) or other weights")
    return f"{compared}: {'; '.join(reasons)}."
