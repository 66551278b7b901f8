"""What a study is made for: model, text, space and objectives, noted on it and asked of every command that goes on with it.

That holds from the first trial on. A study without trials is whatever the last command made it for: memory that is short, or a model that
cannot be pruned so, is found when the study is there already, and the command that mends it asks for something else.
"""

import json
from collections.abc import Iterator
from typing import Any

import optuna

from compactmind.errors import CompactMindError
from compactmind.settings import without_password

FEW = 8
"""Of so many values all are named where two studies differ."""


def describe(study: optuna.Study, described: dict[str, Any], code: str, storage: str) -> None:
    """Note on a study what it is made for and by which version of the code, unless it has trials: these are what it is made for then.

    Another version of the code is printed. Raises CompactMindError if the trials are of something else.
    """
    described = json.loads(json.dumps(described))
    known, begun_by = (study.user_attrs.get(name) for name in ("described", "code"))
    begun = bool(study.get_trials(deepcopy=False))
    if known is None or not begun:
        study.set_user_attr("described", described)
    else:
        require_described(study, described, storage)
    if code and (begun_by is None or not begun):
        study.set_user_attr("code", code)
    elif code and begun_by != code:
        print(f"study {study.study_name} was begun by another version of the code, which may measure otherwise: ", end="")
        print("another --study_name begins anew")


def require_described(study: optuna.Study, described: dict[str, Any], storage: str) -> None:
    """Raise CompactMindError if a study is made for something else; what an earlier version did not note is not asked."""
    known, described = study.user_attrs["described"], json.loads(json.dumps(described))
    if different := sorted(key for key in known if described.get(key) != known[key]):
        details = "; ".join(text for key in different for text in differences(known.get(key), described.get(key), key))
        raise CompactMindError(
            f"the study {study.study_name!r} in {without_password(storage)} was made for something else ({details}): choose another "
            "--study_name, or delete it"
        )


def differences(there: Any, here: Any, name: str) -> Iterator[str]:
    """Yield in words where two descriptions differ, each by its path: a space may be long, and differ in one choice."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in {**there, **here}:
            if there.get(key) != here.get(key):
                yield from differences(there.get(key), here.get(key), f"{name}.{key}")
    elif isinstance(there, list) and isinstance(here, list) and max(len(there), len(here)) > FEW:
        only = [[each for each in one if each not in other][:FEW] for one, other in ((there, here), (here, there))]
        yield f"{name}: {len(there)} there, {len(here)} here; among those only there {only[0]}, only here {only[1]}"
    else:
        yield f"{name}: {str(there)[:200]} there, {str(here)[:200]} here"
