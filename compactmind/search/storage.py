"""Where a study is kept: a storage that several workers may use at once, and whose hiccups cost nothing but time.

Optuna reads the state of a trial and writes the next one in one transaction. PostgreSQL and MySQL lock the row for that and a journal file
has one order of its lines; SQLite locks nothing before the first write, so two workers could both take the trial that waits. Here its
transactions take the lock when they begin: what has been read in one is still so when it writes.
"""

import re
import shlex
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import optuna
import sqlalchemy
from filelock import FileLock
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, get_storage
from optuna.storages.journal import JournalFileBackend

from compactmind.devices import is_worker
from compactmind.errors import CompactMindError, first_line
from compactmind.settings import without_password

WAITS = (0.5, 1, 2, 4, 8, 15, 30, 60, 60, 60)
"""Seconds before a call that failed is made again, for the first time, the second ...: a database that restarts is back within minutes."""
OPENING_WAITS = (0.1, 0.3, 1)
"""The same while the storage is opened by hand: somebody who gave a wrong address does not want to wait. A worker's has been opened by who
started it, and is waited for."""
PATIENT_LIBPQ = {
    "connect_timeout": 20, "keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3, "tcp_user_timeout": 60_000,
}  # fmt: skip
"""What tells PostgreSQL's own client to notice that its server is gone: else it waits for an answer for a quarter of an hour."""
LOCK_SECONDS = 60
"""So long one process waits for the lock of an SQLite file that another one has."""
HICCUPS = (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError, OSError)
"""What a storage raises that is away or busy; anything else is an answer."""


class LockOfProcess:
    """The lock of a journal file that ends with the process that has it.

    Optuna's own, a symbolic link, outlives a process that is killed: the others wait for half a minute then, and for ever if the journal is
    given by a relative path into another folder.
    """

    def __init__(self, place: str):
        self.lock = FileLock(f"{place}.mutex", poll_interval=0.005, preserve_lock_file=True)

    def acquire(self) -> bool:
        """Wait for the lock and take it."""
        self.lock.acquire()
        return True

    def release(self) -> None:
        """Give it back."""
        self.lock.release()


class PatientStorage:
    """A storage whose calls are made again, after growing waits, when it does not answer.

    Raises CompactMindError when it has not answered for about as many seconds as WAITS has in all.
    """

    def __init__(self, storage: BaseStorage, name: str):
        self.storage, self.name = storage, name

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(self.storage, attribute)
        return self._patient(value) if callable(value) else value

    def _patient(self, call: Callable) -> Callable:
        def patient(*arguments, **options):
            begun = time.monotonic()
            for wait in (*WAITS, None):
                try:
                    return call(*arguments, **options)
                except HICCUPS as error:
                    if wait is None:
                        raise CompactMindError(
                            f"the study's storage {self.name} has not answered for {time.monotonic() - begun:.0f} s "
                            f"({first_line(error.__cause__ or error)}): what it has is kept; the same command goes on once it answers again"
                        ) from error
                    time.sleep(wait)

        return patient


def open_storage(place: str) -> PatientStorage:
    """Return the storage at an Optuna URL or, if it ends in .log, in a journal file. Raises CompactMindError if it cannot be reached."""
    name = without_password(place)
    for wait in (*(WAITS if is_worker() else OPENING_WAITS), None):
        try:
            return PatientStorage(_opened(place), name)
        except Exception as error:  # noqa: BLE001  every database driver has its own way to say "not there"
            if isinstance(error, ImportError):
                raise CompactMindError(_no_driver(place, error)) from None
            if "table schema" in str(error) and isinstance(error, RuntimeError):
                raise CompactMindError(_other_optuna(name, first_line(error))) from None
            if wait is None or not isinstance(error, HICCUPS):
                raise CompactMindError(
                    f"the study's storage {name!r} cannot be opened: {first_line(error)}; for example "
                    "sqlite:///study.db, a journal file study.log, or postgresql://user:password@host/database"
                ) from None
            time.sleep(wait)  # two workers that make the tables of a new database: the second finds them a moment later


def _no_driver(place: str, error: ImportError) -> str:
    backend = sqlalchemy.engine.make_url(place).get_backend_name()
    command = "pip install -r requirements-postgres.txt" if backend == "postgresql" else f"pip install a driver of {backend}"
    return f"{without_password(place)!r} needs a driver that is not installed ({first_line(error.__cause__ or error)}): {command}"


def _other_optuna(name: str, problem: str) -> str:
    """Return what to do about a database of another version of Optuna, which is what `problem` says in the words of this one."""
    made_by = re.search(r"set up by optuna ([\w.]+)", problem)
    other, own = made_by.group(1) if made_by else "another version", optuna.__version__
    if "storage upgrade" in problem:
        command = f"optuna storage upgrade --storage {shlex.quote(name)}"
        return f"the study's storage {name!r} was made by Optuna {other} and this is {own}: `{command}` brings it up to date (keep a copy)"
    return f"the study's storage {name!r} is of a newer Optuna than this one, {own}: choose another --storage, or its version of Optuna"


def _opened(place: str) -> BaseStorage:
    if place.endswith(".log"):
        return JournalStorage(JournalFileBackend(place, LockOfProcess(place)))
    if place.startswith("postgresql"):
        return get_storage(RDBStorage(_with_driver(place), engine_kwargs={"connect_args": _patience(place)}))
    if not place.startswith("sqlite"):
        return get_storage(place)
    storage = RDBStorage(place, engine_kwargs={"connect_args": {"timeout": LOCK_SECONDS}})
    storage.engine.dispose()  # connections made before the listeners below were there
    sqlalchemy.event.listen(storage.engine, "connect", _leave_transactions_to_us)
    sqlalchemy.event.listen(storage.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    return get_storage(storage)


def _with_driver(place: str) -> str:
    """Return the address of a PostgreSQL with the driver that is installed, if it names none."""
    url = sqlalchemy.engine.make_url(place)
    if url.drivername == "postgresql" and not find_spec("psycopg") and find_spec("pg8000"):
        url = url.set(drivername="postgresql+pg8000")
    return url.render_as_string(hide_password=False)


def _patience(place: str) -> dict[str, int]:
    """Return what a driver is told beside the address, but for what that says itself."""
    url = sqlalchemy.engine.make_url(_with_driver(place))
    if url.get_driver_name() not in ("psycopg", "psycopg2"):
        return {}  # pg8000 keeps its connections alive by itself
    return {name: value for name, value in PATIENT_LIBPQ.items() if name not in url.query}


def _leave_transactions_to_us(connection, _) -> None:
    connection.isolation_level = None  # else Python's driver begins one of its own at the first write
