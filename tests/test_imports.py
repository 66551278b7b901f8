"""Imports point one way: what is above knows what is below, never the other way round; inside functions too."""

import ast

import helpers
import pytest

GGUF = ("gguf_export", "gguf_blocks", "gguf_source", "gguf_tokenizer")
ABOVE = (
    ("methods",),
    ("formats",),
    ("manifest", "guards", "trained_on", "model_card", "checkpoint", "onnx_export", "generation", *GGUF),
    ("evaluation", "loop", "sources", "classifier_room"),
    ("search", "report", "plan", "console", "command_line", "classify", "generate", "__init__"),  # __init__: what the package itself offers
)
"""Packages and files of compactmind/ in layers; one that is not named is below all of them. A layer may import itself and those below."""
SCRIPTS = {path.stem for path in helpers.REPOSITORY.glob("*.py")}


def layer_of(module: str) -> int:
    """Return the number of a module's layer, 0 for those below all."""
    part = (module.split(".") + [""])[1]
    return next((number for number, names in enumerate(ABOVE, start=1) if part in names), 0)


def imports_of(text: str) -> set[str]:
    """Return the modules a program text imports anywhere, and what may be modules: `a` and `a.b` for `from a import b`."""
    result = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            result |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            result |= {"." * node.level + module, *(f"{'.' * node.level}{module}.{alias.name}" for alias in node.names)}
    return result


def wrong_arrows(files: dict[str, str]) -> list[str]:
    """Return, for program texts by module, every import of a module above, of a script, and every relative one."""
    return sorted(
        f"{module} -> {imported}"
        for module, text in files.items()
        for imported in imports_of(text)
        if imported.startswith(".")
        or imported.partition(".")[0] in SCRIPTS
        or (imported.partition(".")[0] == "compactmind" and layer_of(imported) > layer_of(module))
    )


def test_imports_point_one_way():
    files = {
        ".".join(path.relative_to(helpers.REPOSITORY).with_suffix("").parts): path.read_text(encoding="utf-8")
        for path in (helpers.REPOSITORY / "compactmind").rglob("*.py")
    }
    assert {layer_of(module) for module in files} == set(range(len(ABOVE) + 1))
    assert wrong_arrows(files) == []


@pytest.mark.parametrize(
    ("module", "text", "arrow"),
    [
        ("compactmind.methods.a", "from compactmind.evaluation.accuracy import f", "compactmind.evaluation.accuracy"),
        ("compactmind.methods.a", "def f():\n    import compactmind.checkpoint", "compactmind.checkpoint"),
        ("compactmind.methods.a", "from compactmind.formats.table import FORMATS", "compactmind.formats.table"),
        ("compactmind.methods.a", "from compactmind import manifest", "compactmind.manifest"),
        ("compactmind.training", "from compactmind.methods import llama", "compactmind.methods.llama"),
        ("compactmind.formats.a", "from compactmind.manifest import MANIFEST", "compactmind.manifest"),
        ("compactmind.checkpoint", "class A:\n    from compactmind.evaluation import cost", "compactmind.evaluation.cost"),
        ("compactmind.search.a", "import common", "common"),
        ("compactmind.search.a", "from .space import Space", ".space"),
    ],
)
def test_an_arrow_that_points_back_is_found(module, text, arrow):
    assert f"{module} -> {arrow}" in wrong_arrows({module: text})
    assert wrong_arrows({"compactmind.search.a": text}) == [] or arrow in ("common", ".space")
