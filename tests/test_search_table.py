"""The table of all pipelines that benchmarks/search.py looks searches up in."""

import importlib.util
import sys
from types import SimpleNamespace

import helpers
import pytest

from compactmind.search.space import make_space


@pytest.fixture
def benchmark_script(monkeypatch):
    folder = helpers.REPOSITORY / "benchmarks"
    monkeypatch.setattr(sys, "path", [str(folder), str(helpers.REPOSITORY), *sys.path])
    spec = importlib.util.spec_from_file_location("search_benchmark", folder / "search.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "search_benchmark", module)
    spec.loader.exec_module(module)
    return module


def test_every_point_is_run_once_and_what_is_there_is_taken_over(tmp_path, benchmark_script):
    space, ran = make_space(("nf4",), choices={"nf4.embeddings": ["int8"], "nf4.compensation": [True]}), []
    runner = SimpleNamespace(
        expected_ratio=lambda _: 2.0, run=ran.append, measure=lambda _: {"kl": 0.1, "compression_ratio": 2.0}
    )  # fmt: skip
    for _ in range(2):
        points = benchmark_script.run_grid(space, runner, tmp_path / "grid.json", {})
        assert len(points) == len(ran) == space.size() == 2 and all(row["kl"] == 0.1 for row in points.values())
