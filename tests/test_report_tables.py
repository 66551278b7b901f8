"""The tables of classes, steps and bits of the report, their picture and the card, from numbers that are made up."""

import copy
import re

import made_up_report
import pytest
from goals import goals
from made_up_report import grid, grouped_model

from compactmind.methods.llama import LINEARS
from compactmind.model_card import model_card
from compactmind.report import tables
from compactmind.report.documents import render
from compactmind.report.language_figures import WIDTHS, tensor_bits
from compactmind.report.literature import beside_the_literature
from compactmind.report.sentences import sentences, warnings

report = made_up_report.report


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


def test_that_w8a8_computes_less_is_said_where_it_is_there(report):
    said = "of the last block the first token alone"
    assert said not in tables.encoder_table(report).note
    report["models"][1]["kind"] = "w8a8"
    assert said in tables.encoder_table(report).note
    report["models"][1] |= {"kind": "pruned", "onnx_latency": {}}
    assert said in tables.encoder_table(report).note


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
    ("name", "metric", "expected"), [("GLUE cola", "mcc", "by MCC"), ("GLUE mrpc", "f1", "by F1"), ("GLUE rte", "accuracy", "by accuracy")]
)
def test_glue_is_judged_by_its_own_metric(report, name, metric, expected):
    table = tables.encoder_table(of_classes(report, ("no", "yes"), name=name, metric=metric))
    assert ("MCC" in table.header) == (metric == "mcc") and table.note.endswith(f"F1 is of yes; the task is usually judged {expected}.")
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
    text = warnings(report)
    assert "student, pruned: of 10.0% of the test rows only the first 64 tokens were read; at --max_length 180 it would be 1%." in text
    assert "90.0% of the test rows are ham: always saying that is as accurate; look at macro-F1." in text


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
    cells = {(round(text.get_position()[0], 1), text.get_position()[1]): text.get_text() for text in figure.axes[1].texts}
    assert [cells[place] for place in ((0, 0), (1, 1), (1, 6), (2, 5), (1, 7), (1, 8))] == ["3", "3", "8", "4", "6", "8"]
    assert len(cells) == 2 * 7 + 1 + 2  # a block that lacks six linears leaves them empty
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
