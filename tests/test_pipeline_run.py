"""The pipeline and quantizing as a user runs them: stages in order, what is up to date, and what is said when one fails."""

import runpy
import shlex
import shutil

import finished_pipeline
import helpers
import scripts
from finished_pipeline import LANGUAGE_ROWS, ROWS

from compactmind.manifest import MADE_BY, read_manifest
from compactmind.search.compressor import read_pipeline

copy, reported = finished_pipeline.copy, finished_pipeline.reported

FIXED = "5_bayesian_search.py --strategy=fixed"
STAGES = ("download_model.py", "1_distill.py", "2_prune_finetune.py", "3_quantize.py", "4_smoothquant_llama.py",
          f"{FIXED} --calibration_windows=32,", f"{FIXED} --output=models/llama_gptq_3.5x",
          "5_bayesian_search.py --objectives kl bytes --save_front 2.5 3 4 --target_compression=2.5 --final_tokens=12000",
          "6_evaluate_report.py")  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- pipeline
def test_the_pipeline_runs_every_stage_in_order_and_says_where_the_report_is(reported):
    _, output = reported
    places = [output.index(f"[{number}/9] {name}") for number, name in enumerate(STAGES, start=1)]
    assert places == sorted(places)
    assert output.rstrip().endswith("report: results/final_report.html")


def test_the_command_of_every_fixed_row_is_what_the_pipeline_runs():
    pipeline = runpy.run_path(str(helpers.REPOSITORY / "run_pipeline.py"))
    runs = {}
    for name, (script, settings) in pipeline["RUNS"].items():
        options = [part.replace(pipeline["MODELS"], "models") for part in pipeline["as_arguments"](settings)]
        runs[name] = ["python", script, *(part for option in options for part in option.split("=", 1))]
    for run, names in {
        "llama_gptq_3.5x": ["llama_gptq_3.5x"], "5_bayesian_search": ["llama_searched", "llama_front_3x", "llama_front_4x"],
        "llama_pruned": ["llama_pruned"],
    }.items():  # fmt: skip
        assert {tuple(shlex.split(MADE_BY[name])) for name in names} == {tuple(runs[run])}
    read_pipeline(runs["llama_gptq_3.5x"][-1])


def test_a_second_pipeline_skips_what_is_finished(copy):
    before = {name: read_manifest(copy / "models" / name)["created"] for name in ROWS}
    result = scripts.run_pipeline("--only", "1_distill.py", "2_prune_finetune.py", "3_quantize.py", cwd=copy)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("is up to date: skipped") == len(ROWS)
    assert {name: read_manifest(copy / "models" / name)["created"] for name in ROWS} == before


def test_the_pipeline_stops_at_a_failing_stage_and_says_how_to_go_on(copy):
    (copy / "sst2_data" / "train.jsonl").unlink()
    result = scripts.run_script("run_pipeline.py", "--only", "3_quantize.py", "6_evaluate_report.py", cwd=copy)
    assert result.returncode != 0
    assert "3_quantize.py failed" in result.stderr and "train.jsonl" in result.stderr
    assert "6_evaluate_report.py," not in result.stdout and "Traceback" not in result.stderr


# -------------------------------------------------------------------------------------------------------------- quantize
def test_quantized_checkpoints_say_what_was_done(reported):
    folder, output = reported
    for parent in ("student_distilled", "student_pruned"):
        manifest, source = (read_manifest(folder / "models" / name) for name in (f"{parent}_nf4", parent))
        assert (manifest["kind"], manifest["parent"], manifest["layers"]) == ("nf4", parent, source["layers"])
        assert manifest["parameters"] == source["parameters"]
        assert manifest["quantization"]["bits"] == 4 and manifest["quantization"]["double_quantization"] is True
        assert manifest["quantization"]["error_compensation"] == "gptq"
        assert "classifier" in manifest["quantization"]["skipped_modules"]
        assert manifest["metrics"]["embedding_bytes"] * 3 < manifest["metrics"]["parent_embedding_bytes"]  # int8 with scales
        assert manifest["files"]["model.safetensors"]["bytes"] < source["files"]["model.safetensors"]["bytes"]
    assert output.count("reloads with equal logits") == 3
    assert read_manifest(folder / "models" / "student_pruned_w8a8")["quantization"]["granularity"]["activations"] == "per_token"


def test_int8_is_a_choice_and_becomes_a_row(copy, run_here):
    status, output = run_here("3_quantize.py", "--method", "int8", "--parents", "student_pruned", cwd=copy)
    assert status == 0, output
    manifest = read_manifest(copy / "models" / "student_pruned_int8")
    assert manifest["kind"] == "int8" and manifest["quantization"]["bits"] == 8
    status, output = run_here("6_evaluate_report.py", cwd=copy)
    assert status == 0, output
    rows = {row["name"]: row for row in helpers.read_json(copy / "results" / "final_report.json")["models"]}
    assert list(rows) == [*ROWS, "student_pruned_int8", *LANGUAGE_ROWS] and rows["student_pruned_int8"]["status"] == "measured"


def test_a_quantized_parent_is_refused(copy, run_here):
    status, output = run_here("3_quantize.py", "--parents", "student_pruned_nf4", cwd=copy)
    assert status == 1 and "is quantized already (nf4)" in output
    assert not (copy / "models" / "student_pruned_nf4_nf4").exists()


def test_a_missing_parent_names_its_command(copy, run_here):
    shutil.rmtree(copy / "models" / "student_pruned")
    status, output = run_here("3_quantize.py", "--force", "True", cwd=copy)
    assert status == 1 and "python 2_prune_finetune.py" in output and "Traceback" not in output
