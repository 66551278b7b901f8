"""Whether a newcomer can do what the README and docs/ say: every command, every piece of code, every link.

Run:   python benchmarks/check_readme.py                       (reads: seconds)
       python benchmarks/check_readme.py --run True            (and runs what it can, on the smoke profile: 5 minutes)
       python benchmarks/check_readme.py --run True --pages README.md docs/take_away.md
Reads: README.md, docs/*.md, benchmarks/peers/README.md
Prints: what is wrong, by page; with --run a line per command: what became of it, seconds

Commands are those of blocks of bash and PowerShell and those in the text that begin with `python`. A script has to be there, its options
have to be fields of its dataclass or arguments of its parser with values in range, pipelines legal, requirements and extras known. Code
has to compile, and what it imports from this project has to be there. Files of settings have to be read. Links have to lead somewhere,
blocks of commands to say their language, tables to be whole.
"""

import ast
import importlib
import json
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from readme_commands import CONFIGS, PIPELINE, blocks, call_of, commands, simple_commands  # noqa: E402
from readme_runs import run_pages  # noqa: E402

from common import StageConfig, parse_command_line, run_stage  # noqa: E402
from compactmind.errors import CompactMindError  # noqa: E402
from compactmind.settings import setting_problem  # noqa: E402
from compactmind.settings_file import read_settings  # noqa: E402
from profiles import PROFILES  # noqa: E402

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "peers" / "README.md")
EXAMPLE_METHODS = ("magnitude",)
"""Methods that a page makes itself."""


@dataclass(frozen=True)
class CheckConfig(StageConfig):
    run: bool = False
    """Also run what can be run, in a workspace of the smoke profile."""
    pages: tuple[str, ...] = ()
    """Pages to look at; empty: all."""


CONFIG = CheckConfig()


# --------------------------------------------------------------------------------------------------------------- checking
def problems_of_call(words: list[str]) -> list[str]:
    """Return what is wrong with one call of a program."""
    try:
        call = call_of(words)
    except (ValueError, IndexError) as error:
        return [str(error)]
    if call is None:
        return problems_of_pip(words) if "pip" in words[:3] else []
    script, given = call
    if not (ROOT / script).is_file():
        return [f"there is no {script}"]
    if script in ("run.sh", "test.sh"):
        return problems_of_settings("run_pipeline.py", given) if script == "run.sh" else []
    if script in CONFIGS:
        return problems_of_settings(script, given)
    sources = (ROOT / script).read_text(encoding="utf-8")
    for imported in re.findall(r"^from (\w+) import", sources, flags=re.MULTILINE):
        beside = (ROOT / script).with_name(f"{imported}.py")
        sources += beside.read_text(encoding="utf-8") if beside.is_file() and beside.parent != ROOT else ""
    if f"from compactmind.{Path(script).stem} import main" in sources:
        sources += (ROOT / "compactmind" / script).read_text(encoding="utf-8")
    shared = {field.name for field in fields(StageConfig)} if "parse_command_line" in sources else set()
    names = [word.removeprefix("--").partition("=")[0] for word in given if re.match(r"--[a-zA-Z]", word)]
    return [f"{script} has no option --{name}" for name in names if name not in shared and not re.search(rf"\b{name}\b", sources)]


def problems_of_settings(script: str, given: list[str]) -> list[str]:
    """Return what is wrong with the options of a script whose settings are a dataclass."""
    config = CONFIGS[script]
    known, name, values = {field.name: field for field in fields(config)}, None, {}
    for word in given:
        if word.startswith("--"):
            name, equals, value = word.removeprefix("--").partition("=")
            values[name] = [value] if equals else []
        elif name is None:
            return [f"{script} takes no {word!r}"]
        else:
            values[name].append(word)
    if unknown := [name for name in values if name not in known and name != "help"]:
        return [f"{script} has no option --{name}" for name in unknown]
    edits = {name: _typed(config, known[name], words) for name, words in values.items() if name not in ("help", "profile")}
    profile = (values.get("profile") or ["embedded"])[0]
    if profile not in PROFILES:
        return [f"unknown profile {profile!r}"]
    problems = [problem] if (problem := setting_problem(config.for_profile(profile, **edits))) else []
    return problems + [problem for name in ("pipeline",) if name in edits for problem in problems_of_pipeline(edits[name])]


def _typed(config: type[StageConfig], field, words: list[str]) -> object:
    """Return the words behind an option as the field has them; what is no number stays a word, which `setting_problem` refuses."""

    def plain(word: str) -> object:
        for kind in (int, float):
            try:
                return kind(word)
            except ValueError:
                continue
        return {"True": True, "False": False}.get(word, word)

    if isinstance(field.default, tuple):
        texts = all(isinstance(each, str) for each in field.default) and field.default != ()
        return tuple(words if texts or field.type in ("tuple[str, ...]", tuple[str, ...]) else map(plain, words))
    if isinstance(field.default, Path):
        return Path(words[0])
    return words[0] if type(field.default) is str and not isinstance(plain(words[0]), float) else plain(words[0])


