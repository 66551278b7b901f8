"""Settings of several dataclasses in one YAML file: a section for each, every key checked, values of the types the dataclass says.

    pipeline:
      profile: sst2
    2_prune_finetune:
      target_sparsity: 0.5

What is not in the file keeps its default. A list or a mapping where text is wanted becomes JSON, so that a pipeline of methods can be
written as YAML.
"""

import ast
import difflib
import inspect
import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from compactmind.errors import CompactMindError
from compactmind.settings import without_password

COMMENT_WIDTH = 118


class _EveryKeyOnce(yaml.SafeLoader):
    """YAML that refuses a key that stands twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping. Raises yaml.YAMLError on a key that stands twice."""
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            names = [key.value for key, _ in node.value]
            twice = next(name for name in names if names.count(name) > 1)
            raise yaml.constructor.ConstructorError(None, None, f"{twice} stands here twice", node.start_mark)
        return mapping


def nearest(name: str, known: Iterable[str]) -> str:
    """Return what to say of an unknown name: the known one that is like it, or all."""
    known = list(known)
    like = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {like[0]}?" if like else f"choose from {', '.join(known)}"


def read_settings(path: Path, sections: Mapping[str, type], refused: Mapping[str, str] | None = None) -> dict[str, dict[str, Any]]:
    """Return section -> field -> value of a YAML file; `sections` has the dataclass of each, `refused` says where a field belongs instead.

    Raises CompactMindError naming the file and what is wrong: no YAML, an unknown section or setting and the nearest known one.
    """
    try:
        given = yaml.load(path.read_text(encoding="utf-8-sig"), _EveryKeyOnce)
    except FileNotFoundError:
        raise CompactMindError(f"{path} not found: `python run_pipeline.py --dump_config {path}` writes one") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise CompactMindError(f"{path}{where}: no YAML ({getattr(error, 'problem', None) or error})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CompactMindError(f"{path} cannot be read: {error}") from None
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise CompactMindError(f"{path} has no sections: write for example\n{next(iter(sections))}:\n  seed: 42")
    checked = {}
    for section, settings in given.items():
        if section not in sections:
            raise CompactMindError(f"{path}: unknown section {section!r}: {nearest(str(section), sections)}")
        if settings is not None and not isinstance(settings, dict):
            raise CompactMindError(f"{path}: section {section} is {settings!r}: write its settings below it, `name: value` each")
        hints = get_type_hints(sections[section])
        names = [field.name for field in fields(sections[section])]
        for name in settings or {}:
            if name in (refused or {}) and section != refused[name]:
                raise CompactMindError(f"{path}: {name} belongs to section {refused[name]}, not to {section}")
            if name not in names:
                raise CompactMindError(f"{path}: unknown setting {name!r} in section {section}: {nearest(str(name), names)}")
            if settings[name] is None:
                raise CompactMindError(f"{path}: {name} in section {section} has no value: give one, or leave the line out")
        checked[section] = {name: _of_type(value, hints[name]) for name, value in (settings or {}).items()}
    return checked


def _of_type(value: Any, hint: Any) -> Any:
    """Return a value of a YAML file as a dataclass has it; one of another type as it is: who checks settings says so."""
    if get_origin(hint) is tuple:
        of = get_args(hint)[0]
        return tuple(_of_type(each, of) for each in (value if isinstance(value, list) else [value]))
    types = get_args(hint) or (hint,)
    if Path in types and isinstance(value, str):
        return Path(value)
    if str in types and isinstance(value, (list, dict)):
        return json.dumps(value)
    if float in types and isinstance(value, str):  # 1e-4 without a point is text in YAML
        try:
            return float(value)
        except ValueError:
            return value
    return value


def settings_text(values: Mapping[str, Mapping[str, Any]], sections: Mapping[str, type], head: str) -> str:
    """Return the YAML file that `read_settings` reads as these values: a section for each, what a field is for above it, `head` on top."""
    lines = [f"# {line}".rstrip() for line in head.splitlines()]
    for section, settings in values.items():
        lines += ["", f"{section}:"]
        reasons = field_reasons(sections[section])
        for name, value in settings.items():
            reason = textwrap.wrap(reasons.get(name, ""), COMMENT_WIDTH)
            value = _plain(value)
            if isinstance(value, list):
                plain = f"{name}: {yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)}"
            else:
                plain = yaml.safe_dump({name: value}, default_flow_style=False, allow_unicode=True, width=10_000)
            lines += [f"  # {line}" for line in reason] + [f"  {line}" for line in plain.splitlines()]
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def field_reasons(config: type) -> dict[str, str]:
    """Return what stands below each field of a dataclass and of those it is made from, as far as their source is at hand."""
    reasons = {}
    for each in reversed(config.__mro__[:-1]):
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(each))).body[0].body
        except (OSError, TypeError):
            continue
        for field, below in zip(body, body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                reasons[field.target.id] = " ".join(str(below.value.value).split())
    return reasons


def changed_options(settings: Any, usual: Any, left_out: Sequence[str] = ()) -> list[str]:
    """Return what differs between two sets of settings of one dataclass as options of a command line, *** for a password: --name value."""
    options: list[str] = []
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.name not in left_out and value != getattr(usual, field.name):
            options += [f"--{field.name}", *(without_password(str(each)) for each in (value if isinstance(value, tuple) else (value,)))]
    return options
