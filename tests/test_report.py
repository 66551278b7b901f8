"""6_evaluate_report.py as a user runs it: rows, equal numbers, what is measured again, and what is said when a stage is missing."""

import csv
import json
import math
import shutil

import finished_pipeline
import helpers
import matplotlib.image
import pytest
from finished_pipeline import LANGUAGE_ROWS, ROWS
from goals import goals as project_goals
from tokenizers import normalizers, pre_tokenizers

from compactmind import kernels
from compactmind.checkpoint import load_checkpoint
from compactmind.data import EncodedSentences, load_split
from compactmind.evaluation.divergence import divergence
from compactmind.evaluation.perplexity import perplexity
from compactmind.forward import predict_logits
from compactmind.manifest import read_manifest
from compactmind.report.figures import FIGURES
from compactmind.report.search_figures import SEARCH_FIGURES
from compactmind.text import load_documents, token_windows

copy, reported = finished_pipeline.copy, finished_pipeline.reported


# ---------------------------------------------------------------------------------------------------------------- report
def test_the_report_holds_every_row_with_every_measurement(reported):
    folder, output = reported
    report = helpers.read_json(folder / "results" / "final_report.json")
    assert report["schema_version"] == 6 and report["profile"] == "smoke"
    assert [row["name"] for row in report["models"]] == [*ROWS, *LANGUAGE_ROWS]
    for row in report["models"][: len(ROWS)]:
        assert row["status"] == "measured" and row["track"] == "encoder"
        low, high = row["accuracy_interval"]
        assert 0 <= low <= row["accuracy"] <= high <= 1 and 0 <= row["auc"] <= 1 and 0 <= row["f1"] <= 1
        matrix = row["confusion_matrix"]
        assert sum(map(sum, matrix)) == row["rows"] == 50
        assert row["accuracy"] == pytest.approx((matrix[0][0] + matrix[1][1]) / 50)
        for key in ("gflops", "gmacs_thop", "size_mb", "load_seconds", "peak_memory_mb", "parameters"):
            assert row[key] > 0, (row["name"], key)
        for batch in ("batch_1", "batch_32"):
            assert row["latency"][batch]["median_ms"] > 0
        assert (row["mcnemar_against_reference"] is None) == (row["name"] == "student_distilled")
        assert row["name"] in output
    assert {"os", "cpu", "cores", "threads", "versions"} <= report["environment"].keys()
    assert {"accuracy", "gflops", "latency", "size_mb", "peak_memory_mb", "mcnemar"} <= report["protocols"].keys()
    assert report["data"]["fingerprint"] == read_manifest(folder / "models" / "teacher")["data_fingerprint"]


def test_accuracy_is_that_of_the_test_split(reported):
    folder, _ = reported
    rows = {row["name"]: row for row in helpers.read_json(folder / "results" / "final_report.json")["models"]}
    for name in ("teacher", "student_pruned_nf4"):
        checkpoint = load_checkpoint(folder / "models" / name)
        sentences = load_split(folder / "sst2_data", "test")
        logits = predict_logits(checkpoint.model, EncodedSentences(checkpoint.tokenizer, sentences, 64), 7)
        right = sum(int(logits[i].argmax()) == sentence.label for i, sentence in enumerate(sentences))
        assert rows[name]["accuracy"] == right / len(sentences)


def test_pruning_and_quantization_show_where_they_should(reported):
    folder, _ = reported
    rows = {row["name"]: row for row in helpers.read_json(folder / "results" / "final_report.json")["models"]}
    for parent in ("student_distilled", "student_pruned"):
        assert rows[f"{parent}_nf4"]["gflops"] == rows[parent]["gflops"]
        assert rows[f"{parent}_nf4"]["size_mb"] < rows[parent]["size_mb"]
    assert rows["student_pruned"]["gflops"] < rows["student_distilled"]["gflops"]
    goals = {goal["goal"]: goal for goal in project_goals(helpers.read_json(folder / "results" / "final_report.json"))}
    removed = goals["GFLOPs removed by pruning"]
    assert removed["measured"] == pytest.approx(1 - rows["student_pruned"]["gflops"] / rows["student_distilled"]["gflops"])
    assert removed["met"] == (removed["measured"] >= 0.40)
    assert goals["training throughput (see benchmarks/)"]["measured"] is None  # not run here, so neither met nor missed
    assert goals["training throughput (see benchmarks/)"]["met"] is None


