"""Where what a study has found lies: of the first studies of models/llama under short names, of every other one under its own."""

import re
from contextlib import suppress
from pathlib import Path

from compactmind.errors import CompactMindError
from compactmind.manifest import read_manifest

FIRST_STUDY = "llama-bayesian"
"""The study whose findings lie in results/search itself."""
FIRST_FRONT = "llama-bayesian-front"
"""The study whose models are called by their size alone; that of the usual size is models/llama_searched, as that of FIRST_STUDY is."""

FILES = ("cache", "study.db", "summary.json", "trials.csv", "best_pipeline.json")
"""What lies in results/search beside the folders of studies."""


def study_name(given: str, usual: str, search: Path) -> str:
    """Return the name of a study, `given` or made of the `usual` one: directories in `search` are named for it.

    Raises CompactMindError if it is given and cannot be a directory's.
    """
    if not given:  # of a folder that may be called anything
        return re.sub(r"[^\w.-]+", "_", usual)
    if not re.fullmatch(r"\w[\w.-]*", given) or given.lower() in FILES or given.endswith(".png"):
        raise CompactMindError(
            f"study_name {given!r} cannot be the name of a directory in {search}: use letters, digits, '-', '_' and '.', for example "
            "--study_name narrow"
        )
    return given


def findings_folder(search: Path, study: str) -> Path:
    """Return the folder of a study's findings, in results/search."""
    return search if study == FIRST_STUDY else search / study


def searched_name(study: str) -> str:
    """Return the name of the model of a study that reaches the target."""
    return "llama_searched" if study in (FIRST_STUDY, FIRST_FRONT) else f"llama_searched_{study}"


def front_name(study: str, ratio: float) -> str:
    """Return the name of the model of a front that is `ratio` times smaller."""
    return f"llama_front_{ratio:g}x" + (f"_{study}" if study != FIRST_FRONT else "")


def trial_name(study: str, number: int) -> str:
    """Return the name of the model of one trial that was made again."""
    return f"llama_trial_{number}" + (f"_{study}" if study != FIRST_STUDY else "")


def findings_of(search: Path, searched: Path) -> Path:
    """Return the folder of the findings that the model `searched` is from; that of FIRST_STUDY where there is no such model."""
    study = None
    with suppress(CompactMindError):
        study = read_manifest(searched)["stage"]["config"].get("study")
    return findings_folder(search, study["name"] if study else FIRST_STUDY)
