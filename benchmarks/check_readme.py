"""Whether a newcomer can do what the README and docs/ say: every command, every piece of code, every link.

Run:   python benchmarks/check_readme.py                       (reads: seconds)
       python benchmarks/check_readme.py --run True            (and runs what it can, on the smoke profile)
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
import runpy
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from common import StageConfig, parse_command_line, run_stage  # noqa: E402
from compactmind.errors import CompactMindError  # noqa: E402
from compactmind.settings import setting_problem  # noqa: E402
from compactmind.settings_file import read_settings  # noqa: E402
from export_gguf import GGUFConfig  # noqa: E402
from export_onnx import ExportConfig  # noqa: E402
from profiles import PROFILES  # noqa: E402

PIPELINE = runpy.run_path(str(ROOT / "run_pipeline.py"))
CONFIGS: dict[str, type[StageConfig]] = {
    **PIPELINE["CONFIGS"],
    "run_pipeline.py": PIPELINE["PipelineConfig"],
    "export_onnx.py": ExportConfig,
    "export_gguf.py": GGUFConfig,
}
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "peers" / "README.md")
OTHER_PROGRAMS = (
    "pip", "mkdir", "cp", "source", "deactivate", "cd", "git", "optuna-dashboard", "py", "cat", "ls", "curl", "apt-get", "export",

)  # fmt: skip
"""What is not of this project and is believed."""
LAUNCHERS = {"accelerate": ("--mixed_precision", "--config_file", "--num_processes", "--num_machines", "--machine_rank",
                            "--main_process_ip"), "torchrun": ("--nproc_per_node",)}  # fmt: skip
"""Program -> its options, each with a value, before the script."""
EXAMPLE_METHODS = ("magnitude",)
"""Methods that a page makes itself."""
OPERATORS = re.compile(r"[;&|]+")


@dataclass(frozen=True)
class CheckConfig(StageConfig):
    run: bool = False
    """Also run what can be run, in a workspace of the smoke profile."""
    pages: tuple[str, ...] = ()
    """Pages to look at; empty: all."""


CONFIG = CheckConfig()


# ---------------------------------------------------------------------------------------------------------------- reading
def blocks(text: str) -> Iterator[tuple[str, str]]:
    """Return language and content of every fenced block of a page."""
    for found in re.finditer(r"^```([\w.+-]*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        yield found.group(1), found.group(2)


def commands(text: str) -> Iterator[str]:
    """Return the commands of a page, each on one line: of its blocks, and those in its text that begin with python."""
    for language, content in blocks(text):
        if language in ("bash", "powershell", "sh"):
            waiting = ""
            for line in content.splitlines():
                waiting += line.removesuffix("\\") + ("" if line.endswith("\\") else "\n")
                try:
                    whole = not line.endswith("\\") and shlex.split(waiting, comments=True) is not None
                except ValueError:  # a quotation that goes on in the next line
                    continue
                if whole and waiting.strip():
                    yield waiting.strip()
                if whole:
                    waiting = ""
            if waiting.strip():
                yield waiting.strip()
    plain = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for found in re.finditer(r"`((?:\.venv/bin/)?python [^`]+)`", plain):
        command = " ".join(found.group(1).split())
        if "..." not in command and "<" not in command:
            yield command


def simple_commands(command: str) -> Iterator[list[str]]:
    """Return the words of every program call in a command: those before and behind `&&`, `|` and `;`, without redirections."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars="&|;<>")
    lexer.whitespace_split, lexer.commenters = True, "#"
    words: list[str] = []
    for word in [*lexer, ";"]:
        if OPERATORS.fullmatch(word):
            if words:
                yield words
            words = []
        else:
            words.append(word)


