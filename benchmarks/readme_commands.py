"""What README and docs/ tell a newcomer to type: the blocks and commands of a page, and which script of this project each one runs.

A part of check_readme.py, which says where this project is imported from.
"""

import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path

from common import StageConfig
from export_gguf import GGUFConfig
from export_onnx import ExportConfig

ROOT = Path(__file__).resolve().parents[1]
PIPELINE = runpy.run_path(str(ROOT / "run_pipeline.py"))
CONFIGS: dict[str, type[StageConfig]] = {
    **PIPELINE["CONFIGS"],
    "run_pipeline.py": PIPELINE["PipelineConfig"],
    "export_onnx.py": ExportConfig,
    "export_gguf.py": GGUFConfig,
}
OTHER_PROGRAMS = (
    "pip", "mkdir", "cp", "source", "deactivate", "cd", "git", "optuna-dashboard", "py", "cat", "ls", "curl", "apt-get", "export",

)  # fmt: skip
"""What is not of this project and is believed."""
LAUNCHERS = {"accelerate": ("--mixed_precision", "--config_file", "--num_processes", "--num_machines", "--machine_rank",
                            "--main_process_ip"), "torchrun": ("--nproc_per_node",)}  # fmt: skip
"""Program -> its options, each with a value, before the script."""
OPERATORS = re.compile(r"[;&|]+")


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """Return language and content of every fenced block of a page."""
    for match in re.finditer(r"^```([\w.+-]*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        yield match.group(1), match.group(2)


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
    for match in re.finditer(r"`((?:\.venv/bin/)?python [^`]+)`", plain):
        command = " ".join(match.group(1).split())
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