def test_the_table_for_spreadsheets_agrees_with_the_report(reported):
    folder, _ = reported
    with open(folder / "results" / "model_comparison.csv", newline="", encoding="utf-8") as file:
        table = {row["name"]: row for row in csv.DictReader(file)}
    for row in helpers.read_json(folder / "results" / "final_report.json")["models"]:
        line = table[row["name"]]
        assert float(line["size_mb"]) == row["size_mb"]
        if row["track"] == "llm":
            assert float(line["perplexity"]) == row["perplexity"] and line["accuracy"] == ""
            kl = row["divergence"]
            assert [float(line[name]) for name in ("kl_mean", "kl_p999", "same_top")] == [
                kl["mean"],
                kl["p999"],
                kl["same_top"],
            ]
            assert [float(line["kl_low"]), float(line["kl_high"])] == kl["interval"]
            assert float(line["decode_ms"]) == row["generation"]["decode"]["median_ms"]
            continue
        assert float(line["accuracy"]) == row["accuracy"] and line["perplexity"] == ""
        assert float(line["latency_32_median_ms"]) == row["latency"]["batch_32"]["median_ms"]


def test_the_plots_are_pictures(reported):
    folder, _ = reported
    names = ("final_report", "model_comparison", "perplexity_against_size", "divergence_against_size", "tensor_bits", "latency")
    names += ("divergence_against_speed",)
    names += ("training_curves", "alpha_curve")
    summary = helpers.read_json(folder / "results" / "search" / "llama-bayesian-front" / "summary.json")
    empty = {"importance": not summary["importances"], "retraining_gain": not summary["retraining"]}
    empty["error_accumulation"] = all(result.get("interaction") is None for result in summary["confirmed"].values())
    for name in (*names, *(f"search_{name}" for name in SEARCH_FIGURES if not empty.get(name))):
        picture = matplotlib.image.imread(folder / "results" / f"{name}.png")
        assert picture.shape[0] > 300 and picture.shape[1] > 300 and math.isfinite(picture.std()) and picture.std() > 0.01
    for name in SEARCH_FIGURES:  # nobody is shown a figure with nothing in it
        assert (folder / "results" / f"search_{name}.png").is_file() != bool(empty.get(name))
    assert (folder / "results" / "model_comparison.pdf").read_bytes().startswith(b"%PDF")
    assert not list((folder / "results").glob(".*tmp*"))


