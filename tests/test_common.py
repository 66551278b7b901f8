"""Settings: defaults, changed by the profile, changed by the edits in a script, changed by the command line."""

import dataclasses
import inspect
import math
import subprocess
import sys
import typing

import helpers
import pytest
import scripts

import common
from common import DistillConfig, DownloadConfig, PruneConfig, StageConfig, parse_command_line
from compactmind import settings
from export_gguf import GGUFConfig
from export_onnx import ExportConfig
from profiles import PROFILES

CONFIGS = [value for value in vars(common).values() if isinstance(value, type) and issubclass(value, StageConfig)]
CONFIGS += [ExportConfig, GGUFConfig]


@pytest.fixture
def command_line(monkeypatch):
    def parse(config, *arguments: str):
        monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
        return parse_command_line(config)

    return parse


def test_the_embedded_profile_is_the_defaults():
    assert len(CONFIGS) >= 7
    for config in CONFIGS:
        assert config.for_profile("embedded") == config()


@pytest.mark.parametrize("profile", PROFILES)
def test_every_config_builds_in_every_profile(profile):
    for config in CONFIGS:
        built = config.for_profile(profile)
        assert built.profile == profile
        for name, value in PROFILES[profile].get(config.__name__, {}).items():
            assert getattr(built, name) == value


def test_profiles_name_configs_that_exist():
    assert {name for profile in PROFILES.values() for name in profile} <= {config.__name__ for config in CONFIGS}


def test_the_paper_profile_is_the_published_recipe():
    config = PruneConfig.for_profile("paper")
    assert (config.prune_start_epoch, config.prune_end_epoch, config.prune_every, config.epochs) == (2, 8, 20, 15)
    assert (config.batch_size, config.lr, config.recovery_lr, config.target_sparsity) == (32, 5e-5, 1e-5, 0.2)
    assert (config.patience, config.min_delta) == (5, 0.001)
    distill = DistillConfig.for_profile("paper")
    assert (distill.temperature_start, distill.temperature_end, distill.alpha_start, distill.alpha_end) == (10, 2, 0.9, 0.2)
    assert DownloadConfig.for_profile("paper").teacher_name.endswith("bert-base-uncased")


def test_every_field_says_what_it_is_for():
    for config in CONFIGS:
        source = inspect.getsource(config).splitlines()
        for name in config.__annotations__:
            line = next(number for number, text in enumerate(source) if text.startswith(f"    {name}: "))
            assert source[line + 1].strip().startswith('"""'), name


def test_an_unknown_profile_names_the_known_ones():
    with pytest.raises(SystemExit) as caught:
        DistillConfig.for_profile("huge")
    assert "'huge'" in caught.value.code and all(profile in caught.value.code for profile in PROFILES)


@pytest.mark.parametrize("arguments", [["--profile", "huge"], ["--profile=huge"]])
def test_an_unknown_profile_on_the_command_line_names_the_known_ones(command_line, arguments):
    with pytest.raises(SystemExit) as caught:
        command_line(DistillConfig(), *arguments)
    assert "'huge'" in caught.value.code and all(profile in caught.value.code for profile in PROFILES)


def test_the_command_line_beats_edits_and_edits_beat_the_profile(command_line):
    config = PruneConfig.for_profile("embedded", epochs=9, round_to=8)
    assert config.epochs == 9 != PruneConfig().epochs
    parsed = command_line(config, "--epochs", "7")
    assert (parsed.epochs, parsed.round_to, parsed.target_sparsity) == (7, 8, PruneConfig().target_sparsity)
    assert command_line(config) == config


@pytest.mark.parametrize("arguments", [["--profile", "paper"], ["--profile=paper"]])
def test_another_profile_keeps_the_edits(command_line, arguments):
    parsed = command_line(PruneConfig.for_profile("embedded", round_to=8, seed=7), *arguments, "--lr", "1e-3")
    assert (parsed.profile, parsed.round_to, parsed.seed, parsed.lr) == ("paper", 8, 7, 1e-3)
    assert (parsed.epochs, parsed.target_sparsity) == (15, 0.2)


def test_values_get_the_type_of_their_field(command_line):
    parsed = command_line(DistillConfig(), "--models_dir", "elsewhere", "--force", "True", "--student_epochs", "2")
    assert parsed.models_dir.name == "elsewhere" and parsed.force is True and parsed.student_epochs == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        parsed.seed = 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--student_epoks", "2"], "student_epoks"),
        (["--student_epochs", "two"], "two"),
        (["--force", "perhaps"], "perhaps"),
        (["2"], "2"),
    ],
)
def test_a_wrong_argument_ends_with_its_name_and_a_status(command_line, capsys, arguments, expected):
    with pytest.raises(SystemExit) as caught:
        command_line(DistillConfig(), *arguments)
    assert caught.value.code == 2
    assert expected in "".join(capsys.readouterr())


def test_a_wrong_choice_names_the_choices(command_line, capsys):
    with pytest.raises(SystemExit) as caught:
        command_line(PruneConfig(), "--criterion", "magic")
    output = "".join(capsys.readouterr())
    assert caught.value.code == 2
    assert all(word in output for word in ("magic", "taylor", "l2", "random"))


