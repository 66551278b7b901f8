"""Settings of every stage in one file, and the plan of a run: run_pipeline.py --config, --dump_config, --dry_run."""

import runpy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import helpers
import pytest
import yaml

from common import StageConfig
from compactmind import plan
from compactmind.checkpoint import save_checkpoint
from compactmind.errors import CompactMindError
from compactmind.plan import has_written, known_durations, minutes, note_duration, why_made
from compactmind.settings_file import field_reasons, read_settings, settings_text
from profiles import PROFILES


@pytest.fixture(scope="module")
def pipeline():
    return SimpleNamespace(**runpy.run_path(str(helpers.REPOSITORY / "run_pipeline.py")))


@dataclass
class Colours:
    """Settings of a test."""

    name: str = "red"
    """What it is
    called."""
    share: float = 0.5
    places: tuple[Path, ...] = ()
    """Where it is."""
    steps: str = "[]"


def read(folder: Path, text: str):
    (folder / "my.yaml").write_text(text, encoding="utf-8")
    return read_settings(folder / "my.yaml", {"colours": Colours, "more": Colours}, {"share": "colours"})


# ---------------------------------------------------------------------------------------------------------------- the file
def test_values_are_of_the_types_the_dataclass_says(tmp_path):
    result = read(tmp_path, "colours:\n  share: 1e-4\n  places: [a, b/c]\n  steps:\n  - {method: prune, params: {x: 1}}\nmore:\n")
    steps = '[{"method": "prune", "params": {"x": 1}}]'
    assert result == {"colours": {"share": 1e-4, "places": (Path("a"), Path("b/c")), "steps": steps}, "more": {}}
    assert read(tmp_path, "colours: {places: a, share: much}\n")["colours"] == {"places": (Path("a"),), "share": "much"}
    assert read(tmp_path, "\ufeff# nothing\n") == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("colours:\n  nam: blue\n", r"my.yaml: unknown setting 'nam' in section colours: did you mean name\?"),
        ("colours:\n  xyz: 1\n", "unknown setting 'xyz' in section colours: choose from name, share, places, steps"),
        ("colour:\n  name: blue\n", r"unknown section 'colour': did you mean colours\?"),
        ("more:\n  share: 1\n", "share belongs to section colours, not to more"),
        ("colours:\n  name:\n", "name in section colours has no value"),
        ("colours: blue\n", "section colours is 'blue': write its settings below it"),
        ("- colours\n", "has no sections"),
        ("colours:\n  name: blue\n  name: green\n", "line 2: no YAML .name stands here twice"),
        ("colours:\n  name: [\n", "line 3: no YAML"),
        ("colours:\n  name: \t@\n", "line 2: no YAML"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_what_is_like_it(tmp_path, text, said):
    with pytest.raises(CompactMindError, match=said):
        read(tmp_path, text)


def test_a_file_that_is_not_there_names_the_command_that_writes_one(tmp_path):
    with pytest.raises(CompactMindError, match="--dump_config .*no.yaml` writes one"):
        read_settings(tmp_path / "no.yaml", {"colours": Colours})


def test_what_is_written_says_what_a_setting_is_for_and_is_read_as_the_same(tmp_path):
    values = {"colours": {"name": "no", "share": 5e-5, "places": (Path("a"),), "steps": '[{"a": "b: c"}]'}, "more": {"places": ()}}
    text = settings_text(values, {"colours": Colours, "more": Colours}, "Two lines\nof head")
    assert text.startswith("# Two lines\n# of head\n\ncolours:\n  # What it is called.\n  name: 'no'\n")
    assert read(tmp_path, text) == values
    assert field_reasons(Colours) == {"name": "What it is called.", "places": "Where it is."}


# ------------------------------------------------------------------------------------------------------------ the pipeline
@pytest.mark.parametrize("profile", PROFILES)
def test_every_setting_of_every_stage_is_dumped_and_read_as_the_same(pipeline, tmp_path, profile):
    config = pipeline.PipelineConfig.for_profile(profile, models_dir=Path("elsewhere"), seed=7)
    text = pipeline.dump(config, {})
    path = tmp_path / "all.yaml"
    path.write_text(text, encoding="utf-8")
    again = pipeline.with_file(pipeline.CONFIG, ["--config", str(path)])
    assert again == config
    given = pipeline.settings_of_file(str(path))
    assert pipeline.dump(again, given) == text
    assert list(given) == [pipeline.OWN, *pipeline.RUNS]
    for name in pipeline.RUNS:
        whole = pipeline.resolved(name, config, {})
        assert pipeline.resolved(name, again, given[name]) == whole
        assert set(given[name]) == {field for field in vars(whole) if field not in StageConfig.__dataclass_fields__}
    assert given["llama_gptq_3.5x"]["output"] == "elsewhere/llama_gptq_3.5x"


def test_a_stage_is_told_what_its_section_says_and_nothing_else(pipeline, tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(
        "pipeline: {profile: smoke, seed: 3}\n1_distill: {students: [student_distilled], seed: 4}\n"
        "llama_pruned:\n  pipeline: [{method: w8a8}]\n  calibration_windows: 8\n"
    )
    config, given = pipeline.with_file(pipeline.CONFIG, [f"--config={path}"]), pipeline.settings_of_file(str(path))
    assert (config.profile, config.seed) == ("smoke", 3)

    def options(name: str) -> list[str]:
        return pipeline.as_arguments(pipeline.options_for(name, config, given.get(name, {})))

    shared = ["--models_dir=models", "--data_dir=sst2_data", "--results_dir=results", "--seed=3", "--force=False", "--verify=False"]
    assert options("2_prune_finetune") == shared
    assert options("1_distill") == [*shared[:3], "--seed=4", *shared[4:], "--students", "student_distilled"]
    text = ["--strategy=fixed", "--calibration_windows=8", '--pipeline=[{"method": "w8a8"}]']
    assert options("llama_pruned") == [*shared, *text]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pipeline: {profile: smok}", r"unknown profile 'smok': did you mean smoke\?"),
        ("pipeline: {dry_run: true}", "dry_run is for the command line"),
        ("2_prune_finetune: {profile: smoke}", "profile belongs to section pipeline"),
        ("2_prune_finetune: {target_sparcity: 0.1}", r"did you mean target_sparsity\?"),
        ("2_prune_finetun: {}", r"did you mean 2_prune_finetune\?"),
        ("2_prune_finetune: {target_sparsity: 2}", r"section 2_prune_finetune: target_sparsity 2 is not in \[0, 1\)$"),
        ("2_prune_finetune: {criterion: magic}", "unknown criterion 'magic': choose from taylor"),
        ("2_prune_finetune: {epochs: many}", "epochs 'many' is no int"),
    ],
)
def test_a_file_is_checked_before_anything_runs(pipeline, tmp_path, run_here, text, said):
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(CompactMindError, match=said):
        pipeline.settings_of_file(str(tmp_path / "my.yaml"))
    status, output = run_here("run_pipeline.py", "--config", "my.yaml", cwd=tmp_path)
    assert status == 1 and "error: my.yaml" in output and [path.name for path in tmp_path.iterdir()] == ["my.yaml"]