def call_of(words: list[str]) -> tuple[str, list[str]] | None:
    """Return the script of this project that a call runs and what it is given; None for another program. Raises ValueError."""
    words = list(words)
    for sign in ("<", ">"):
        while sign in words:
            del words[words.index(sign) : words.index(sign) + 2]
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    if not words:
        return None
    program, *rest = words
    if program in ("./run.sh", "./test.sh"):
        return program.removeprefix("./"), rest
    if program in LAUNCHERS:
        rest = rest[1:] if program == "accelerate" else rest
        while rest and rest[0].startswith("--"):
            if rest[0] not in LAUNCHERS[program]:
                raise ValueError(f"{program} has no option {rest[0]} that is known here")
            rest = rest[2:]
        return rest[0], rest[1:]
    if program in ("python", "python3", ".venv/bin/python"):
        if not rest:
            return None
        if rest[0] == "-m":
            if rest[1].startswith("compactmind"):
                return "/".join(rest[1].split(".")) + ".py", rest[2:]
            return None
        return (rest[0], rest[1:]) if rest[0].endswith(".py") else None
    if program.startswith((".venv", ".peers/")) or program in OTHER_PROGRAMS:
        return None
    raise ValueError(f"unknown program {program!r}")


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
    found = [problem] if (problem := setting_problem(config.for_profile(profile, **edits))) else []
    return found + [problem for name in ("pipeline",) if name in edits for problem in problems_of_pipeline(edits[name])]


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
    found = []
    for before, word in zip(words, words[1:], strict=False):
        if before == "-r" and not (ROOT / word).is_file():
            found.append(f"there is no {word}")
        if extra := re.fullmatch(r"(?:\.|compactmind)\[(.*)\]", word):
            known = re.findall(r'^    "(\w+)": ', (ROOT / "setup.py").read_text(encoding="utf-8"), flags=re.MULTILINE)
            found += [f"there is no extra {name}" for name in extra.group(1).split(",") if name.strip() not in known]
    return found


def problems_of_code(content: str) -> list[str]:
    """Return what is wrong with a piece of Python: it does not compile, or imports from this project what is not there."""
    try:
        tree = ast.parse(content)
    except SyntaxError as error:
        return [f"line {error.lineno} of the code: {error.msg}"]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "compactmind":
            try:
                module = importlib.import_module(node.module)
            except ImportError as error:
                found.append(str(error))
                continue
            found += [f"{node.module} has no {alias.name}" for alias in node.names if not hasattr(module, alias.name)]
    return found


def anchors(text: str) -> set[str]:
    """Return what links can point to in a page, as GitHub names its headings."""
    plain = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", plain, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def problems_of_links(page: Path, text: str) -> list[str]:
    found = []
    plain = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", plain):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists():
            found.append(f"a link leads to {target}, which is not there")
        elif anchor and file.suffix == ".md" and anchor not in anchors(file.read_text(encoding="utf-8")):
            found.append(f"a link leads to {target}: {file.name} has no such heading")
    return found


def problems_of_layout(text: str) -> list[str]:
    """Return commands in a block that says no language, where nothing reads them, and tables that a blank line has cut."""
    found = [
        f"a block of commands says no language: {content.splitlines()[0]}"
        for language, content in blocks(text)
        if not language and re.match(r"(python|pip|\./\w+\.sh) ", content)
    ]
    plain = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL).splitlines()
    for before, line, after in zip(["", *plain], plain, [*plain[1:], ""], strict=False):
        if line.startswith("|") and not before.startswith("|") and not re.fullmatch(r"\|[ :|-]+\|", after):
            found.append(f"a row of a table stands alone: {line[:60]}")
    return found


def problems_of_page(page: Path, text: str | None = None) -> list[str]:
    """Return everything that is wrong with a page."""
    text = page.read_text(encoding="utf-8") if text is None else text
    found = problems_of_links(page, text) + problems_of_layout(text)
    for command in commands(text):
        try:
            found += [f"{command.splitlines()[0]}: {problem}" for words in simple_commands(command) for problem in problems_of_call(words)]
        except ValueError as error:
            found.append(f"{command.splitlines()[0]}: {error}")
    for language, content in blocks(text):
        if language == "python":
            found += problems_of_code(content)
        elif language == "yaml":
            with TemporaryDirectory() as folder:
                file = Path(folder) / "settings.yaml"
                file.write_text(content, encoding="utf-8")
                try:
                    read_settings(file, PIPELINE["SECTIONS"], {"profile": PIPELINE["OWN"]})
                except CompactMindError as error:
                    found.append(str(error).replace(f"{folder}/", ""))
    return found


