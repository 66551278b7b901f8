"""How a test runs a script: inside this process, in one or several beside it, in forks of one, until it is killed, or once for all."""

import contextlib
import io
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock
from helpers import REPOSITORY, read_json

PATIENCE = 240
"""Seconds after which several processes that have not ended are waiting for each other for ever."""


def _command(name: str, arguments: tuple) -> list[str]:
    return [sys.executable, str(REPOSITORY / name), "--profile", "smoke", *map(str, arguments)]


def environment(cwd: Path, gpu: bool = False) -> dict[str, str]:
    """Return the environment of a subprocess that sees no hub, no other profile than the one it is given, and a GPU only if `gpu`."""
    changes = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "hf_home"), "OMP_NUM_THREADS": "1"}
    changes |= {"PYTHONIOENCODING": "utf-8", "PYTHONPATH": ""}
    changes |= {} if gpu else {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_MIXED_PRECISION": "no"}
    own = ("COMPACTMIND_PROFILE", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU")
    return {key: value for key, value in os.environ.items() if key not in own} | changes


def run_script(name: str, *arguments, cwd: Path, processes: int = 1, gpu: bool = False) -> subprocess.CompletedProcess:
    """Run a script of the repository in `cwd` with the smoke profile and no hub, on a GPU only if `gpu`; wait for it to end.

    With several processes it is started as on several GPUs.
    """
    return _run(_command(name, arguments), cwd, processes, gpu)


def run_python(path: Path, *arguments, cwd: Path, processes: int = 1) -> subprocess.CompletedProcess:
    """Run any Python file as `run_script` runs a script, without a profile."""
    return _run([sys.executable, str(path), *map(str, arguments)], cwd, processes)


def _run(command: list[str], cwd: Path, processes: int, gpu: bool = False) -> subprocess.CompletedProcess:
    if processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    with subprocess.Popen(
        command, cwd=cwd, env=environment(cwd, gpu), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            output, errors = process.communicate(timeout=PATIENCE if processes > 1 else None)
        except subprocess.TimeoutExpired:
            process.terminate()  # the launcher, which ends the others
            output, errors = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


WATCHED = f"""
import json, os, runpy, sys
sys.path[:1] = [{str(REPOSITORY)!r}, {str(REPOSITORY / "tests")!r}]
import helpers
sys.argv = sys.argv[1:]
with helpers.training_batches() as seen:
    runpy.run_path(sys.argv[0], run_name="__main__")
with open(f"seen_by_{{os.environ['RANK']}}.json", "w") as file:
    json.dump(seen, file)
"""


def run_script_watched(name: str, *arguments, cwd: Path) -> tuple[subprocess.CompletedProcess, list[list[list[tuple[int, ...]]]]]:
    """Run a script by two processes and return how it ended and the `training_batches` of each process."""
    (cwd / "watched.py").write_text(WATCHED)
    command = _command(name, arguments)
    ended = _run([command[0], str(cwd / "watched.py"), *command[1:]], cwd, processes=2)
    assert ended.returncode == 0, ended.stderr
    return ended, batches_seen(cwd)


def batches_seen(folder: Path) -> list[list[list[tuple[int, ...]]]]:
    """Return the `training_batches` that each of two processes has written into `folder`."""
    seen = [read_json(folder / f"seen_by_{rank}.json") for rank in range(2)]
    return [[[tuple(row) for row in batch] for batch in each] for each in seen]


def assert_shared_out(together: list[list[list]], alone: list[list]) -> None:
    """In every forward pass each process had as many rows as the others, and all together those that one process had alone."""
    assert alone
    for whole, *parts in zip(alone, *together, strict=True):
        assert [len(part) for part in parts] == [len(whole) / len(parts)] * len(parts)
        assert sorted(row for part in parts for row in part) == sorted(whole)


NEXT = "----8<----"
IN_TURN = f"""
import json, runpy, sys
for command in json.loads(sys.argv[1]):
    print({NEXT!r}, end="", flush=True)
    sys.path[0], sys.argv = {str(REPOSITORY)!r}, command
    runpy.run_path(command[0], run_name="__main__")
"""


def run_scripts(*runs: tuple, cwd: Path) -> list[str]:
    """Run scripts one after the other in one process beside this one, as `run_script` does in one each, and return what each printed.

    A run is (name, *arguments). Raises AssertionError with everything that was printed if one fails.
    """
    commands = [_command(name, arguments)[1:] for name, *arguments in runs]
    result = subprocess.run(
        [sys.executable, "-c", IN_TURN, json.dumps(commands)], cwd=cwd, env=environment(cwd), stdin=subprocess.DEVNULL,
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    outputs = result.stdout.split(NEXT)[1:]
    assert len(outputs) == len(runs)
    return outputs


FORKING = f"""
import json, os, runpy, subprocess, sys, tempfile, types
sys.path[0] = {str(REPOSITORY)!r}
import accelerate, optuna, transformers
import compactmind.checkpoint, compactmind.loop, compactmind.evaluation.language, compactmind.report.documents
import compactmind.search.compressor

whole = subprocess.run

def fork(command, stdin=os.devnull, output=None, errors=None):
    sys.stdout.flush()
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code, sys.argv = 0, [str(each) for each in command[1:]]
    try:
        if output:
            os.dup2(os.open(stdin, os.O_RDONLY), 0)
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
            os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if errors else 1, 2)
        subprocess.run = run if sys.argv[0].endswith("run_pipeline.py") else whole
        if sys.argv[0] == "-m":
            del sys.argv[0]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else end.code is not None
        sys.stdout.flush()
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    os._exit(int(code))

def run(command, **options):
    if not options:
        return types.SimpleNamespace(returncode=fork(command))
    with tempfile.TemporaryDirectory() as folder:  # what it says is asked for
        names = [os.path.join(folder, name) for name in ("output", "errors")]
        code = fork(command, os.devnull, *names)
        stdout, stderr = (open(name, encoding="utf-8").read() for name in names)
    return types.SimpleNamespace(returncode=code, stdout=stdout, stderr=stderr)
"""
"""A process that has imported what takes long, and forks one for each script: `run` stands for the `subprocess.run` of run_pipeline.py."""

FORKED = f"""{FORKING}
subprocess.run, sys.argv = run, sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""run_pipeline.py, and its stages as forks of the same process."""

ONE_A_LINE = f"""{FORKING}
for line in sys.stdin:
    asked = json.loads(line)
    os.chdir(asked.pop("folder"))
    print(fork(**asked), flush=True)
"""


class Launcher:
    """Runs commands of Python one after the other, as a shell would; each a fork of one process, where there are forks."""

    def __init__(self, folder: Path):
        self.environment = {**environment(folder), "PYTHONPATH": str(REPOSITORY)}  # as if the package were installed
        self.forks = None
        if hasattr(os, "fork"):
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self.forks = subprocess.Popen([sys.executable, "-c", ONE_A_LINE], env=self.environment, **pipes)

    def run(self, command: list[str], folder: Path, stdin: Path, output: Path) -> int:
        """Run `python ...` in a folder, a file as its input, what it prints into another, and return its exit status."""
        if self.forks:
            asked = {"command": command, "folder": str(folder), "stdin": str(stdin), "output": str(output)}
            print(json.dumps(asked), file=self.forks.stdin, flush=True)
            return int(self.forks.stdout.readline())
        with open(stdin, "rb") as given, open(output, "wb") as said:
            return subprocess.run(command, cwd=folder, env=self.environment, stdin=given, stdout=said, stderr=said).returncode

    def close(self) -> None:
        """End the process that forks."""
        if self.forks:
            self.forks.communicate()


def run_pipeline(*arguments, cwd: Path) -> subprocess.CompletedProcess:
    """Run run_pipeline.py as `run_script` does; its stages are forked from a process that has imported what takes long, if it can be."""
    command = _command("run_pipeline.py", arguments)
    return _run([command[0], "-c", FORKED, *command[1:]] if hasattr(os, "fork") else command, cwd, processes=1)


def _heed_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell makes its background jobs ignore it, and children inherit that


def run_script_until(text: str, number: int, name: str, *arguments, cwd: Path) -> tuple[int, str]:
    """Start a script, send it signal `number` as soon as it prints a line with `text`, and return its exit status and its output."""
    with subprocess.Popen(
        _command(name, arguments), cwd=cwd, env=environment(cwd), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=_heed_interrupts,
    ) as process:  # fmt: skip
        lines = []
        for line in process.stdout:
            lines.append(line)
            if text in line:
                process.send_signal(number)
                break
        lines.append(process.stdout.read())
    return process.returncode, "".join(lines)


def run_script_here(name: str, *arguments, cwd: Path, monkeypatch, capfd) -> tuple[int, str]:
    """Run a script inside this process (no second import of torch) and return its exit status and its output.

    The exit status is what the shell would see; a traceback would arrive here as the exception it is.
    """
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", [str(REPOSITORY / name), "--profile", "smoke", *map(str, arguments)])
    capfd.readouterr()
    status, message = 0, ""
    try:
        runpy.run_path(str(REPOSITORY / name), run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            status, message = 1, end.code
        else:
            status = end.code or 0
    captured = capfd.readouterr()
    return status, captured.out + captured.err + message


def run_script_once(name: str, *arguments, cwd: Path) -> str:
    """Run a script inside this process, for what several tests look at, and return what it printed; a failure is what it raises."""
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stdout(io.StringIO()) as printed:
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", [str(REPOSITORY / name), "--profile", "smoke", *map(str, arguments)])
        runpy.run_path(str(REPOSITORY / name), run_name="__main__")
    return printed.getvalue()


def made_once(tmp_path_factory, name: str, make: Callable[[Path], object]) -> tuple[Path, object]:
    """Return a directory that `make` has filled and the JSON it returned, made once for all test files and processes of a run.

    Nobody changes the directory afterwards: what a test changes is a copy.
    """
    place = tmp_path_factory.getbasetemp()
    place = place.parent if "PYTEST_XDIST_WORKER" in os.environ else place  # each process of xdist has a folder in it
    folder, record = place / name, place / f"{name}.json"
    with FileLock(place / f"{name}.lock"):
        if not record.is_file():
            shutil.rmtree(folder, ignore_errors=True)  # of one that failed
            folder.mkdir()
            record.write_text(json.dumps(make(folder)), encoding="utf-8")
    return folder, read_json(record)
