"""A row of the report fails alone and says why, and is compared with the model it was made from or with nothing."""

import contextlib
import csv
import html
import io
import json
import runpy
import shutil
from types import SimpleNamespace

import helpers
import pytest
import rows_workspace
import scripts
from goals import goals as project_goals
from rows_workspace import save_classifier
from test_gguf import byte_level, llama

from compactmind.errors import CompactMindError
from compactmind.evaluation import classifiers, language
from compactmind.gguf_export import export_gguf
from compactmind.report.documents import write_documents
from compactmind.report.figures import latency, model_comparison, perplexity_against_size
from compactmind.report.sentences import sentences, warnings
from compactmind.report.tables import divergence, encoder_table

workspace = rows_workspace.workspace

ENCODERS = ("deberta", "short", "three", "unpadded", "masked", "strange", "empty")
LANGUAGES = ("my-other", "tiny-opt")


def faked_memory(directory, batch_size, sequence_length) -> float:
    if directory.name in ("student_pruned", "llama_nf4"):
        raise CompactMindError("its process was killed")
    return 1.0


def run(folder, *arguments, **patches) -> tuple[int, str, dict]:
    """Run the report in this process, memory not really measured: (exit status, output, rows by name)."""
    text = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(text):
        for module in (classifiers, language):
            patch.setattr(module, "peak_memory", faked_memory)
        for name, value in patches.items():
            for module in (classifiers, language):
                if hasattr(module, name):
                    patch.setattr(module, name, value)
        quiet = SimpleNamespace(readouterr=lambda: SimpleNamespace(out="", err=""))
        status, message = scripts.run_script_here(
            "6_evaluate_report.py", *arguments, cwd=folder, monkeypatch=patch, capfd=quiet
        )
    rows = {row["name"]: row for row in helpers.read_json(folder / "results" / "final_report.json")["models"]}
    return status, text.getvalue() + message, rows


@pytest.fixture(scope="module")
def reported(workspace):
    own = [f"{name}=elsewhere/{name}" for name in (*ENCODERS, *LANGUAGES)]
    broken = workspace / "models" / "student_pruned_nf4"
    broken.mkdir()
    (workspace / "models" / "student_distilled" / "model.onnx").write_bytes(b"no graph")
    status, output, rows = run(workspace, "--models", *own)
    assert status == 0, output
    return workspace, output, rows


# ---------------------------------------------------------------------------------------------------------- failing alone
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("three", "it tells 3 classes apart (label_0, label_1, label_2)"),
        ("masked", "holds a BertForMaskedLM: only SequenceClassification and CausalLM can be measured"),
        ("strange", "the model knows 20 of them"),
        ("empty", "elsewhere/empty holds no weights"),
        ("tiny-opt", "it has positions for 24 tokens, not for 32: choose a smaller --seq_len"),
    ],
)
def test_a_row_without_quality_fails_with_its_reason_everywhere(reported, name, reason):
    folder, output, rows = reported
    assert rows[name]["status"] == "failed" and reason in rows[name]["error"] and "command" not in rows[name]
    assert f"{name} failed: {rows[name]['error']}" in output  # among the warnings
    table = {row["name"]: row for row in csv.DictReader((folder / "results" / "model_comparison.csv").open())}
    assert table[name]["status"] == "failed" and table[name]["error"] == rows[name]["error"]
    for document in ("html", "md", "tex"):
        text = html.unescape((folder / "results" / f"final_report.{document}").read_text()).replace("\\", "")
        assert f"failed: {rows[name]['error'][:60]}" in text and (document == "tex" or rows[name]["error"] in text), document


@pytest.mark.parametrize(
    ("name", "missing", "reason"),
    [
        ("deberta", {"gflops", "gmacs_thop"}, "cannot be called on meta tensors"),
        ("short", {"gflops", "gmacs_thop", "latency", "peak_memory_mb"}, "it has positions for 8 tokens, not for 16"),
        ("unpadded", {"latency at batch 32"}, "Cannot handle batch sizes > 1"),
        ("student_pruned", {"peak_memory_mb"}, "its process was killed"),
        ("llama_nf4", {"peak_memory_mb"}, "its process was killed"),
    ],
)
def test_a_cost_that_cannot_be_measured_leaves_a_measured_row(reported, name, missing, reason):
    folder, output, rows = reported
    row = rows[name]
    assert row["status"] == "measured" and row.get("accuracy", row.get("perplexity")) > 0 and row["size_mb"] > 0
    result = row["not_measured"]
    assert result.keys() == missing
    assert all(reason in text for text in result.values())
    for text in result.values():
        assert text in output
    assert all(row[key] is None for key in result if key in ("gflops", "gmacs_thop", "peak_memory_mb"))