def test_language_models_are_measured_on_the_same_windows_and_against_the_dense_one(reported):
    folder, output = reported
    report = helpers.read_json(folder / "results" / "final_report.json")
    rows = {row["name"]: row for row in report["models"] if row["track"] == "llm"}
    confirmed = next(line for line in output.splitlines() if line.endswith("; the first window, read again, is the same"))
    assert confirmed.partition(":")[0].split(", ") == [name for name in LANGUAGE_ROWS if name != "llama"]
    assert list(rows) == LANGUAGE_ROWS and {"perplexity", "compression_ratio", "generation"} <= report["protocols"].keys()
    dense = rows["llama"]
    windows = token_windows(helpers.make_byte_tokenizer(), load_documents(folder / "wikitext_data", "test"), 32, 4, "spread")
    for name, row in rows.items():
        assert row["status"] == "measured" and row["protocol"]["seq_len"] == 32 and row["protocol"]["windows"] == 4
        model = load_checkpoint(folder / "models" / name).model
        assert row["perplexity"] == pytest.approx(perplexity(model, windows, "")["perplexity"], rel=1e-4)
        result = divergence(load_checkpoint(folder / "models" / "llama").model, model, windows)
        assert row["divergence"]["mean"] == pytest.approx(result["mean"], rel=1e-3, abs=1e-6)
        assert row["divergence"]["same_top"] == pytest.approx(result["same_top"]) and len(row["divergence"]["divergences"]) == 4
        assert (row["divergence"]["mean"] == 0) == (name == "llama") and row["protocol"]["windows_from"] == "spread"
        assert row["against_dense"]["ratio"] == pytest.approx(row["perplexity"] / dense["perplexity"])
        assert row["compression_ratio"] == pytest.approx(dense["size_mb"] / row["size_mb"])
        for phase in ("prefill", "decode"):
            assert row["generation"][phase]["median_ms"] > 0 and row["generation"][phase]["speedup"] > 0
        assert row["peak_memory_mb"] > 0
        assert row["parameters"] <= dense["parameters"] and (row["parameters"] < dense["parameters"] or name != "llama_pruned")
        assert name in output
    steps = rows["llama_pruned"]["pipeline"]
    assert [step["method"] for step in steps] == ["dense", "prune", "retrain"]
    assert steps[-1]["perplexity"] == pytest.approx(rows["llama_pruned"]["perplexity"], rel=1e-4)
    for step in steps:  # measured as the report does
        assert (step["divergence"]["mean"] == 0) == (step["method"] == "dense") and 0 <= step["divergence"]["same_top"] <= 1
    assert steps[-1]["divergence"]["mean"] == pytest.approx(rows["llama_pruned"]["divergence"]["mean"], rel=1e-3)
    row = rows["llama_gptq_3.5x"]
    assert row["kind"] == "grouped" and row["compression_ratio"] >= 3.5 and row["interaction"] is None
    assert row["quantization"]["target_compression"] == 3.5 and len(row["quantization"]["tensors"]) == 2 * 7 + 1
    assert [step["method"] for step in row["pipeline"]] == ["dense", "gptq"]
    assert row["pipeline"][-1]["divergence"]["mean"] == pytest.approx(row["divergence"]["mean"], rel=1e-3)
    assert f"3.5x smaller was asked for, {row['compression_ratio']:.3f}x reached" in output
    for name, ratio in (("llama_searched", 2.5), ("llama_front_3x", 3), ("llama_front_4x", 4)):
        assert rows[name]["compression_ratio"] >= ratio
    goals = {goal["goal"]: goal for goal in project_goals(report)}
    assert goals["llama_pruned perplexity, times dense"]["measured"] == rows["llama_pruned"]["against_dense"]["ratio"]
    assert goals["llama_pruned retraining"]["measured"] == pytest.approx(steps[-1]["seconds"] / 60)
    search = report["search"]
    assert rows["llama_searched"]["compression_ratio"] > 1 and search["best"]["methods"] == [
        step["method"] for step in rows["llama_searched"]["pipeline"][1:]
    ]
    assert f"best: trial {search['best']['trial']}" in output
    assert dense["kernel"] == "float32" and rows["llama_nf4"]["kernel"].endswith("bitsandbytes")
    assert rows["llama_w8a8"]["kernel"] in ("int_mm", "avx2", "simulated")


def test_without_text_the_language_models_are_not_run_and_the_encoders_are(copy, run_here):
    shutil.rmtree(copy / "wikitext_data")
    status, output = run_here("6_evaluate_report.py", cwd=copy)
    assert status == 0, output
    rows = {row["name"]: row for row in helpers.read_json(copy / "results" / "final_report.json")["models"]}
    assert (rows["llama"]["status"], rows["llama"]["command"]) == ("not run", "python download_model.py")
    assert rows["teacher"]["status"] == "measured" and "perplexity" not in rows["llama"]


def test_missing_and_broken_stages_are_rows_that_say_what_to_do(copy, run_here):
    shutil.rmtree(copy / "models" / "student_pruned")
    (copy / "models" / "student_finetuned" / "manifest.json").unlink()
    status, output = run_here("6_evaluate_report.py", cwd=copy)
    assert status == 0, output
    report = helpers.read_json(copy / "results" / "final_report.json")
    rows = {row["name"]: row for row in report["models"]}
    assert list(rows) == [*ROWS, *LANGUAGE_ROWS]
    assert rows["student_pruned"] == {
        "name": "student_pruned", "track": "encoder", "directory": "models/student_pruned", "status": "not run",
        "command": "python 2_prune_finetune.py",
    }  # fmt: skip
    assert rows["student_finetuned"]["status"] == "broken" and "manifest.json" in rows["student_finetuned"]["error"]
    assert rows["teacher"]["status"] == "measured"
    assert "not run: run `python 2_prune_finetune.py`" in output
    assert {goal["met"] for goal in project_goals(report) if "prun" in goal["goal"]} == {None}


