"""What a run of several stages would do, said before it begins: what is up to date, what is not and why, how long it took last time."""

import datetime
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compactmind.code_version import code_version
from compactmind.errors import CompactMindError
from compactmind.files import MANIFEST, write_json_atomically

DURATIONS = "durations.json"
"""File of a results folder: name of a run -> seconds, day, profile and machine of the last time it made something."""


def why_made(directory: Path, script: Path, settings: Mapping[str, Any], data_dir: Path, models_dir: Path) -> str | None:
    """Return why a stage would make a checkpoint, None if it is there, made by this code from the same inputs with the same settings.

    Compared is what its manifest has recorded and `settings` (field -> value) name; only reading, nothing is loaded.
    """
    from compactmind.manifest import read_manifest  # here: torch, which who only notes durations need not wait for

    if not (directory / MANIFEST).is_file():
        return "not there"
    try:
        made_by = read_manifest(directory)["stage"]
    except CompactMindError as error:
        return str(error)
    different = [] if made_by.get("code") in (None, code_version(script)) else ["code"]
    wanted = json.loads(json.dumps(dict(settings), default=str))
    for name, value in made_by.get("config", {}).items():
        if name == "data":
            wanted[name] = _fingerprint(data_dir)
        if name in wanted and wanted[name] != value:
            different.append(f"config.{name}")
    for name, known in made_by.get("inputs", {}).items():
        if _identity(models_dir / name) != known:
            different.append(f"inputs.{name}")
    return f"made with another {', '.join(different)}" if different else None


def _fingerprint(data_dir: Path) -> str | None:
    from compactmind.data import data_fingerprint

    try:
        return data_fingerprint(data_dir)
    except CompactMindError:
        return None


def _identity(directory: Path) -> str | None:
    from compactmind.manifest import identity_of

    try:
        return identity_of(directory)
    except CompactMindError:
        return None


def machine() -> str:
    """Return what tells this machine from others whose folder it may share."""
    return f"{platform.node()}, {os.cpu_count()} cores"


def known_durations(results_dir: Path) -> dict[str, dict[str, Any]]:
    """Return what is recorded of earlier runs, nothing if there is no such file or it is damaged."""
    try:
        durations = json.loads((results_dir / DURATIONS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return durations if isinstance(durations, dict) else {}


def note_duration(results_dir: Path, run: str, seconds: float, profile: str) -> None:
    """Record how long a run took that has made something."""
    day = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    row = {"seconds": round(seconds, 1), "day": day, "profile": profile, "machine": machine()}
    write_json_atomically(results_dir / DURATIONS, known_durations(results_dir) | {run: row})


def minutes(results_dir: Path, run: str, profile: str) -> str:
    """Return how long a run will take, in words with the source: its last one with this profile; else unknown."""
    row = known_durations(results_dir).get(run, {})
    try:
        if row["profile"] != profile:
            return "minutes: unknown, it has not run with this profile"
        where = "on this machine" if row["machine"] == machine() else f"on another machine ({row['machine']})"
        return f"minutes: {row['seconds'] / 60:.1f}, as on {row['day']} {where}"
    except (KeyError, TypeError):
        return "minutes: unknown, it has not run here"


def has_written(places: Sequence[Path], since: float) -> bool:
    """Tell whether one of some checkpoints or files was written after a time (seconds since 1970)."""
    files = [place / MANIFEST if place.is_dir() else place for place in places]
    return any(file.is_file() and file.stat().st_mtime >= since for file in files)