def test_what_is_left_of_a_row_is_there(reported):
    folder, _, rows = reported
    assert rows["short"]["max_length"] == 8 and rows["short"]["latency"] == {}
    assert rows["unpadded"]["latency"].keys() == {"batch_1"}
    assert rows["deberta"]["latency"].keys() == {"batch_1", "batch_32"}
    assert rows["student_pruned_nf4"]["status"] == "broken" and rows["student_pruned_nf4"]["command"] == "python 3_quantize.py"
    for name in ("student_distilled", "student_finetuned"):
        assert rows[name]["latency"]["batch_32"]["speedup"] > 0 and rows[name]["gflops"] > 0 and "error" not in rows[name]
    assert rows["student_pruned"]["mcnemar_against_reference"]["p_value"] <= 1
    report = helpers.read_json(folder / "results" / "final_report.json")
    text = warnings(report)
    assert any(line.startswith("short has positions for 8 tokens: its sentences were cut there") for line in text)
    assert not any("three" in line or "strange" in line for line in sentences(report))
    assert any(line.startswith("short: ") and "GFLOPs" not in line and "batch" not in line for line in sentences(report))
    assert "student_pruned" in (folder / "models" / "student_pruned" / "README.md").read_text()


def test_an_onnx_file_that_is_none_costs_its_own_numbers_only(reported):
    pytest.importorskip("onnxruntime")
    _, _, rows = reported
    row = rows["student_distilled"]
    assert (
        "onnx_latency" not in row
        and list(row["not_measured"]) == ["onnx_latency"]
        and row["latency"]["batch_1"]["speedup"] == 1
    )


def test_only_what_lacks_something_is_measured_again(reported):
    folder, _, rows = reported
    (folder / "models" / "student_distilled" / "model.onnx").unlink()
    status, output, _ = run(folder, "--models", *[f"{name}=elsewhere/{name}" for name in (*ENCODERS, *LANGUAGES)])
    assert status == 0
    again = [line.split()[0] for line in output.splitlines() if "accuracy, operations" in line]
    assert again == ["student_distilled", "student_pruned", "deberta", "short", "three", "unpadded", "strange"]


def test_without_a_reference_the_others_are_compared_with_nothing(workspace, tmp_path, tokenizer):
    folder = tmp_path / "copy"
    shutil.copytree(workspace, folder, ignore=shutil.ignore_patterns("results", "llama*", "elsewhere", "*_nf4", "*.onnx"))
    shutil.rmtree(folder / "models" / "student_distilled")
    save_classifier(folder / "models", "student_distilled", tokenizer, vocab_size=20)  # tokens it does not know
    status, output, rows = run(folder)
    assert status == 0 and rows["student_distilled"]["status"] == "failed", output
    for name in ("student_finetuned", "student_pruned"):
        row = rows[name]
        assert row["status"] == "measured" and row["mcnemar_against_reference"] is None
        assert row["latency"]["batch_1"]["speedup"] is None and row["latency"]["batch_1"]["median_ms"] > 0
    assert "student_distilled, the classifier that the others are compared with, was not measured" in output


