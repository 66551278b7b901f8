"""How 5_bayesian_search.py is run inside a test, and which models it has left."""

import pytest
import scripts

SCRIPT = "5_bayesian_search.py"


def models_in(folder) -> list[str]:
    return sorted(path.name for path in (folder / "models").iterdir() if path.name != ".locks")


@pytest.fixture
def run_here(monkeypatch, capfd, tmp_path):
    def run(*arguments, cwd=tmp_path):
        return scripts.run_script_here(SCRIPT, *arguments, cwd=cwd, monkeypatch=monkeypatch, capfd=capfd)

    return run
