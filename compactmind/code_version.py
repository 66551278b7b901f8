"""Which code an output was made by: a hash of the program text that can have a say in it.

It belongs to what an output depends on, as settings and inputs do: after a fault is mended, what the faulty code made must not count as up
to date. Comments, docstrings and the layout of the text do not count, nor do the constants a user edits at the top of a script (CONFIG:
these are recorded as settings), nor the parts that only show what was made.
"""

import ast
import functools
import hashlib
from pathlib import Path

PACKAGE = "compactmind"
LEFT_OUT = ("compactmind.report", "compactmind.model_card", "compactmind.origin", "compactmind.errors", "compactmind.classifier_room")
"""Modules, with all below them, that have no say in what a model's file holds."""
NOT_FOLLOWED = (
    "compactmind.checkpoint", "compactmind.manifest", "compactmind.guards", "compactmind.files", "compactmind.evaluation.cost",
)  # fmt: skip
"""Modules that count, but not what they import: a checkpoint, and a model whose cost is measured, can be of every kind, most of which a
stage has nothing to do with."""
FORMATS, STORED = "compactmind.formats", "compactmind.methods.quantization"
"""Who makes a quantized model also has it written as its format is: a module of the first counts where one of the second that it stores
does, and those that store none (the table of all) wherever any counts."""


def code_version(script: str | Path) -> str:
    """Return a hash of a script and of the modules of this package it imports, directly or not: 16 hexadecimal digits."""
    digest, waiting, seen = hashlib.sha256(), [Path(script).resolve()], set()
    root = Path(__file__).resolve().parent.parent
    texts = {}

    def add(path: Path) -> tuple[str, ...]:
        text, imported = _read(path, path.stat().st_mtime_ns)
        name = path.name if path.parent == root else str(path.relative_to(root))
        texts[name.replace("\\", "/")] = text
        return imported

    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        imported = add(path)
        if _matches(_module_of(path, root), NOT_FOLLOWED):
            continue
        for module in imported:
            if not _matches(module, LEFT_OUT) and (file := _file_of(module, root)):
                waiting.append(file)
    for path in _formats(seen, root):
        add(path)
    for name in sorted(texts):
        digest.update(f"{name}\0{texts[name]}\0".encode())
    return digest.hexdigest()[:16]


def _formats(seen: set[Path], root: Path) -> list[Path]:
    """Return the files of FORMATS that count where the files `seen` do."""
    shared, storing = [], []
    for path in root.joinpath(*FORMATS.split(".")).glob("*.py"):
        _, imported = _read(path, path.stat().st_mtime_ns)
        stored = {_file_of(module, root) for module in imported if _matches(module, (STORED,))} - {None}
        if not stored:
            shared.append(path)
        elif stored & seen:
            storing.append(path)
    return storing and [*storing, *shared]


@functools.cache
def _read(path: Path, _modified: int) -> tuple[str, tuple[str, ...]]:
    """Return the text of a file without what does not count, and the modules of this package it imports."""
    tree, imported = ast.parse(path.read_text(encoding="utf-8")), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names if alias.name.partition(".")[0] == PACKAGE]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == PACKAGE:
            imported += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        body = getattr(node, "body", None)
        if isinstance(body, list):
            # a string that stands alone is a docstring, of a field too
            kept = [each for each in body if not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))]
            if isinstance(node, ast.Module):
                kept = [each for each in kept if not _is_config(each)]
            node.body = kept or [ast.Pass()]
    return ast.unparse(tree), tuple(imported)


def _is_config(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["CONFIG"]


def _matches(module: str, names: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in names)


def _module_of(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts) if path.is_relative_to(root) else path.stem


def _file_of(module: str, root: Path) -> Path | None:
    """Return the file of a module of this package; None for a name that is no module (a function)."""
    file = root.joinpath(*module.split(".")).with_suffix(".py")
    return file if file.is_file() else None