def test_what_is_measured_survives_what_comes_after_it(workspace, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(workspace, folder, ignore=shutil.ignore_patterns("results", "elsewhere", "*_nf4", "*.onnx"))

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    status, output, rows = run(folder, measure_language_models=interrupted)
    assert status == 1 and "stopped" in output
    assert (
        rows["student_distilled"]["status"] == "measured" and rows["student_distilled"]["latency"]["batch_32"]["median_ms"] > 0
    )
    assert (rows["llama"]["status"], rows["llama"]["command"]) == ("not run", "python 6_evaluate_report.py")
    status, output, rows = run(folder)
    assert status == 0 and rows["llama"]["status"] == "measured", output
    assert "student_finetuned        accuracy" not in output  # it is as it was


# --------------------------------------------------------------------------------------------------------- whose child it is
def test_a_language_model_is_compared_with_what_it_was_made_from_or_with_nothing(reported):
    folder, output, rows = reported
    names = ("llama", "llama_nf4", "llama_w8a8", "llama_pruned", "llama_searched", "my-other")
    result = {name: rows[name]["compared_with"] for name in names}
    assert result == {
        "llama": "llama", "llama_nf4": "llama", "llama_w8a8": None, "llama_pruned": "my-other", "llama_searched": None, "my-other": None,
    }  # fmt: skip
    for name, base in result.items():
        row, generation = rows[name], rows[name]["generation"]
        assert row["status"] == "measured"
        if base is None:
            assert row["against_dense"] is row["compression_ratio"] is generation["prefill"]["speedup"] is None
            assert row["divergence"] is None
            continue
        assert (row["divergence"]["mean"] == 0) == (base == name) and row["divergence"]["p999"] >= row["divergence"]["mean"]
        assert row["against_dense"]["ratio"] == pytest.approx(row["perplexity"] / rows[base]["perplexity"])
        assert row["compression_ratio"] == pytest.approx(rows[base]["size_mb"] / row["size_mb"])
        assert generation["decode"]["speedup"] > 0
    assert "llama_w8a8 is compared with nothing: it was made from a model called other whose weights" in output
    assert "llama_searched is compared with nothing: it was made from a model called llama whose weights" in output
    assert "my-other is compared with nothing: a folder of others" in output
    report = helpers.read_json(folder / "results" / "final_report.json")
    text = [line for line in sentences(report) if "smaller than" in line]
    assert len(text) == 2 and text[0].startswith("llama_nf4: ") and "than llama as released" in text[0]
    assert text[1].startswith("llama_pruned: ") and "than my-other as released" in text[1]
    assert "% of my-other" not in output and "] of my-other" in output  # the table says whose ratio it is


def test_goals_and_figures_leave_out_what_has_another_parent(reported):
    folder, _, rows = reported
    report = helpers.read_json(folder / "results" / "final_report.json")
    goals = {goal["goal"]: goal for goal in project_goals(report)}
    assert goals["llama_w8a8 perplexity above dense"]["measured"] is None
    assert goals["llama_w8a8 bytes of the released"]["measured"] is None
    assert rows["student_pruned"]["made_from"] == "student_finetuned"
    assert goals["pruned minus distilled accuracy"]["measured"] is None
    for name in ("llama_w8a8", "llama_pruned", "llama_searched", "my-other"):
        assert f">{name}<" not in drawn(report)
    assert ">llama_nf4<" in drawn(report)


def test_a_row_without_a_bar_keeps_its_place_in_every_panel(reported):
    report = helpers.read_json(reported[0] / "results" / "final_report.json")
    rows = [name for name, row in reported[2].items() if row["status"] == "measured" and row["track"] == "encoder"]
    for axes in model_comparison(report).axes:
        bottom, top = axes.get_ylim()
        assert [label.get_text() for label in axes.get_yticklabels()] == rows and bottom > len(rows) - 0.5 and top < -0.5


def drawn(report) -> str:
    """Return the words of the speed-up figure and of perplexity against size, each between > and <."""
    words = []
    for draw in (latency, perplexity_against_size):
        figure = draw(report)
        labels = [
            *(label for axes in figure.axes for label in axes.get_yticklabels()),
            *(text for each in figure.legends for text in each.get_texts()),
        ]
        words += [label.get_text().split(":")[0] for label in labels]
    return "".join(f">{word}<" for word in words)


def test_every_document_is_written_of_rows_with_holes(reported, tmp_path):
    folder, _, _ = reported
    report = helpers.read_json(folder / "results" / "final_report.json")
    for row in report["models"]:
        if row["status"] == "measured":
            row |= {"load_seconds": None, "peak_memory_mb": None, "gmacs_thop": None, "gsm8k": None}
            row |= {"gflops": None, "latency": {}} if row["track"] == "encoder" else {"generation": None}
    write_documents(json.loads(json.dumps(report)), tmp_path)
    assert all((tmp_path / f"final_report.{name}").is_file() for name in ("html", "md", "tex"))
    assert not (tmp_path / "latency.png").exists() and not (tmp_path / "final_report.png").exists()
    line = next(line for line in encoder_table(report).rows if line[0] == "student_distilled")
    assert line[1].endswith("]") and set(line[7:9]) == {"-"}


@pytest.mark.parametrize(
    ("mean", "interval", "cell"),
    [
        (0.1342, [0.1032, 0.1652], "0.1342 [0.1032, 0.1652]"),
        (0.0034, [0.0012, 0.0056], "0.0034 [0.0012, 0.0056]"),
        (0.00005, [0.00002, 0.00008], "0.000050 [0.000020, 0.000080]"),
        (0.0, [0.0, 0.0], "0"),
    ],
)
def test_next_to_no_divergence_is_not_told_as_none(mean, interval, cell):
    assert divergence({"mean": mean, "interval": interval}) == cell


def test_a_gguf_file_of_ones_own_is_one_row_however_often(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export_gguf(llama(), byte_level(), tmp_path / "x.gguf", "tiny")
    stage = runpy.run_path(str(helpers.REPOSITORY / "6_evaluate_report.py"), run_name="stage")
    for _ in range(2):
        rows = stage["list_rows"](stage["ReportConfig"].for_profile("smoke", models=("mine=x.gguf",)))
        present = {row["name"]: (row["track"], row["directory"]) for row in rows if row["status"] == "present"}
        assert present == {"mine": ("llm", "models/x")}