def test_the_command_line_goes_before_the_file_and_a_file_is_not_replaced(tmp_path, run_here):
    (tmp_path / "my.yaml").write_text("pipeline: {seed: 3, results_dir: there}\n6_evaluate_report: {eval_windows: 9}")
    status, output = run_here("run_pipeline.py", "--config", "my.yaml", "--seed", 5, "--dump_config", "all.yaml", cwd=tmp_path)
    assert status == 0 and "--config all.yaml" in output
    result = yaml.safe_load((tmp_path / "all.yaml").read_text(encoding="utf-8"))
    assert (result["pipeline"]["seed"], result["pipeline"]["results_dir"], result["6_evaluate_report"]["eval_windows"]) == (5, "there", 9)
    status, output = run_here("run_pipeline.py", "--dump_config", "all.yaml", cwd=tmp_path)
    assert status == 1 and "all.yaml is there already" in output


# --------------------------------------------------------------------------------------------------------------- the plan
def test_the_plan_says_what_would_run_and_why_and_writes_nothing(tmp_path, run_here):
    helpers.make_workspace(tmp_path, train_rows=30, dev_rows=20)
    before = sorted(tmp_path.rglob("*"))
    status, output = run_here("run_pipeline.py", "--dry_run", "True", cwd=tmp_path)
    assert status == 0 and sorted(tmp_path.rglob("*")) == before
    assert "runs: models/teacher_base: not there" in output and "runs: models/student_pruned_w8a8: not there" in output
    assert output.count("left out: there is no models/llama") == 4  # the profile fetches none
    assert "minutes: unknown, it has not run here" in output and "GB of disk are free for models" in output
    note_duration(tmp_path / "results", "1_distill", 90, "smoke")
    _, output = run_here("run_pipeline.py", "--dry_run", "True", "--only", "1_distill.py", cwd=tmp_path)
    assert "minutes: 1.5, as on 20" in output and "on this machine" in output and "2_prune" not in output


def test_what_is_made_of_something_that_is_made_is_made_too(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "why_made", lambda *_: None)
    quantize = pipeline.resolved("3_quantize", pipeline.PipelineConfig(models_dir=tmp_path), {})
    places = pipeline.outputs_of("3_quantize.py", quantize)
    for place in places:
        place.mkdir()
    due = {tmp_path / "student_pruned"}
    result = {place.name: pipeline.why_run("3_quantize.py", quantize, place, own, due) for place, own in places.items()}
    first = f"{tmp_path / 'student_pruned'} is made first"
    assert result == {"student_distilled_nf4": None, "student_pruned_nf4": first, "student_pruned_w8a8": first}