def test_a_report_of_nothing_is_a_table_of_commands(copy, run_here):
    shutil.rmtree(copy / "models")
    status, output = run_here("6_evaluate_report.py", cwd=copy)
    assert status == 0, output
    assert {row["status"] for row in helpers.read_json(copy / "results" / "final_report.json")["models"]} == {"not run"}
    assert "run `python 1_distill.py`" in output


def models_of(folder) -> dict[str, dict]:
    return {row["name"]: row for row in helpers.read_json(folder / "results" / "final_report.json")["models"]}


def test_what_is_as_it_was_is_not_measured_again(copy, run_here):
    before = models_of(copy)
    status, output = run_here("6_evaluate_report.py", cwd=copy)
    assert status == 0 and "accuracy, operations" not in output, output
    assert f"{len(ROWS)} of {len(ROWS)} rows are as they were" in output
    after = models_of(copy)
    assert all(after[name] == before[name] for name in ROWS)


def test_what_has_changed_is_measured_again_beside_the_reference_and_the_rest_is_kept(copy, run_here):
    before = models_of(copy)
    path = copy / "models" / "student_pruned_nf4"
    shutil.rmtree(path)
    shutil.copytree(copy / "models" / "student_distilled_nf4", path)
    status, output = run_here("6_evaluate_report.py", cwd=copy)
    assert status == 0, output
    after = models_of(copy)
    again = [name for name in ROWS if f"{name:<24} accuracy" in output]
    assert again == ["student_pruned_nf4"] and "2 models in turn" in output  # it and the reference
    assert all(after[name] == before[name] for name in ROWS if name not in again)
    for key in ("accuracy", "correct", "gflops", "size_mb", "parameters"):
        assert after["student_pruned_nf4"][key] == before["student_distilled_nf4"][key]
    assert (
        after["student_pruned_nf4"]["mcnemar_against_reference"] == before["student_distilled_nf4"]["mcnemar_against_reference"]
    )
    assert after["student_pruned_nf4"]["latency"]["batch_32"]["speedup"] > 0


@pytest.mark.parametrize("arguments", [("--fresh", "True"), ("--cost_length", "12"), ()])
def test_everything_is_measured_again_if_asked_or_if_the_protocol_or_the_kernels_are_others(copy, run_here, arguments, monkeypatch):
    if not arguments:
        monkeypatch.setattr(kernels, "identity", lambda: "newer ones")
    for name in ROWS[1:]:
        if name != "student_distilled":
            shutil.rmtree(copy / "models" / name)
    status, output = run_here("6_evaluate_report.py", *arguments, cwd=copy)
    assert status == 0 and "teacher                  accuracy" in output and "student_distilled        accuracy" in output, (
        output
    )
    assert "the first window, read again" not in output


def test_a_new_reference_changes_every_row(copy, run_here):
    status, output = run_here("6_evaluate_report.py", "--reference", "teacher", cwd=copy)
    assert status == 0, output
    rows = models_of(copy)
    assert rows["teacher"]["mcnemar_against_reference"] is None and rows["teacher"]["latency"]["batch_32"]["speedup"] == 1
    assert rows["student_distilled"]["mcnemar_against_reference"]["p_value"] <= 1


def test_everything_but_the_measurements_is_made_again_from_the_json(copy, run_here):
    results = copy / "results"
    report = helpers.read_json(results / "final_report.json")
    row = next(row for row in report["models"] if row["name"] == "student_pruned")
    row["accuracy"], row["accuracy_interval"], row["size_mb"] = 0.123456, [0.1, 0.2], 777.7
    (results / "final_report.json").write_text(json.dumps(report))
    old = {path.name: path.stat().st_mtime_ns for path in results.glob("*.png") if path.stem in FIGURES}
    shutil.rmtree(copy / "models")
    status, output = run_here("6_evaluate_report.py", "--from_json", "True", cwd=copy)
    assert status == 0 and "12.3%" in output and "777.7" in output, output
    for name in ("final_report.html", "final_report.md", "final_report.tex", "model_comparison.csv"):
        assert "777.7" in (results / name).read_text(encoding="utf-8"), name
    assert len(old) >= 6 and all((results / name).stat().st_mtime_ns > time for name, time in old.items())
    (results / "final_report.json").write_text(json.dumps({"schema_version": 2}))
    status, output = run_here("6_evaluate_report.py", "--from_json", "True", cwd=copy)
    assert status == 1 and "without --from_json" in output