# ---------------------------------------------------------------------------------------------------------------- running
SMALLER = {
    "n_trials": ["2"], "eval_windows": ["2"], "calibration_windows": ["4"], "target_compression": ["1.2"], "save_front": ["1.1", "1.2"],
    "gsm8k_problems": ["0"], "seq_len": ["32"], "student_layers": ["2"], "latency_repeats": ["1"],
}  # fmt: skip
"""Options whose values are for a real model -> what the tiny one gets."""
PLACES = {"/path/to/model": "models/llama", "/path/to/a/llama": "models/llama", "/path/to/folder": "models/student_distilled"}
NOT_HERE = ("--storage", "--workers", "--replay", "--profile", "--gsm8k_problems", "--zero_shot", "--track", "magnitude", "hub", "gguf")
"""A command with one of these wants a database, a hub, another profile, a package, what is not there yet, or real weights: it is only
read."""
OF_PAIRS = ("--pair ", "pairs.tsv")
"""A command with one of these wants a model of pairs: it is run when the page has made one."""
PAIR_MODEL = "own_data/pairs_models/student_distilled"
CODE_PAGES = ("README.md", "python.md", "checkpoints.md")
"""Pages whose code a newcomer can run as it stands."""


def runnable(command: str) -> list[str] | None:
    """Return what is run in place of a command of the documentation; None where it is only read."""
    words = next(simple_commands(command))
    call = None if any(word in command for word in NOT_HERE) else call_of(words)
    if call is None or not (call[0] in CONFIGS or Path(call[0]).stem in ("classify", "generate")) or words[0] in LAUNCHERS:
        return None
    script, given = call
    found, name = [], None
    for word in given:
        if word == "--chat":  # the tiny tokenizer has no template for it
            continue
        if word.startswith("--"):
            name = word.removeprefix("--")
            found += [word, *SMALLER.get(name, [])]
        elif name not in SMALLER:
            word = next((word.replace(long, short) for long, short in PLACES.items() if long in word), word)
            word = re.sub(r'"target_compression": [\d.]+', '"target_compression": 1.2', word)
            found.append(re.sub(r'"tokens": \d+', '"tokens": 256', word))
    if any(sign in command for sign in OF_PAIRS):
        found = [PAIR_MODEL if word == "models/student_distilled" else word for word in found]
    profile = ["--profile", "smoke"] if script in CONFIGS else []
    if script.startswith("compactmind/"):
        return [sys.executable, "-m", f"compactmind.{Path(script).stem}", *found]
    return [sys.executable, str(ROOT / script), *profile, *found]


def input_of(command: str) -> str:
    """Return the file that a command reads from its standard input."""
    found = re.search(r"<\s*(\w+\.\w+)", command)
    return found.group(1) if found else "reviews.txt"


def code_of(text: str) -> str:
    """Return the Python of a page as one program, with a model and a size that are there."""
    content = "\n".join(content for language, content in blocks(text) if language == "python")
    for long, short in PLACES.items():
        content = content.replace(long, short)
    content = re.sub(r"target_compression=[\d.]+", "target_compression=1.2, seq_len=32, eval_windows=2", content)
    return 'sentences = ["a lovely film", "a dull film"]\n' + content