@pytest.mark.parametrize(
    ("settings", "made"),
    [
        ({"target_speedups": (2.0, 4.0)}, ("student_pruned_2x", "student_pruned_4x")),
        ({"target_gflops": (0.3,), "seeds": 3}, ("student_pruned_gflops0.3",)),
        ({"pattern": "2:4"}, ("student_pruned_2to4",)),
        ({"output_dir": "small"}, ("small",)),
        ({}, ("student_pruned",)),
    ],
    ids=str,
)
def test_what_is_rounded_is_what_is_pruned(pipeline, settings, made):
    config, name = pipeline.PipelineConfig(), "3_quantize"
    given = pipeline.with_family(config, {"2_prune_finetune": settings})
    quantize = pipeline.resolved(name, config, given.get(name, {}))
    assert (quantize.parents, quantize.w8a8_parents) == (("student_distilled", *made), made)
    asked = {"2_prune_finetune": settings, name: {"parents": ("teacher",), "w8a8_parents": ("student_pruned",)}}
    assert pipeline.with_family(config, asked) == asked


def test_a_stage_that_would_not_fit_is_said_and_is_an_error(tmp_path, run_here, monkeypatch):
    helpers.add_llama(tmp_path)
    stage = ("--only", "5_bayesian_search.py", "--dry_run", "True")
    monkeypatch.setattr("subprocess.run", lambda command, **_: SimpleNamespace(stdout="", stderr="error: no room\n", returncode=1))
    status, output = run_here("run_pipeline.py", *stage, cwd=tmp_path)
    assert status == 1 and output.count("would stop: error: no room") == 3 and "error: not every stage would run" in output
    text = "# x=1\nmemory: 0.1 GB at the peak\nmodels/llama_pruned is made again: it was made with another code\n"
    monkeypatch.setattr("subprocess.run", lambda command, **_: SimpleNamespace(stdout=text, stderr="", returncode=0))
    status, output = run_here("run_pipeline.py", *stage, cwd=tmp_path)
    assert status == 0 and output.count("  memory: 0.1 GB at the peak") == 3 and "x=1" not in output


def test_why_a_checkpoint_would_be_made_again(tmp_path, tokenizer, monkeypatch):
    script = tmp_path / "stage.py"
    script.write_text("x = 1\n")
    monkeypatch.setattr(plan, "code_version", lambda path: path.read_text())
    models, data = tmp_path / "models", tmp_path / "data"
    parent = {"kind": "dense", "parent": None, "stage": {"script": "x.py"}}
    save_checkpoint(models / "parent", helpers.make_distilbert(), tokenizer, **parent)
    monkeypatch.setattr("compactmind.data.data_fingerprint", lambda folder: "1234")
    stage = {
        "script": "stage.py", "code": plan.code_version(script), "config": {"lr": 0.1, "names": ["a"], "data": "1234", "other": 1},
        "inputs": {"parent": plan._identity(models / "parent")},
    }  # fmt: skip
    save_checkpoint(models / "made", helpers.make_distilbert(), tokenizer, kind="dense", parent=None, stage=stage)
    settings = {"lr": 0.1, "names": ("a",), "not recorded": 5}

    def why(**changes) -> str | None:
        return why_made(models / "made", script, settings | changes, data, models)

    assert why() is None
    assert why_made(models / "none", script, settings, data, models) == "not there"
    assert why(lr=0.2) == "made with another config.lr"
    monkeypatch.setattr("compactmind.data.data_fingerprint", lambda folder: "5678")
    save_checkpoint(models / "parent", helpers.make_distilbert(seed=1), tokenizer, **parent)
    script.write_text("x = 2\n")
    assert why() == "made with another code, config.data, inputs.parent"
    (models / "made" / "model.safetensors").unlink()
    assert "model.safetensors" in why()


def test_durations_are_of_runs_that_made_something(tmp_path):
    assert known_durations(tmp_path) == {} and minutes(tmp_path, "1_distill", "smoke").startswith("minutes: unknown")
    note_duration(tmp_path, "1_distill", 30, "smoke")
    note_duration(tmp_path, "3_quantize", 60, "smoke")
    assert minutes(tmp_path, "1_distill", "smoke").startswith("minutes: 0.5, as on ")
    assert minutes(tmp_path, "1_distill", "paper") == "minutes: unknown, it has not run with this profile"
    (tmp_path / plan.DURATIONS).write_text("[")
    assert known_durations(tmp_path) == {}
    made = tmp_path / "made"
    made.mkdir()
    assert not has_written([made, tmp_path / "none"], 0)
    (made / "manifest.json").write_text("{}")
    since = (made / "manifest.json").stat().st_mtime
    assert has_written([made], since) and not has_written([made], since + 1) and has_written([tmp_path / plan.DURATIONS], 0)