def problems_of_pipeline(text: str) -> list[str]:
    from compactmind.search.compressor import read_pipeline

    try:
        steps = json.loads(text)
        read_pipeline([step for step in steps if step["method"] not in EXAMPLE_METHODS] if len(steps) > 1 else steps)
    except CompactMindError as error:
        if not any(name in text for name in EXAMPLE_METHODS):
            return [str(error)]
    except (ValueError, KeyError, TypeError) as error:
        return [f"the pipeline is none: {error}"]
    return []


def problems_of_pip(words: list[str]) -> list[str]:
    problems = []
    for before, word in zip(words, words[1:], strict=False):
        if before == "-r" and not (ROOT / word).is_file():
            problems.append(f"there is no {word}")
        if extra := re.fullmatch(r"(?:\.|compactmind)\[(.*)\]", word):
            known = re.findall(r'^    "(\w+)": ', (ROOT / "setup.py").read_text(encoding="utf-8"), flags=re.MULTILINE)
            problems += [f"there is no extra {name}" for name in extra.group(1).split(",") if name.strip() not in known]
    return problems


def problems_of_code(content: str) -> list[str]:
    """Return what is wrong with a piece of Python: it does not compile, or imports from this project what is not there."""
    try:
        tree = ast.parse(content)
    except SyntaxError as error:
        return [f"line {error.lineno} of the code: {error.msg}"]
    problems = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "compactmind":
            try:
                module = importlib.import_module(node.module)
            except ImportError as error:
                problems.append(str(error))
                continue
            problems += [f"{node.module} has no {alias.name}" for alias in node.names if not hasattr(module, alias.name)]
    return problems


def anchors(text: str) -> set[str]:
    """Return what links can point to in a page, as GitHub names its headings."""
    plain = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", plain, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def problems_of_links(page: Path, text: str) -> list[str]:
    problems = []
    plain = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", plain):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists():
            problems.append(f"a link leads to {target}, which is not there")
        elif anchor and file.suffix == ".md" and anchor not in anchors(file.read_text(encoding="utf-8")):
            problems.append(f"a link leads to {target}: {file.name} has no such heading")
    return problems


def problems_of_layout(text: str) -> list[str]:
    """Return commands in a block that says no language, where nothing reads them, and tables that a blank line has cut."""
    problems = [
        f"a block of commands says no language: {content.splitlines()[0]}"
        for language, content in blocks(text)
        if not language and re.match(r"(python|pip|\./\w+\.sh) ", content)
    ]
    plain = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL).splitlines()
    for before, line, after in zip(["", *plain], plain, [*plain[1:], ""], strict=False):
        if line.startswith("|") and not before.startswith("|") and not re.fullmatch(r"\|[ :|-]+\|", after):
            problems.append(f"a row of a table stands alone: {line[:60]}")
    return problems


def problems_of_page(page: Path, text: str | None = None) -> list[str]:
    """Return everything that is wrong with a page."""
    text = page.read_text(encoding="utf-8") if text is None else text
    problems = problems_of_links(page, text) + problems_of_layout(text)
    for command in commands(text):
        try:
            called = [problem for words in simple_commands(command) for problem in problems_of_call(words)]
            problems += [f"{command.splitlines()[0]}: {problem}" for problem in called]
        except ValueError as error:
            problems.append(f"{command.splitlines()[0]}: {error}")
    for language, content in blocks(text):
        if language == "python":
            problems += problems_of_code(content)
        elif language == "yaml":
            with TemporaryDirectory() as folder:
                file = Path(folder) / "settings.yaml"
                file.write_text(content, encoding="utf-8")
                try:
                    read_settings(file, PIPELINE["SECTIONS"], {"profile": PIPELINE["OWN"]})
                except CompactMindError as error:
                    problems.append(str(error).replace(f"{folder}/", ""))
    return problems


def main(config: CheckConfig) -> None:
    pages = [ROOT / name for name in config.pages] or list(PAGES)
    problems = {page: problems_of_page(page) for page in pages}
    for page, of_page in problems.items():
        for problem in of_page:
            print(f"{page.relative_to(ROOT)}: {problem}")
    count = sum(len(list(commands(page.read_text(encoding="utf-8")))) for page in pages)
    print(f"{len(pages)} pages, {count} commands read: {sum(map(len, problems.values())) or 'nothing'} wrong")
    well = run_pages(pages) if config.run else True
    if any(problems.values()) or not well:
        raise SystemExit(1)


if __name__ == "__main__":
    run_stage(main, parse_command_line(CONFIG))