def test_relevant_returns_plain_values():
    assert PruneConfig(epochs=3).relevant("epochs", "criterion") == {"epochs": 3, "criterion": "taylor"}


def run_python(code: str, tmp_path, **variables) -> subprocess.CompletedProcess:
    environment = scripts.environment(tmp_path) | {"PYTHONPATH": str(helpers.REPOSITORY)} | variables
    return subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)


def test_importing_common_needs_the_standard_library_alone(tmp_path):
    code = "import sys; before = set(sys.modules); import common; print(*sorted(set(sys.modules) - before))"
    result = run_python(code, tmp_path)
    assert result.returncode == 0, result.stderr
    loaded = {name.partition(".")[0] for name in result.stdout.split()}
    assert "common" in loaded
    assert loaded - {"common", "compactmind", "profiles"} <= sys.stdlib_module_names


def test_the_profile_can_come_from_the_environment(tmp_path):
    code = "import common; print(common.DownloadConfig.for_profile().teacher_name)"
    assert run_python(code, tmp_path, COMPACTMIND_PROFILE="smoke").stdout.strip() == "tiny-bert"
    wrong = run_python(code, tmp_path, COMPACTMIND_PROFILE="huge")
    assert wrong.returncode == 1
    assert "unknown profile 'huge'" in wrong.stderr and "Traceback" not in wrong.stderr


# ----------------------------------------------------------------------------------------------------------------- ranges
def number_fields() -> list[tuple[type, dataclasses.Field]]:
    """Return every field of every config that is a number or holds numbers."""
    result = []
    for config in CONFIGS:
        for field in dataclasses.fields(config):
            values = field.default if isinstance(field.default, tuple) else (field.default,)
            words, types = settings.allowed_values(typing.get_type_hints(config)[field.name])
            if set(types) & {int, float} or any(type(value) in (int, float) for value in values):
                result.append((config, field))
    return result


def outside(interval: str) -> list[float]:
    """Return numbers just outside an interval, and what is no number at all."""
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    result = [low - 1 if interval[0] == "[" else low, math.nan, math.inf]
    return result + ([] if high == math.inf else [high + 1 if interval[-1] == "]" else high])


def test_every_number_of_every_config_has_a_range_and_is_held_to_it():
    assert len(number_fields()) > 90
    for config, field in number_fields():
        interval = settings.RANGES.get(f"{config.__name__}.{field.name}", settings.RANGES.get(field.name))
        assert interval, f"{config.__name__}.{field.name} may be any number"
        whole = float not in settings.allowed_values(typing.get_type_hints(config)[field.name])[1]
        for value in [int(x) for x in outside(interval) if math.isfinite(x)] if whole else outside(interval):
            wrong = (value,) if isinstance(field.default, tuple) else value
            problem = settings.setting_problem(config(**{field.name: wrong}))
            assert problem and interval in problem and f"--{field.name} " in problem, (field.name, value)


def test_no_range_is_left_over():
    names = {name for config, field in number_fields() for name in (field.name, f"{config.__name__}.{field.name}")}
    assert set(settings.RANGES) <= names


@pytest.mark.parametrize("profile", PROFILES)
def test_the_settings_of_every_profile_are_in_range(profile):
    for config in CONFIGS:
        assert settings.setting_problem(config.for_profile(profile)) is None


def test_words_and_names_are_checked_where_constants_are_edited_too():
    for config in CONFIGS:
        for field in dataclasses.fields(config):
            words, types = settings.allowed_values(typing.get_type_hints(config)[field.name])
            many = isinstance(field.default, tuple)
            if words:
                problem = settings.setting_problem(config(**{field.name: ("magic",) if many else "magic"}))
                assert problem and all(word in problem for word in ("magic", *words)), field.name
            if {field.name, f"{config.__name__}.{field.name}"} & set(settings.NAMES):
                for name in ("", "..", ".", "a/b", "/tmp/x", "a b"):
                    problem = settings.setting_problem(config(**{field.name: (name,) if many else name}))
                    assert problem and field.name in problem and "plain name" in problem, (field.name, name)
            if {field.name, f"{config.__name__}.{field.name}"} & set(settings.NOT_EMPTY) and many:
                assert settings.setting_problem(config(**{field.name: ()})) == (
                    f"{field.name} is empty: for example --{field.name} {' '.join(map(str, field.default))}"
                )
    assert "is no int" in settings.setting_problem(PruneConfig(epochs="three"))
    assert "is no int" in settings.setting_problem(PruneConfig(epochs=2.5))


@pytest.mark.parametrize("script", ["download_model.py", "1_distill.py", "2_prune_finetune.py", "3_quantize.py", "4_smoothquant_llama.py",
                                    "5_bayesian_search.py", "6_evaluate_report.py", "export_onnx.py", "run_pipeline.py"])  # fmt: skip
def test_every_script_refuses_a_setting_before_it_reads_or_writes_anything(script, tmp_path, run_here):
    status, output = run_here(script, "--seed", -1, cwd=tmp_path)
    assert status == 1 and "error: seed -1 is not in [0, 4294967295]: for example --seed 42" in output
    assert list(tmp_path.iterdir()) == []