# ------------------------------------------------------------------------------------------------------- your own models
def test_any_hugging_face_folder_becomes_a_row(copy, run_here):
    encoder = load_checkpoint(copy / "models" / "student_distilled")
    encoder.model.config.id2label = {0: "POSITIVE", 1: "NEGATIVE"}  # the other way round
    llama = load_checkpoint(copy / "models" / "llama")
    for name, checkpoint in (("mine", encoder), ("my-llama", llama)):
        checkpoint.model.save_pretrained(copy / "elsewhere" / name)
        checkpoint.tokenizer.save_pretrained(copy / "elsewhere" / name)
    own = ["--models", "mine=elsewhere/mine", "my-llama=elsewhere/my-llama"]
    status, output = run_here("6_evaluate_report.py", *own, cwd=copy)
    assert status == 0, output
    rows = models_of(copy)
    assert list(rows)[len(ROWS)] == "mine" and list(rows)[-1] == "my-llama"
    assert rows["mine"]["status"] == rows["my-llama"]["status"] == "measured"
    assert rows["mine"]["accuracy"] == pytest.approx(1 - rows["student_distilled"]["accuracy"])
    assert rows["mine"]["gflops"] == rows["student_distilled"]["gflops"] and rows["mine"]["peak_memory_mb"] > 0
    assert rows["my-llama"]["perplexity"] == pytest.approx(rows["llama"]["perplexity"], rel=1e-4)
    assert not (copy / "elsewhere" / "mine" / "README.md").exists()  # a foreign folder is left as it is


def test_a_model_with_another_tokenizer_is_not_compared_per_token(copy, run_here):
    place = copy / "elsewhere" / "my-llama"
    checkpoint = load_checkpoint(copy / "models" / "llama")
    checkpoint.model.save_pretrained(place)
    tokenizer = helpers.make_byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    tokenizer.save_pretrained(place)
    status, output = run_here("6_evaluate_report.py", "--models", "my-llama=elsewhere/my-llama", cwd=copy)
    assert status == 0, output
    row = models_of(copy)["my-llama"]
    assert row["perplexity"] > 1 and row["against_dense"] is row["compression_ratio"] is None  # made from nobody knows what
    assert "my-llama was measured under another protocol" in output and "tokenizer 'its own'" in output


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("mine", "is not name=folder"),
        ("mine=nowhere", "nowhere holds no model"),
        ("teacher=models/teacher", "is the name of a model of"),
    ],
)
def test_own_models_that_are_not_there_are_told_at_once(copy, run_here, entry, expected):
    status, output = run_here("6_evaluate_report.py", "--models", entry, cwd=copy)
    assert status == 1 and expected in output and "Traceback" not in output


def test_every_model_has_a_card_with_its_numbers(reported):
    folder, _ = reported
    rows = models_of(folder)
    for name in (*ROWS, *LANGUAGE_ROWS):
        card = (folder / "models" / name / "README.md").read_text(encoding="utf-8")
        assert f"# {name}" in card and "load_checkpoint" in card and f"models/{name}" in card
        wanted = f"{rows[name]['accuracy']:.1%}" if name in ROWS else f"{rows[name]['perplexity']:.2f}"
        assert wanted in card
        read_manifest(folder / "models" / name)  # still whole


def test_no_report_without_sentences(copy, run_here):
    old = (copy / "results" / "final_report.json").read_bytes()
    shutil.rmtree(copy / "sst2_data")
    status, output = run_here("6_evaluate_report.py", cwd=copy)
    assert status == 1 and "python download_model.py" in output
    assert (copy / "results" / "final_report.json").read_bytes() == old