def fill(folder: Path) -> Path:
    """Make what a newcomer has before the first command: tiny models and text of every kind that the pages name."""
    import helpers

    from compactmind.checkpoint import silence_libraries

    silence_libraries()
    workspace = helpers.make_workspace(folder / "workspace", train_rows=300, dev_rows=50)
    helpers.add_llama(workspace, hidden_size=64, intermediate_size=128, scale=0.1)
    roberta = workspace / "local_assets" / "roberta-base"
    helpers.make_encoder("roberta", max_position_embeddings=66, vocab_size=400).save_pretrained(roberta)
    helpers.make_byte_bpe(roberta).save_pretrained(roberta)
    rows = [(each.text, ("dull", "lovely")[each.label]) for each in helpers.make_sentences(360, seed=11)]
    texts = {
        "reviews.txt": "a lovely film\n", "pairs.tsv": "a lovely film\ta dull film\n", "my_text.txt": "\n".join(text for text, _ in rows),
        "my.yaml": "2_prune_finetune:\n  target_sparsity: 0.3\n",
    }  # fmt: skip
    parts = {"train": rows[:280], "validation": rows[280:320], "test": rows[320:]}
    for split, part in parts.items():
        columns = {"topic": "text,topic", "pairs": "headline,sentence,match"}
        for task, head in columns.items():
            lines = [",".join([text, *([text[::-1]] if task == "pairs" else []), label]) for text, label in part]
            texts[f"own_data/{task}_{split}.csv"] = "\n".join([head, *lines]) + "\n"
        mine = "\n".join(["text,review,label,topic", *(f"{text},{text},{label},{label}" for text, label in part)]) + "\n"
        texts |= {"train": {"my.csv": mine}, "test": {"my_test.csv": mine}}.get(split, {})
    for name, text in texts.items():
        (workspace / name).parent.mkdir(parents=True, exist_ok=True)
        (workspace / name).write_text(text, encoding="utf-8")
    return workspace


def run_pages(pages: list[Path]) -> bool:
    """Run what can be run, each page in a copy of a workspace that run_pipeline.py has filled; tell whether all went well.

    What an earlier page has run in just these words is not run again.
    """
    import scripts

    with TemporaryDirectory() as folder:
        fill(Path(folder))
        filled, seen = Path(folder) / "workspace", set()
        with closing(scripts.Launcher(Path(folder))) as launcher:
            well = _run(launcher, [sys.executable, str(ROOT / "run_pipeline.py"), "--profile", "smoke"], filled, "run_pipeline.py")
            for page in pages:
                text = page.read_text(encoding="utf-8")
                found = [(command, words) for command in commands(text) if (words := runnable(command)) and tuple(words) not in seen]
                found.sort(key=lambda each: any(sign in each[0] for sign in OF_PAIRS))
                workspace = shutil.copytree(filled, Path(folder) / page.stem)
                if "--dump_config my.yaml" in text:
                    (workspace / "my.yaml").unlink()
                for command, words in found:
                    if tuple(words) not in seen:
                        seen.add(tuple(words))
                        well &= _run(launcher, words, workspace, f"{page.name}: {command.splitlines()[0]}", input_of(command))
                if page.name in CODE_PAGES:
                    (workspace / "page.py").write_text(code_of(text), encoding="utf-8")
                    well &= _run(launcher, [sys.executable, "page.py"], workspace, f"{page.name}: its code")
                shutil.rmtree(workspace)
    return well


def _run(launcher, words: list[str], folder: Path, name: str, told: str = "reviews.txt") -> bool:
    started, output = time.perf_counter(), folder / "said.txt"
    code = launcher.run(words, folder, folder / told, output)
    print(f"{'FAILED' if code else 'ran':<7}{time.perf_counter() - started:6.0f} s  {name[:110]}", flush=True)
    if code:
        print("        " + (output.read_text(encoding="utf-8").strip().splitlines() or ["without a word"])[-1], flush=True)
    return not code


def main(config: CheckConfig) -> None:
    pages = [ROOT / name for name in config.pages] or list(PAGES)
    found = {page: problems_of_page(page) for page in pages}
    for page, problems in found.items():
        for problem in problems:
            print(f"{page.relative_to(ROOT)}: {problem}")
    count = sum(len(list(commands(page.read_text(encoding="utf-8")))) for page in pages)
    print(f"{len(pages)} pages, {count} commands read: {sum(map(len, found.values())) or 'nothing'} wrong")
    well = run_pages(pages) if config.run else True
    if any(found.values()) or not well:
        raise SystemExit(1)


if __name__ == "__main__":
    run_stage(main, parse_command_line(CONFIG))
